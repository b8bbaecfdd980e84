//! The CPU report at toy sizes, without another stack.

use std::process::{Command, Output};

use serde_json::Value;

fn cpu(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cpu")).args(arguments).output().unwrap()
}

#[test]
fn every_row_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let [json, markdown] = ["report.json", "report.md"].map(|name| folder.path().join(name));
    // The command's start is no row of this crate's tests: the command is another crate's program.
    let names = String::from_utf8(cpu(&["--list"]).stdout).unwrap();
    let rows = names.lines().filter(|r| *r != "start").collect::<Vec<_>>().join(",");
    let output = cpu(&[
        "--tiny",
        "--rounds",
        "2",
        "--rows",
        &rows,
        "--json",
        json.to_str().unwrap(),
        "--markdown",
        markdown.to_str().unwrap(),
    ]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    for row in report["rows"].as_array().unwrap() {
        let (what, note) = (row["what"].as_str().unwrap(), row["note"].as_str().unwrap());
        assert!(row["ours"].is_f64() && !note.contains("failed"), "{what}: {row}");
    }
    for name in rows.split(',') {
        assert!(!report["rounds"][name].is_null(), "all rounds of {name}");
    }
    let rounds = &report["rounds"]["dense-f32"]["ours"];
    assert_eq!(rounds.as_array().unwrap().len(), 2);
    assert!(rounds[0]["gemm_flops_per_s"].as_f64().unwrap() < rounds[0]["ceiling"].as_f64().unwrap(), "{rounds}");
    let allocations = rounds[0]["allocations"].as_array().unwrap();
    assert!(allocations.iter().all(|n| n.as_u64() > Some(0)), "the allocator counts: {allocations:?}");
    assert!(std::fs::read_to_string(markdown).unwrap().contains("SmolLM-135M"));
}

#[test]
fn what_cannot_be_measured_is_said() {
    let unknown = cpu(&["--tiny", "--rows", "gpt9"]);
    let said = String::from_utf8(unknown.stderr).unwrap();
    assert!(!unknown.status.success() && said.contains("no row \"gpt9\"") && said.contains("dense-f32"), "{said}");

    let no_peer = cpu(&["--tiny", "--rounds", "1", "--rows", "dense-f32", "--peer", "no-such-python"]);
    let said = String::from_utf8(no_peer.stdout).unwrap();
    assert!(no_peer.status.success() && said.contains("peer failed: could not run"), "{said}");
}
