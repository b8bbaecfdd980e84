//! The built `lora` binary, driven as a user drives it.

mod analyze;
mod bad_input;
mod base;
mod chat;
mod commands;
mod compare;
mod completions;
mod convert;
mod extract;
mod lab;
mod latency;
mod merge;
mod methods;
mod misfits;
mod plan;
mod resume;
mod several;
mod tasks;
