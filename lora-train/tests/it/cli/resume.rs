//! Runs that are cut off: by a kill, by Ctrl-C, by a full disk, by numbers that are none.

use std::{fs, process::Command};

use crate::cli::lab::{Lab, lines, names};

/// Everything that has a state: order over several epochs, dropout of base and adapter, a schedule, evaluations.
const RUN: &str = "train --model base --data train.txt --valid valid.txt --targets c_attn.q,c_proj --rank 2 --dropout 0.1 \
                   --steps 31 --batch-size 6 --grad-accum 2 --warmup 4 --schedule cosine --lr 1e-2 --save-every 4";

#[test]
fn a_killed_run_goes_on_as_if_nothing_had_been() {
    let lab = Lab::new();
    let whole = |dtype: &str| format!("whole-{dtype}");
    for dtype in ["f32", "bf16"] {
        let whole = whole(dtype);
        lab.ok(&format!("{RUN} --dtype {dtype} --out {whole} --log {whole}.jsonl"));
    }
    assert_ne!(lab.log("whole-f32.jsonl"), lab.log("whole-bf16.jsonl"), "the base was not rounded");
    // Lines of the log after which each life of the run is killed.
    let in_f32 = [&[0][..], &[1], &[4], &[5], &[13, 22], &[4, 5, 30], &[36]].map(|kills| (kills, "f32"));
    let in_bf16 = [&[5][..], &[13, 22]].map(|kills| (kills, "bf16"));
    for (i, (kills, dtype)) in in_f32.into_iter().chain(in_bf16).enumerate() {
        let (out, log, whole) = (format!("run{i}"), format!("log{i}.jsonl"), whole(dtype));
        let args = format!("{RUN} --dtype {dtype} --out {out} --log {log}");
        for (life, &n) in kills.iter().enumerate() {
            let mut child = lab.spawn(&format!("{args} {}", if life > 0 { "--resume" } else { "" }));
            lab.wait_for_lines(&mut child, &log, n);
            child.kill().unwrap();
            child.wait().unwrap();
        }
        lab.ok(&format!("{args} --resume"));
        let what = format!("{kills:?}, {dtype}");
        assert_eq!(lab.log(&log), lab.log(&format!("{whole}.jsonl")), "{what}");
        let file = "adapter_model.safetensors";
        assert!(lab.bytes(&format!("{out}/{file}")) == lab.bytes(&format!("{whole}/{file}")), "{what}");
        assert_eq!(names(&lab.path(&out)), names(&lab.path(&whole)), "{what}");
        let checkpoints = |run: &str| names(&lab.path(run).join("checkpoints"));
        assert_eq!(checkpoints(&out), checkpoints(&whole), "{what}");
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
    lab.write("train.txt", &lines(0, 40));

    // Weights that changed, though their shapes are the same.
    let weights = lab.bytes("base/model.safetensors");
    let mut changed = weights.clone();
    let middle = changed.len() - 4 * changed.len().div_ceil(8);
    changed[middle..].iter_mut().step_by(4).for_each(|b| *b ^= 1);
    fs::write(lab.path("base/model.safetensors"), changed).unwrap();
    lab.fails(&format!("{RUN} --out run --resume"), &["the base model has changed"]);
    fs::write(lab.path("base/model.safetensors"), weights).unwrap();
    assert_eq!(names(&lab.path("run")), before);
}

#[test]
fn damaged_checkpoints_are_passed_over() {
    let lab = Lab::new();
    lab.ok(&format!("{RUN} --out run --log log.jsonl"));
    let (log, adapter) = (lab.log("log.jsonl"), lab.bytes("run/adapter_model.safetensors"));
    let tensors = lab.path("run/checkpoints/step-00000031/state.safetensors");
    fs::write(&tensors, &fs::read(&tensors).unwrap()[..200]).unwrap();
    fs::remove_file(lab.path("run/checkpoints/step-00000028/state.json")).unwrap();
    fs::create_dir(lab.path("run/checkpoints/step-00000099")).unwrap();
    let output = lab.lora(&format!("{RUN} --out run --log log.jsonl --resume"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    for part in ["step-00000099 is no whole", "step-00000031 is no whole", "step-00000028 is no whole", "after step 24"]
    {
        assert!(stderr.contains(part), "{part}: {stderr}");
    }
    assert_eq!(lab.log("log.jsonl"), log);
    assert!(lab.bytes("run/adapter_model.safetensors") == adapter);
}

/// A newer one that is damaged is no reason to remove the last that is whole.
#[test]
fn what_was_just_saved_is_kept_whatever_lies_beside_it() {
    let lab = Lab::new();
    let run = "train --model base --data train.txt --batch-size 4 --save-every 3 --keep 1 --out run";
    lab.ok(&format!("{run} --steps 6"));
    fs::create_dir(lab.path("run/checkpoints/step-00000099")).unwrap();
    fs::remove_dir_all(lab.path("run/checkpoints/step-00000006")).unwrap();
    lab.ok(&format!("{run} --steps 6 --resume"));
    assert_eq!(names(&lab.path("run/checkpoints")), ["step-00000006", "step-00000099"]);
}

#[test]
fn checkpoints_without_their_run_are_not_begun_over() {
    let lab = Lab::new();
    lab.ok("train --model base --data train.txt --steps 4 --batch-size 4 --save-every 2 --out run");
    for file in ["run.toml", "adapter_config.json", "adapter_model.safetensors"] {
        fs::remove_file(lab.path(&format!("run/{file}"))).unwrap();
    }
    let again = "train --model base --data train.txt --steps 4 --batch-size 4 --save-every 2 --out run";
    lab.fails(again, &["holds checkpoints of something else"]);
    lab.fails(&format!("{again} --resume"), &["holds checkpoints but no run.toml"]);
}

#[test]
fn a_runs_own_configuration_is_no_file_to_begin_with() {
    let lab = Lab::new();
    fs::create_dir(lab.path("run")).unwrap();
    let mine = "# mine\nmodel = \"base\"\ndata = \"train.txt\"\nout = \"run\"\nsteps = 2\n";
    lab.write("run/run.toml", mine);
    lab.fails("train --config run/run.toml", &["run/run.toml", "would be overwritten"]);
    assert_eq!(lab.read("run/run.toml"), mine);
    lab.ok("train --config run/run.toml --out other");
    lab.ok("train --config other/run.toml --out other --resume");
}

#[test]
fn a_fusion_goes_on_with_the_adapters_that_it_began_with() {
    let lab = Lab::new();
    let adapter = |name: &str, seed: u64| {
        let _ = fs::remove_dir_all(lab.path(name));
        lab.train(name, &format!("--method adapter-p --bottleneck 3 --steps 1 --seed {seed}"));
    };
    adapter("first", 1);
    adapter("second", 2);
    let run = "--method fusion --fuse first,second --steps 4 --save-every 2";
    lab.train("run", run);
    fs::remove_dir_all(lab.path("run/checkpoints/step-00000004")).unwrap();
    adapter("first", 3);
    let args = format!("train --model base --data train.txt {run} --out run --resume");
    let refused = lab.fails(&args, &["an adapter that the run began with or combines has changed"]);
    assert!(refused.contains("step-00000002"), "{refused}");
}

#[test]
fn a_folder_that_is_not_the_runs_is_left_alone() {
    let lab = Lab::new();
    // A pretrained model, which is a run of its own, a run with other options, and the base itself.
    lab.ok("pretrain --text train.txt --vocab 300 --layers 1 --dim 8 --heads 2 --context 16 --steps 2 --out model");
    let short = "train --model base --data train.txt --steps 2";
    lab.ok(&format!("{short} --out run"));
    let before = (lab.bytes("model/model.safetensors"), lab.bytes("run/adapter_model.safetensors"));
    lab.fails(&format!("{short} --method full --out model --resume"), &["model", "was started with", "another folder"]);
    lab.fails(&format!("{short} --out model --resume"), &["model", "was started with"]);
    lab.fails(&format!("{short} --out base --resume"), &["base", "never written"]);
    lab.fails(&format!("{} --out run --resume", short.replace("steps 2", "steps 3")), &["steps = 2", "3"]);
    assert!((lab.bytes("model/model.safetensors"), lab.bytes("run/adapter_model.safetensors")) == before);
    // The very same run may be done again: there is no checkpoint to continue from.
    lab.ok(&format!("{short} --out run --resume"));
    assert!(lab.bytes("run/adapter_model.safetensors") == before.1);

    // A run that failed before it saved anything can be started again; two at a time cannot.
    fs::create_dir(lab.path("failed")).unwrap();
    fs::copy(lab.path("run/run.toml"), lab.path("failed/run.toml")).unwrap();
    lab.ok(&format!("{short} --out failed"));
    let long = "train --model base --data train.txt --steps 100000";
    let mut child = lab.spawn(&format!("{long} --out busy --log busy.jsonl"));
    lab.wait_for_lines(&mut child, "busy.jsonl", 1);
    lab.fails(&format!("{long} --out busy --resume"), &["busy", "another process"]);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn logs_of_other_runs_and_other_files_are_not_lost() {
    let lab = Lab::new();
    let short = "train --model base --data train.txt --steps 2 --log log.jsonl";
    lab.ok(&format!("{short} --out one"));
    let first = lab.read("log.jsonl");
    lab.ok(&format!("{short} --seed 1 --out two"));
    assert_eq!(lab.read("log.1.jsonl"), first);
    assert_ne!(lab.read("log.jsonl"), first);
    // Another run has taken the name since: its lines are not this one's, whatever their steps.
    let run = "train --model base --data train.txt --steps 4 --save-every 2 --log same.jsonl --batch-size 4";
    lab.ok(&format!("{run} --out cut"));
    fs::remove_dir_all(lab.path("cut/checkpoints/step-00000004")).unwrap();
    lab.ok(&format!("{run} --seed 1 --out other"));
    let fourth = lab.read("same.jsonl");
    lab.ok(&format!("{run} --out cut --resume"));
    assert_eq!(lab.read("same.2.jsonl"), fourth);
    assert_eq!(lab.logged("same.jsonl", "step"), [3.0, 4.0]);
    let data = "{\"text\": \"how to bake\", \"step\": 3}\n";
    lab.write("log.jsonl", data);
    lab.fails(&format!("{short} --out three"), &["log.jsonl", "line 1", "no line of a training log"]);
    assert_eq!(lab.read("log.jsonl"), data);
}

#[test]
fn a_run_that_overflows_keeps_its_last_good_checkpoint() {
    let lab = Lab::new();
    let args = "train --model base --data train.txt --method full --schedule constant --lr 999 --steps 30 --save-every 1 \
                --keep 1 --out run";
    lab.fails(args, &["step", "kept", "--lr"]);
    let checkpoints = names(&lab.path("run/checkpoints"));
    assert_eq!(checkpoints.len(), 1, "{checkpoints:?}");
    let file = lab.bytes(&format!("run/checkpoints/{}/state.safetensors", checkpoints[0]));
    let start = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let finite = |b: &[u8]| f32::from_le_bytes(b.try_into().unwrap()).is_finite();
    assert!(file[start..].chunks_exact(4).all(finite), "a number in the checkpoint is none");
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
        // Neither a log nor messages that cannot be written stop a run, or change what it makes.
        let output = lab.lora(&format!("{RUN} --out run --log /dev/full"));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && stderr.matches("goes on without its log").count() == 1, "{stderr}");
        let unsaid = |c: &mut Command| {
            c.stderr(fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
        };
        let output = lab.spawn_with(&format!("-v {RUN} --out unsaid"), unsaid).wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        let file = "adapter_model.safetensors";
        assert!(lab.bytes(&format!("unsaid/{file}")) == lab.bytes(&format!("run/{file}")));
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
