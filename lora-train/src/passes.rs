//! The forward and backward pass of one micro-batch.
//!
//! It is thousands of small kernels, and on a CUDA device starting them can take longer than they do. Where the shape of a
//! micro-batch repeats the one before, the pass is recorded and from then on started as a whole. `LORA_CUDA_GRAPHS=0`
//! turns that off.

use lora_core::{Grads, Noise, Params, Tape, Tensor, ops, peft::Adapted};
use lora_kernels::axpby;
use lora_model::Model;

use crate::{Result, data};

/// What a pass reads and writes besides its micro-batch.
pub(crate) struct Pass<'a> {
    pub(crate) model: &'a dyn Model,
    pub(crate) adapted: &'a Adapted,
    pub(crate) grads: &'a mut Grads,
    /// The step's loss, to which that of the micro-batch is added.
    pub(crate) loss: &'a mut Tensor,
    pub(crate) smoothing: f64,
    /// Whether layers are computed once more on the way back.
    pub(crate) checkpoint: bool,
    pub(crate) scale: f64,
    pub(crate) noise: Noise,
    /// Whether this is the step's first micro-batch.
    pub(crate) first: bool,
}

impl Pass<'_> {
    fn batch(&self, b: &data::Batch) -> Result<lora_model::Batch> {
        Ok(self.model.batch(self.adapted, &b.texts())?)
    }

    /// Asks for every kernel of the pass; whether any of them depends on the step's noise.
    fn compute(&mut self, params: &Params, batch: &lora_model::Batch) -> Result<bool> {
        let mut tape = Tape::new(params).with_noise(self.noise).with_checkpoints(self.checkpoint);
        let mut part = self.model.loss(&mut tape, self.adapted, batch, self.smoothing, self.scale)?;
        // What a method adds belongs to the step, not to each of its parts.
        if self.first
            && let Some(penalty) = self.adapted.penalty(&mut tape)?
        {
            part = ops::add(&mut tape, part, penalty)?;
        }
        axpby(1.0, part.value().mat(), if self.first { 0.0 } else { 1.0 }, self.loss.make_mut()?)?;
        let noisy = tape.is_noisy();
        tape.backward(part, self.grads)?;
        Ok(noisy)
    }
}

/// The passes of a run.
#[derive(Default)]
pub(crate) struct Passes {
    /// That of a step's first micro-batch, which overwrites gradients, and that of the others, which add to them.
    #[cfg(feature = "cuda")]
    slots: [recorded::Slot; 2],
    replayed: u64,
}

impl Passes {
    /// Passes that were replayed.
    pub(crate) fn replayed(&self) -> u64 {
        self.replayed
    }

    pub(crate) fn run(&mut self, pass: &mut Pass, b: &data::Batch) -> Result<()> {
        #[cfg(feature = "cuda")]
        if !pass.model.device().is_cpu() {
            let slot = &mut self.slots[usize::from(!pass.first)];
            self.replayed += u64::from(slot.run(pass, b)?);
            return Ok(());
        }
        let device = pass.model.device();
        device.run(|| {
            let batch = pass.batch(b)?;
            pass.compute(&pass.adapted.params, &batch).map(drop)
        })
    }
}

#[cfg(feature = "cuda")]
mod recorded {
    use lora_core::Marks;
    use lora_kernels::{Device, cuda::Graph};

    use super::Pass;
    use crate::{Result, data};

    /// What a recording depends on besides the numbers that it reads anew.
    #[derive(PartialEq)]
    pub(super) struct Key {
        lengths: Vec<usize>,
        targets: usize,
        /// The bits of the loss's scale: the targets of the whole step.
        scale: u64,
        /// Where the parameters lie.
        params: usize,
    }

    /// What was done last, and can perhaps be done again.
    #[derive(Default)]
    pub(super) enum Slot {
        #[default]
        None,
        /// A pass with this key was run as it is, and can be recorded when it comes again.
        Seen(Key),
        Ready(Box<Ready>),
        /// Passes depend on noise, or the device cannot record.
        Never,
    }

    pub(super) struct Ready {
        key: Key,
        graph: Graph,
        /// Where the recording reads the micro-batch.
        batch: lora_model::Batch,
        /// The gradients that are written after it.
        marks: Marks,
    }

    impl Slot {
        /// Does a pass; whether it was replayed.
        pub(super) fn run(&mut self, pass: &mut Pass, b: &data::Batch) -> Result<bool> {
            let key = Key {
                lengths: b.lengths.clone(),
                targets: b.targets(),
                scale: pass.scale.to_bits(),
                params: pass.adapted.params.address(),
            };
            if let Slot::Ready(ready) = self
                && ready.key == key
            {
                let model = pass.model;
                ready.batch.rewrite(model.limits(), model.task(), pass.adapted, &b.texts())?;
                ready.graph.launch()?;
                pass.grads.restore(&ready.marks);
                return Ok(true);
            }
            let batch = pass.batch(b)?;
            if matches!(self, Slot::Seen(seen) if *seen == key) {
                let before = pass.grads.marks();
                let device = pass.model.device();
                if let Device::Cuda(gpu) = &device {
                    // A recording keeps memory of its own: what the passes before it used is free for that.
                    gpu.release_idle_memory();
                }
                match Graph::record(&device, || pass.compute(&pass.adapted.params.uncast(), &batch)) {
                    Ok((_, graph)) => {
                        graph.launch()?;
                        *self = Slot::Ready(Box::new(Ready { key, graph, batch, marks: pass.grads.marks() }));
                        return Ok(false);
                    }
                    Err(e) => {
                        tracing::warn!("the device records no graphs, so steps take longer: {e}");
                        pass.grads.restore(&before);
                        *self = Slot::Never;
                    }
                }
            }
            let noisy = pass.compute(&pass.adapted.params, &batch)?;
            let off = std::env::var_os("LORA_CUDA_GRAPHS").is_some_and(|v| v == "0");
            *self = match self {
                Slot::Never => Slot::Never,
                _ if noisy || off => Slot::Never,
                _ => Slot::Seen(key),
            };
            Ok(false)
        }
    }
}
