//! One optimiser step, and evaluation: the arithmetic of training without files.

use lora_core::{Grads, Noise, Tensor, peft::Adapted};
use lora_kernels::{AdamW, DType, adamw_clipped, all_finite, clip_factor, fill, sum_squares_into};
use lora_model::Model;
use serde::Serialize;

use crate::{
    Error, Result, TrainConfig,
    data::{Batch, Dataset, Sampler},
    evaluation::{Evaluation, evaluate},
    groups::{Group, groups},
    passes::{Pass, Passes},
};

/// What one optimiser step did.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Step {
    /// Number of the step, from 1.
    pub step: u64,
    /// What was minimised, of the step's batch before its update: the mean cross-entropy over all targets (or squared error),
    /// with the labels' smoothing, and with what the method adds ([`Adapted::penalty`]).
    pub loss: f64,
    /// Learning rate of its update; with LoRA+ that of A.
    pub lr: f64,
    /// ‖gradient‖₂, before clipping.
    pub grad_norm: f64,
    /// Tokens of its sequences.
    pub tokens: usize,
}

/// Trains what a method made trainable on one base.
///
/// A step is: the batch's micro-batches forward and backward (their gradients add up; each loss is divided by the number
/// of targets of the whole batch, so that splitting changes nothing), clipping, AdamW, and what the method does after a step.
///
/// ```
/// use lora_core::peft::{Adapted, Base};
/// use lora_kernels::Device;
/// use lora_model::{Model, adapter};
/// use lora_train::{
///     Encoder, TrainConfig, Trainer,
///     checkpoint::{self, Fingerprint, Spent},
///     data::{Content, Corpus},
///     task::encode_completions,
/// };
/// # use lora_train::{PretrainConfig, pretrain};
/// # let temporary = tempfile::tempdir()?;
/// # let folder = temporary.path();
/// # let text = folder.join("text.txt");
/// # std::fs::write(&text, "The Vaults is a pub . The Mill is a restaurant .\n")?;
/// # let (out, vocab, context) = (folder.join("base"), 262, 64);
/// # let base = PretrainConfig { text: vec![text], out, vocab, layers: 1, dim: 16, heads: 2, context, ..Default::default() };
/// # pretrain(&PretrainConfig { steps: Some(1), ..base }, false, &mut ())?;
///
/// let (base, out) = (folder.join("base"), folder.join("adapter"));
/// let model = lora_model::load(&base, &Device::Cpu)?;
/// let config = TrainConfig { rank: 4, batch_size: 2, epochs: Some(3.0), lr: 1e-2, ..TrainConfig::default() };
/// let adapted = Adapted::new(&*config.method_options()?, &*model, &Device::Cpu, model.dtype(), config.seed)?;
///
/// // Texts of your own: of each the model is given the first part, and learns the second.
/// let pairs = [("name : The Vaults", "The Vaults is a pub ."), ("name : The Mill", "The Mill is a restaurant .")];
/// let pair = |(prompt, completion): (&str, &str)| Content::Pair { prompt: prompt.into(), completion: completion.into() };
/// let encoder = Encoder::from_dir(&base, &*model)?;
/// let data = encode_completions(&Corpus::new("my pairs", pairs.map(pair)), &encoder, &*model, &adapted, 64)?;
///
/// let mut trainer = Trainer::new(&*model, adapted, &config, data.sequences.len())?;
/// let inputs = Fingerprint::of(&data, &*model)?;
/// while trainer.steps_done() < trainer.total_steps() {
///     let step = trainer.step(&data)?;
///     println!("step {}: loss {:.3}", step.step, step.loss);
///     if step.step == 2 {
///         checkpoint::save(&out, &trainer, &inputs, Spent::default(), |_| Ok(()))?; // `load` goes on from it
///         break;
///     }
/// }
/// println!("loss {:.3}", trainer.evaluate(&data)?.loss);
///
/// // An adapter in PEFT's format, and a model of its own with the adapter in its weights.
/// let adapted = trainer.adapted;
/// adapter::save(&out, &config.method, &config.options()?, &adapted, &*model, None)?;
/// model.save(&folder.join("merged"), &adapted.merged(&*model)?)?;
/// # let again = adapter::attach(&out, &*model, &Device::Cpu)?;
/// # assert_eq!(again.params.flat().to_f64()?, adapted.params.flat().to_f64()?);
/// # assert_eq!(checkpoint::list(&out)?.len(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Trainer<'a> {
    model: &'a dyn Model,
    /// The trainable parameters and where they are attached.
    pub adapted: Adapted,
    pub(crate) config: &'a TrainConfig,
    groups: Vec<Group>,
    grads: Grads,
    /// AdamW's mean of gradients and of their squares, flat like the parameters.
    pub(crate) moments: [Tensor; 2],
    scalars: Scalars,
    passes: Passes,
    /// Steps done.
    pub(crate) done: u64,
    /// Loss of the last of them.
    pub(crate) loss: Option<f64>,
    /// Steps of the whole run.
    total: u64,
    sampler: Sampler,
    first: bool,
    unreached: Vec<String>,
}

/// The single numbers of a step, on the device: they are read once, when all of the step has been asked for.
struct Scalars {
    loss: Tensor,
    /// ‖gradient‖₂².
    sum_squares: Tensor,
    /// What the gradient is multiplied by.
    factor: Tensor,
}

impl<'a> Trainer<'a> {
    /// A trainer before its first step, for data of `sequences` sequences. Of the configuration it reads how long and in what
    /// batches to train, the optimiser's settings and schedule, label smoothing, clipping, `checkpoint`, `no-shuffle` and the
    /// seed; method, base, data and output are what it is given. [`TrainConfig::check`] checks them.
    ///
    /// # Errors
    /// No sequences, no memory; a method's schedule that does not fit into the run.
    pub fn new(
        model: &'a dyn Model,
        mut adapted: Adapted,
        config: &'a TrainConfig,
        sequences: usize,
    ) -> Result<Trainer<'a>> {
        let grads = Grads::new(&adapted.params)?;
        let p = &adapted.params;
        let zeros = || Tensor::zeros(&p.device(), p.dtype(), &[1, p.count()]);
        let moments = [zeros()?, zeros()?];
        let scalar = |dtype| Tensor::zeros(&p.device(), dtype, &[1, 1]);
        let scalars =
            Scalars { loss: scalar(p.dtype())?, sum_squares: scalar(DType::F64)?, factor: scalar(p.dtype())? };
        let seed = (!config.no_shuffle).then_some(config.seed);
        let sampler = Sampler::new(sequences, config.batch_size, config.grad_accum, seed)?;
        let total = config.total_steps(sampler.steps_per_epoch());
        adapted.set_total_steps(total)?;
        Ok(Trainer {
            model,
            groups: groups(&adapted.params, config),
            adapted,
            config,
            grads,
            moments,
            scalars,
            passes: Passes::default(),
            done: 0,
            loss: None,
            total,
            sampler,
            first: true,
            unreached: Vec::new(),
        })
    }

    /// Steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.total
    }

    /// Steps of one pass over the data.
    pub fn steps_per_epoch(&self) -> u64 {
        self.sampler.steps_per_epoch()
    }

    /// Steps done so far.
    pub fn steps_done(&self) -> u64 {
        self.done
    }

    /// Parameters that the backward pass of the first step (of this life) did not reach; empty from the second on. AdaLoRA's
    /// penalty reaches every A and B, so of a map that the loss does not reach its E alone is among them.
    pub fn unreached(&self) -> &[String] {
        &self.unreached
    }

    /// How many forward and backward passes were replayed rather than asked for kernel by kernel: on a CUDA device, where
    /// shapes repeat and nothing is dropped out.
    pub fn replayed(&self) -> u64 {
        self.passes.replayed()
    }

    pub(crate) fn sampler(&self) -> &Sampler {
        &self.sampler
    }

    /// Does the next step.
    ///
    /// # Errors
    /// [`Error::Diverged`] when the loss or the gradient is no number: parameters and moments are as before the step.
    pub fn step(&mut self, data: &Dataset) -> Result<Step> {
        let (c, step) = (self.config, self.done);
        let batches = self.sampler.batches(step, data);
        let targets: usize = batches.iter().map(Batch::targets).sum();
        let tokens = batches.iter().map(Batch::sequence_tokens).sum();
        self.grads.reset();
        for (i, b) in batches.iter().enumerate() {
            let noise = Noise {
                seed: c.seed,
                step: step as u32,
                row_offset: b.row_offset as u32,
                sequence_offset: b.sequence_offset as u32,
                target_offset: b.target_offset as u32,
            };
            let mut passes = std::mem::take(&mut self.passes);
            let done = passes.run(
                &mut Pass {
                    model: self.model,
                    adapted: &self.adapted,
                    grads: &mut self.grads,
                    loss: &mut self.scalars.loss,
                    smoothing: c.label_smoothing,
                    checkpoint: c.checkpoint,
                    scale: 1.0 / targets as f64,
                    noise,
                    first: i == 0,
                },
                b,
            );
            self.passes = passes;
            done?;
        }
        self.unreached.clear();
        if std::mem::take(&mut self.first) {
            self.unreached.extend(self.grads.unwritten().iter().map(|n| n.to_string()));
        }
        let schedule = c.schedule.factor(step, c.warmup, self.total);
        self.update(schedule, step + 1)?;
        // The step's only wait for the device: nothing before read anything back.
        let loss = self.scalars.loss.to_f64()?[0];
        let grad_norm = self.scalars.sum_squares.to_f64()?[0].sqrt();
        let within = |what, value: f64, limit: f64| match value.abs() < limit {
            true => Ok(value),
            false => Err(Error::Diverged { step: step + 1, what, value }),
        };
        within("the loss", loss, f64::INFINITY)?;
        within("the gradient's norm", grad_norm, f64::from(f32::MAX).sqrt())?;
        if self.adapted.budget().is_some() {
            let factor = self.scalars.factor.to_f64()?[0];
            self.adapted.after_step(step + 1, &mut self.grads, factor)?;
        }
        (self.done, self.loss) = (self.done + 1, Some(loss));
        Ok(Step { step: step + 1, loss, lr: c.lr * schedule, grad_norm, tokens })
    }

    /// Clipping as PyTorch's `clip_grad_norm_` does it, and AdamW on each group, with a `schedule`'s share of its learning
    /// rate. When loss or gradient is no number, nothing changes ([`clip_factor`]).
    fn update(&mut self, schedule: f64, step: u64) -> Result<()> {
        let c = self.config;
        let Scalars { loss, sum_squares, factor } = &mut self.scalars;
        sum_squares_into(self.grads.flat_mut()?.as_mat(), sum_squares.make_mut()?)?;
        fill(1.0, factor.make_mut()?)?;
        clip_factor(loss.mat(), sum_squares.mat(), c.clip, factor.make_mut()?)?;
        let params = &mut self.adapted.params;
        let [m, v] = &mut self.moments;
        let (mut p, mut g) = (params.flat_mut()?, self.grads.flat_mut()?);
        for Group { range, lr, weight_decay } in self.groups.iter().cloned() {
            let lr = lr * schedule;
            let rule = AdamW { lr, beta1: c.beta1, beta2: c.beta2, eps: c.eps, weight_decay, step };
            adamw_clipped(
                &rule,
                factor.mat(),
                p.reborrow().cols_in(range.clone()),
                g.reborrow().as_mat().cols_in(range.clone()),
                m.make_mut()?.cols_in(range.clone()),
                v.make_mut()?.cols_in(range),
            )?;
        }
        Ok(())
    }

    /// Checks that parameters and moments are numbers, before they are saved.
    ///
    /// # Errors
    /// [`Error::Diverged`].
    pub(crate) fn check_finite(&self) -> Result<()> {
        let flat = self.adapted.params.flat();
        let finite =
            all_finite(flat.mat())? && all_finite(self.moments[0].mat())? && all_finite(self.moments[1].mat())?;
        match finite {
            true => Ok(()),
            false => Err(Error::Diverged { step: self.done, what: "a parameter or its moments", value: f64::NAN }),
        }
    }

    /// The loss on `data` as it is now.
    ///
    /// # Errors
    /// What a forward pass can cause; [`Error::Diverged`] where the loss is no number.
    pub fn evaluate(&self, data: &Dataset) -> Result<Evaluation> {
        // As many at once as a pass of training has.
        let at_once = self.config.batch_size.div_ceil(self.config.grad_accum.max(1));
        evaluate(self.model, &self.adapted, data, at_once).map_err(|e| match e {
            Error::NotFinite { loss } => Error::Diverged { step: self.done, what: "the validation loss", value: loss },
            e => e,
        })
    }
}
