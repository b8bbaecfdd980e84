//! A whole run, as the program that watches it sees it.

use std::{fs, path::Path};

use lora_model::{adapter, config::CONFIG_FILE};
use lora_train::{Evaluation, Observer, Step, TrainConfig, checkpoint, schedule::Schedule, train};
use serde_json::Value;

use crate::common::{base, golden, records};

/// Has enough after some steps.
#[derive(Default)]
struct Enough {
    after: u64,
    done: u64,
    evaluated: Vec<u64>,
}

impl Observer for Enough {
    fn step(&mut self, step: &Step, _tokens_per_s: f64) {
        self.done = step.step;
    }

    fn evaluation(&mut self, step: u64, _evaluation: &Evaluation) {
        self.evaluated.push(step);
    }

    fn enough(&mut self) -> bool {
        self.done == self.after
    }
}

/// At a constant rate it is the run of as many steps, whether that step was to be evaluated or not.
#[test]
fn a_run_that_has_done_enough_ends_as_after_its_last_step() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (folder.path().join("base"), folder.path().join("data.txt"));
    let gpt2 = golden().into_iter().find(|g| g.parent().unwrap().ends_with("gpt2")).unwrap();
    base(&gpt2, &model, |_| ());
    fs::write(&data, records()).unwrap();
    for (method, file) in [("lora", adapter::WEIGHTS_FILE), ("full", "model.safetensors")] {
        for (after, evaluated) in [(4, &[2, 4][..]), (3, &[2, 3]), (8, &[2, 4, 6, 8])] {
            let config = |out: &str, steps| TrainConfig {
                model: model.clone(),
                data: data.clone(),
                valid: Some(data.clone()),
                out: folder.path().join(format!("{method}-{after}-{out}")),
                method: method.into(),
                steps: Some(steps),
                schedule: Schedule::Constant,
                warmup: 0,
                batch_size: 4,
                eval_every: 2,
                save_every: 100,
                log: Some(folder.path().join(format!("{method}-{after}-{out}.jsonl"))),
                ..TrainConfig::default()
            };
            let (early, whole) = (config("early", 8), config("whole", after));
            let mut watcher = Enough { after, ..Enough::default() };
            let summary = train(&early, false, &mut watcher).unwrap();
            let wanted = train(&whole, false, &mut ()).unwrap();
            assert!(!summary.interrupted && summary.out == early.out, "{summary:?}");
            assert_eq!((summary.steps, summary.loss), (after, wanted.loss), "{method}");
            assert_eq!(summary.evaluation, wanted.evaluation, "{method}");
            assert_eq!(watcher.evaluated, evaluated, "{method}");
            let read = |out: &Path| fs::read(out.join(file)).unwrap();
            assert!(read(&early.out) == read(&whole.out), "{method}: another result");
            assert_eq!(early.out.join(CONFIG_FILE).exists(), method == "full");
            let log = fs::read_to_string(early.log.as_ref().unwrap()).unwrap();
            let step = |line: &str| serde_json::from_str::<Value>(line).unwrap()["eval_step"].as_u64();
            assert_eq!(log.lines().filter_map(step).collect::<Vec<_>>(), evaluated, "{method}");
            let saved: Vec<u64> = checkpoint::list(&early.out).unwrap().into_iter().map(|(step, _)| step).collect();
            assert_eq!(saved, [after], "{method}");
        }
    }
}
