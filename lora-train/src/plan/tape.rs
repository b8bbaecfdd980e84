//! `lora_core`'s tape without numbers: matrices that are only sizes, and a ledger of what is held.
//!
//! A [`Matrix`] counts from its making until its last holder drops it, exactly as a tensor does. What an operation records
//! holds what its backward needs, so the ledger's peak is that of the real pass.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use lora_kernels::DryPool;

/// What is held, in blocks as the pool of memory hands them out, and the most that the pool ever took from the system.
#[derive(Default)]
pub(super) struct Ledger {
    pool: RefCell<DryPool>,
    peak: Cell<usize>,
    /// Whether more was asked for than any machine has: nothing is counted from then on.
    absurd: Cell<bool>,
}

/// Bytes that no pass needs, far enough from the end of 64 bits for sums of them.
const MOST: u128 = 1 << 60;

impl Ledger {
    /// The most bytes that the pool held; `None` when they were absurdly many.
    pub(super) fn peak(&self) -> Option<u128> {
        (!self.absurd.get()).then_some(self.peak.get() as u128)
    }

    fn hold(self: &Rc<Ledger>, bytes: u128) -> Rc<Held> {
        let mut pool = self.pool.borrow_mut();
        let sum = bytes.saturating_add(pool.stats().reserved as u128);
        if sum > MOST || self.absurd.get() {
            self.absurd.set(true);
            return Rc::new(Held { size: None, ledger: self.clone() });
        }
        let size = pool.take(bytes as usize);
        self.peak.set(self.peak.get().max(pool.stats().reserved));
        Rc::new(Held { size: Some(size), ledger: self.clone() })
    }
}

/// A block that somebody holds.
struct Held {
    size: Option<usize>,
    ledger: Rc<Ledger>,
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(size) = self.size {
            self.ledger.pool.borrow_mut().put(size);
        }
    }
}

/// The size of a matrix, and its memory; none for parameters and weights, which are counted by themselves.
#[derive(Clone)]
pub(super) struct Matrix {
    pub(super) rows: u128,
    pub(super) cols: u128,
    /// Bytes of an element.
    size: u128,
    held: Option<Rc<Held>>,
}

impl Matrix {
    /// Whether a write needs no copy.
    pub(super) fn is_unshared(&self) -> bool {
        self.held.as_ref().is_some_and(|h| Rc::strong_count(h) == 1)
    }

    /// As many rows of it, sharing its memory.
    pub(super) fn rows_in(&self, rows: u128) -> Matrix {
        Matrix { rows, ..self.clone() }
    }

    /// The same memory in another shape.
    pub(super) fn reshaped(self, rows: u128, cols: u128) -> Matrix {
        Matrix { rows, cols, ..self }
    }

    /// The matrix for writing: copied where anybody else holds it.
    pub(super) fn make_mut(&mut self, ledger: &Rc<Ledger>) {
        if !self.is_unshared() {
            self.held = Some(ledger.hold(self.rows * self.cols * self.size));
        }
    }
}

/// A place for a gradient.
#[derive(Clone, Copy)]
pub(super) enum Slot {
    /// That of a parameter, which is counted by itself.
    Param,
    /// That of an intermediate value.
    Node(usize),
}

/// A value, and the place of its gradient when something trainable lies below it.
pub(super) struct Var {
    pub(super) value: Matrix,
    pub(super) slot: Option<Slot>,
}

impl Var {
    pub(super) fn share(&self) -> Var {
        Var { value: self.value.clone(), slot: self.slot }
    }
}

type Back<'m> = Box<dyn FnOnce(Matrix, &mut Backward) + 'm>;

/// What a forward pass has recorded.
pub(super) struct Tape<'m> {
    pub(super) ledger: Rc<Ledger>,
    /// Bytes of an element of weights and activations.
    size: u128,
    checkpoints: bool,
    /// The node of the first step.
    first: usize,
    steps: Vec<Back<'m>>,
}

/// Bytes of an element of losses, statistics and gradients of parameters.
pub(super) const WIDE: u128 = 4;

impl<'m> Tape<'m> {
    pub(super) fn new(size: u128, checkpoints: bool) -> Tape<'m> {
        Tape { ledger: Rc::default(), size, checkpoints, first: 0, steps: Vec::new() }
    }

    /// Bytes of an element.
    pub(super) fn size(&self) -> u128 {
        self.size
    }

    /// A new matrix in the type of activations.
    pub(super) fn empty(&self, rows: u128, cols: u128) -> Matrix {
        self.sized(rows, cols, self.size)
    }

    /// A new matrix in f32.
    pub(super) fn wide(&self, rows: u128, cols: u128) -> Matrix {
        self.sized(rows, cols, WIDE)
    }

    fn sized(&self, rows: u128, cols: u128, size: u128) -> Matrix {
        Matrix { rows, cols, size, held: Some(self.ledger.hold(rows * cols * size)) }
    }

    /// A weight, or a parameter where it trains.
    pub(super) fn weight(&self, rows: u128, cols: u128, trains: bool) -> Var {
        Var { value: Matrix { rows, cols, size: self.size, held: None }, slot: trains.then_some(Slot::Param) }
    }

    pub(super) fn record(
        &mut self,
        value: Matrix,
        tracked: bool,
        back: impl FnOnce(Matrix, &mut Backward) + 'm,
    ) -> Var {
        if !tracked {
            return Var { value, slot: None };
        }
        self.steps.push(Box::new(back));
        Var { value, slot: Some(Slot::Node(self.first + self.steps.len() - 1)) }
    }

    /// f(x), of which x alone is kept.
    pub(super) fn checkpoint(&mut self, x: Var, f: impl Fn(&mut Tape<'m>, Var) -> Var + 'm) -> Var {
        if !self.checkpoints {
            return f(self, x);
        }
        let before = Tape { ledger: self.ledger.clone(), steps: Vec::new(), ..*self };
        let (value, slot, outside) = (x.value.clone(), x.slot, self.steps.len());
        let Var { value: y, slot: tracked } = f(self, x);
        self.steps.truncate(outside);
        let first = self.first + outside;
        self.record(y, tracked.is_some(), move |dy, g| {
            let mut t = Tape { first, ..before };
            let y = f(&mut t, Var { value, slot });
            g.run(first, t.steps, y, dy);
        })
    }

    /// The backward pass from a loss.
    pub(super) fn backward(self, loss: Var) {
        let seed = self.wide(1, 1);
        let mut g = Backward { nodes: Vec::new(), ledger: self.ledger, size: self.size };
        g.run(self.first, self.steps, loss, seed);
    }
}

/// The gradients on their way down.
pub(super) struct Backward {
    nodes: Vec<Option<Matrix>>,
    ledger: Rc<Ledger>,
    size: u128,
}

impl Backward {
    /// Runs steps backwards from y, whose gradient is dy.
    fn run(&mut self, first: usize, steps: Vec<Back>, y: Var, dy: Matrix) {
        let Some(slot) = y.slot else { return };
        drop(y.value);
        self.nodes.resize(self.nodes.len().max(first + steps.len()), None);
        self.pass(slot, dy);
        for (i, back) in steps.into_iter().enumerate().rev() {
            let Some(dy) = self.nodes[first + i].take() else { continue };
            back(dy, self);
        }
    }

    /// Somebody writes or adds to the gradient of a value.
    pub(super) fn add(&mut self, slot: Slot, rows: u128, cols: u128) {
        if let Slot::Node(_) = slot {
            let open = self.open(slot, rows, cols);
            self.pass(slot, open);
        }
    }

    /// A whole matrix is added to the gradient of a value.
    pub(super) fn pass(&mut self, slot: Slot, dy: Matrix) {
        let Slot::Node(n) = slot else { return };
        match &mut self.nodes[n] {
            Some(sum) => sum.make_mut(&self.ledger),
            empty => *empty = Some(dy),
        }
    }

    /// Takes out the gradient of a value, to be put back by [`Backward::pass`].
    pub(super) fn open(&mut self, slot: Slot, rows: u128, cols: u128) -> Matrix {
        let sum = match slot {
            Slot::Node(n) => self.nodes[n].take(),
            Slot::Param => None,
        };
        match sum {
            Some(mut sum) => {
                sum.make_mut(&self.ledger);
                sum
            }
            None => {
                let size = if matches!(slot, Slot::Param) { WIDE } else { self.size };
                Matrix { rows, cols, size, held: Some(self.ledger.hold(rows * cols * size)) }
            }
        }
    }

    /// Memory that only one step needs.
    pub(super) fn scratch(&self, rows: u128, cols: u128) -> Matrix {
        Matrix { rows, cols, size: self.size, held: Some(self.ledger.hold(rows * cols * self.size)) }
    }
}
