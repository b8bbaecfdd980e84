//! The GPU report without a GPU: all of it at toy sizes on the emulated device, and what it says without any device.

use std::process::{Command, Output};

fn gpu(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gpu")).args(arguments).output().unwrap()
}

#[test]
fn without_a_device_it_says_so_and_fails_only_when_one_is_required() {
    for (require, fails) in [(&[][..], false), (&["--require"][..], true)] {
        let output = gpu(&[&["--device", "4095"], require].concat());
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(said.starts_with("skipped: no CUDA device (") && said.lines().count() == 1, "{said}");
        assert_eq!(output.status.success(), !fails);
    }
}

#[cfg(feature = "emulator")]
#[test]
fn every_row_runs_on_the_emulated_device() {
    use serde_json::Value;

    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("report.json");
    let output = gpu(&["--emulated", "--json", json.to_str().unwrap()]);
    let said = String::from_utf8(output.stdout).unwrap();
    if said.starts_with("skipped: no CUDA device") {
        print!("{said}");
        return;
    }
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let rows = report["rows"].as_array().unwrap();
    for row in rows {
        let (what, note) = (row["what"].as_str().unwrap(), row["note"].as_str().unwrap());
        assert!(!note.starts_with("failed"), "{row}");
        assert_eq!(
            note.contains("no such kernel"),
            what.starts_with("wgmma"),
            "the emulation has all but wgmma: {row}"
        );
        assert!(row["ours"].is_null() && row["ratio"].is_null(), "nothing is timed: {row}");
    }
    for part in ["wgmma", "SIMT", "mma.sync", "LoRA forward", "layer norm", "attention", "a token", "training"] {
        assert!(rows.iter().any(|r| r["what"].as_str().unwrap().contains(part)), "{part}: {said}");
    }
}
