//! The story of `lora demo`, in miniature.

use std::{fs, path::Path};

use lora_core::peft::METHODS;
use lora_train::{
    Observer, PretrainConfig, Step, TrainConfig,
    demo::{DemoConfig, Report, Stage, Watcher, run},
};

fn tiny(cache: Option<&Path>) -> DemoConfig {
    let short = DemoConfig::short();
    DemoConfig {
        cache: cache.map(Into::into),
        prose: 60_000,
        pretrain: PretrainConfig {
            vocab: 320,
            layers: 1,
            dim: 32,
            heads: 2,
            steps: Some(240),
            batch_size: 8,
            lr: 1e-2,
            ..short.pretrain
        },
        records: 200,
        held_out: 16,
        // Its only layer keeps its adapter.
        adapt: TrainConfig { rank: 2, steps: Some(60), drop_layers: Some("none".into()), ..short.adapt },
        lr: (vec![("full", 1e-2), ("top2", 1e-2)], 3e-2),
        table_steps: 4,
        told: 4,
        shown: 4,
        ..short
    }
}

/// The stages that were gone through; stops after so many steps of the optimiser.
struct Stages(Vec<Stage>, u64);

impl Watcher for Stages {
    fn stage(&mut self, stage: Stage) {
        self.0.push(stage);
    }
}

impl Observer for Stages {
    fn step(&mut self, _: &Step, _: f64) {
        self.1 -= 1;
    }

    fn stop(&mut self) -> bool {
        self.1 == 0
    }
}

fn tell(config: &DemoConfig) -> (Report, Vec<Stage>) {
    let dir = tempfile::tempdir().unwrap();
    let mut stages = Stages(Vec::new(), u64::MAX);
    (run(config, &dir.path().join("work"), &mut stages).unwrap().unwrap(), stages.0)
}

/// What has to be the same from run to run.
fn figures(report: &Report) -> Report {
    let mut report = report.clone();
    (report.pretrain.seconds, report.pretrain.cached) = (0.0, false);
    report.methods.iter_mut().for_each(|m| m.seconds = 0.0);
    report.table.iter_mut().for_each(|r| r.seconds = 0.0);
    report
}

#[test]
fn the_figures_make_sense() {
    let (report, stages) = tell(&tiny(None));
    assert_eq!(stages[0], Stage::Pretrain);
    assert!(!report.pretrain.cached && report.pretrain.steps == 240 && report.pretrain.loss < 5.5, "{report:?}");
    let names: Vec<&str> = report.methods.iter().map(|m| m.name).collect();
    assert_eq!(names, ["lora", "full"]);
    for m in &report.methods {
        // A base so small gives an adapter little to work with: how far losses fall is for larger runs to show.
        assert!(m.loss_after < m.loss_before && m.loss_before < 6.0 && m.loss_after > 0.0, "{m:?}");
        assert!(m.seconds > 0.0 && (0.0..=1.0).contains(&m.facts_after), "{m:?}");
        // Four bytes a number, and a header.
        let bytes = 4 * m.trainable as u64;
        assert!((bytes..bytes + 8000).contains(&m.checkpoint_bytes), "{m:?}");
        assert_eq!(m.trainable_share, m.trainable as f64 / report.pretrain.parameters as f64);
    }
    let by = |name: &str| report.methods.iter().find(|m| m.name == name).unwrap();
    assert_eq!(by("full").trainable, report.pretrain.parameters);
    // Rank 2 on maps of 32 to 96, 32, 128 and of 128 to 32.
    assert_eq!(by("lora").trainable, 2 * (32 + 96 + 32 + 32 + 32 + 128 + 128 + 32));
    let names: Vec<&str> = report.table.iter().map(|r| r.name).collect();
    assert_eq!(names, METHODS.iter().map(|m| m.name).collect::<Vec<_>>());
    for r in &report.table {
        // Prefixes do not begin where the base stands.
        let most = by("lora").loss_before + if r.name.contains("pre-") { 0.5 } else { 0.0 };
        assert!(r.loss < most && r.loss > 0.0 && r.seconds > 0.0, "{r:?}");
        // AdaLoRA's file lacks the ranks that were taken away.
        assert!(r.checkpoint_bytes >= 4 * r.trainable as u64 || r.name == "adalora", "{r:?}");
        let row = METHODS.iter().find(|m| m.name == r.name).unwrap();
        assert!(row.whole_model == (r.trainable == report.pretrain.parameters), "{r:?}");
    }
    assert!(report.merge_max_logit_diff > 0.0 && report.merge_max_logit_diff < 1e-4, "{report:?}");
    assert_eq!(report.samples.len(), 4);
    for s in &report.samples {
        assert!(s.record.starts_with("name : "), "{s:?}");
    }
    // So small a model may have nothing to say to one of them.
    assert!(report.samples.iter().any(|s| !s.after.is_empty() && s.before != s.after), "{:?}", report.samples);
    let json = serde_json::to_value(&report).unwrap();
    for key in ["name", "trainable", "trainable_share", "checkpoint_bytes", "loss_before", "loss_after", "seconds"] {
        assert!(!json["methods"][0][key].is_null(), "{key}");
    }
}

#[test]
fn run_after_run_is_the_same_with_a_cache_without_and_with_a_damaged_one() {
    let cache = tempfile::tempdir().unwrap();
    let (config, none) = (tiny(Some(cache.path())), tiny(None));
    let entries = || fs::read_dir(cache.path()).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>();

    let (first, _) = tell(&none);
    let same = |what: &str, expected: Stage| {
        let (report, stages) = tell(&config);
        assert_eq!((figures(&report), stages[0]), (figures(&first), expected), "{what}");
        let [base] = &entries()[..] else { panic!("{what}: {:?}", entries()) };
        assert!(report.pretrain.cached == (expected == Stage::Cached), "{what}");
        base.clone()
    };
    let base = same("an empty cache", Stage::Pretrain);
    same("a full one", Stage::Cached);

    let weights = base.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&weights, bytes).unwrap();
    same("a flipped bit", Stage::Pretrain);
    fs::remove_file(base.join("demo.json")).unwrap();
    same("half a base", Stage::Pretrain);
    fs::remove_dir_all(&base).unwrap();
    fs::write(&base, "a file").unwrap();
    same("something else in its place", Stage::Pretrain);
    same("after all that", Stage::Cached);

    let (other, stages) = tell(&DemoConfig { seed: 1, ..config.clone() });
    assert!(figures(&other) != figures(&first) && stages[0] == Stage::Pretrain && entries().len() == 2);
}

#[test]
fn it_stops_when_asked_and_clears_up() {
    let cache = tempfile::tempdir().unwrap();
    for (steps, whole) in [(10, 0), (260, 1)] {
        let dir = tempfile::tempdir().unwrap();
        let told = run(&tiny(Some(cache.path())), dir.path(), &mut Stages(Vec::new(), steps)).unwrap();
        assert_eq!(told, None);
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), whole, "after {steps} steps");
    }
}

#[test]
fn it_does_without_a_cache_that_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let (report, stages) = tell(&tiny(Some(&file.join("cache"))));
    assert_eq!(stages[0], Stage::Pretrain);
    assert!(!report.pretrain.cached);
}
