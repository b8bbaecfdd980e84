//! `lora generate --adapters`.

use serde_json::{Value, json};

use crate::cli::lab::Lab;

fn lab() -> Lab {
    let lab = Lab::new();
    for (name, options) in [("a", "--rank 2 --targets c_attn,c_fc"), ("b", "--rank 4 --use-dora --targets c_attn")] {
        lab.train(name, &format!("--steps 8 --batch-size 4 --lr 0.05 {options}"));
    }
    lab.train("biases", "--method bitfit --steps 2 --batch-size 4");
    lab
}

const GENERATE: &str = "generate --model base --max-new-tokens 9 --eos none";

#[test]
fn every_prompt_has_the_adapter_that_its_line_names() {
    let lab = lab();
    let text =
        |args: &str, prompt: &str| lab.json(&format!("{GENERATE} {args} --prompt {prompt} --json"))["text"].clone();
    let alone = |adapter: &str, prompt: &str| match adapter {
        "" => text("", prompt),
        name => text(&format!("--adapter {name}"), prompt),
    };
    // Ids of prompts end as in training there; here the prompts are texts as they are.
    let lines = [("a", "Blue"), ("", "Blue"), ("second", "Blue"), ("a", "Old"), ("second", "near")];
    let file: String = (lines.iter())
        .map(|&(adapter, text)| match adapter {
            "" => json!({"text": text}),
            name => json!({"text": text, "adapter": name}),
        })
        .map(|line| format!("{line}\n"))
        .collect();
    lab.write("prompts.jsonl", &file);
    for batch in [1, 3, 16] {
        let out = lab.ok(&format!("{GENERATE} --adapters a,second=b --data prompts.jsonl --batch-size {batch} --json"));
        let out: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(out.len(), lines.len());
        for (line, (adapter, prompt)) in out.iter().zip(lines) {
            let folder = if adapter == "second" { "b" } else { adapter };
            assert_eq!(line["text"], alone(folder, prompt), "{adapter}: {prompt}, {batch} at a time");
            assert_eq!(line["adapter"], if adapter.is_empty() { Value::Null } else { json!(adapter) });
        }
    }
    // One prompt by each.
    let both = lab.ok(&format!("{GENERATE} --adapters second=b,a --prompt Blue"));
    let expected = [("second", "b"), ("a", "a")].map(|(name, folder)| {
        let text = alone(folder, "Blue");
        format!("{name}: {}", text.as_str().unwrap())
    });
    assert_eq!(both.trim_end(), expected.join("\n").trim_end());
    assert_ne!(alone("a", "Blue"), alone("", "Blue"), "adapters that change nothing show nothing");
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let lab = lab();
    lab.write("named.jsonl", "{\"prompt\": \"Blue\"}\n\n{\"prompt\": \"Old\", \"adapter\": \"c\"}\n");
    lab.write("number.jsonl", "{\"prompt\": \"Blue\", \"adapter\": 3}\n");
    for (args, parts) in [
        // A key that would be passed over.
        ("--data named.jsonl", &["named.jsonl", "\"adapter\"", "--adapters c=DIR"][..]),
        ("--data named.jsonl --adapter a", &["\"adapter\"", "--adapters c=DIR"]),
        ("--data named.jsonl --adapters a,b", &["named.jsonl:3", "`c`", "a, b"]),
        ("--data number.jsonl --adapters a", &["number.jsonl:1", "\"adapter\" is a number"]),
        ("--data train.txt --adapters a", &["train.txt", "JSON lines", "--adapter"]),
        ("--prompt a --adapters a,a=b", &["two of the name `a`"]),
        ("--prompt a --adapters a,biases", &["`biases` cannot share a batch", "run its texts alone"]),
        ("--prompt a --adapters a --adapter b", &["--adapters", "--adapter"]),
        ("--prompt a --adapters base", &["whole model"]),
    ] {
        lab.fails(&format!("{GENERATE} {args}"), parts);
    }
    lab.model("other", |c| c.n_inner = Some(48));
    lab.fails("generate --model other --prompt a --adapters b --strict", &["--strict", "fingerprint"]);
}
