//! The built `lora` binary, driven as a user drives it.

mod bad_input;
mod chat;
mod commands;
mod compare;
mod completions;
mod convert;
mod lab;
mod latency;
mod methods;
mod misfits;
mod plan;
mod resume;
mod tasks;
