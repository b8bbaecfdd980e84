//! A folder with a tiny base model, data, and the built `lora` binary to drive.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use lora_kernels::Device;
use lora_model::{Gpt2, Model, config::Gpt2Config, tokenizer::Tokenizer};
use serde_json::Value;

pub(crate) struct Lab {
    dir: tempfile::TempDir,
}

/// Lines of the E2E form, `n` of them from the `from`-th on.
pub(crate) fn lines(from: usize, n: usize) -> String {
    let (names, foods, places) = (
        ["Blue Fig", "Old Mill", "Sun Cat"],
        ["tea", "fish", "plum cake", "soup"],
        ["river", "market", "hill", "mole", "gate"],
    );
    let line = |i: usize| {
        let (n, f, p) = (names[i % 3], foods[i % 4], places[i % 5]);
        format!("name : {n} | food : {f} | near : {p}||{n} serves {f} near the {p} .\n")
    };
    (from..from + n).map(line).collect()
}

impl Lab {
    /// `base` (a model of random weights with dropout), `train.txt`, `valid.txt`.
    pub(crate) fn new() -> Lab {
        let lab = Lab { dir: tempfile::tempdir().unwrap() };
        lab.write("train.txt", &lines(0, 40));
        lab.write("valid.txt", &lines(40, 12));
        lab.model("base", |_| ());
        lab
    }

    /// A model of 2 layers with its tokenizer.
    pub(crate) fn model(&self, name: &str, change: impl FnOnce(&mut Gpt2Config)) {
        let dir = self.path(name);
        fs::create_dir_all(&dir).unwrap();
        let tokenizer = Tokenizer::train_bpe([lines(0, 60)].iter(), 300).unwrap();
        let end = tokenizer.end_of_text().unwrap();
        let mut config = Gpt2Config {
            vocab_size: tokenizer.vocab_size(),
            n_positions: 64,
            n_embd: 16,
            n_layer: 2,
            n_head: 2,
            bos_token_id: Some(end),
            eos_token_id: Some(end),
            ..Gpt2Config::small()
        };
        change(&mut config);
        let model = Gpt2::init(config, &dir, 1, &Device::Cpu).unwrap();
        model.save(&dir, &Default::default()).unwrap();
        tokenizer.save(&dir).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// Copies a folder of files.
    pub(crate) fn copy(&self, from: &str, to: &str) {
        fs::create_dir_all(self.path(to)).unwrap();
        for entry in fs::read_dir(self.path(from)).unwrap() {
            let entry = entry.unwrap();
            if entry.path().is_file() {
                fs::copy(entry.path(), self.path(to).join(entry.file_name())).unwrap();
            }
        }
    }

    /// Changes one key of a JSON file.
    pub(crate) fn set(&self, file: &str, key: &str, value: Value) {
        let mut json: Value = serde_json::from_str(&self.read(file)).unwrap();
        json[key] = value;
        self.write(file, &json.to_string());
    }

    fn command(&self, args: &str) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_lora"));
        c.args(args.split_whitespace()).current_dir(self.dir.path()).stdin(Stdio::null()).env_remove("RUST_LOG");
        c
    }

    /// Runs `lora` with arguments that hold no spaces.
    pub(crate) fn lora(&self, args: &str) -> Output {
        self.command(args).output().unwrap()
    }

    /// As [`Lab::lora`], with one more argument that may be anything.
    pub(crate) fn lora_with(&self, args: &str, last: &str) -> Output {
        self.command(args).arg(last).output().unwrap()
    }

    pub(crate) fn spawn(&self, args: &str) -> Child {
        self.spawn_with(args, |_| ())
    }

    /// As [`Lab::spawn`], with a change to how the process is started.
    pub(crate) fn spawn_with(&self, args: &str, change: impl FnOnce(&mut Command)) -> Child {
        let mut command = self.command(args);
        change(&mut command);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Runs `lora` and gives what it put on standard output.
    pub(crate) fn ok(&self, args: &str) -> String {
        success(args, self.lora(args))
    }

    pub(crate) fn json(&self, args: &str) -> Value {
        let text = self.ok(args);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("lora {args}: {e}: {text}"))
    }

    /// A training run of few steps, with `more` options.
    pub(crate) fn train(&self, out: &str, more: &str) -> String {
        self.ok(&format!("train --model base --data train.txt --out {out} {more}"))
    }

    /// Runs `lora`, which has to fail with one paragraph that has all of `parts`. Gives the paragraph.
    #[track_caller]
    pub(crate) fn fails(&self, args: &str, parts: &[&str]) -> String {
        let output = self.lora(args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        let code = output.status.code();
        let diverged = ["training stopped", "that are no numbers"].iter().any(|said| stderr.contains(said));
        let expected = if diverged { [Some(3), None] } else { [Some(1), Some(2)] };
        assert!(code.is_some() && expected.contains(&code), "lora {args}: {code:?}: {stderr}");
        let from = stderr.find("error: ").unwrap_or_else(|| panic!("lora {args}: no error: {stderr}"));
        let error = stderr[from..].trim_end();
        assert!(!stderr.contains("panicked"), "lora {args}: {stderr}");
        assert!(code == Some(2) || !error.contains('\n'), "lora {args}: more than a paragraph: {error}");
        for part in parts {
            assert!(error.contains(part), "lora {args}: no {part:?} in: {error}");
        }
        assert!(output.stdout.is_empty(), "lora {args}: results in spite of an error");
        error.to_owned()
    }

    /// Waits until a file has `n` lines, while the process runs.
    pub(crate) fn wait_for_lines(&self, child: &mut Child, file: &str, n: usize) {
        let start = Instant::now();
        let count = || fs::read(self.path(file)).map_or(0, |b| b.iter().filter(|&&b| b == b'\n').count());
        while count() < n && child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < Duration::from_secs(60), "{file} has not got {n} lines in a minute");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The lines of a log without their times: what must not differ between two runs.
    pub(crate) fn log(&self, name: &str) -> Vec<String> {
        let untimed = |line: &str| match line.split_once(",\"tokens_per_s\"") {
            Some((before, _)) => before.to_owned(),
            None => line.to_owned(),
        };
        self.read(name).lines().map(untimed).collect()
    }

    /// The numbers under `key` in a log.
    pub(crate) fn logged(&self, name: &str, key: &str) -> Vec<f64> {
        let lines = self.read(name);
        let lines = lines.lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
        lines.filter_map(|v| v[key].as_f64()).collect()
    }
}

#[track_caller]
pub(crate) fn success(args: &str, output: Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "lora {args}: {}: {stderr}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// The names in a folder, sorted.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A safetensors file.
pub(crate) fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}
