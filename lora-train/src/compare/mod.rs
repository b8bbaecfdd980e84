//! The paper's comparison: methods × seeds on one base and one task, as a table.
//!
//! ```text
//! FILE.toml ──▶ Comparison of Rows ──▶ a Cell for every row and seed ──▶ Table: terminal, Markdown, CSV, JSON, SVG
//! ```
//!
//! A *row* is a method with its options, a *cell* one training run of it with one seed, judged on the test data. Where a
//! row names several learning rates, each is first tried on one seed with a share of the training data held out, and the
//! best is used for all seeds. A finished cell is a small JSON file, written whole; it is never run again, and one that
//! was made with other settings is refused rather than mixed in.
//!
//! Every cell is trained and judged by the `lora` command in a process of its own, so that its peak memory is its own and
//! its death is not the comparison's.

mod cell;
mod check;
mod config;
mod inputs;
mod plot;
mod process;
mod run;
mod source;
mod statistics;
mod table;

pub use cell::{Cell, Judged, Made, Trained};
pub use config::{Comparison, Row};
pub use inputs::Inputs;
pub use process::{DIVERGED, Program, eval_args};
pub use run::{Failure, Finished, Job, Kind, Watcher, finished, run};
pub use statistics::Spread;
pub use table::{Line, Table};
