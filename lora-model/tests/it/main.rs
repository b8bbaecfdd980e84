//! Tests from outside, all in one program: it links once.

mod adapter;
mod architectures;
mod chat;
mod checkpoint;
mod combine;
mod common;
mod config;
mod convert;
mod counts;
mod foreign;
mod generate;
mod golden;
mod heads;
mod join;
mod methods;
mod peft;
mod pefts_types;
mod rows;
mod several;
mod tokenizer;
mod virtual_tokens;
