//! Every method on every architecture that it fits, trained through a whole run that is interrupted and goes on: the
//! result is that of the run that was not, bit for bit. And steps that are split into micro-batches.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use lora_core::{
    Error as CoreError,
    peft::{InitLoraWeights, METHODS},
};
use lora_model::{Error as ModelError, adapter, config::RawConfig};
use lora_train::{Error, Observer, Step, TrainConfig, train};

const STEPS: u64 = 6;

/// Stops a run after some steps.
struct Stop(u64);

impl Observer for Stop {
    fn step(&mut self, step: &Step, _tokens_per_s: f64) {
        self.0 = self.0.saturating_sub(u64::from(step.step > 0));
    }

    fn stop(&mut self) -> bool {
        self.0 == 0
    }
}

/// The files of a result, by name.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file());
    let named = entries.map(|p| (p.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&p).unwrap()));
    // It names the folder.
    named.filter(|(name, _)| name != lora_train::RUN_FILE && !name.ends_with("lock")).collect()
}

#[test]
fn an_interrupted_run_of_any_method_goes_on_bit_for_bit() {
    let temporary = tempfile::tempdir().unwrap();
    let (mut kinds, mut pairs) = (BTreeSet::new(), 0);
    for golden in crate::common::golden() {
        let case = golden.parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
        let folder = temporary.path().join(&case);
        let model = folder.join("base");
        let raw = RawConfig::from_dir(&golden).unwrap();
        let Some((task, data)) = crate::common::data(&raw) else { continue };
        // One model of each architecture and task: the others differ in nothing that a run's course depends on.
        if !kinds.insert((raw.str("model_type").unwrap().unwrap().to_owned(), task)) {
            continue;
        }
        crate::common::base(&golden, &model, |_| ());
        fs::write(folder.join("data.txt"), data).unwrap();
        let config = |out: &str| TrainConfig {
            model: model.clone(),
            task: task.map(str::to_owned),
            data: folder.join("data.txt"),
            out: folder.join(out),
            rank: 2,
            dropout: 0.1,
            bottleneck: 3,
            prefix: 2,
            infix: 1,
            classify_prefix: task.is_some(),
            reparam: 4,
            layers: "last:1".into(),
            steps: Some(STEPS),
            batch_size: 4,
            grad_accum: 2,
            max_length: 24,
            lr: 1e-2,
            ..TrainConfig::default()
        };
        for name in ["first", "second"] {
            let run = TrainConfig { method: "adapter-p".into(), steps: Some(2), ..config(name) };
            train(&run, false, &mut ()).unwrap_or_else(|e| panic!("{case}: {e}"));
        }
        // What an adapter begins at is not in the checkpoint: it is computed again, and is the same.
        let inits = [InitLoraWeights::Pissa { niter: Some(2) }, InitLoraWeights::Olora];
        let inits = inits.into_iter().map(|init| (METHODS.iter().find(|m| m.name == "lora").unwrap(), init));
        for (row, init_lora_weights) in METHODS.iter().map(|row| (row, InitLoraWeights::default())).chain(inits) {
            let what = format!("{case}, {}, {init_lora_weights:?}", row.name);
            let run = |out: &str| TrainConfig {
                method: row.name.into(),
                init_lora_weights,
                fuse: vec![folder.join("first"), folder.join("second")],
                ..config(&format!("{}-{}-{out}", row.name, init_lora_weights.word()))
            };
            let whole = match train(&run("whole"), false, &mut ()) {
                Ok(summary) => summary,
                Err(Error::Model(ModelError::Core(
                    CoreError::NothingTrainable { .. } | CoreError::DoesNotFit { .. },
                ))) => continue,
                Err(e) => panic!("{what}: {e}"),
            };
            assert!(!whole.interrupted && whole.steps == STEPS, "{what}");
            let cut = run("cut");
            let first = train(&cut, false, &mut Stop(3)).unwrap();
            assert!(first.interrupted && first.steps == 3, "{what}: {first:?}");
            if !row.whole_model {
                assert!(adapter::is_adapter(&first.out), "{what}: no adapter beside the checkpoint");
            }
            let second = train(&cut, true, &mut ()).unwrap();
            assert!(second.steps == STEPS && second.loss == whole.loss, "{what}: {second:?} for {whole:?}");
            assert!(files(&cut.out) == files(&whole.out), "{what}: another result");
            // Nor does it matter what is kept for the way back.
            let again = TrainConfig { checkpoint: true, ..run("again") };
            assert_eq!(train(&again, false, &mut ()).unwrap().loss, whole.loss, "{what}: with checkpoints");
            assert!(files(&again.out) == files(&whole.out), "{what}: another result with checkpoints");
            // Splitting a step changes nothing but rounding, dropout included.
            let [one, three] = [1, 3].map(|grad_accum| {
                let out = run(&format!("split-{grad_accum}")).out;
                train(&TrainConfig { grad_accum, steps: Some(2), out, ..run("") }, false, &mut ()).unwrap()
            });
            let (one, three) = (one.loss.unwrap(), three.loss.unwrap());
            assert!(
                (one - three).abs() <= 1e-4 * one.abs(),
                "{what}: split into 1 and 3 parts, losses {one} and {three}"
            );
            pairs += 1;
        }
    }
    let encoders = kinds.iter().filter(|(_, task)| task.is_some()).count();
    assert!(kinds.len() >= 11 && encoders >= 6 && pairs > 10 * kinds.len(), "{kinds:?}: {pairs} pairs");
}
