//! The base that an adapter was trained on, and others.

use serde_json::json;

use crate::cli::{bad_input::with_header, lab::Lab};

/// What a command that succeeds says on standard error.
fn said(lab: &Lab, args: &str) -> String {
    let output = lab.lora(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "lora {args}: {stderr}");
    stderr
}

#[test]
fn another_base_is_warned_of_and_refused_when_strict() {
    let lab = Lab::new();
    lab.train("run", "--steps 2 --batch-size 4 --lr 0.05 --rank 2 --targets c_attn");
    lab.train("prefix", "--steps 1 --batch-size 4 --method adapter-p --bottleneck 4");
    lab.train("other", "--method full --steps 2 --batch-size 4 --lr 0.01");
    lab.copy("base", "copy");
    const OTHER: &str = "trained on a base with fingerprint";

    let eval = |base: &str, adapter: &str| format!("eval --model {base} --adapter {adapter} --data valid.txt");
    for adapter in ["run", "prefix"] {
        // The base, wherever it lies, in another type too, is the base.
        for args in [eval("base", adapter), eval("copy", adapter), format!("{} --dtype bf16", eval("base", adapter))] {
            let said = said(&lab, &format!("{args} --strict"));
            assert!(!said.contains("fingerprint"), "{args}: {said}");
        }
        assert!(said(&lab, &eval("other", adapter)).contains(OTHER));
        lab.fails(&format!("{} --strict", eval("other", adapter)), &["--strict", adapter, OTHER]);
    }
    for (i, (args, writes)) in [
        ("generate --model BASE --adapter run --prompt a --max-new-tokens 2", false),
        ("merge --model BASE --adapter run", true),
        ("merge --model BASE --adapters run,run --how cat", true),
        ("analyze run --model BASE", false),
        ("train --model BASE --data train.txt --init-adapter run --steps 1 --batch-size 4", true),
    ]
    .into_iter()
    .enumerate()
    {
        let command = |base: &str, strict: &str| {
            let out = if writes { format!(" --out {base}-{i}") } else { String::new() };
            format!("{}{out}{strict}", args.replace("BASE", base))
        };
        lab.fails(&command("other", " --strict"), &[OTHER]);
        assert!(!lab.path(&format!("other-{i}")).exists(), "{args}");
        assert!(said(&lab, &command("other", "")).contains(OTHER), "{args}");
        assert!(!said(&lab, &command("base", "")).contains(OTHER), "{args}");
    }

    // Adapters of different bases, with no base at hand.
    lab.ok("train --model other --data train.txt --out far --steps 1 --batch-size 4 --rank 2 --targets c_attn");
    for args in ["merge --adapters run,far --how cat --out mixed", "analyze run --against far"] {
        lab.fails(&format!("{args} --strict"), &["run and far", "different bases"]);
        assert!(said(&lab, args).contains("different bases"), "{args}");
    }
    // What came of them belongs to no base; what came of one still knows its own.
    const NOTHING: &str = "no fingerprint of the base";
    assert!(said(&lab, &format!("{} --strict", eval("base", "mixed"))).contains(NOTHING));
    // As PEFT's files do not.
    lab.copy("run", "plain");
    with_header(&lab, "plain/adapter_model.safetensors", |h| h["__metadata__"] = json!({"format": "pt"}));
    for args in [
        &eval("other", "plain"),
        "merge --adapters run,plain --how cat --out plain-1",
        "merge --model other --adapter plain --out plain-2",
        "analyze run --against plain",
        "train --model other --data train.txt --init-adapter plain --steps 1 --batch-size 4 --out plain-3",
    ] {
        assert!(said(&lab, &format!("{args} --strict")).contains(NOTHING), "{args}");
    }
    assert!(!said(&lab, &eval("other", "plain")).contains(NOTHING));
    lab.ok("merge --adapters run:0.5 --out half");
    lab.fails(&format!("{} --strict", eval("other", "half")), &[OTHER]);
    lab.ok("extract --model base --tuned other --rank 2 --out taken");
    lab.ok(&format!("{} --strict", eval("base", "taken")));
    lab.fails(&format!("{} --strict", eval("other", "taken")), &[OTHER]);
}
