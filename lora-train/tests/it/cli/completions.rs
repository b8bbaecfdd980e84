//! `--task e2e`: prompts with several references, from training to the scores of what is generated.

use serde_json::{Value, json};

use crate::{
    cli::lab::{Lab, lines},
    common,
};

/// The records of [`lines`], each told twice on neighbouring lines.
fn told_twice(from: usize, n: usize) -> String {
    let twice = |line: &str| format!("{line}\n{}\n", line.replace(" serves ", " has ").replace(" the ", " a "));
    lines(from, n).lines().map(twice).collect()
}

fn lab() -> Lab {
    let lab = Lab::new();
    lab.write("test.txt", &told_twice(40, 6));
    lab
}

const QUICK: &str = "--num-beams 3 --max-new-tokens 12";

#[test]
fn from_training_to_scores() {
    let lab = lab();
    let options = "--lr 3e-2 --rank 4 --steps 30 --valid test.txt --json --targets c_attn,c_fc";
    lab.train("plain", options);
    let summary: Value = serde_json::from_str(&lab.train("run", &format!("{options} --task e2e"))).unwrap();
    assert!(summary["evaluation"]["perplexity"].is_f64(), "{summary}");
    assert!(lab.bytes("run/adapter_model.safetensors") == lab.bytes("plain/adapter_model.safetensors"));
    assert!(!lab.path("run/task.json").exists(), "an adapter of a model that continues text is like any");

    let eval = "eval --model base --adapter run --data test.txt";
    let judged = lab.json(&format!("{eval} --task e2e {QUICK} --json --predictions said.txt"));
    let keys: Vec<&str> = judged.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(
        keys,
        ["loss", "perplexity", "bleu", "nist", "meteor_exact_stem", "rouge_l", "cider", "targets", "prompts"]
    );
    assert!(judged.as_object().unwrap().values().all(Value::is_number), "{judged}");
    let plain = lab.json(&format!("{eval} --json"));
    assert!(["loss", "perplexity", "targets"].into_iter().all(|key| judged[key] == plain[key]), "{judged} {plain}");
    assert_eq!(judged["prompts"], json!(6));
    assert!(judged["rouge_l"].as_f64().unwrap() > 0.0, "{judged}");

    // The texts are those of `lora generate`, whatever the batch, and in JSON lines too.
    let said = lab.read("said.txt");
    assert_eq!(said.lines().count(), 6);
    assert!(!lab.path("said.txt.part").exists());
    let generate = format!("generate --model base --adapter run --data test.txt {QUICK} --length-penalty 0.9");
    assert_eq!(lab.ok(&format!("{generate} --no-repeat-ngram-size 4 --repeat-prompt-ngrams")), said);
    // What a prompt says may be said once more.
    let once = "--no-repeat-ngram-size 1";
    lab.json(&format!("{eval} --task e2e {QUICK} {once} --json --predictions once.txt"));
    assert_eq!(lab.ok(&format!("{generate} {once} --repeat-prompt-ngrams")), lab.read("once.txt"));
    assert_ne!(lab.ok(&format!("{generate} {once}")), lab.read("once.txt"));
    let again = lab.json(&format!("{eval} --task e2e {QUICK} --json --batch-size 1 --predictions again.txt"));
    assert_eq!((&again["bleu"], lab.read("again.txt")), (&judged["bleu"], said.clone()));
    let pair = |line: &str| {
        let (prompt, completion) = line.split_once("||").unwrap();
        format!("{}\n", json!({"prompt": prompt, "completion": completion}))
    };
    lab.write("test.jsonl", &lab.read("test.txt").lines().map(pair).collect::<String>());
    let from_json = lab.json(&format!("{} --task e2e {QUICK} --json", eval.replace("test.txt", "test.jsonl")));
    assert_eq!(from_json, judged);

    // A file of texts is scored without a model, as lines or as JSON lines.
    let mut scores = judged.clone();
    ["loss", "perplexity", "targets"].into_iter().for_each(|key| drop(scores.as_object_mut().unwrap().remove(key)));
    let text = |line: &str| format!("{}\n", json!({"prompt": "p", "text": line}));
    lab.write("said.jsonl", &said.lines().map(text).collect::<String>());
    for file in ["said.txt", "said.jsonl"] {
        assert_eq!(lab.json(&format!("eval --task e2e --data test.txt --score {file} --json")), scores, "{file}");
    }
    lab.write(
        "right.txt",
        &lines(40, 6).lines().map(|l| format!("{}\n", l.split_once("||").unwrap().1)).collect::<String>(),
    );
    assert_eq!(
        lab.ok("eval --task e2e --data test.txt --score right.txt").lines().collect::<Vec<_>>()[0..3],
        ["BLEU 100.0000", "NIST 6.4535", "METEOR (exact, stem) 0.9991"]
    );
    lab.write("blank.txt", &"\r\n".repeat(6));
    assert_eq!(lab.json("eval --task e2e --data test.txt --score blank.txt --json")["bleu"], json!(0.0));

    let text = lab.ok(&format!("{eval} --task e2e {QUICK}"));
    let titles =
        ["loss", "perplexity", "BLEU", "NIST", "METEOR (exact, stem)", "ROUGE-L", "CIDEr", "targets", "prompts"];
    let shown: Vec<&str> = text.lines().map(|line| line.rsplit_once(' ').unwrap().0).collect();
    assert_eq!(shown, titles, "{text}");
}

#[test]
fn prompts_that_come_again_after_others_are_warned_of() {
    let lab = lab();
    let scored = |file: &str| {
        let output = lab.lora(&format!("eval --task e2e --data {file} --score said.txt"));
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    lab.write("said.txt", &"a\n".repeat(6));
    assert_eq!(scored("test.txt"), "");
    let twice = told_twice(40, 6);
    lab.write(
        "apart.txt",
        &format!("{}{}", told_twice(40, 4), twice.lines().take(3).map(|l| format!("{l}\n")).collect::<String>()),
    );
    let warned = scored("apart.txt");
    assert!(warned.starts_with("warning: apart.txt: 2 times a prompt comes again"), "{warned}");
}

#[test]
fn completions_that_cannot_be_judged() {
    let lab = lab();
    let golden = common::golden().into_iter().find(|g| g.parent().unwrap().ends_with("bert_classification")).unwrap();
    common::base(&golden, &lab.path("encoder"), |raw| raw.set("architectures", vec!["BertModel"]));
    lab.write("texts.jsonl", "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"text\": \"c\"}\n");
    lab.write("empty.txt", "");
    lab.write("pairs.tsv", "a\tb\tyes\n");
    lab.write("long.txt", &format!("a : b||c\n{}||c\n", "name ".repeat(80)));
    lab.write("five.txt", &"a\n".repeat(5));
    lab.write("said.jsonl", "{\"text\": \"a\"}\n{\"said\": \"b\"}\n");
    lab.write("broken.jsonl", "{\"text\": \"a\"\n");
    std::fs::write(lab.path("latin.txt"), b"caf\xe9\n").unwrap();
    let eval = "eval --model base --task e2e --data test.txt";
    let score = "eval --task e2e --data test.txt --score";
    for (args, parts) in [
        (
            "train --model encoder --data train.txt --task e2e --out out".to_owned(),
            &["task = e2e", "is an encoder", "sst2"][..],
        ),
        ("train --model base --data pairs.tsv --task labels --out out".into(), &["continues text", "e2e", "encoder"]),
        ("train --model base --data texts.jsonl --task e2e --out out".into(), &["texts.jsonl:2:", "without a prompt"]),
        ("train --model base --data train.txt --task e2e --out out --format tsv".into(), &["train.txt", "format tsv"]),
        (
            "train --model base --data train.txt --task e2e --out out --format text".into(),
            &["train.txt", "format text"],
        ),
        ("train --model base --data empty.txt --task e2e --out out".into(), &["empty.txt", "is empty"]),
        ("eval --model encoder --data test.txt --task e2e".into(), &["task = e2e", "is an encoder"]),
        ("eval --model base --data empty.txt --task e2e".into(), &["empty.txt", "is empty"]),
        ("eval --model base --data long.txt --task e2e".into(), &["long.txt:2:", "64 positions", "shorten"]),
        (format!("{eval} --num-beams 0"), &["num-beams = 0"]),
        (format!("{eval} --max-new-tokens 0"), &["max-new-tokens = 0"]),
        (format!("{eval} --length-penalty nan"), &["length-penalty = NaN"]),
        (format!("{eval} --batch-size 0"), &["batch-size = 0"]),
        (format!("{eval} --predictions base"), &["base", "--predictions is a file"]),
        (format!("{eval} --predictions nowhere/said.txt"), &["nowhere"]),
        (format!("{eval} --score five.txt"), &["--score", "--model"]),
        (format!("{score} five.txt --num-beams 3"), &["--score", "--num-beams"]),
        (format!("{score} five.txt"), &["five.txt: 5 predictions for the 6 prompts of test.txt"]),
        (format!("{score} empty.txt"), &["empty.txt", "is empty"]),
        (format!("{score} nowhere.txt"), &["nowhere.txt", "cannot read"]),
        (format!("{score} latin.txt"), &["latin.txt:1:", "UTF-8"]),
        (format!("{score} said.jsonl"), &["said.jsonl:2:", "\"text\""]),
        (format!("{score} broken.jsonl"), &["broken.jsonl:1:", "JSON"]),
        ("eval --data test.txt --score five.txt".into(), &["score = given", "--task e2e"]),
        ("eval --data test.txt --task e2e".into(), &["--model"]),
        ("eval --model base --data test.txt --num-beams 3".into(), &["num-beams = given", "--task e2e"]),
        ("eval --model base --data test.txt --predictions said.txt".into(), &["predictions = given", "--task e2e"]),
        ("eval --model base --data test.txt --task bleu".into(), &["--task", "e2e"]),
    ] {
        lab.fails(&args, parts);
        assert!(!lab.path("out").exists() && !lab.path("said.txt").exists(), "{args}: wrote to its output");
    }
}

#[cfg(unix)]
/// As an evaluation whose comparison was killed may still be at work.
#[test]
fn two_do_not_write_the_same_texts() {
    let lab = lab();
    let part = std::fs::File::create(lab.path("said.txt.part")).unwrap();
    part.lock().unwrap();
    let eval = format!("eval --model base --task e2e --data test.txt {QUICK} --predictions said.txt");
    lab.fails(&eval, &["said.txt.part", "another process is writing it"]);
    drop(part);
    lab.ok(&eval);
    assert_eq!(lab.read("said.txt").lines().count(), 6);
}

#[test]
fn ctrl_c_keeps_the_texts_so_far() {
    let lab = lab();
    lab.write("many.txt", &told_twice(0, 2000));
    lab.write("said.txt", "of before\n");
    let args = "eval --model base --task e2e --data many.txt --batch-size 2 --num-beams 2 --predictions said.txt";
    let mut child = lab.spawn(args);
    lab.wait_for_lines(&mut child, "said.txt.part", 4);
    let sent = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("said.txt.part") && !stderr.contains("error") && output.stdout.is_empty(), "{stderr}");
    assert_eq!(lab.read("said.txt"), "of before\n");
    let kept = lab.read("said.txt.part");
    assert!(kept.ends_with('\n') && (4..2000).contains(&kept.lines().count()), "{}", kept.lines().count());
}
