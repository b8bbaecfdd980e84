//! Runs that are cut off: by a kill, by Ctrl-C, by a full disk, by numbers that are none.

use std::{fs, process::Command};

use crate::lab::{Lab, lines, names};

/// Everything that has a state: order over several epochs, dropout of base and adapter, a schedule, evaluations.
const RUN: &str = "train --model base --data train.txt --valid valid.txt --targets c_attn.q,c_proj --rank 2 --dropout 0.1 \
                   --steps 31 --batch-size 6 --grad-accum 2 --warmup 4 --schedule cosine --lr 1e-2 --save-every 4";

#[test]
fn a_killed_run_goes_on_as_if_nothing_had_been() {
    let lab = Lab::new();
    lab.ok(&format!("{RUN} --out whole --log whole.jsonl"));
    // Lines of the log after which each life of the run is killed.
    for (i, kills) in [&[0][..], &[1], &[4], &[5], &[13, 22], &[4, 5, 30], &[36]].iter().enumerate() {
        let (out, log) = (format!("run{i}"), format!("log{i}.jsonl"));
        let args = format!("{RUN} --out {out} --log {log}");
        for (life, &n) in kills.iter().enumerate() {
            let mut child = lab.spawn(&format!("{args} {}", if life > 0 { "--resume" } else { "" }));
            lab.wait_for_lines(&mut child, &log, n);
            child.kill().unwrap();
            child.wait().unwrap();
        }
        lab.ok(&format!("{args} --resume"));
        assert_eq!(lab.log(&log), lab.log("whole.jsonl"), "{kills:?}");
        let file = "adapter_model.safetensors";
        assert!(lab.bytes(&format!("{out}/{file}")) == lab.bytes(&format!("whole/{file}")), "{kills:?}");
        assert_eq!(names(&lab.path(&out)), names(&lab.path("whole")), "{kills:?}");
        assert_eq!(names(&lab.path(&out).join("checkpoints")), names(&lab.path("whole/checkpoints")), "{kills:?}");
    }
}

#[test]
fn a_kill_while_writing_leaves_the_checkpoint_before() {
    let lab = Lab::new();
    lab.ok(&format!("{RUN} --out whole --log whole.jsonl"));
    let last = 28;
    // As a kill in the middle of writing the last checkpoint leaves things: a part of it under its temporary name with
    // a part of a file, a line of the log without its end, and no result.
    for cut in [0, 1, 100] {
        let out = format!("cut{cut}");
        let log = format!("cut{cut}.jsonl");
        lab.ok(&format!("{RUN} --out {out} --log {log}"));
        let checkpoints = lab.path(&out).join("checkpoints");
        fs::remove_dir_all(checkpoints.join("step-00000031")).unwrap();
        let partial = checkpoints.join(".partial-step-00000028");
        fs::rename(checkpoints.join(format!("step-{last:08}")), &partial).unwrap();
        let state = fs::read(partial.join("state.safetensors")).unwrap();
        fs::write(partial.join("state.safetensors"), &state[..cut]).unwrap();
        fs::write(partial.join(".state.json.77-3.tmp"), "{").unwrap();
        fs::remove_file(lab.path(&out).join("adapter_config.json")).unwrap();
        fs::write(lab.path(&out).join(".adapter_model.safetensors.77-0.tmp"), "x").unwrap();
        let text = lab.read(&log);
        lab.write(&log, &text[..text.len() - 20]);

        let output = lab.lora(&format!("{RUN} --out {out} --log {log} --resume"));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && stderr.contains("continuing after step 24"), "{stderr}");
        assert_eq!(lab.log(&log), lab.log("whole.jsonl"));
        let file = "adapter_model.safetensors";
        assert!(lab.bytes(&format!("{out}/{file}")) == lab.bytes(&format!("whole/{file}")));
        assert_eq!(names(&checkpoints), names(&lab.path("whole/checkpoints")));
        assert_eq!(names(&lab.path(&out)), names(&lab.path("whole")));
    }
}

#[test]
fn a_run_is_resumed_only_as_itself() {
    let lab = Lab::new();
    let output = lab.lora(&format!("{RUN} --out run --resume"));
    assert!(String::from_utf8_lossy(&output.stderr).contains("starting from the beginning"));
    assert!(output.status.success());
    let before = names(&lab.path("run"));
    lab.fails(&format!("{RUN} --out run"), &["run", "another run", "--resume"]);
    for (change, parts) in [
        ("--lr 1e-3", &["lr = 0.01", "0.001"][..]),
        ("--seed 3", &["seed = 0", "3"]),
        ("--method full", &["method", "full"]),
        ("--rank 3", &["rank = 2", "3"]),
    ] {
        let flag = change.split(' ').next().unwrap();
        let kept: Vec<&str> = RUN.split_whitespace().collect();
        let args = match kept.iter().position(|a| *a == flag) {
            Some(i) => [&kept[..i], &kept[i + 2..]].concat().join(" "),
            None => RUN.to_owned(),
        };
        lab.fails(&format!("{args} {change} --out run --resume"), parts);
    }
    lab.write("train.txt", &lines(1, 40));
    lab.fails(&format!("{RUN} --out run --resume"), &["data has changed"]);
    assert_eq!(names(&lab.path("run")), before);

    lab.copy("base", "model");
    lab.fails(&format!("{RUN} --out model"), &["model", "config.json"]);
    lab.fails(&format!("{RUN} --out model --resume"), &["model", "no run to resume"]);
    lab.fails(&format!("{RUN} --out train.txt"), &["train.txt", "is a file"]);
    // A damaged checkpoint is told of by name.
    lab.write("train.txt", &lines(0, 40));
    let state = "run/checkpoints/step-00000031/state.safetensors";
    fs::write(lab.path(state), &lab.bytes(state)[..200]).unwrap();
    lab.fails(&format!("{RUN} --out run --resume"), &["step-00000031/state.safetensors"]);
}

#[test]
fn a_pretraining_run_is_resumed_too() {
    let lab = Lab::new();
    let args = "pretrain --text train.txt --vocab 300 --layers 2 --dim 16 --heads 2 --context 32 --epochs 2 \
                --batch-size 4 --save-every 5 --warmup 3";
    lab.ok(&format!("{args} --out whole --log whole.jsonl"));
    let mut child = lab.spawn(&format!("{args} --out run --log log.jsonl"));
    lab.wait_for_lines(&mut child, "log.jsonl", 7);
    child.kill().unwrap();
    child.wait().unwrap();
    lab.fails(&format!("{} --out run --resume", args.replace("--heads 2", "--heads 4")), &["heads 2", "heads 4"]);
    lab.ok(&format!("{args} --out run --log log.jsonl --resume"));
    assert_eq!(lab.log("log.jsonl"), lab.log("whole.jsonl"));
    assert!(lab.bytes("run/model.safetensors") == lab.bytes("whole/model.safetensors"));
    lab.ok("eval --model run --data valid.txt");
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_exits() {
    let lab = Lab::new();
    let args = RUN.replace("--steps 31", "--steps 400").replace("--save-every 4", "");
    lab.ok(&format!("{args} --out whole --log whole.jsonl"));
    let mut child = lab.spawn(&format!("{args} --out run --log log.jsonl"));
    lab.wait_for_lines(&mut child, "log.jsonl", 3);
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("--resume") && !stderr.contains("error"), "{stderr}");
    assert_eq!(names(&lab.path("run/checkpoints")).len(), 1);
    lab.ok(&format!("{args} --out run --log log.jsonl --resume"));
    assert_eq!(lab.log("log.jsonl"), lab.log("whole.jsonl"));
    let file = "adapter_model.safetensors";
    assert!(lab.bytes(&format!("run/{file}")) == lab.bytes(&format!("whole/{file}")));
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_and_keeps_its_checkpoint() {
    let lab = Lab::new();
    // Only the last, longest line reaches the position whose embedding is NaN.
    lab.write("last.txt", &format!("{}a||{}\n", "a : b||c\n".repeat(12), "the tea ".repeat(20)));
    lab.copy("base", "nan");
    let mut bytes = lab.bytes("nan/model.safetensors");
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..start]).unwrap();
    let end = header["transformer.wpe.weight"]["data_offsets"][1].as_u64().unwrap() as usize;
    bytes[start + end - 30 * 64..start + end - 29 * 64].fill(0xff);
    fs::write(lab.path("nan/model.safetensors"), bytes).unwrap();

    let args = "train --model nan --data last.txt --no-shuffle --batch-size 1 --epochs 1 --save-every 4 --out run";
    let error = lab.fails(&format!("{args} --log log.jsonl"), &["step 13", "loss", "NaN", "--lr"]);
    assert!(error.contains("kept"), "{error}");
    assert_eq!(lab.logged("log.jsonl", "step").len(), 12);
    assert_eq!(names(&lab.path("run/checkpoints")), ["step-00000004", "step-00000008", "step-00000012"]);
    assert_eq!(names(&lab.path("run")), ["checkpoints", "run.toml"]);
    lab.fails("eval --model nan --data last.txt", &["last.txt", "NaN"]);
}

#[test]
fn a_full_disk_loses_nothing_that_was_saved() {
    let lab = Lab::new();
    if cfg!(target_os = "linux") {
        lab.fails(&format!("{RUN} --out run --log /dev/full"), &["/dev/full", "No space left"]);
        let mut c = Command::new(env!("CARGO_BIN_EXE_lora"));
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = c.arg("info").arg(lab.path("base")).stdout(full).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && stderr.contains("standard output"), "{stderr}");
    }

    let disk = lab.path("disk");
    fs::create_dir(&disk).unwrap();
    let mount = |options: &str| {
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "lora-test"]).arg(&disk).output();
        mounted.is_ok_and(|o| o.status.success())
    };
    if !mount("size=128k") {
        eprintln!("skipped: a small disk to fill needs the right to mount a tmpfs");
        return;
    }
    struct Unmount<'a>(&'a std::path::Path);
    impl Drop for Unmount<'_> {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(self.0).status();
        }
    }
    let _unmount = Unmount(&disk);
    lab.ok(&format!("{RUN} --out whole --log whole.jsonl"));
    lab.fails(&format!("{RUN} --out disk/run --log log.jsonl"), &["disk/run", "No space left"]);
    let checkpoints = names(&disk.join("run/checkpoints"));
    assert!(!checkpoints.is_empty() && checkpoints.iter().all(|n| n.starts_with("step-")), "{checkpoints:?}");
    assert_eq!(names(&disk.join("run")), ["checkpoints", "run.toml"]);
    lab.fails("merge --model base --adapter whole --out disk/merged", &["disk", "No space left"]);
    assert_eq!(names(&disk), ["run"]);
    assert!(mount("remount,size=4m"), "the disk grows");
    lab.ok(&format!("{RUN} --out disk/run --log log.jsonl --resume"));
    assert_eq!(lab.log("log.jsonl"), lab.log("whole.jsonl"));
    let file = "adapter_model.safetensors";
    assert!(lab.bytes(&format!("disk/run/{file}")) == lab.bytes(&format!("whole/{file}")));
}
