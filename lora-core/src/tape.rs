use std::{mem, sync::Arc};

use lora_kernels::{Acc, Device, Dropout, axpby, fill};

use crate::{Grads, ParamId, Params, Result, Share, Shares, Tensor};

/// A place for the gradient of one value. What has no slot is a constant: nothing is saved or computed for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// A trainable parameter; its gradient goes to the [`Grads`].
    Param(ParamId),
    /// An intermediate value of this tape.
    Node(usize),
}

/// A value in a computation: a tensor and, when something trainable lies below it, the place for its gradient.
///
/// Not `Clone`: an operation that takes a `Var` by value may write in place, as long as nobody else (a saved input of a
/// recorded step) holds its tensor.
#[derive(Debug)]
pub struct Var {
    pub(crate) value: Tensor,
    pub(crate) slot: Option<Slot>,
}

impl Var {
    /// The value.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// The same value for a second use. An operation that would write in place copies while both live.
    pub fn share(&self) -> Var {
        Var { value: self.value.clone(), slot: self.slot }
    }

    /// The value alone, without its history.
    pub fn into_value(self) -> Tensor {
        self.value
    }

    /// The place for the gradient of this value; a constant has none.
    pub fn slot(&self) -> Option<Slot> {
        self.slot
    }

    /// Whether a gradient flows to this value.
    pub fn is_tracked(&self) -> bool {
        self.slot.is_some()
    }
}

/// What makes the dropout masks of one forward pass: they are a function of these numbers and the element's place, so
/// that threads, micro-batches and an interrupted run change nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noise {
    /// Seed of the run.
    pub seed: u64,
    /// The optimiser's step.
    pub step: u32,
    /// Rows of the step that earlier micro-batches held.
    pub row_offset: u32,
    /// Sequences of the step that earlier micro-batches held.
    pub sequence_offset: u32,
    /// Targets of the step that earlier micro-batches held.
    pub target_offset: u32,
}

type Back<'m> = Box<dyn FnOnce(Tensor, &mut Backward) -> Result<()> + 'm>;

/// Records the operations of one forward pass, as far as something trainable lies below them. `'m` is how long the model
/// lives, of which parts may be computed once more on the way back ([`Tape::checkpoint`]).
pub struct Tape<'m> {
    params: Params,
    recording: bool,
    noise: Option<Noise>,
    noisy: bool,
    sites: u32,
    shares: Option<Shares>,
    checkpoints: bool,
    /// The node of the first step.
    first: usize,
    /// Step i makes the value of node `first` + i.
    steps: Vec<Back<'m>>,
}

impl<'m> Tape<'m> {
    /// A tape on which `params` are variables. Without [`Tape::with_noise`] nothing is dropped out.
    pub fn new(params: &Params) -> Tape<'m> {
        Tape {
            params: params.clone(),
            recording: true,
            noise: None,
            noisy: false,
            sites: 0,
            shares: None,
            checkpoints: false,
            first: 0,
            steps: Vec::new(),
        }
    }

    /// A tape that records nothing: evaluation and generation.
    pub fn inference(params: &Params) -> Tape<'m> {
        Tape { recording: false, ..Tape::new(params) }
    }

    /// Training mode: dropout is active, with masks made from `noise`.
    pub fn with_noise(mut self, noise: Noise) -> Tape<'m> {
        self.noise = Some(noise);
        self
    }

    /// Whether [`Tape::checkpoint`] saves memory, or computes what it is given like anything else.
    pub fn with_checkpoints(self, checkpoints: bool) -> Tape<'m> {
        Tape { checkpoints, ..self }
    }

    /// Whether it does.
    pub fn checkpoints(&self) -> bool {
        self.checkpoints && self.recording
    }

    /// Says which rows have which of several adapters ([`crate::peft::Adapted::mixed`]).
    pub fn share_rows(&mut self, shares: Option<Shares>) {
        self.shares = shares;
    }

    /// The shares of the rows that are computed now, where they have different adapters.
    pub fn shares(&self) -> Option<Arc<[Share]>> {
        self.shares.as_ref().map(|shares| shares.current().clone())
    }

    /// A value that nothing trainable lies below.
    pub fn constant(&self, t: &Tensor) -> Var {
        Var { value: t.clone(), slot: None }
    }

    /// A value that counts as if something trainable lay below it, though nothing takes its gradient: for measuring what
    /// a part of a network costs.
    pub fn tracked(&mut self, t: &Tensor) -> Var {
        self.record(t.clone(), self.recording, |_, _| Ok(()))
    }

    /// A trainable parameter.
    pub fn param(&self, id: ParamId) -> Result<Var> {
        Ok(Var { value: self.params.compute_tensor(id)?, slot: self.recording.then_some(Slot::Param(id)) })
    }

    /// A trainable parameter in the type that it is kept in, where 16 bits would not do.
    pub fn param_wide(&self, id: ParamId) -> Var {
        Var { value: self.params.tensor(id), slot: self.recording.then_some(Slot::Param(id)) }
    }

    /// Where new tensors of this computation lie.
    pub fn device(&self) -> Device {
        self.params.device()
    }

    /// The mask of the next dropout of rate `p`, or none when nothing is to be dropped.
    pub fn dropout_mask(&mut self, p: f64) -> Option<Dropout> {
        // Every dropout of the architecture counts, also one of rate 0: its neighbours keep their masks when it changes.
        let site = self.sites;
        self.sites += 1;
        let Noise { seed, step, row_offset, .. } = self.noise?;
        self.noisy |= p > 0.0;
        (p > 0.0).then_some(Dropout { p, seed, step, site, row_offset })
    }

    /// Runs `f` on rows that all micro-batches of a step have in common, those of a table: its dropout masks count rows from
    /// 0, so that splitting a batch does not change them. They are of no sequence, so in no share.
    pub fn on_common_rows<R>(&mut self, f: impl FnOnce(&mut Self) -> R) -> R {
        let shares = mem::take(&mut self.shares);
        let result = self.counting_rows_from(|_| 0, f);
        self.shares = shares;
        result
    }

    /// Runs `f` on one row for each target, as heads see them: its dropout masks count targets over the whole step, where
    /// those of tokens count rows.
    pub fn on_target_rows<R>(&mut self, f: impl FnOnce(&mut Self) -> R) -> R {
        self.counting_rows_from(|noise| noise.target_offset, f)
    }

    /// As [`Tape::on_target_rows`], for what follows up to the end of the function that [`Tape::on_rows_with`] runs.
    pub fn go_on_with_target_rows(&mut self) {
        self.noise = self.noise.map(|noise| Noise { row_offset: noise.target_offset, ..noise });
        self.shares.iter_mut().for_each(Shares::go_on_with_targets);
    }

    /// Runs `f` on rows among which every sequence has so many virtual ones: its dropout masks count those too, so that
    /// micro-batches have rows of their own.
    pub fn on_rows_with<R>(&mut self, virtual_rows: usize, f: impl FnOnce(&mut Self) -> R) -> R {
        let more = self.virtual_rows_before(virtual_rows);
        self.counting_rows_from(|noise| noise.row_offset.wrapping_add(more), f)
    }

    /// The virtual rows of the step's earlier micro-batches, where every sequence has so many.
    pub fn virtual_rows_before(&self, virtual_rows: usize) -> u32 {
        self.noise.map_or(0, |noise| noise.sequence_offset.wrapping_mul(virtual_rows as u32))
    }

    fn counting_rows_from<R>(&mut self, offset: impl FnOnce(Noise) -> u32, f: impl FnOnce(&mut Self) -> R) -> R {
        let noise = self.noise;
        if let Some(noise) = noise {
            self.noise = Some(Noise { row_offset: offset(noise), ..noise });
        }
        let result = f(self);
        self.noise = noise;
        result
    }

    /// Whether anything was dropped out so far: the pass then depends on the step's [`Noise`].
    pub fn is_noisy(&self) -> bool {
        self.noisy
    }

    /// Records how the gradient of a new value flows on. When `tracked` is false the value is a constant and `back` is
    /// dropped, with all it captured.
    pub fn record(
        &mut self,
        value: Tensor,
        tracked: bool,
        back: impl FnOnce(Tensor, &mut Backward) -> Result<()> + 'm,
    ) -> Var {
        if !tracked {
            return Var { value, slot: None };
        }
        self.steps.push(Box::new(back));
        Var { value, slot: Some(Slot::Node(self.first + self.steps.len() - 1)) }
    }

    /// As [`Tape::record`], for an operation y ← y + f(…) that wrote onto `y`: dy flows on to what y was before (`slot`),
    /// and to f. What y was keeps its own place: another holder of it must not send its gradient through f.
    pub fn record_onto(
        &mut self,
        value: Tensor,
        slot: Option<Slot>,
        tracked: bool,
        back: impl FnOnce(Tensor, &mut Backward) -> Result<()> + 'm,
    ) -> Var {
        if !tracked {
            return Var { value, slot };
        }
        self.record(value, true, move |dy, g| {
            if let Some(s) = slot {
                g.pass(s, dy.clone())?;
            }
            back(dy, g)
        })
    }

    /// f(x), of which nothing but x is kept for the backward pass, where f is computed once more: the memory of its inside is
    /// needed for one part of a network at a time, for the price of a second forward pass (Chen et al. 2016). Values and
    /// gradients keep their bits. Of what f computes, nothing but its result may be used outside.
    ///
    /// Without [`Tape::with_checkpoints`], and in inference, this is f(x) as it stands.
    pub fn checkpoint(&mut self, x: Var, f: impl Fn(&mut Tape<'m>, Var) -> Result<Var> + 'm) -> Result<Var> {
        if !self.checkpoints() {
            return f(self, x);
        }
        let before = Tape { params: self.params.clone(), shares: self.shares.clone(), steps: Vec::new(), ..*self };
        let (value, slot, outside) = (x.value.clone(), x.slot, self.steps.len());
        let y = f(self, x);
        // All that f has recorded goes: it said whether something trains there.
        self.steps.truncate(outside);
        let Var { value: y, slot: tracked } = y?;
        let first = self.first + outside;
        Ok(self.record(y, tracked.is_some(), move |dy, g| {
            // Its nodes take the places of those after it, which are done with.
            let mut t = Tape { first, ..before };
            let y = f(&mut t, Var { value, slot })?;
            g.run(first, t.steps, y, dy)
        }))
    }

    /// Adds ∂loss/∂p to the gradient of every parameter p. `loss` holds one element.
    ///
    /// # Panics
    /// When `loss` is not a scalar.
    pub fn backward(self, loss: Var, grads: &mut Grads) -> Result<()> {
        assert_eq!(loss.value.len(), 1, "backward starts from a scalar, not from {:?}", loss.value.shape());
        let mut seed = Tensor::empty(&loss.value.device(), loss.value.dtype(), loss.value.shape())?;
        fill(1.0, seed.make_mut()?)?;
        self.backward_from(loss, seed, grads)
    }

    /// Adds ∂⟨dy, y⟩/∂p to the gradient of every parameter p: the vector-Jacobian product.
    ///
    /// # Panics
    /// When dy has not the shape of y.
    pub fn backward_from(self, y: Var, dy: Tensor, grads: &mut Grads) -> Result<()> {
        assert_eq!(y.value.shape(), dy.shape(), "the gradient has the shape of its value");
        Backward { nodes: Vec::new(), grads }.run(self.first, self.steps, y, dy)
    }
}

/// The gradients on their way down, during [`Tape::backward`].
pub struct Backward<'a> {
    nodes: Vec<Option<Tensor>>,
    grads: &'a mut Grads,
}

/// The gradient of one value, taken out so that a kernel can write several at once.
pub struct Open {
    slot: Slot,
    value: Tensor,
    beta: f64,
}

impl Open {
    /// Where the kernel writes.
    pub fn acc(&mut self) -> Result<Acc<'_>> {
        Ok(Acc { beta: self.beta, to: self.value.make_mut()? })
    }
}

impl Backward<'_> {
    /// Runs steps backwards from y, whose gradient is dy; the first of them made the value of node `first`.
    fn run(&mut self, first: usize, steps: Vec<Back>, y: Var, dy: Tensor) -> Result<()> {
        let Some(slot) = y.slot else { return Ok(()) };
        drop(y.value);
        self.nodes.resize(self.nodes.len().max(first + steps.len()), None);
        self.pass(slot, dy)?;
        for (i, back) in steps.into_iter().enumerate().rev() {
            // A value that nothing used has no gradient: its step is skipped, and so is all below it.
            let Some(dy) = self.nodes[first + i].take() else { continue };
            back(dy, self)?;
        }
        Ok(())
    }

    /// Lets `write` add to the gradient of a value of the given shape; `like` gives type and device.
    pub fn add(
        &mut self,
        slot: Slot,
        shape: &[usize],
        like: &Tensor,
        write: impl FnOnce(Acc) -> Result<()>,
    ) -> Result<()> {
        if let Slot::Param(id) = slot {
            return write(self.grads.acc(id));
        }
        let mut open = self.open(slot, shape, like)?;
        write(open.acc()?)?;
        self.close(open)
    }

    /// As [`Backward::add`], for a kernel that adds to the gradients of several values in one call, in their order.
    pub fn add_all(
        &mut self,
        values: &[(Slot, Vec<usize>)],
        like: &Tensor,
        write: impl FnOnce(Vec<Acc>) -> Result<()>,
    ) -> Result<()> {
        let id = |(slot, _): &(Slot, _)| if let Slot::Param(id) = slot { Some(*id) } else { None };
        if let Some(ids) = values.iter().map(id).collect::<Option<Vec<_>>>()
            && let Some(accs) = self.grads.accs(&ids)
        {
            return write(accs);
        }
        let open: Result<Vec<_>> = values.iter().map(|(slot, shape)| self.open(*slot, shape, like)).collect();
        let mut open = open?;
        write(open.iter_mut().map(Open::acc).collect::<Result<_>>()?)?;
        open.into_iter().try_for_each(|open| self.close(open))
    }

    /// Adds a whole tensor to the gradient of a value; as the first one it is taken as it is, without a copy.
    pub fn pass(&mut self, slot: Slot, dy: Tensor) -> Result<()> {
        let acc = match slot {
            Slot::Param(id) => self.grads.acc(id),
            Slot::Node(n) => match &mut self.nodes[n] {
                Some(sum) => Acc { to: sum.make_mut()?, beta: 1.0 },
                empty => {
                    *empty = Some(dy);
                    return Ok(());
                }
            },
        };
        Ok(axpby(1.0, dy.mat(), acc.beta, acc.to)?)
    }

    /// Takes out the gradient of a value, for a kernel that writes several gradients in one call.
    pub fn open(&mut self, slot: Slot, shape: &[usize], like: &Tensor) -> Result<Open> {
        let sum = match slot {
            Slot::Node(n) => self.nodes[n].take(),
            Slot::Param(_) => None,
        };
        Ok(match sum {
            Some(value) => Open { slot, value, beta: 1.0 },
            None => {
                let dtype = match slot {
                    Slot::Param(_) => like.dtype().accumulator(),
                    Slot::Node(_) => like.dtype(),
                };
                Open { slot, value: Tensor::empty(&like.device(), dtype, shape)?, beta: 0.0 }
            }
        })
    }

    /// Puts back what [`Backward::open`] took out.
    pub fn close(&mut self, open: Open) -> Result<()> {
        self.pass(open.slot, open.value)
    }
}
