//! train

pub mod data;
pub mod demo_data;
pub mod schedule;
