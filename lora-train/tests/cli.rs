//! The built `lora` binary, driven as a user drives it.

#[path = "cli/bad_input.rs"]
mod bad_input;
#[path = "cli/commands.rs"]
mod commands;
mod common;
#[path = "cli/compare.rs"]
mod compare;
#[path = "cli/completions.rs"]
mod completions;
#[path = "cli/convert.rs"]
mod convert;
#[path = "cli/lab.rs"]
mod lab;
#[path = "cli/methods.rs"]
mod methods;
#[path = "cli/misfits.rs"]
mod misfits;
#[path = "cli/resume.rs"]
mod resume;
#[path = "cli/tasks.rs"]
mod tasks;
