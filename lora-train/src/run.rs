//! A whole run in a folder.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use lora_core::peft::{AdaLoraSchedule, Adapted};
use lora_kernels::{DType, Device};
use lora_model::{
    Model,
    adapter::{self, AdapterFile},
    files,
    tokenizer::Tokenizer,
};

use crate::{
    Encoder, Error, Evaluation, Log, Place, Result, Step, TextJoiner, TrainConfig, Trainer,
    checkpoint::{self, Fingerprint, Spent},
    data::{Corpus, Dataset, TaskKind},
    hub, load_data,
    output::Output,
    resources::peak_memory,
    task::{self, Fitted},
};

/// What a run looks like before its first step.
#[derive(Clone, Debug)]
pub struct RunInfo {
    /// Trainable scalars.
    pub trainable: usize,
    /// Scalars of the base.
    pub base: usize,
    /// Training sequences.
    pub sequences: usize,
    /// Steps of the whole run.
    pub steps: u64,
    /// Steps that an earlier life of the run has done.
    pub done: u64,
}

/// What a finished (or interrupted) run did.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Summary {
    /// Trainable scalars.
    pub trainable: usize,
    /// Steps done, those of earlier lives included.
    pub steps: u64,
    /// Loss of the last step of this life, if it did any.
    pub loss: Option<f64>,
    /// The last evaluation, if there was one.
    pub evaluation: Option<Evaluation>,
    /// What the steps took, those of earlier lives included.
    #[serde(flatten)]
    pub spent: Spent,
    /// Where the result lies; the checkpoint when the run was interrupted.
    pub out: PathBuf,
    /// Whether the run was interrupted before its last step.
    pub interrupted: bool,
}

/// Watches a run: a progress bar, a program of your own. Everything is optional.
///
/// One that ends a run when two evaluations were no better than the best before them:
///
/// ```
/// use lora_train::{Evaluation, Observer};
///
/// struct Patience {
///     best: f64,
///     worse: u32,
/// }
///
/// impl Observer for Patience {
///     fn evaluation(&mut self, _step: u64, evaluation: &Evaluation) {
///         self.worse = if evaluation.loss < self.best { 0 } else { self.worse + 1 };
///         self.best = self.best.min(evaluation.loss);
///     }
///
///     fn enough(&mut self) -> bool {
///         self.worse == 2
///     }
/// }
/// # let mut watcher = Patience { best: f64::INFINITY, worse: 0 };
/// # for (loss, enough) in [(2.0, false), (1.0, false), (1.5, false), (1.0, true)] {
/// #     watcher.evaluation(0, &Evaluation { loss, perplexity: None, targets: 1, scores: Default::default() });
/// #     assert_eq!(watcher.enough(), enough);
/// # }
/// ```
pub trait Observer {
    /// The run begins.
    fn start(&mut self, _info: &RunInfo) {}
    /// A step is done.
    fn step(&mut self, _step: &Step, _tokens_per_s: f64) {}
    /// The model was evaluated after `step` steps.
    fn evaluation(&mut self, _step: u64, _evaluation: &Evaluation) {}
    /// A checkpoint was written.
    fn checkpoint(&mut self, _path: &Path) {}
    /// Something a person should know.
    fn note(&mut self, _message: &str) {}
    /// Asked before every step: whether to save a checkpoint and stop, to go on some other time.
    fn stop(&mut self) -> bool {
        false
    }
    /// Asked after every step, and after its evaluation where there is one: whether the run has done enough. It then ends as
    /// it does after its last step, with its result in `out`: early stopping.
    fn enough(&mut self) -> bool {
        false
    }
}

impl Observer for () {}

/// Runs (or with `resume` continues) a whole training run: reads base and data, trains, logs, saves checkpoints, and
/// leaves the finished adapter (or, for a method that trains base weights, the finished model) in `config.out`.
///
/// # Errors
/// Everything that a configuration, a file or a device can cause. What was saved before stays as it was.
pub fn train(config: &TrainConfig, resume: bool, observer: &mut dyn Observer) -> Result<Summary> {
    config.check()?;
    let mut output = Output::open(config, resume)?;
    let (Place { device, dtype, .. }, config) = Place::of_run(config, output.earlier.as_ref(), &mut output.notes)?;
    let config = &config;
    let base_dir = hub::resolve(&config.model)?;
    if device.is_cpu() && dtype != DType::F32 && config.row()?.whole_model {
        output
            .notes
            .push("what trains is computed in f32 on the CPU, which is everything here: bf16 saves nothing".into());
    }
    // Base weights that train begin with all their digits, and are rounded for each step anew.
    let stored = if config.row()?.whole_model { DType::F32 } else { dtype };
    let row = config.task_row()?;
    let task = match row.filter(|row| row.kind != TaskKind::Completions) {
        None => {
            task::check_causal(&base_dir, row)?;
            None
        }
        Some(task) => {
            let corpus = task::read(&config.data, task, config.format)?;
            let fitted = Fitted::to_train(task, &base_dir, config.init_adapter.as_deref(), &corpus)?;
            Some((fitted, corpus))
        }
    };
    let new_head = match (&config.init_adapter, &task) {
        (Some(dir), Some((fitted, _))) => !fitted.continues(dir)?,
        _ => false,
    };
    let mut model = match &task {
        None => lora_model::load_as(&base_dir, &device, stored)?,
        Some((fitted, _)) => fitted.load(&base_dir, &device, stored, config.seed, config.init_adapter.is_some())?,
    };
    if let Some(p) = config.base_dropout {
        model.set_base_dropout(p);
    }
    let model = &*model;
    if config.row()?.options.contains(&"fuse") {
        for dir in &config.fuse {
            let fused = adapter::load(dir)?;
            fused.check_base(model.outline())?;
            match fused.check_same_base(model) {
                Err(e) if config.strict => return Err(e.into()),
                Err(e) => output.notes.push(format!("{}: {e}", dir.display())),
                Ok(()) => note_unchecked(config, dir, &fused, &mut output),
            }
        }
    }
    let adapted = match &config.init_adapter {
        None => {
            let method = config.method_options()?;
            let mut adapted = Adapted::new(&*method, model, &device, dtype, config.seed)?;
            if stored != DType::F32 && adapted.trained().next().is_some() {
                // Base weights that train begin with all their digits here too.
                let exact = match &task {
                    None => lora_model::load(&base_dir, &Device::Cpu)?,
                    Some((fitted, _)) => fitted.load(&base_dir, &Device::Cpu, DType::F32, config.seed, true)?,
                };
                adapted.begin_at(&*exact)?;
            }
            adapted
        }
        Some(dir) => {
            let mut file = adapter::load(dir)?;
            if config.strict {
                file.check_same_base(model)?;
            }
            note_unchecked(config, dir, &file, &mut output);
            config.clone().adopt(dir, &file, |_| true)?;
            file.options.dropout = config.dropout;
            let kept = std::mem::take(&mut file.options.adalora.kept);
            file.options.adalora = AdaLoraSchedule { kept, ..config.options()?.adalora };
            file.options.fan_in_fan_out = config.fan_in_fan_out;
            match (new_head, config.task.as_deref()) {
                (true, Some(task)) => {
                    let dir = dir.display();
                    output.notes.push(format!(
                        "{dir} was trained for another task: its head is left out, and one for {task} begins at random"
                    ));
                    file.attach_with_new_head(model, &device)?
                }
                _ => file.attach(model, &device)?,
            }
        }
    };
    let (data, valid, task) = match task {
        None => {
            let encoder = Encoder::from_dir(&base_dir, model)?;
            let read = |path: &Path| match row {
                None => load_data(path, config.format, &encoder, model, &adapted, config.max_length),
                Some(row) => {
                    let corpus = task::read(path, row, config.format)?;
                    task::encode_completions(&corpus, &encoder, model, &adapted, config.max_length)
                }
            };
            (read(&config.data)?, config.valid.as_deref().map(read).transpose()?, None)
        }
        Some((fitted, corpus)) => {
            let joiner = TextJoiner::from_dir(&base_dir, model)?;
            let encode = |corpus: &Corpus| fitted.encode(corpus, &joiner, model, &adapted, config.max_length);
            let read = |path: &Path| encode(&task::read(path, fitted.task, config.format)?);
            (encode(&corpus)?, config.valid.as_deref().map(read).transpose()?, Some(fitted))
        }
    };
    let (data, valid) = match config.hold_out {
        0.0 => (data, valid),
        share => {
            let (rest, held_out) = data.hold_out(share)?;
            (rest, Some(held_out))
        }
    };
    let save = |dir: &Path, adapted: &Adapted| save_result(dir, model, &base_dir, adapted, config, task.as_ref());
    let run = Run { model, adapted, data: &data, valid: valid.as_ref(), output, save: &save };
    run.run(config, resume, observer)
}

/// Notes that `strict` could not check an adapter that remembers no base.
fn note_unchecked(config: &TrainConfig, dir: &Path, file: &AdapterFile, output: &mut Output) {
    if config.strict && file.base_fingerprint.is_none() {
        output.notes.push(format!("strict: {}: {}", dir.display(), adapter::UNCHECKED));
    }
}

/// A run whose inputs have been read.
pub(crate) struct Run<'a> {
    pub(crate) model: &'a dyn Model,
    pub(crate) adapted: Adapted,
    pub(crate) data: &'a Dataset,
    pub(crate) valid: Option<&'a Dataset>,
    /// Where the result goes.
    pub(crate) output: Output,
    /// Writes what was trained into a folder.
    pub(crate) save: &'a dyn Fn(&Path, &Adapted) -> Result<()>,
}

impl Run<'_> {
    pub(crate) fn run(self, config: &TrainConfig, resume: bool, observer: &mut dyn Observer) -> Result<Summary> {
        let Run { model, adapted, data, valid, mut output, save: save_result } = self;
        let inputs = Fingerprint::of(data, model)?.with_adapters(config.init_adapter.iter().chain(&config.fuse))?;
        let mut trainer = Trainer::new(model, adapted, config, data.sequences.len())?;
        output.notes.iter().for_each(|note| observer.note(note));
        let mut spent = Spent::default();
        if let Some(path) = &output.checkpoint {
            spent = checkpoint::load(path, &mut trainer, &inputs)?;
            observer.note(&format!("continuing after step {} from {}", trainer.steps_done(), path.display()));
        } else if resume {
            observer.note("no checkpoint to continue from: starting from the beginning");
        }
        config.log.as_deref().map_or(Ok(()), Log::check)?;
        // Nothing has been written up to here: whatever was wrong with the inputs left everything as it was.
        output.claim(config)?;
        let earlier_log = output.earlier.as_ref().and_then(|run| run.log.as_ref());
        // Another run may have taken the name meanwhile.
        let own = |path: &PathBuf| earlier_log == Some(path) && Log::has(path, trainer.steps_done(), trainer.loss);
        let open_log = |path: &PathBuf| Log::open(path, own(path), trainer.steps_done());
        let mut log = config.log.as_ref().map(open_log).transpose()?;
        if let Some(kept) = log.as_ref().and_then(Log::set_aside) {
            observer.note(&format!("the log of an earlier run is kept as {}", kept.display()));
        }
        if let Some(total) = config.total_step.filter(|_| trainer.adapted.budget().is_some()) {
            let (last, steps) = (total.saturating_sub(config.tfinal), trainer.total_steps());
            if last > steps {
                observer.note(&format!(
                    "total-step = {total}: ranks come down to target-r at step {last}, and the run has {steps} steps: its \
                     adapter keeps more of them"
                ));
            }
        }
        if let Some(warning) = config.schedule.check(config.warmup, trainer.total_steps()) {
            observer.note(&warning.to_string());
        }

        let mut summary = Summary {
            trainable: trainer.adapted.params.count(),
            steps: trainer.steps_done(),
            loss: None,
            evaluation: None,
            spent,
            out: config.out.clone(),
            interrupted: false,
        };
        observer.start(&RunInfo {
            trainable: summary.trainable,
            base: model.tensors().map(|(_, t)| t.len()).sum(),
            sequences: data.sequences.len(),
            steps: trainer.total_steps(),
            done: summary.steps,
        });
        // The step whose checkpoint is there already: it is not written twice.
        let mut saved = output.checkpoint.clone().map(|path| (trainer.steps_done(), path));
        let mut save = |trainer: &Trainer, spent: Spent, observer: &mut dyn Observer| -> Result<PathBuf> {
            if let Some((_, path)) = saved.as_ref().filter(|(step, _)| *step == trainer.steps_done()) {
                return Ok(path.clone());
            }
            // A model would make every checkpoint as large as the base: it is written at the end alone.
            let export = |dir: &Path| match config.row()?.whole_model {
                true => Ok(()),
                false => save_result(dir, &trainer.adapted),
            };
            let path = checkpoint::save(&config.out, trainer, &inputs, spent, export)?;
            observer.checkpoint(&path);
            saved = Some((trainer.steps_done(), path.clone()));
            Ok(path)
        };
        let mut evaluated = None;
        while trainer.steps_done() < trainer.total_steps() {
            if observer.stop() {
                summary.out = save(&trainer, summary.spent, observer)?;
                summary.interrupted = true;
                return Ok(summary);
            }
            let start = Instant::now();
            let step = match trainer.step(data) {
                Err(e @ Error::Diverged { .. }) => {
                    // What was learned before is as it was. That this may fail, too, changes nothing.
                    let _ = save(&trainer, summary.spent, observer);
                    return Err(e);
                }
                step => step?,
            };
            let seconds = start.elapsed().as_secs_f64();
            if !trainer.unreached().is_empty() {
                let names = trainer.unreached().join(", ");
                observer.note(&format!("no gradient reaches {names}: nothing trains them"));
            }
            let tokens_per_s = step.tokens as f64 / seconds;
            written(&mut log, observer, |log| log.step(&step, tokens_per_s));
            observer.step(&step, tokens_per_s);
            (summary.loss, summary.steps) = (Some(step.loss), step.step);
            summary.spent.seconds += seconds;
            summary.spent.tokens = summary.spent.tokens.saturating_add(step.tokens as u64);
            // On a device the host's memory says nothing of training.
            let peak = if model.device().is_cpu() { peak_memory() } else { None };
            summary.spent.peak_memory = summary.spent.peak_memory.max(peak);
            let last = step.step == trainer.total_steps();
            let every = if config.eval_every > 0 { config.eval_every } else { trainer.steps_per_epoch() };
            if let Some(valid) = valid.filter(|_| last || step.step % every == 0) {
                let evaluation = match trainer.evaluate(valid) {
                    Ok(evaluation) => evaluation,
                    Err(e) => {
                        // The steps are not lost with it. That this may fail, too, changes nothing.
                        let _ = save(&trainer, summary.spent, observer);
                        return Err(e);
                    }
                };
                written(&mut log, observer, |log| log.evaluation(step.step, &evaluation));
                observer.evaluation(step.step, &evaluation);
                summary.evaluation = Some(evaluation);
                evaluated = Some(step.step);
            }
            let enough = !last && observer.enough();
            if config.save_every > 0 && (last || enough || step.step % config.save_every == 0) {
                save(&trainer, summary.spent, observer)?;
            }
            if enough {
                break;
            }
        }
        trainer.check_finite()?;
        // A life that had no step left, whose last evaluation was another's and is in the log, or one that had done enough.
        if let Some(valid) = valid.filter(|_| evaluated != Some(summary.steps)) {
            let evaluation = trainer.evaluate(valid)?;
            if summary.loss.is_some() {
                written(&mut log, observer, |log| log.evaluation(summary.steps, &evaluation));
            }
            observer.evaluation(summary.steps, &evaluation);
            summary.evaluation = Some(evaluation);
        }
        save_result(&config.out, &trainer.adapted)?;
        Ok(summary)
    }
}

/// Writes into a log; one that cannot be written any more is noted and closed, and the run goes on.
fn written(log: &mut Option<Log>, observer: &mut dyn Observer, write: impl FnOnce(&mut Log) -> Result<()>) {
    if let Some(open) = log
        && let Err(e) = write(open)
    {
        observer.note(&format!("{e}; the run goes on without its log"));
        *log = None;
    }
}

/// Writes what a method trained: the adapter's folder, or the whole model with its tokenizer when all of it trains; with
/// the names of the task's labels.
///
/// # Errors
/// What writing files can cause.
pub fn save_result(
    dir: &Path,
    model: &dyn Model,
    base_dir: &Path,
    adapted: &Adapted,
    config: &TrainConfig,
    task: Option<&Fitted>,
) -> Result<()> {
    files::create_folder(dir)?;
    if !config.row()?.whole_model {
        let base = config.model.to_string_lossy();
        let options = config.options()?;
        // Before the adapter, so that no adapter is there without it.
        task.map_or(Ok(()), |task| task.save(dir))?;
        return Ok(adapter::save(dir, &config.method, &options, adapted, model, Some(&base))?);
    }
    model.save(dir, &adapted.merged(model)?)?;
    task.map_or(Ok(()), |task| task.name_labels(dir))?;
    Ok(Tokenizer::copy_files(base_dir, dir)?)
}

#[cfg(test)]
mod tests {
    use lora_core::peft::Layers;

    use super::*;
    use crate::data::{Goal, Sequence};

    #[derive(Default)]
    struct Notes(Vec<String>);

    impl Observer for Notes {
        fn note(&mut self, message: &str) {
            self.0.push(message.to_owned());
        }
    }

    /// A run whose adapters of the lowest layer nothing uses says so, once.
    #[test]
    fn a_run_names_what_no_gradient_reaches() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lora-model/tests/golden/gpt2/model");
        let (model, dir) = (lora_model::load(&golden, &Device::Cpu).unwrap(), tempfile::tempdir().unwrap());
        let sequence = Sequence { tokens: vec![5, 17, 9, 3, 42], second_from: 5, goal: Goal::After(1) };
        let data = Dataset::new(vec![sequence; 2]);
        let config =
            TrainConfig { steps: Some(3), batch_size: 2, out: dir.path().join("out"), ..TrainConfig::default() };
        let notes = |dropped: Layers| {
            let config = TrainConfig { out: dir.path().join(dropped.to_string()), ..config.clone() };
            let method = config.method_options().unwrap();
            let mut adapted = Adapted::new(&*method, &*model, &Device::Cpu, DType::F32, 0).unwrap();
            adapted.drop_layers(&dropped, model.outline()).unwrap();
            let output = Output::open(&config, false).unwrap();
            let run = Run { model: &*model, adapted, data: &data, valid: None, output, save: &|_, _| Ok(()) };
            let mut notes = Notes::default();
            run.run(&config, false, &mut notes).unwrap();
            notes.0.retain(|note| note.contains("gradient"));
            notes.0
        };
        assert!(notes(Layers::NONE).is_empty());
        const NAMES: &str = "transformer.h.0.attn.c_attn.lora_A.weight, transformer.h.0.attn.c_attn.lora_B.weight";
        assert_eq!(notes(Layers::First(1)), [format!("no gradient reaches {NAMES}: nothing trains them")]);
    }
}
