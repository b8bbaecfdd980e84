//! `lora compare`: cells that are run once, and the tables of them.

use std::{fs, time::SystemTime};

use crate::cli::lab::{Lab, lines};

const SHARED: &str = r#"
model = "base"
data = "train.txt"
test = "valid.txt"
seeds = [0, 1]
steps = 4
batch_size = 4

[search]
hold_out = 0.2
steps = 2

[eval]
batch-size = 4
"#;

const RUNS: &str = r#"
[[run]]
method = "lora"
rank = 2
lr = [1e-3, 1e-2]

[[run]]
method = "bitfit"
lr = 1e-2
seeds = [0]

[[run]]
name = "everything"
method = "full"
lr = 1e-3
"#;

fn lab() -> Lab {
    let lab = Lab::new();
    lab.write("c.toml", &format!("{SHARED}{RUNS}"));
    lab
}

const CELLS: [&str; 7] = [
    "lora-rank=2/lr-0.001",
    "lora-rank=2/lr-0.01",
    "lora-rank=2/seed-0",
    "lora-rank=2/seed-1",
    "bitfit/seed-0",
    "everything/seed-0",
    "everything/seed-1",
];

fn written(lab: &Lab) -> Vec<SystemTime> {
    CELLS.map(|c| fs::metadata(lab.path(&format!("out/cells/{c}.json"))).unwrap().modified().unwrap()).to_vec()
}

#[test]
fn a_comparison_is_run_once_and_goes_on_where_it_stopped() {
    let lab = lab();
    let table = lab.json("compare c.toml --out out --json");
    let line = |i: usize| &table["lines"][i];
    assert_eq!(line(0)["name"], "lora rank=2");
    assert_eq!(line(2)["name"], "everything");
    for (i, seeds) in [2, 1, 2].into_iter().enumerate() {
        assert_eq!((&line(i)["finished"], &line(i)["seeds"]), (&seeds.into(), &seeds.into()), "{table}");
        let (name, loss) = (&line(i)["scores"][0][0], &line(i)["scores"][0][1]);
        assert_eq!(
            (name.as_str(), loss["values"].as_array().unwrap().len()),
            (Some("loss"), seeds as usize),
            "{table}"
        );
        assert_eq!(loss["sd"].is_f64(), seeds > 1, "{table}");
        assert!(line(i)["tokens_per_s"].as_f64().unwrap() > 0.0 && line(i)["checkpoint_bytes"].as_u64().unwrap() > 0);
    }
    assert!(line(0)["trainable"].as_u64() < line(2)["trainable"].as_u64(), "{table}");

    // The learning rate is the one that did better on what was held out.
    let judged = |cell: &str| -> f64 {
        let cell: serde_json::Value = serde_json::from_str(&lab.read(&format!("out/cells/{cell}.json"))).unwrap();
        cell["trained"]["judged"]["loss"].as_f64().unwrap()
    };
    let better = if judged(CELLS[1]) < judged(CELLS[0]) { 1e-2 } else { 1e-3 };
    assert_eq!(line(0)["lr"], better);
    // A cell is what the plain commands give.
    let train = "train --model base --data train.txt --rank 2 --steps 4 --batch-size 4 --seed 1 --method lora";
    lab.ok(&format!("{train} --lr {better} --out alone"));
    let alone = lab.json("eval --model base --adapter alone --data valid.txt --batch-size 4 --json");
    assert_eq!(alone["loss"].as_f64().unwrap(), judged(CELLS[3]));
    assert_eq!(
        lab.bytes("alone/adapter_model.safetensors"),
        lab.bytes("out/runs/lora-rank=2/seed-1/adapter_model.safetensors")
    );
    assert!(!lab.path("out/runs/everything/seed-0").exists(), "whole models are not kept");

    // All is there: nothing is run, and the table is the same.
    let before = written(&lab);
    assert_eq!(lab.json("compare c.toml --out out --json"), table);
    assert_eq!(written(&lab), before);
    // One is missing, as after an interruption: it alone is run.
    fs::remove_file(lab.path("out/cells/bitfit/seed-0.json")).unwrap();
    let shown = lab.json("compare c.toml --out out --json --show");
    assert_eq!((&shown["lines"][1]["finished"], &shown["lines"][0]), (&0.into(), line(0)), "{shown}");
    let again = lab.json("compare c.toml --out out --json");
    assert_eq!(again["lines"][1]["scores"], line(1)["scores"]);
    let after = written(&lab);
    for (i, cell) in CELLS.iter().enumerate() {
        assert_eq!(after[i] != before[i], *cell == "bitfit/seed-0", "{cell}");
    }

    // A run that was whole before its cell was written, as after a lost machine, is judged and not run again.
    fs::remove_file(lab.path("out/cells/lora-rank=2/lr-0.001.json")).unwrap();
    lab.ok("train --config out/runs/lora-rank=2/lr-0.001.toml --resume");
    let stamp = |name: &str| fs::metadata(lab.path(name)).unwrap().modified().unwrap();
    let checkpoint = "out/runs/lora-rank=2/lr-0.001/checkpoints/step-00000002/state.json";
    let spent: serde_json::Value = serde_json::from_str(&lab.read(checkpoint)).unwrap();
    lab.ok("compare c.toml --out out");
    let cell: serde_json::Value = serde_json::from_str(&lab.read("out/cells/lora-rank=2/lr-0.001.json")).unwrap();
    assert_eq!(cell["trained"]["seconds"], spent["spent"]["seconds"], "{cell}");
    assert!(cell["trained"]["tokens_per_s"].as_f64().unwrap() > 0.0, "{cell}");
    assert!(stamp("out/cells/lora-rank=2/seed-0.json") == after[2], "the others are as they were");
    assert!(!lab.path("out/runs/lora-rank=2/lr-0.001").exists());

    let markdown = lab.read("out/table.md");
    assert!(markdown.starts_with("| method | trainable | lr | seeds | loss | 95% interval |"), "{markdown}");
    assert!(markdown.contains("Made 20") && markdown.contains(" thread"), "{markdown}");
    assert!(markdown.contains("| everything | ") && markdown.contains(" ± "), "{markdown}");
    let csv = lab.read("out/table.csv");
    assert_eq!((csv.lines().count(), csv.lines().next().unwrap().split(',').count()), (4, 13), "{csv}");
    let svg = lab.read("out/table.svg");
    assert!(svg.starts_with("<svg") && svg.contains("everything") && svg.contains("trainable parameters"), "{svg}");
}

#[test]
fn a_killed_comparison_keeps_its_finished_cells() {
    let lab = lab();
    let mut child = lab.spawn("compare c.toml --out out");
    let first = lab.path("out/cells/lora-rank=2/seed-0.json");
    while !first.exists() {
        assert!(child.try_wait().unwrap().is_none(), "over before its first cell");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let kept = fs::metadata(&first).unwrap().modified().unwrap();
    // A run of the killed one may still be at work for a moment, and hold its folder.
    let wait = std::time::Duration::from_secs(2);
    std::thread::sleep(wait);
    let table = lab.json("compare c.toml --out out --json");
    assert_eq!(fs::metadata(&first).unwrap().modified().unwrap(), kept);
    let finished = |i: usize| table["lines"][i]["finished"].as_u64().unwrap();
    assert_eq!([finished(0), finished(1), finished(2)], [2, 1, 2]);
}

#[test]
fn cells_of_other_settings_are_refused() {
    let lab = lab();
    let small = "[[run]]\nmethod = \"bitfit\"\nlr = 1e-2\n";
    let file = |shared: &str| lab.write("s.toml", &format!("{shared}{small}"));
    let shared = SHARED.replace("[0, 1]", "[0]");
    file(&shared);
    lab.ok("compare s.toml --out out");
    let cell = "out/cells/bitfit/seed-0.json";
    for (from, to, says) in [
        ("steps = 4", "steps = 5", &["steps = 4", "steps"][..]),
        ("batch-size = 4", "batch-size = 5", &["judged with batch-size = 4", "now to have 5"]),
    ] {
        file(&shared.replacen(from, to, 1));
        lab.fails("compare s.toml --out out", &[&[cell], says].concat());
    }
    file(&shared);
    lab.write("valid.txt", &lines(40, 13));
    lab.fails("compare s.toml --out out", &[cell, "another test data", "remove the file"]);
    lab.write("valid.txt", &lines(40, 12));
    lab.write("train.txt", &lines(0, 41));
    lab.fails("compare s.toml --out out", &[cell, "another training data"]);
    lab.write("train.txt", &lines(0, 40));
    lab.ok("compare s.toml --out out");
    lab.write("base/chat_template.jinja", "{{ messages }}");
    lab.fails("compare s.toml --out out", &[cell, "another base"]);
    fs::remove_file(lab.path("base/chat_template.jinja")).unwrap();
    let whole = lab.read(cell);
    lab.write(cell, &whole.replace("\"dtype\": \"f32\"", "\"dtype\": \"bf16\""));
    lab.fails("compare s.toml --out out", &[cell, "dtype = \"bf16\"", "now to have"]);
    lab.write(cell, "{\"settings\"");
    lab.fails("compare s.toml --out out", &[cell, "is no finished cell", "remove it"]);
}

#[test]
fn a_run_that_fails_or_diverges_does_not_stop_the_others() {
    let lab = lab();
    let shared = SHARED.replace("[0, 1]", "[0]");
    let runs = "[[run]]\nmethod = \"lora\"\ntargets = [\"nothing\"]\n[[run]]\nmethod = \"full\"\nlr = [1e-3, 9e2]\nclip = 0\n\
                [[run]]\nname = \"lost\"\nmethod = \"full\"\nlr = 9e2\nsteps = 60\n";
    lab.write("f.toml", &format!("{}{runs}", shared.replace("steps = 2", "steps = 60")));
    let output = lab.lora("compare f.toml --out out --json");
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("no module") || stderr.contains("nothing"), "{stderr}");
    let table: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&table["lines"][0]["finished"], &table["lines"][1]["finished"]), (&0.into(), &1.into()), "{stderr}");
    assert_eq!(table["lines"][1]["lr"], 1e-3, "{stderr}");
    assert_eq!(table["lines"][2]["diverged"], 1, "{stderr}");
}

#[test]
fn a_broken_file_says_what_and_where() {
    let lab = lab();
    for (text, parts) in [
        ("model = \"base\"\ndata = ", &["c.toml: line 2:"][..]),
        (&SHARED.replace("test = \"valid.txt\"", ""), &["c.toml:", "key test: missing"]),
        (&SHARED.replace("model = \"base\"", ""), &["c.toml:", "key model: missing"]),
        (SHARED, &["c.toml:", "no [[run]]"]),
        (
            &format!("{SHARED}[[run]]\nmethod = \"lora\"\nrnk = 8\n"),
            &["c.toml: line 17: [[run]] 1: key rnk: unknown field"],
        ),
        (&format!("{SHARED}[[run]]\nrank = \"8\"\n"), &["c.toml: line 16: [[run]] 1: key rank:"]),
        (&format!("{SHARED}[[run]]\nmethod = \"lorra\"\n"), &["lorra", "lora"]),
        (&format!("{SHARED}[[run]]\nlr = [1e-3, \"x\"]\n"), &["c.toml: line 16: [[run]] 1: key lr:", "no number"]),
        (&format!("{SHARED}[[run]]\nlr = -1\n"), &["[[run]] 1: lr = -1", "positive"]),
        (&format!("{SHARED}[[run]]\n[[run]]\n"), &["[[run]] 1 and 2 are both called lora"]),
        (&format!("{SHARED}[[run]]\nout = \"x\"\n"), &["[[run]] 1: key out", "leave it out"]),
        (&format!("{SHARED}[[run]]\n").replace("seeds = [0, 1]", "seeds = [-1]"), &["c.toml: line 5: key seeds"]),
        (&format!("{SHARED}[[run]]\n").replace("hold_out = 0.2", "hold_out = 2"), &["key hold-out", "between 0 and 1"]),
        (&format!("{SHARED}[[run]]\n").replace("valid.txt", "none.txt"), &["none.txt"]),
        (&format!("{SHARED}[[run]]\n").replace("[eval]", "[eval]\nbeams = 3"), &["c.toml: [eval]: ", "--beams"]),
        (
            &format!("{SHARED}[[run]]\n").replace("[eval]", "[eval]\ndevice = \"cpu\""),
            &["c.toml: [eval]: ", "--device"],
        ),
        (&format!("{SHARED}[[run]]\n").replace("hold_out", "lr = 1\nhold_out"), &["line 10: key lr", "[search]"]),
        (&format!("run = [1]\n{SHARED}"), &["line 1: key run"]),
        (&format!("seed = 7\n{SHARED}[[run]]\n"), &["line 1: key seed", "seeds = "]),
        (&format!("{SHARED}[[run]]\nlr = [1e-3, -1]\n"), &["[[run]] 1: lr = -1"]),
        (
            &format!("{SHARED}[[run]]\nmethod = \"adapter-l\"\nrank = 8\n"),
            &["line 17: [[run]] 1: key rank", "adapter-l does not read it"],
        ),
        (&format!("{SHARED}[[run]]\nname = \"a\\nb\"\n"), &["line 16: [[run]] 1: key name", "one line"]),
        (&format!("{SHARED}[[run]]\nname = \"{}\"\n", "a".repeat(300)), &["line 16: [[run]] 1: key name", "100 bytes"]),
        (
            &format!("{SHARED}[[run]]\n").replace("batch-size = 4", "batch-size = 0"),
            &["c.toml: [eval]: batch-size = 0"],
        ),
        (
            &format!("{SHARED}[[run]]\n").replace("[eval]", "[eval]\nnum-beams = 3"),
            &["c.toml: [eval]: num-beams", "e2e"],
        ),
        (&format!("{SHARED}[[run]]\n").replace("batch_size = 4", "batch_size = 0"), &["batch-size = 0"]),
    ] {
        lab.write("c.toml", text);
        lab.fails("compare c.toml --out out", parts);
        assert!(!lab.path("out/cells").exists(), "{text}");
    }
    lab.write("bad.txt", "no separator\n");
    lab.write("c.toml", &format!("{SHARED}[[run]]\n").replace("valid.txt", "bad.txt"));
    lab.fails("compare c.toml --out out", &["bad.txt:1:"]);
    assert!(!lab.path("out/cells").exists());
    lab.fails("compare nowhere.toml --out out", &["nowhere.toml"]);
}
