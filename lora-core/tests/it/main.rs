//! Tests from outside, all in one program: it links once.

mod adapters;
mod combine;
mod common;
mod disentangled;
mod lowrank;
mod methods;
mod ops;
mod tape;
