//! `lora compare`: cells that are run once, and the tables of them.

use std::{fs, time::SystemTime};

use lora_train::compare::{Comparison, Program, run};
use serde_json::Value;

use crate::cli::{
    lab::{Lab, lines},
    tasks,
};

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
    let again = || lab.lora("compare c.toml --out out --json");
    let mut output = again();
    for _ in 0..60 {
        if String::from_utf8_lossy(&output.stderr).contains("another process") {
            std::thread::sleep(std::time::Duration::from_secs(1));
            output = again();
        }
    }
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let table: Value = serde_json::from_slice(&output.stdout).unwrap();
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
    // The advice is true, though the adapter of the other settings still lies there.
    file(&shared.replacen("steps = 4", "steps = 3", 1));
    fs::remove_file(lab.path(cell)).unwrap();
    assert_eq!(lab.json("compare s.toml --out out --json")["lines"][0]["finished"], 1);
    assert!(lab.read(cell).contains("\"steps\": 3"));
    file(&shared);
    fs::remove_file(lab.path(cell)).unwrap();
    lab.ok("compare s.toml --out out");
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
    lab.write(cell, &whole);
    file(&format!("checkpoint = true\n{shared}"));
    lab.fails("compare s.toml --out out", &[cell, "checkpoint = false", "now to have true"]);
    file(&shared);
    lab.write(cell, "{\"settings\"");
    lab.fails("compare s.toml --out out", &[cell, "is no finished cell", "remove it"]);
}

#[test]
fn a_rate_that_wins_later_does_not_stop_the_other_rows() {
    let lab = lab();
    let file = |lrs: &str| {
        let runs = format!("[[run]]\nmethod = \"bitfit\"\nlr = {lrs}\n[[run]]\nmethod = \"full\"\nlr = 1e-3\n");
        lab.write("l.toml", &format!("{}{runs}", SHARED.replace("[0, 1]", "[0]")));
    };
    file("[1e-7, 1e-6]");
    lab.ok("compare l.toml --out out");
    fs::remove_file(lab.path("out/cells/full/seed-0.json")).unwrap();
    file("[1e-7, 1e-6, 1e-1]");
    let output = lab.lora("compare l.toml --out out --json");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let table: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&table["lines"][0]["finished"], &table["lines"][1]["finished"]), (&0.into(), &1.into()), "{stderr}");
    let (_, last) = stderr.rsplit_once("error: ").unwrap();
    assert!(last.contains("bitfit/seed-0.json") && last.contains("was made with lr = "), "{last}");
    // From now on it is seen before anything is run.
    lab.fails("compare l.toml --out out", &["bitfit/seed-0.json", "was made with lr = ", "remove the file"]);
}

#[test]
fn an_interrupted_run_of_other_settings_says_how_to_go_on() {
    let lab = lab();
    let run = "out/runs/bitfit/seed-0";
    lab.ok(&format!(
        "train --model base --data train.txt --method bitfit --lr 1e-2 --steps 3 --batch-size 4 --save-every 2 --out {run}"
    ));
    lab.write("s.toml", &format!("{}[[run]]\nmethod = \"bitfit\"\nlr = 1e-2\n", SHARED.replace("[0, 1]", "[0]")));
    let output = lab.lora("compare s.toml --out out");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let (_, last) = stderr.rsplit_once("error: ").unwrap();
    let parts = ["lora train ended with", "of other settings or data, remove ", run, "begins anew"];
    assert!(stderr.contains("started with steps = 3") && parts.iter().all(|part| last.contains(part)), "{stderr}");
    fs::remove_dir_all(lab.path(run)).unwrap();
    lab.ok("compare s.toml --out out");
}

#[test]
fn a_run_that_fails_or_diverges_does_not_stop_the_others() {
    let lab = lab();
    let shared = SHARED.replace("[0, 1]", "[0]");
    let runs = "[[run]]\nmethod = \"lora\"\nlr = [1e-3, 2e-3]\n\
                [[run]]\nmethod = \"full\"\nlr = [1e-3, 9e2]\nclip = 0\n\
                [[run]]\nname = \"lost\"\nmethod = \"full\"\nlr = 9e2\nsteps = 60\n\
                [[run]]\nname = \"wild\"\nmethod = \"full\"\nlr = [8e2, 9e2]\n";
    lab.write("f.toml", &format!("{}{runs}", shared.replace("steps = 2", "steps = 60")));
    // What keeps both tries of the first row from beginning.
    fs::create_dir_all(lab.path("out/runs")).unwrap();
    lab.write("out/runs/lora", "");
    let output = lab.lora("compare f.toml --out out --json");
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    let table: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&table["lines"][0]["finished"], &table["lines"][1]["finished"]), (&0.into(), &1.into()), "{stderr}");
    assert_eq!(table["lines"][1]["lr"], 1e-3, "{stderr}");
    assert_eq!(table["lines"][2]["diverged"], 1, "{stderr}");
    // Tries that failed tell nothing of rates.
    let (_, last) = stderr.rsplit_once("error: ").unwrap();
    assert!(last.starts_with("4 of the runs failed: lora, trying lr 0.001: could not "), "{last}");
    assert!(last.contains("lost: training diverged with every"), "{last}");
    assert!(last.contains("lora, trying lr 0.002: ") && !last.contains("; lora: "), "{last}");
    assert!(last.contains("wild: training diverged with every learning rate"), "{last}");
    let shown = lab.ok("compare f.toml --out out --show");
    let rows: Vec<&str> = shown.lines().filter(|line| line.contains("diverged with every rate")).collect();
    assert!(rows.len() == 1 && rows[0].contains("wild"), "{shown}");
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
            &["c.toml: line 17: [[run]] 1: key rnk: unknown field; there are name, seeds, method, rank, "],
        ),
        (
            &format!("sedes = [0]\n{SHARED}[[run]]\n"),
            &["c.toml: line 1: key sedes: unknown field; there are test, seeds, search"],
        ),
        (&format!("{SHARED}[[run]]\nrank = 0\n"), &["c.toml: line 16: [[run]] 1: rank = 0"]),
        (&format!("device = \"gpu\"\n{SHARED}[[run]]\n"), &["c.toml: line 1: device = gpu"]),
        (
            &format!("{SHARED}[[run]]\n[[run]]\nmethod = \"full\"\n").replace("[eval]", "[eval]\nstrict = true"),
            &["c.toml: [eval]: full: ", "--adapter"],
        ),
        (
            &format!("{SHARED}[[run]]\n").replace("[eval]", "[eval]\nformat = \"jsonl\""),
            &["valid.txt:1:", "not valid JSON"],
        ),
        (&format!("{SHARED}[[run]]\nrank = \"8\"\n"), &["c.toml: line 16: [[run]] 1: key rank:"]),
        (&format!("{SHARED}[[run]]\nmethod = \"lorra\"\n"), &["lorra", "lora"]),
        (&format!("{SHARED}[[run]]\nlr = [1e-3, \"x\"]\n"), &["c.toml: line 16: [[run]] 1: key lr:", "no number"]),
        (&format!("{SHARED}[[run]]\nlr = -1\n"), &["[[run]] 1: lr = -1", "positive"]),
        (&format!("{SHARED}[[run]]\n[[run]]\n"), &["[[run]] 1 and 2 are both called lora"]),
        (&format!("{SHARED}[[run]]\nout = \"x\"\n"), &["line 16: [[run]] 1: key out", "decides this itself"]),
        (&format!("{SHARED}[[run]]\nmodel = \"x\"\n"), &["[[run]] 1: key model: is the same for all rows"]),
        (&format!("{SHARED}[[run]]\nseed = 3\n"), &["line 16: [[run]] 1: key seed", "seeds = "]),
        // The key's own place, not the first of its name.
        (
            &format!("{SHARED}[[run]]\n").replace("hold_out", "batch_size = \"x\"\nhold_out"),
            &["c.toml: line 10: [search]: key batch-size:"],
        ),
        (
            &format!("{SHARED}[[run]]\nlr = [1e-3, 1e-2]\n").replace("hold_out", "batch_size = 0\nhold_out"),
            &["c.toml: line 10: [search]: batch-size = 0"],
        ),
        (
            &format!("{SHARED}[[run]]\n").replace("batch-size = 4", "batch-size = [4]"),
            &["c.toml: line 14: [eval]: key batch-size"],
        ),
        (
            &format!("{SHARED}[[run]]\nseeds = [1]\n\n[[run]] # another\nname = \"b\"\nseeds = [-1]\n"),
            &["c.toml: line 20: [[run]] 2: key seeds"],
        ),
        (
            &format!("{SHARED}[[run]]\nrank = 4\n[[run]]\nmethod = \"bitfit\"\nr = 4\n"),
            &["c.toml: line 19: [[run]] 2: key rank: method bitfit does not read it"],
        ),
        (&format!("{SHARED}[[run]]\nr = 4\nrank = 8\n"), &["[[run]] 1: key rank: stands there under two names"]),
        (
            &format!("{SHARED}[[run]]\nmethod = \"adalora\"\nbeta1 = 0.5\n"),
            &["c.toml: line 17: [[run]] 1: beta1 = 0.5", "adalora-beta1"],
        ),
        (
            &format!("beta2 = 0.5\n{SHARED}[[run]]\nmethod = \"adalora\"\n"),
            &["c.toml: line 1: [[run]] 1: beta2 = 0.5", "adalora-beta2"],
        ),
        (&format!("{SHARED}[[run]]\n[run.rank_pattern]\nc_attn = \"x\"\n"), &["[[run]] 1: key rank-pattern:"]),
        (&format!("{SHARED}[[run]]\n").replace("seeds = [0, 1]", "seeds = [-1]"), &["c.toml: line 5: key seeds"]),
        (&format!("{SHARED}[[run]]\n").replace("hold_out = 0.2", "hold_out = 2"), &["key hold-out", "between 0 and 1"]),
        (&format!("{SHARED}[[run]]\n").replace("valid.txt", "none.txt"), &["none.txt"]),
        (&format!("{SHARED}[[run]]\n").replace("[eval]", "[eval]\nbeams = 3"), &["c.toml: [eval]: ", "--beams"]),
        (
            &format!("{SHARED}[[run]]\n").replace("[eval]", "[eval]\ndevice = \"cpu\""),
            &["c.toml: line 14: [eval]: key device: a comparison decides this itself"],
        ),
        (
            &format!("{SHARED}[[run]]\n").replace("[eval]", "[eval]\nmax_length = 9"),
            &["c.toml: line 14: [eval]: key max-length: a comparison decides this itself"],
        ),
        (&format!("{SHARED}[[run]]\n").replace("hold_out", "lr = 1\nhold_out"), &["line 10: [search]: key lr"]),
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

/// Of one `[[run]]` for each of `runs`, judged with one seed after two steps.
fn quick(runs: &[&str]) -> String {
    let runs: String = runs.iter().map(|run| format!("[[run]]\n{run}\n")).collect();
    format!("model = \"base\"\ndata = \"train.txt\"\ntest = \"valid.txt\"\nsteps = 2\nbatch_size = 4\n{runs}")
}

fn cell(lab: &Lab, name: &str) -> Value {
    serde_json::from_str(&lab.read(&format!("out/cells/{name}.json"))).unwrap()
}

#[test]
fn options_have_pefts_names_and_patterns_those_of_modules() {
    let lab = lab();
    let pattern = "r = 4\nlora_alpha = 3\n[run.rank_pattern]\nc_attn = 3";
    lab.write("p.toml", &quick(&["r = 4", "r = 8", pattern]));
    let table = lab.json("compare p.toml --out out --json");
    let names = ["lora rank=4", "lora rank=8", "lora rank=4 alpha=3 rank-pattern=c_attn=3"];
    assert_eq!([0, 1, 2].map(|i| table["lines"][i]["name"].as_str().unwrap()), names, "{table}");
    let of = |name: &str| {
        let file = format!("out/runs/{}/seed-0/adapter_config.json", name.replace(' ', "-"));
        serde_json::from_str::<Value>(&lab.read(&file)).unwrap()
    };
    assert_eq!((&of(names[1])["r"], &of(names[2])["r"]), (&8.into(), &4.into()));
    assert_eq!(of(names[2])["rank_pattern"], serde_json::json!({"c_attn": 3}));
}

/// Whichever row stands first, and whatever its own seeds are.
#[test]
fn rates_are_tried_with_the_first_of_the_shared_seeds() {
    let lab = lab();
    let runs = ["seeds = [7]", "rank = 2\nlr = [1e-3, 1e-2]"];
    lab.write("s.toml", &quick(&runs).replace("[[run]]\nseeds", "seeds = [3, 4]\n[[run]]\nseeds"));
    lab.ok("compare s.toml --out out");
    for (name, seed) in [("lora/seed-7", 7), ("lora-rank=2/lr-0.001", 3), ("lora-rank=2/seed-4", 4)] {
        assert_eq!(cell(&lab, name)["settings"]["seed"], seed, "{name}");
    }
}

/// A model of values that are no numbers has metrics like any other.
#[test]
fn a_rate_that_left_no_numbers_wins_nothing() {
    let lab = tasks::lab();
    let labels = |i: usize| (if i.is_multiple_of(5) { "yes" } else { "no" }).to_owned();
    for file in ["train.tsv", "valid.tsv"] {
        lab.write(file, &crate::common::pairs(labels));
    }
    let shared = quick(&[]).replace("base", "encoder").replace(".txt", ".tsv");
    let rows = "[[run]]\nmethod = \"full\"\nweight-decay = 900\nlr = [900.0, 1e-9]\n\
                [[run]]\nname = \"lost\"\nmethod = \"full\"\nweight-decay = 900\nlr = 900.0\n";
    lab.write("n.toml", &format!("task = \"labels\"\nmax_length = 20\n{shared}[search]\nhold_out = 0.3\n{rows}"));
    let output = lab.lora("compare n.toml --out out --json");
    let stderr = String::from_utf8(output.stderr).unwrap();
    let table: Value = serde_json::from_slice(&output.stdout).unwrap();
    let (line, lost) = (&table["lines"][0], &table["lines"][1]);
    assert_eq!((&line["lr"], &line["finished"]), (&1e-9.into(), &1.into()), "{stderr}");
    assert_eq!((&lost["finished"], &lost["diverged"]), (&1.into(), &1.into()), "{stderr}");
    assert!(cell(&lab, "full/lr-900")["trained"].is_null());
}

#[test]
fn a_row_that_starts_from_an_adapter() {
    let lab = lab();
    lab.train("first", "--rank 3 --alpha 5 --targets c_fc --steps 2");
    lab.copy("first", "second");
    let file = |dir: &str, more: &str| {
        lab.write("i.toml", &quick(&["rank = 2", &format!("name = \"on\"\ninit_adapter = \"{dir}\"\n{more}")]))
    };
    file("first", "");
    let table = lab.json("compare i.toml --out out --json");
    let line = &table["lines"][1];
    assert_eq!((&line["finished"], &line["method"]), (&1.into(), &"lora".into()), "{table}");
    let made = cell(&lab, "on/seed-0");
    assert_eq!((&made["settings"]["rank"], &made["settings"]["targets"]), (&3.into(), &serde_json::json!(["c_fc"])));
    assert!(lab.read("out/runs/on/seed-0/adapter_config.json").contains("c_fc"));
    // Wherever the adapter lies, the cell is the same; but not of another adapter.
    let before = lab.bytes("out/cells/on/seed-0.json");
    file("second", "");
    assert_eq!(lab.json("compare i.toml --out out --json"), table);
    assert_eq!(lab.bytes("out/cells/on/seed-0.json"), before);
    // As older programs wrote it.
    lab.write(
        "out/cells/on/seed-0.json",
        &lab.read("out/cells/on/seed-0.json").replacen("\"init-adapter\": null", "\"init-adapter\": \"first\"", 1),
    );
    assert_eq!(lab.json("compare i.toml --out out --json"), table);
    lab.train("third", "--rank 3 --alpha 5 --targets c_fc --steps 3");
    file("third", "");
    lab.fails("compare i.toml --out out", &["on/seed-0.json", "another adapter to begin with"]);
    file("first", "rank = 4\n");
    lab.fails("compare i.toml --out out", &["i.toml: line 11: [[run]] 2: rank = 4", "first has 3"]);
}

#[test]
fn falling_back_to_the_cpu_is_said() {
    if lora_train::Place::open("auto", "auto").unwrap().note.is_none() {
        return eprintln!("skipped: there is a CUDA device");
    }
    let lab = lab();
    lab.write("a.toml", &format!("device = \"auto\"\n{}", quick(&["method = \"bitfit\""])));
    let output = lab.lora("compare a.toml --out out");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && stderr.contains("note: computing on the CPU: "), "{stderr}");
}

#[test]
fn runs_in_the_background_warn_and_show_no_progress() {
    let lab = lab();
    lab.write("w.toml", &quick(&["max_length = 24"]));
    let said = |options: &str| {
        let output = lab.lora(&format!("compare w.toml --out out{} {options}", options.len()));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        stderr
    };
    let stderr = said("");
    // Once in training, once in judging.
    assert_eq!(stderr.matches("are longer than 24 tokens").count(), 2, "{stderr}");
    assert!(stderr.contains("left: ") && !stderr.contains("step ") && !stderr.contains("training "), "{stderr}");
    let stderr = said("--no-progress");
    assert!(stderr.contains("are longer than 24 tokens") && !stderr.contains("left: "), "{stderr}");
    assert_eq!(said("--quiet"), "");
}

#[test]
fn what_does_not_fit_the_base_is_told_before_anything_is_run() {
    let lab = tasks::lab();
    lab.write("other.tsv", "a\tb\tyes\na\tb\tperhaps\n");
    let labelled = quick(&["method = \"bitfit\""]).replace(".txt", ".tsv");
    let encoder = labelled.replace("base", "encoder");
    let task = |name: &str, file: &str| format!("task = \"{name}\"\n{file}");
    for (file, parts) in [
        (task("labels", &labelled), &["task = labels", "continues text"][..]),
        (quick(&[""]).replace("base", "encoder"), &["task = not given", "is an encoder"]),
        (task("e2e", &quick(&[""]).replace("base", "encoder")), &["task = e2e", "is an encoder"]),
        (quick(&["rank = 2", "name = \"none\"\ntargets = [\"nothing\"]"]), &["none: ", "nothing"]),
        (quick(&["method = \"pre-embed\"\nprefix = 64"]), &["pre-embed prefix=64: ", "64"]),
        (task("labels", &encoder.replace("valid.tsv", "other.tsv")), &["other.tsv:2:", "\"perhaps\"", "train on data"]),
    ] {
        lab.write("m.toml", &file);
        lab.fails("compare m.toml --out out", parts);
        assert!(!lab.path("out").exists(), "{file}");
    }
    // What only the tokenizer finds out.
    let long = "name : Sun Cat | food : tea | near : gate | ".repeat(9);
    lab.write("valid.txt", &format!("{}{long}||Sun Cat .\n", lines(0, 3)));
    lab.write("chat.jsonl", "{\"messages\": [{\"role\": \"assistant\", \"content\": \"Ho\"}]}\n");
    for (file, parts) in [
        (task("e2e", &quick(&[""])), &["valid.txt:4: its ", "leave none of the model's 64 positions free"][..]),
        (quick(&["max-length = 4"]).replace("valid", "train"), &["train.txt: none of the 40 examples", "--max-length"]),
        (
            quick(&[""])
                .replace("valid.txt", "chat.jsonl")
                .replace("steps = 2", "steps = 2\n[eval]\nformat = \"jsonl\"\n"),
            &["chat.jsonl:1:", "template"],
        ),
    ] {
        lab.write("m.toml", &file);
        lab.fails("compare m.toml --out out", parts);
        assert!(!lab.path("out").exists(), "{file}");
    }
}

#[test]
fn nothing_is_shown_of_a_folder_that_is_not_there() {
    let lab = lab();
    lab.fails("compare c.toml --out mistyped --show", &["mistyped", "no such folder"]);
    assert!(!lab.path("mistyped").exists());
}

/// An encoder's task: two metrics, of which the first chooses the learning rate, and of equal ones the lower loss.
#[test]
fn a_task_is_compared_by_its_first_metric() {
    let lab = tasks::lab();
    let shared = quick(&[]).replace("base", "encoder").replace(".txt", ".tsv").replace("steps = 2", "steps = 6");
    let search = "[search]\nhold_out = 0.3\n";
    let runs = "[[run]]\nrank = 2\nlr = [1e-5, 3e-2]\n[[run]]\nmethod = \"full\"\nlr = 1e-3\n";
    let file = format!("task = \"labels\"\nmax_length = 20\nkeep-models = true\n{shared}{search}{runs}");
    lab.write("t.toml", &file);
    let table = lab.json("compare t.toml --out out --json");
    let line = &table["lines"][0];
    let names: Vec<&str> = line["scores"].as_array().unwrap().iter().map(|s| s[0].as_str().unwrap()).collect();
    assert_eq!(names, ["accuracy", "matthews"], "{table}");
    let tried = [1e-5, 3e-2].map(|lr| (lr, cell(&lab, &format!("lora-rank=2/lr-{lr}"))["trained"]["judged"].clone()));
    let key = |judged: &Value| (judged["accuracy"].as_f64().unwrap(), -judged["loss"].as_f64().unwrap());
    let best = if key(&tried[1].1) > key(&tried[0].1) { tried[1].0 } else { tried[0].0 };
    assert_eq!(line["lr"], best, "{tried:?}");
    let markdown = lab.read("out/table.md");
    assert!(
        markdown.starts_with("| method | trainable | lr | seeds | accuracy | 95% interval | matthews |"),
        "{markdown}"
    );
    // The adapter and, where it is asked for, the whole model are what was judged.
    let eval = "--task labels --data valid.tsv --max-length 20 --json";
    for (row, model) in
        [("lora-rank=2", "encoder --adapter out/runs/lora-rank=2/seed-0"), ("full", "out/runs/full/seed-0")]
    {
        let judged = lab.json(&format!("eval --model {model} {eval}"));
        assert_eq!(judged, cell(&lab, &format!("{row}/seed-0"))["trained"]["judged"], "{row}");
    }

    // Ties of the metric are broken by the loss, for which the cells that chose are changed by hand.
    for (cell, loss) in [("lr-0.00001", 0.5), ("lr-0.03", 0.4)] {
        for (key, value) in [("accuracy", 0.5), ("loss", loss)] {
            let file = format!("out/cells/lora-rank=2/{cell}.json");
            let mut json: Value = serde_json::from_str(&lab.read(&file)).unwrap();
            json["trained"]["judged"][key] = value.into();
            lab.write(&file, &json.to_string());
        }
    }
    fs::remove_file(lab.path("out/cells/lora-rank=2/seed-0.json")).unwrap();
    assert_eq!(lab.json("compare t.toml --out out --show --json")["lines"][0]["lr"], 3e-2);
}

#[test]
fn completions_are_compared_by_what_is_said() {
    let lab = lab();
    let eval = "[eval]\nnum-beams = 2\nmax-new-tokens = 6\n";
    lab.write("e.toml", &format!("task = \"e2e\"\n{}{eval}[[run]]\nrank = 2\n", quick(&[])));
    let table = lab.json("compare e.toml --out out --json");
    let scores = table["lines"][0]["scores"].as_array().unwrap();
    let names: Vec<&str> = scores.iter().map(|s| s[0].as_str().unwrap()).collect();
    assert_eq!(names, ["bleu", "nist", "meteor_exact_stem", "rouge_l", "cider"], "{table}");
    let judged = &cell(&lab, "lora-rank=2/seed-0")["trained"]["judged"];
    assert_eq!(judged["prompts"], 12, "{judged}");
    assert_eq!(lab.read("out/runs/lora-rank=2/seed-0.txt").lines().count(), 12);
}

#[cfg(unix)]
mod interrupted {
    use std::{os::unix::process::CommandExt, process::Command};

    use super::*;

    #[test]
    fn ctrl_c_keeps_the_cells_and_the_folder_is_its_own_until_then() {
        let lab = lab();
        lab.write("c.toml", &format!("{SHARED}{RUNS}").replace("steps = 4", "steps = 400"));
        // As from a terminal, all its processes get the signal.
        let mut child = lab.spawn_with("compare c.toml --out out", |c| {
            c.process_group(0);
        });
        let first = lab.path("out/cells/lora-rank=2/lr-0.001.json");
        while !first.exists() {
            assert!(child.try_wait().unwrap().is_none(), "over before its first cell");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        lab.fails("compare c.toml --out out", &["out", "another process is working in it"]);
        let sent = Command::new("kill").args(["-INT", "--", &format!("-{}", child.id())]).status().unwrap();
        assert!(sent.success());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(130), "{stderr}");
        assert!(stderr.contains("the same command goes on from here") && !stderr.contains("failed"), "{stderr}");
        assert!(first.exists() && !lab.path("out/cells/everything/seed-1.json").exists());
    }

    /// Judging an encoder listens to no signal: its end by one is no failure.
    #[test]
    fn a_run_that_the_signal_ends_at_once_was_interrupted() {
        let lab = tasks::lab();
        let shared = quick(&["rank = 2", "method = \"bitfit\""]).replace("base", "encoder").replace(".txt", ".tsv");
        lab.write("t.toml", &format!("task = \"labels\"\nmax_length = 20\n{shared}"));
        let lora = env!("CARGO_BIN_EXE_lora");
        let script = format!("case \"$*\" in *\"eval \"*) kill -INT $$ ;; *) exec {lora} \"$@\" ;; esac\n");
        lab.write("lora.sh", &script);
        let keys = [("model", "encoder"), ("data", "train.tsv"), ("test", "valid.tsv")];
        let keys = keys.map(|(key, file)| (key.to_owned(), lab.path(file).to_str().unwrap().into()));
        let comparison = Comparison::read(&lab.path("t.toml"), keys.into_iter().collect()).unwrap();
        let options = vec![lab.path("lora.sh").to_str().unwrap().to_owned(), "--quiet".to_owned()];
        let program = Program { path: "sh".into(), options };
        let finished = run(&comparison, &lab.path("out"), &program, &mut ()).unwrap();
        assert!(finished.interrupted && finished.failed.is_empty(), "{finished:?}");
    }
}
