//! What the LoRA paper (Hu et al. 2021, sections 1, 4.2 and appendix) says of a model, to stand beside ours.

use serde::Serialize;

/// The paper's figures of one model, in its units: full fine-tuning, and LoRA.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Paper {
    /// How LoRA was set.
    pub setting: &'static str,
    /// Training memory in bytes.
    pub memory: [u64; 2],
    /// Bytes of a checkpoint.
    pub checkpoint: [u64; 2],
    /// Tasks that are stored.
    pub tasks: u64,
    /// Bytes of all of them.
    pub tasks_bytes: [u64; 2],
}

const GB: u64 = 1_000_000_000;

pub(super) fn of(arch: &str) -> Option<Paper> {
    (arch == "gpt3-175b").then_some(Paper {
        setting: "r = 4, queries and values",
        memory: [1200 * GB, 350 * GB],
        checkpoint: [350 * GB, GB * 35 / 1000],
        tasks: 100,
        tasks_bytes: [35_000 * GB, 354 * GB],
    })
}
