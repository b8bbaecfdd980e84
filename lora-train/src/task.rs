//! Tasks: the base with a head for whole sequences, the data, and the names of labels; and the data of models that continue
//! text.
//!
//! An adapter remembers them beside its own files, in [`FILE`]; a whole model in its `config.json`, as `id2label`.

use std::path::Path;

use lora_core::peft::Adapted;
use lora_kernels::{DType, Device};
use lora_model::{
    LoadOptions, Model, Task, adapter,
    config::{CONFIG_FILE, RawConfig},
    files, outline,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{
    Encoder, Error, Result, TextJoiner,
    data::{self, Corpus, Dataset, Format, Goal, Labels, Sequence, TaskKind, TaskRow},
};

/// The file in an adapter's folder that says what it was trained for. PEFT passes over it.
pub const FILE: &str = "task.json";

/// A task with the labels that a head tells apart.
#[derive(Clone, Debug)]
pub struct Fitted {
    /// The task.
    pub task: &'static TaskRow,
    /// The labels, in the order of the head's outputs; `None` where it gives a number.
    pub labels: Option<Labels>,
}

/// What [`FILE`] holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Remembered {
    task: String,
    labels: Option<Vec<String>>,
}

/// What the adapter in a folder was trained for, where it says so.
///
/// # Errors
/// A file that is damaged, or names a task that is unknown.
pub fn of_adapter(dir: &Path) -> Result<Option<Fitted>> {
    let path = dir.join(FILE);
    if !path.is_file() {
        return Ok(None);
    }
    let text = files::read_to_string(&path)?;
    let problem = |problem: String| Error::Config { path: path.clone(), problem };
    let Remembered { task, labels } = serde_json::from_str(&text).map_err(|e| problem(e.to_string()))?;
    let task = data::task(&task).map_err(|e| problem(e.to_string()))?;
    match (task.kind, &labels) {
        (TaskKind::Values, None) => {}
        (TaskKind::Labels(_), Some(names)) if names.len() > 1 => {}
        _ => return Err(problem(format!("key \"labels\": {} with these labels makes no sense", task.name))),
    }
    Ok(Some(Fitted { task, labels: labels.map(Labels::new) }))
}

/// A base and an adapter for it, with a head for the task that the adapter was trained for, where it was for one.
///
/// # Errors
/// What [`lora_model::load_with`] and [`adapter::attach`] give; a damaged [`FILE`].
pub fn load_with_adapter(
    base: &Path,
    adapter: &Path,
    device: &Device,
    dtype: DType,
) -> Result<(Box<dyn Model>, Adapted)> {
    let task = of_adapter(adapter)?.map(|fitted| fitted.head());
    let options = LoadOptions { dtype, task, head_follows: true, ..LoadOptions::default() };
    let model = lora_model::load_with(base, device, &options)?;
    let adapted = adapter::attach(adapter, &*model, device)?;
    Ok((model, adapted))
}

/// The names that a configuration gives its labels; `None` where it has none or only those that Transformers gives labels
/// without names, `LABEL_0`, `LABEL_1` ….
fn of_config(raw: &RawConfig) -> Option<Vec<String>> {
    let names = raw.value("id2label")?.as_object()?;
    let name = |i: usize| names.get(&i.to_string())?.as_str().map(str::to_owned);
    let names: Vec<String> = (0..names.len()).map(name).collect::<Option<_>>()?;
    (!names.iter().enumerate().all(|(i, name)| *name == format!("LABEL_{i}"))).then_some(names)
}

/// Whether a model of this configuration can have a head for whole sequences.
///
/// # Errors
/// A configuration that makes no sense.
fn is_encoder(raw: &RawConfig) -> Result<bool> {
    let options = LoadOptions { task: Some(Task::Regression), ..LoadOptions::default() };
    Ok(outline(raw, &options)?.task_type == Some("SEQ_CLS"))
}

impl Fitted {
    /// The task on a base that is to learn it from `training`: with the labels of the adapter that training starts from, where
    /// that was trained for it ([`Fitted::continues`]), else in the order in which the base has them, else in the task's or the
    /// data's own.
    ///
    /// # Errors
    /// Data with one label; a base for something else.
    pub fn to_train(
        task: &'static TaskRow,
        base_dir: &Path,
        start: Option<&Path>,
        training: &Corpus,
    ) -> Result<Fitted> {
        let raw = RawConfig::from_dir(base_dir)?;
        check_encoder(&raw, task, base_dir)?;
        if let Some(earlier) = start.map(of_adapter).transpose()?.flatten()
            && earlier.serves(task)
        {
            return Ok(Fitted { task, ..earlier });
        }
        let labels = Labels::of(task, training)?;
        let named = of_config(&raw).unwrap_or_default();
        let labels = labels.map(|own| own.ordered_as(&named).unwrap_or(own));
        Ok(Fitted { task, labels })
    }

    /// The task on a model that has learned it, as it was trained: what its adapter remembers, or its configuration.
    ///
    /// # Errors
    /// A model that has learned something else, or does not say what its labels are called.
    pub fn trained(task: &'static TaskRow, base_dir: &Path, adapter: Option<&Path>) -> Result<Fitted> {
        let raw = RawConfig::from_dir(base_dir)?;
        check_encoder(&raw, task, base_dir)?;
        if let Some((dir, earlier)) = adapter.map(|dir| Ok::<_, Error>((dir, of_adapter(dir)?))).transpose()?
            && let Some(earlier) = earlier
        {
            earlier.check(task, dir)?;
            return Ok(Fitted { task, ..earlier });
        }
        let labels = match task.kind {
            TaskKind::Values | TaskKind::Completions => None,
            TaskKind::Labels(own) => {
                let own = (!own.is_empty()).then(|| Labels::new(own.iter().map(|n| n.to_string()).collect()));
                Some(match (of_config(&raw), own) {
                    (Some(named), Some(own)) => own.ordered_as(&named).ok_or_else(|| {
                        let problem = format!(
                            "key \"id2label\": the model has the labels {}, which are not those of --task {}; name the task \
                             that it was trained for",
                            named.join(", "),
                            task.name
                        );
                        Error::Config { path: raw.path().into(), problem }
                    })?,
                    (Some(named), None) => Labels::new(named),
                    (None, Some(own)) => own,
                    (None, None) => {
                        let problem = format!(
                            "key \"id2label\": missing, so nobody knows what the labels of --task {} are called; add it, or \
                             {FILE} beside the adapter: {{\"task\": \"{}\", \"labels\": [...]}}",
                            task.name, task.name
                        );
                        return Err(Error::Config { path: raw.path().into(), problem });
                    }
                })
            }
        };
        let fitted = Fitted { task, labels };
        if adapter.is_none() {
            fitted.check_head(&raw, base_dir)?;
        }
        Ok(fitted)
    }

    /// Whether training that starts from the adapter in a folder goes on with its head: it was trained for this task, or does
    /// not say for which. Otherwise its head tells other things apart, and a new one begins
    /// ([`AdapterFile::attach_with_new_head`](adapter::AdapterFile::attach_with_new_head)).
    ///
    /// # Errors
    /// Those of [`of_adapter`].
    pub fn continues(&self, adapter: &Path) -> Result<bool> {
        Ok(of_adapter(adapter)?.is_none_or(|earlier| earlier.serves(self.task)))
    }

    /// Whether a head for this is one for `task`: those that tell the same apart may change places.
    fn serves(&self, task: &TaskRow) -> bool {
        // Matched and mismatched, of one task.
        let same = |a: &TaskRow, b: &TaskRow| a.name.split('-').next() == b.name.split('-').next();
        let own = |task: &TaskRow| ["labels", "values"].contains(&task.name);
        let numbers = |task: &TaskRow| task.kind == TaskKind::Values;
        same(self.task, task) || (own(self.task) || own(task)) && numbers(self.task) == numbers(task)
    }

    /// Refuses an adapter that was trained for another task.
    fn check(&self, task: &TaskRow, dir: &Path) -> Result<()> {
        if self.serves(task) {
            return Ok(());
        }
        let why = format!("the adapter {} was trained for {}; give that task", dir.display(), self.task.name);
        Err(Error::option("task", task.name, why))
    }

    /// Refuses a whole model without a head for this: one that begins at random would be judged.
    fn check_head(&self, raw: &RawConfig, dir: &Path) -> Result<()> {
        let loaded = outline(raw, &LoadOptions::default()).ok().filter(|o| o.task_type == Some("SEQ_CLS"));
        let rows = loaded.and_then(|o| {
            let name = |n: &str| n == "classifier.weight" || n == "classifier.out_proj.weight";
            o.tensors.iter().find(|t| name(&t.name)).map(|t| t.shape[0])
        });
        let wanted = self.labels.as_ref().map_or(1, |l| l.names().len());
        if rows == Some(wanted) {
            return Ok(());
        }
        let has = rows.map_or("no head".to_owned(), |n| format!("a head of {n} outputs, not one"));
        let why = format!(
            "the model in {} has {has} for this task: give the adapter that was trained for it (--adapter), or a model that \
             was trained whole (lora train --method full)",
            dir.display()
        );
        Err(Error::option("task", self.task.name, why))
    }

    /// What the head gives.
    pub fn head(&self) -> Task {
        match &self.labels {
            Some(labels) => Task::Classification { labels: labels.names().len() },
            None => Task::Regression,
        }
    }

    /// The base with a head for this, which begins at random where the folder has none, and is warned of unless an adapter
    /// is to bring it (`head_follows`).
    ///
    /// # Errors
    /// What [`lora_model::load_with`] gives.
    pub fn load(
        &self,
        dir: &Path,
        device: &Device,
        dtype: DType,
        seed: u64,
        head_follows: bool,
    ) -> Result<Box<dyn Model>> {
        let options = LoadOptions { dtype, task: Some(self.head()), seed, head_follows };
        Ok(lora_model::load_with(dir, device, &options)?)
    }

    /// Examples as a model under a method reads them: at most `max_length` tokens, and never more than the positions that
    /// the method's virtual tokens leave.
    ///
    /// # Errors
    /// Those of [`data::encode_task`].
    pub fn encode(
        &self,
        corpus: &Corpus,
        joiner: &TextJoiner,
        model: &dyn Model,
        adapted: &Adapted,
        max_length: usize,
    ) -> Result<Dataset> {
        let longest = max_length.min(model.free_positions(adapted));
        Ok(data::encode_task(corpus, self.task, self.labels.as_ref(), joiner, longest)?)
    }

    /// Writes [`FILE`] into an adapter's folder.
    ///
    /// # Errors
    /// What writing can cause.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let labels = self.labels.as_ref().map(|l| l.names().to_vec());
        let text = json!(Remembered { task: self.task.name.into(), labels });
        Ok(files::write_bytes(&dir.join(FILE), format!("{text:#}\n").as_bytes())?)
    }

    /// Names the labels in the configuration of the model that was written into a folder.
    ///
    /// # Errors
    /// What reading and writing can cause.
    pub fn name_labels(&self, dir: &Path) -> Result<()> {
        let Some(labels) = &self.labels else { return Ok(()) };
        let mut raw = RawConfig::from_dir(dir)?;
        let names = || labels.names().iter().enumerate();
        raw.set("id2label", names().map(|(i, n)| (i.to_string(), json!(n))).collect::<Map<_, Value>>());
        raw.set("label2id", names().map(|(i, n)| (n.clone(), json!(i))).collect::<Map<_, Value>>());
        Ok(raw.save(dir)?)
    }
}

/// Reads a file of a task's examples.
///
/// # Errors
/// Those of [`data::read_task`].
pub fn read(path: &Path, task: &'static TaskRow, format: Option<Format>) -> Result<Corpus> {
    Ok(data::read_task(path, task, format.unwrap_or_else(|| task.format_of(path)))?)
}

/// Encodes examples that are continued for a model under a method: sequences of at most `max_length` tokens, and never longer
/// than the positions that the method's virtual tokens leave.
///
/// # Errors
/// Those of [`data::encode`]; an infix in conversations in which the assistant speaks more than once.
pub fn encode_completions(
    corpus: &Corpus,
    encoder: &Encoder,
    model: &dyn Model,
    adapted: &Adapted,
    max_length: usize,
) -> Result<Dataset> {
    // The last token of a sequence takes no position: it is only predicted.
    let longest = max_length.min(model.free_positions(adapted) + 1);
    let data = data::encode(std::slice::from_ref(corpus), encoder, longest)?;
    let infix = adapted.stream_tokens().infix + adapted.attention_tokens().infix;
    let several = |s: &Sequence| matches!(&s.goal, Goal::Within(runs) if runs.len() > 1);
    if infix > 0 && data.sequences.iter().any(several) {
        let why = "stands before the first answer of a conversation in training, and before the one that is to come when a \
                   text is made: of conversations in which the assistant speaks twice it would learn something else; leave it \
                   out, or take --prefix";
        return Err(Error::option("infix", infix, why));
    }
    Ok(data)
}

/// Refuses a model that has no head for whole sequences, and a task that has none.
fn check_encoder(raw: &RawConfig, task: &TaskRow, dir: &Path) -> Result<()> {
    if task.kind == TaskKind::Completions {
        return Err(Error::option("task", task.name, "is for models that continue text, and has no head of its own"));
    }
    if is_encoder(raw)? {
        return Ok(());
    }
    let why = format!(
        "the model in {} continues text and has no head for this task; leave --task out or give e2e, or give an encoder \
         (BERT, RoBERTa, DeBERTa)",
        dir.display()
    );
    Err(Error::option("task", task.name, why))
}

/// Refuses an encoder where a model that continues text is wanted: without a task, or for one of completions.
///
/// # Errors
/// [`Error::Option`], which says what to give; a configuration that makes no sense.
pub fn check_causal(dir: &Path, given: Option<&TaskRow>) -> Result<()> {
    if !dir.join(CONFIG_FILE).is_file() || !is_encoder(&RawConfig::from_dir(dir)?)? {
        return Ok(());
    }
    let tasks = data::TASKS.iter().filter(|t| t.kind != TaskKind::Completions).map(|t| t.name);
    let tasks = tasks.collect::<Vec<_>>().join(", ");
    let why = format!("the model in {} is an encoder, which learns a task: give one of {tasks}", dir.display());
    Err(Error::option("task", given.map_or("not given", |t| t.name), why))
}
