//! `lora convert`, and what its folder is good for.

use std::fs;

use crate::{
    cli::lab::{Lab, lines, names},
    common::real_data,
};

#[test]
fn a_converted_model_is_a_base_like_any_other() {
    let Some(model) = real_data("stories260k", "stories260K.bin") else { return };
    let lab = Lab::new();
    fs::copy(model.with_file_name("tok512.bin"), lab.path("vocab.bin")).unwrap();
    fs::copy(model, lab.path("model.bin")).unwrap();
    let convert = "convert --from llama2.c model.bin --tokenizer vocab.bin --out stories";
    let summary = lab.json(&format!("{convert} --json"));
    assert_eq!(summary["architecture"], "llama");
    assert_eq!((summary["parameters"].as_u64(), summary["vocab_size"].as_u64()), (Some(260_032), Some(512)));
    let files =
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    assert_eq!(names(&lab.path("stories")), files);
    lab.fails(convert, &["stories", "not empty"]);

    // A text begins with the token that the model begins texts with, which the prompt does not name.
    let begin = lab.lora_with("generate --model stories --max-new-tokens 12 --prompt", "Once upon a time");
    let begin = crate::cli::lab::success("generate", begin);
    assert_eq!(begin, ", there was a little girl named Lily. She\n");
    let nothing =
        crate::cli::lab::success("", lab.lora_with("generate --model stories --max-new-tokens 4 --prompt", ""));
    assert_eq!(nothing, "Once upon a time\n");

    // LoRA on q and v, which nobody had to name: A [4, 64] and B [64, 4], B [32, 4] in each of five layers.
    let run = "train --model stories --data train.txt --valid valid.txt --out run --rank 4 --steps 12 --lr 0.01 --json";
    let trained = lab.json(&format!("{run} --log log.jsonl"));
    assert_eq!(trained["steps"], 12);
    let losses = lab.logged("log.jsonl", "loss");
    assert!(losses[11] < 0.8 * losses[0], "{losses:?}");
    let info = lab.json("info run --json");
    let info = &info["adapter"];
    assert_eq!(info["targets"], serde_json::json!(["q_proj", "v_proj"]));
    assert_eq!(info["trainable"], 5 * (4 * (64 + 64) + 4 * (64 + 32)));

    // Merged it is the same, and generation takes both.
    lab.ok("merge --model stories --adapter run --out merged");
    let loss = |args: &str| lab.json(&format!("eval --data valid.txt --json {args}"))["loss"].as_f64().unwrap();
    let (beside, merged) = (loss("--model stories --adapter run"), loss("--model merged"));
    assert!((beside - merged).abs() < 1e-5, "{beside} {merged}");
    lab.write("prompts.txt", &lines(3, 2));
    let texts = |args: &str| lab.ok(&format!("generate {args} --data prompts.txt --max-new-tokens 8"));
    assert_eq!(texts("--model stories --adapter run"), texts("--model merged"));
}

#[test]
fn what_is_no_model_is_refused_and_leaves_nothing() {
    let lab = Lab::new();
    let header: Vec<u8> = [8, 6, 1, 2, 1, 264, 5].iter().flat_map(|n: &i32| n.to_le_bytes()).collect();
    fs::write(lab.path("short.bin"), &header).unwrap();
    let whole = [&header[..], &vec![0; 4 * (264 * 8 + 2 * 8 + 192 + 3 * 48 + 8 + 20)]].concat();
    fs::write(lab.path("whole.bin"), whole).unwrap();
    fs::write(lab.path("vocab.bin"), [7, 0, 0, 0]).unwrap();
    let before = names(&lab.path("."));
    for (args, parts) in [
        ("short.bin --tokenizer vocab.bin", &["short.bin", "28 bytes", "cut off"][..]),
        ("whole.bin --tokenizer vocab.bin", &["vocab.bin", "ends within token 0"]),
        ("whole.bin --tokenizer missing.bin", &["missing.bin", "could not read"]),
        ("missing.bin --tokenizer vocab.bin", &["missing.bin", "could not read"]),
        ("base --tokenizer vocab.bin", &["base", "could not read"]),
        ("base/config.json --tokenizer vocab.bin", &["config.json", "llama2.c"]),
        ("whole.bin", &["--tokenizer"]),
    ] {
        lab.fails(&format!("convert --from llama2.c --out out {args}"), parts);
        assert_eq!(names(&lab.path(".")), before, "{args}");
    }
    lab.fails("convert --from gguf whole.bin --tokenizer vocab.bin --out out", &["gguf", "llama2.c"]);
    lab.fails("convert --from llama2.c whole.bin --tokenizer vocab.bin --out base", &["base", "not empty"]);
    lab.fails("convert --from llama2.c whole.bin --tokenizer vocab.bin --out train.txt", &["train.txt", "folder"]);
}

/// A LoRA of `c_attn.q,c_attn.v` through loralib's format and back, and an adapter through AdapterHub's.
#[test]
fn adapters_travel_to_other_programs_and_back() {
    let lab = Lab::new();
    let loss = |adapter: &str| {
        let eval = lab.json(&format!("eval --model base --adapter {adapter} --data valid.txt --json"));
        eval["loss"].as_f64().unwrap()
    };
    lab.train("run", "--steps 4 --batch-size 4 --lr 0.05 --rank 2 --alpha 6 --targets c_attn.q,c_attn.v,c_fc");
    let about = lab.json("convert run --to loralib --model base --out run.pt --json");
    assert_eq!((&about["r"], &about["lora_alpha"]), (&serde_json::json!(2), &serde_json::json!(6.0)));
    assert_eq!(about["enable_lora"], serde_json::json!({"attn.c_attn": [true, false, true]}));
    let back = "convert run.pt --from loralib --model base --alpha 6";
    let found = lab.json(&format!("{back} --parts q,v --out back --json"));
    assert_eq!(found["targets"], serde_json::json!(["attn.c_attn.q", "attn.c_attn.v", "mlp.c_fc"]));
    assert_eq!(loss("back"), loss("run"));
    lab.fails(&format!("{back} --out nowhere"), &["run.pt", "c_attn", "--parts"]);
    lab.fails("convert run.pt --from loralib --model base --out nowhere", &["--alpha"]);
    lab.fails("convert run.pt --from loralib --alpha 6 --out nowhere", &["--model"]);
    lab.fails("convert run --to loralib --model base --out run.pt", &["run.pt", "there already"]);
    lab.fails("convert run --to loralib --from loralib --model base --out x.pt", &["--from"]);
    for (flag, of) in [
        ("--alpha 3", "--from loralib"),
        ("--parts q", "--from loralib"),
        ("--labels 2", "--from adapterhub"),
        ("--name foo", "--to adapterhub"),
        ("--tokenizer vocab.bin", "llama2.c"),
    ] {
        lab.fails(
            &format!("convert run --to loralib --model base --out x.pt {flag}"),
            &[flag.split_once(' ').unwrap().0, of],
        );
    }

    for method in ["adapter-p", "adapter-h"] {
        lab.train(method, &format!("--steps 4 --batch-size 4 --lr 0.05 --method {method} --bottleneck 5"));
        lab.ok(&format!("convert {method} --to adapterhub --model base --name mine --out hub-{method}"));
        assert_eq!(names(&lab.path(&format!("hub-{method}"))), ["adapter_config.json", "pytorch_adapter.bin"]);
        let found =
            lab.json(&format!("convert hub-{method} --from adapterhub --model base --out back-{method} --json"));
        assert_eq!(found["method"], method);
        assert_eq!(loss(&format!("back-{method}")), loss(method));
    }
    lab.fails("convert run --to adapterhub --model base --out nowhere", &["method lora", "adapter-p"]);
    assert!(!lab.path("nowhere").exists());
}

/// A file that would run a program when Python reads it.
#[test]
fn a_file_that_would_run_something_is_refused() {
    let lab = Lab::new();
    let marker = lab.path("owned");
    let command = format!("touch {}", marker.display());
    // `os.system(command)`, in the stream that PyTorch wrote before 1.6.
    let mut bytes = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\x80\x02}.\x80\x02cposix\nsystem\nX".to_vec();
    bytes.extend((command.len() as u32).to_le_bytes());
    bytes.extend(command.bytes());
    bytes.extend(b"\x85R.");
    fs::write(lab.path("evil.pt"), bytes).unwrap();
    let convert = "convert evil.pt --from loralib --model base --alpha 1 --out out";
    lab.fails(convert, &["evil.pt", "posix.system", "no part of a tensor"]);
    assert!(!marker.exists() && !lab.path("out").exists());
}
