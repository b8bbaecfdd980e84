//! `--task`: an encoder from labelled lines to its metrics.

use serde_json::json;

use crate::{
    cli::lab::{Lab, names},
    common,
};

/// `encoder` without a head, `train.tsv` and `valid.tsv` with labels.
pub(crate) fn lab() -> Lab {
    let lab = Lab::new();
    let golden = common::golden().into_iter().find(|g| g.parent().unwrap().ends_with("bert_classification")).unwrap();
    common::base(&golden, &lab.path("encoder"), |raw| raw.set("architectures", vec!["BertModel"]));
    let labels = |i: usize| (if i.is_multiple_of(3) { "yes" } else { "no" }).to_owned();
    lab.write("train.tsv", &common::pairs(labels));
    lab.write("valid.tsv", &common::pairs(labels));
    lab.write("numbers.tsv", &common::pairs(|i| format!("{}.5", i % 4)));
    lab
}

const RUN: &str = "--model encoder --batch-size 6 --max-length 20 --steps 6 --lr 0.01";

#[test]
fn a_task_from_training_to_its_metrics() {
    let lab = lab();
    let base = names(&lab.path("encoder"));
    let train = format!("train --task labels --data train.tsv --valid valid.tsv {RUN} --json");
    for (method, model) in [("lora", "encoder --adapter out-lora"), ("full", "out-full")] {
        let summary = lab.json(&format!("{train} --method {method} --out out-{method} --log {method}.jsonl"));
        let judged = &summary["evaluation"];
        assert!(
            judged["accuracy"].is_f64() && judged["matthews"].is_f64() && judged["perplexity"].is_null(),
            "{judged}"
        );
        assert_eq!(
            lab.logged(&format!("{method}.jsonl"), "eval_accuracy").last(),
            judged["accuracy"].as_f64().as_ref()
        );
        let eval = format!("eval --task labels --model {model} --data valid.tsv --max-length 20 --batch-size 6");
        assert_eq!(&lab.json(&format!("{eval} --json")), judged, "{method}");
        let text = lab.ok(&eval);
        let lines: Vec<&str> = text.lines().map(|l| l.split_whitespace().next().unwrap()).collect();
        assert_eq!(lines, ["loss", "accuracy", "matthews", "targets"], "{text}");
    }
    assert_eq!(names(&lab.path("encoder")), base, "the base is as it was");

    // Merged, it is a whole model that knows its labels.
    lab.ok("merge --model encoder --adapter out-lora --out merged");
    let eval = "--task labels --data valid.tsv --max-length 20 --json";
    let merged = lab.json(&format!("eval --model merged {eval}"));
    let loss = lab.json(&format!("eval --model encoder --adapter out-lora {eval}"))["loss"].as_f64().unwrap();
    assert!((merged["loss"].as_f64().unwrap() - loss).abs() < 1e-5, "{merged}, {loss}");

    let numbers = lab.json(&format!("train --task values --data numbers.tsv --valid numbers.tsv {RUN} --out n --json"));
    assert!(numbers["evaluation"]["pearson"].is_f64() && numbers["evaluation"]["spearman"].is_f64(), "{numbers}");
}

#[test]
fn a_head_that_an_adapter_brings_is_not_said_to_be_missing() {
    let lab = lab();
    for (start, random) in [("", true), ("--init-adapter first", false)] {
        let out = if random { "first" } else { "second" };
        let output = lab.lora(&format!("train --task labels --data train.tsv {RUN} {start} --out {out}"));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        assert_eq!(stderr.contains("begins at random"), random, "{stderr}");
    }
}

/// As the paper goes on from MNLI: what was learned stays, and a head for something else begins.
#[test]
fn an_adapter_goes_on_to_another_task_with_a_new_head() {
    let lab = lab();
    lab.write("three.tsv", &common::pairs(|i| ["a", "b", "c"][i % 3].to_owned()));
    lab.write("sentences.tsv", "sentence\tlabel\nit is fun\t1\nit is dull\t0\nfun\t1\nno fun\t0\n");
    for (start, of, task, data) in
        [("labels", "three.tsv", "values", "numbers.tsv"), ("values", "numbers.tsv", "sst2", "sentences.tsv")]
    {
        let (first, name) = (format!("first-{start}"), format!("then-{task}"));
        lab.ok(&format!("train --task {start} --data {of} {RUN} --method adapter-p --out {first}"));
        let run = RUN.replace("--lr 0.01", "--lr 1e-30");
        let output = lab.lora(&format!("train --task {task} --data {data} {run} --init-adapter {first} --out {name}"));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        let note =
            format!("{first} was trained for another task: its head is left out, and one for {task} begins at random");
        assert!(stderr.contains(&note), "{stderr}");
        let tensors = |dir: &str| {
            let bytes = lab.bytes(&format!("{dir}/adapter_model.safetensors"));
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let value = |b: &[u8]| f32::from_le_bytes(b.try_into().unwrap());
            let all =
                file.iter().map(|(name, t)| (name.to_owned(), t.data().chunks(4).map(value).collect::<Vec<f32>>()));
            all.collect::<std::collections::BTreeMap<_, _>>()
        };
        let (first, then) = (tensors(&first), tensors(&name));
        assert_eq!(first.keys().collect::<Vec<_>>(), then.keys().collect::<Vec<_>>());
        for (name, values) in &then {
            let near = values.iter().zip(&first[name]).all(|(a, b)| (a - b).abs() < 1e-20);
            assert_eq!(near && values.len() == first[name].len(), !name.contains("classifier"), "{name}");
        }
        lab.ok(&format!("eval --model encoder --adapter {name} --task {task} --data {data} --max-length 20"));
    }
}

#[test]
fn a_model_of_labels_that_look_like_none_keeps_them() {
    let lab = lab();
    lab.write("odd.tsv", &common::pairs(|i| format!("LABEL_{}", ["a", "b"][i % 2])));
    lab.ok(&format!("train --task labels --data odd.tsv {RUN} --method full --out odd"));
    let judged = lab.json("eval --model odd --task labels --data odd.tsv --max-length 20 --json");
    assert!(judged["accuracy"].is_f64(), "{judged}");
}

#[test]
fn headings_that_nobody_knows_are_warned_of() {
    let lab = lab();
    let rows: String = (0..9).map(|i| format!("N{i} serves .\t{}\n", if i % 2 == 0 { "yes" } else { "no" })).collect();
    for (first, warns) in [("review\tclass\n", true), ("", false)] {
        lab.write("own.tsv", &format!("{first}{rows}"));
        let out = if warns { "one" } else { "two" };
        let output = lab.lora(&format!("train --task labels --data own.tsv {RUN} --out {out}"));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        let warning = "warning: own.tsv:1: no other line has the label \"class\"";
        assert_eq!(stderr.contains(warning) && stderr.contains("text and label"), warns, "{stderr}");
        assert_eq!(stderr.contains("own.tsv:"), warns, "{stderr}");
    }
    // What a task calls a label is none.
    lab.write("own.tsv", "dull\t0\nfine\t1\nfun\t1\n");
    let output = lab.lora(&format!("train --task sst2 --data own.tsv {RUN} --out three"));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && !stderr.contains("own.tsv:"), "{stderr}");
}

#[test]
fn tasks_and_models_that_do_not_fit() {
    let lab = lab();
    lab.ok(&format!("train --task labels --data train.tsv {RUN} --out labels"));
    lab.ok(&format!("train --task values --data numbers.tsv {RUN} --out values"));
    lab.ok(&format!("train --task labels --data train.tsv {RUN} --method full --out whole"));
    lab.write("other.tsv", "a\tb\tyes\na\tb\tperhaps\n");
    lab.write("words.tsv", "a\tb\t1.5\na\tb\thigh\n");
    lab.write("one.tsv", "a\tyes\nb\tyes\n");
    lab.write("ragged.tsv", "a\tyes\nb\tc\tno\n");
    let train = format!("train {RUN} --out out");
    for (args, parts) in [
        (format!("{train} --data train.tsv"), &["task = not given", "is an encoder", "sst2"][..]),
        (format!("{train} --task glue --data train.tsv"), &["--task", "sst2"]),
        ("train --model base --task labels --data train.tsv --out out".into(), &["task = labels", "continues text"]),
        (format!("{train} --task labels --data train.tsv --format e2e"), &["train.tsv", "has no labels"]),
        (format!("{train} --task labels --data none.tsv"), &["none.tsv", "cannot read"]),
        (format!("{train} --task labels --data one.tsv"), &["one.tsv", "every example has the label \"yes\""]),
        (format!("{train} --task labels --data ragged.tsv"), &["ragged.tsv:2:", "3 columns"]),
        (format!("{train} --task sst2 --data train.tsv"), &["train.tsv:1:", "no column sentence"]),
        (format!("{train} --task values --data words.tsv"), &["words.tsv:2:3:", "\"high\" is no number"]),
        (format!("{train} --task labels --data train.tsv --valid other.tsv"), &["other.tsv:2:", "\"perhaps\""]),
        (
            "train --model encoder --out out --task labels --data train.tsv --max-length 4".into(),
            &["length of 4", "at least 5"],
        ),
        ("train --model base --data train.tsv --format tsv --out out".into(), &["train.tsv", "--task"]),
        ("eval --model encoder --adapter labels --data train.tsv".into(), &["task = not given"]),
        ("eval --model encoder --task labels --data train.tsv".into(), &["encoder", "id2label"]),
        ("eval --model encoder --task sst2 --data train.tsv".into(), &["no column sentence"]),
        ("eval --model encoder --task values --data numbers.tsv".into(), &["no head", "--adapter", "--method full"]),
        ("eval --model encoder --adapter values --task labels --data train.tsv".into(), &["trained for values"]),
        ("eval --model encoder --adapter whole --task labels --data train.tsv".into(), &["give it as --model"]),
        ("eval --model whole --task values --data numbers.tsv".into(), &["a head of 2 outputs"]),
        ("eval --model whole --task labels --data other.tsv".into(), &["other.tsv:2:", "\"no\", \"yes\""]),
        ("eval --model base --task labels --data train.tsv".into(), &["continues text"]),
        ("generate --model whole --prompt a".into(), &["whole is for classifying sequences"]),
    ] {
        lab.fails(&args, parts);
        assert!(!lab.path("out").exists(), "{args}: wrote to its output");
    }
    // A run goes on as what it was.
    lab.ok(&format!("train --task labels --data train.tsv {RUN} --save-every 2 --out run"));
    lab.fails(&format!("train --task values --data numbers.tsv {RUN} --out run --resume"), &["task = \"labels\""]);
    // One label is another.
    lab.write("train.tsv", &lab.read("train.tsv").replacen("\tyes\n", "\tno\n", 1));
    lab.fails(
        &format!("train --task labels --data train.tsv {RUN} --save-every 2 --out run --resume"),
        &["data has changed"],
    );

    // What an adapter remembers may be damaged.
    lab.set("labels/task.json", "labels", json!(["only"]));
    lab.fails("eval --model encoder --adapter labels --task labels --data train.tsv", &["task.json", "\"labels\""]);
}
