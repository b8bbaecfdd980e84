use std::sync::{Arc, OnceLock};

use lora_kernels::{Acc, Buffer, DType, Device, MatMut};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};

use crate::{Result, Tensor, hash::fnv1a};

/// Names one trainable parameter of a [`Params`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParamId(pub(crate) usize);

/// How a trainable parameter begins.
#[derive(Clone, Debug)]
pub enum Init {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// Uniform in [−bound, bound).
    Uniform {
        /// The bound.
        bound: f64,
    },
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// Normal with mean 0, drawn again where it is more than two deviations away.
    TruncatedNormal {
        /// Standard deviation of what is cut off.
        std: f64,
    },
    /// Ones on the diagonal of a square matrix, and normal with mean 0 elsewhere.
    NearIdentity {
        /// Standard deviation.
        std: f64,
    },
    /// A copy of another tensor: a base weight that trains.
    Copy(Tensor),
    /// Each row a copy of a random row of another tensor.
    SampledRows(Tensor),
}

impl Init {
    /// PyTorch's `kaiming_uniform_(a = √5)` for a matrix with `fan_in` inputs: uniform within 1/√fan_in. The authors' code
    /// starts A with it.
    pub fn kaiming_uniform(fan_in: usize) -> Init {
        Init::Uniform { bound: 1.0 / (fan_in as f64).sqrt() }
    }
}

/// The stream of random numbers of this name.
pub(crate) fn stream(seed: u64, name: &str) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(fnv1a(name.bytes()));
    rng
}

#[derive(Clone, Debug)]
struct Entry {
    name: String,
    shape: Vec<usize>,
    offset: usize,
    /// Whether the parameter is a bias or belongs to a normalisation: weight decay can spare those.
    vector: bool,
}

impl Entry {
    /// Rows and columns as a matrix.
    fn matrix(&self) -> (usize, usize) {
        (self.shape.iter().rev().skip(1).product(), self.shape.last().copied().unwrap_or(1))
    }
}

/// Collects what a method wants to train, before any memory is taken.
#[derive(Debug, Default)]
pub struct ParamsBuilder {
    entries: Vec<Entry>,
    inits: Vec<Init>,
    len: usize,
}

impl ParamsBuilder {
    /// An empty collection.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a parameter.
    ///
    /// # Panics
    /// When the name is taken, a copied tensor has another number of elements, or sampled rows another width.
    pub fn add(&mut self, name: impl Into<String>, shape: &[usize], init: Init) -> ParamId {
        let (name, len) = (name.into(), shape.iter().product::<usize>());
        assert!(self.entries.iter().all(|e| e.name != name), "parameter {name} twice");
        match &init {
            Init::Copy(t) => assert_eq!(t.len(), len, "{name}: copy of {:?} as {shape:?}", t.shape()),
            Init::SampledRows(t) => assert_eq!(t.cols(), shape[shape.len() - 1], "{name}: rows of {:?}", t.shape()),
            _ => {}
        }
        self.entries.push(Entry { name, shape: shape.into(), offset: self.len, vector: shape.len() < 2 });
        self.inits.push(init);
        self.len += len;
        ParamId(self.entries.len() - 1)
    }

    /// Number of scalars so far.
    pub fn count(&self) -> usize {
        self.len
    }

    /// Names and shapes, without taking any memory.
    pub(crate) fn into_shapes(self) -> Vec<(String, Vec<usize>)> {
        self.entries.into_iter().map(|e| (e.name, e.shape)).collect()
    }

    /// Takes the memory and fills it in. Computations see the parameters in `dtype`; they are kept, and their gradients are
    /// summed, in its accumulator's type ([`DType::accumulator`]): f32 for bf16, so that small updates are not rounded away.
    /// Each parameter draws from a stream of its own, chosen by its name, so that it
    /// begins the same way whatever else trains.
    ///
    /// # Panics
    /// When the standard deviation of an initialisation is not finite.
    pub fn build(self, device: &Device, dtype: DType, seed: u64) -> Result<Params> {
        let compute = device.activations(dtype);
        let dtype = compute.accumulator();
        let mut flat = Buffer::empty(device, dtype, self.len)?;
        for (e, init) in self.entries.iter().zip(&self.inits) {
            let len: usize = e.shape.iter().product();
            let mut rng = stream(seed, &e.name);
            let mut to = MatMut::new(&mut flat, e.offset, 1, len);
            let values: Vec<f64> = match init {
                Init::Zeros | Init::Ones => {
                    lora_kernels::fill(if matches!(init, Init::Ones) { 1.0 } else { 0.0 }, to)?;
                    continue;
                }
                Init::Copy(t) => {
                    let t = t.to(device, dtype)?.reshape(&[1, len]);
                    lora_kernels::axpby(1.0, t.mat(), 0.0, to.reborrow())?;
                    continue;
                }
                Init::SampledRows(t) => {
                    let (rows, cols) = e.matrix();
                    let ids: Vec<u32> = (0..rows).map(|_| rng.random_range(0..t.rows()) as u32).collect();
                    // Only these rows are converted: the table may be as large as a model.
                    let ids = Tensor::from_slice(&t.device(), &[rows], &ids)?;
                    let mut some = Tensor::empty(&t.device(), t.device().activations(t.dtype()), &[rows, cols])?;
                    lora_kernels::gather(t.mat(), ids.mat(), Acc { to: some.make_mut()?, beta: 0.0 })?;
                    let some = some.to(device, dtype)?.reshape(&[1, len]);
                    lora_kernels::axpby(1.0, some.mat(), 0.0, to.reborrow())?;
                    continue;
                }
                Init::Uniform { bound } => (0..len).map(|_| rng.random_range(-1.0..1.0) * bound).collect(),
                Init::Normal { std } => {
                    let normal = Normal::new(0.0, *std).expect("a finite standard deviation");
                    normal.sample_iter(&mut rng).take(len).collect()
                }
                Init::TruncatedNormal { std } => {
                    let normal = Normal::new(0.0, *std).expect("a finite standard deviation");
                    normal.sample_iter(&mut rng).filter(|v: &f64| v.abs() <= 2.0 * std).take(len).collect()
                }
                Init::NearIdentity { std } => {
                    let normal = Normal::new(0.0, *std).expect("a finite standard deviation");
                    let (_, cols) = e.matrix();
                    let noise = normal.sample_iter(&mut rng).take(len).enumerate();
                    noise.map(|(i, v)| if i / cols == i % cols { 1.0 } else { v }).collect()
                }
            };
            match dtype {
                DType::F64 => flat.write(e.offset, &values)?,
                _ => flat.write(e.offset, &values.iter().map(|&v| v as f32).collect::<Vec<_>>())?,
            }
        }
        Ok(Params { entries: self.entries.into(), flat: Arc::new(flat), compute, cast: Arc::default() })
    }
}

/// All trainable parameters, in one flat buffer, so that clipping, AdamW and an all-reduce are one call each. Cloning
/// shares the memory; [`Params::flat_mut`] copies it first when a tape or a tensor still holds it.
#[derive(Clone, Debug)]
pub struct Params {
    entries: Arc<[Entry]>,
    flat: Arc<Buffer>,
    /// The type in which computations see the values.
    compute: DType,
    /// All values in that type, made when they are asked for first and forgotten when the values change.
    cast: Arc<OnceLock<Arc<Buffer>>>,
}

impl Params {
    /// No parameters: inference on a base.
    pub fn none(device: &Device) -> Result<Params> {
        ParamsBuilder::new().build(device, DType::F32, 0)
    }

    /// All parameters, in order.
    pub fn ids(&self) -> impl ExactSizeIterator<Item = ParamId> + use<> {
        (0..self.entries.len()).map(ParamId)
    }

    /// The parameter's name.
    pub fn name(&self, id: ParamId) -> &str {
        &self.entries[id.0].name
    }

    /// The parameter's shape.
    pub fn shape(&self, id: ParamId) -> &[usize] {
        &self.entries[id.0].shape
    }

    /// Whether the parameter is a vector (a bias, a norm's weight), which weight decay can spare.
    pub fn is_vector(&self, id: ParamId) -> bool {
        self.entries[id.0].vector
    }

    /// Where the parameter stands in the flat buffer.
    pub fn range(&self, id: ParamId) -> std::ops::Range<usize> {
        let e = &self.entries[id.0];
        e.offset..e.offset + e.shape.iter().product::<usize>()
    }

    /// The parameter with that name.
    pub fn find(&self, name: &str) -> Option<ParamId> {
        self.entries.iter().position(|e| e.name == name).map(ParamId)
    }

    /// The parameter's value, sharing memory.
    pub fn tensor(&self, id: ParamId) -> Tensor {
        let e = &self.entries[id.0];
        Tensor::view(&e.shape, self.flat.clone(), e.offset)
    }

    /// The parameter's value as computations see it: in the type that the parameters were built for, sharing memory.
    pub fn compute_tensor(&self, id: ParamId) -> Result<Tensor> {
        if self.compute == self.dtype() {
            return Ok(self.tensor(id));
        }
        if self.cast.get().is_none() {
            let mut cast = Buffer::empty(&self.device(), self.compute, self.count())?;
            lora_kernels::axpby(1.0, self.flat().mat(), 0.0, MatMut::new(&mut cast, 0, 1, self.count()))?;
            // Another thread's cast of the same values would be as good.
            let _ = self.cast.set(Arc::new(cast));
        }
        let cast = self.cast.get().expect("set just now").clone();
        let e = &self.entries[id.0];
        Ok(Tensor::view(&e.shape, cast, e.offset))
    }

    /// The same values, sharing memory, but for a cast of its own, made when it is asked for first. For work that is
    /// recorded: it has to cast what the values are then, each time.
    pub fn uncast(&self) -> Params {
        Params { cast: Arc::default(), ..self.clone() }
    }

    /// The type in which computations see the values.
    pub fn compute_dtype(&self) -> DType {
        self.compute
    }

    /// Number of trainable scalars.
    pub fn count(&self) -> usize {
        self.flat.len()
    }

    /// The type in which the values are kept.
    pub fn dtype(&self) -> DType {
        self.flat.dtype()
    }

    /// Where the memory lies.
    pub fn device(&self) -> Device {
        self.flat.device().clone()
    }

    /// All values as one row.
    pub fn flat(&self) -> Tensor {
        Tensor::view(&[self.flat.len()], self.flat.clone(), 0)
    }

    /// All values as one row, for writing.
    pub fn flat_mut(&mut self) -> Result<MatMut<'_>> {
        if Arc::get_mut(&mut self.flat).is_none() {
            self.flat = Arc::new(self.flat.try_clone(0..self.flat.len())?);
        }
        self.cast = Arc::default();
        let len = self.flat.len();
        Ok(MatMut::new(Arc::get_mut(&mut self.flat).expect("unshared: checked or just made"), 0, 1, len))
    }

    /// Whether both are the very same memory, so that neither can have changed without the other.
    pub fn same_memory(&self, other: &Params) -> bool {
        Arc::ptr_eq(&self.flat, &other.flat)
    }

    /// The address of the values on their device, which changes when [`Params::flat_mut`] has to copy them.
    pub fn address(&self) -> usize {
        self.flat.address()
    }

    /// Overwrites one parameter.
    ///
    /// # Panics
    /// When the number of elements differs.
    pub fn set(&mut self, id: ParamId, value: &Tensor) -> Result<()> {
        let range = self.range(id);
        assert_eq!(value.len(), range.len(), "{}: {:?} set to {:?}", self.name(id), self.shape(id), value.shape());
        let value = value.to(&self.device(), self.dtype())?.reshape(&[1, range.len()]);
        Ok(lora_kernels::axpby(1.0, value.mat(), 0.0, self.flat_mut()?.cols_in(range))?)
    }
}

/// The gradients of a [`Params`], in a flat twin of its buffer. Nothing is zero-filled between steps: the first writer of
/// a gradient overwrites it, later ones add (gradient accumulation is just calling backward again).
#[derive(Debug)]
pub struct Grads {
    entries: Arc<[Entry]>,
    flat: Buffer,
    state: Vec<State>,
}

/// Which gradients have been written, at one moment ([`Grads::marks`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marks(Vec<State>);

/// What stands in the memory of one gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Something of an earlier step, or nothing yet: never read.
    Stale,
    /// Zeros, since all gradients were asked for and nobody had written this one.
    Zero,
    /// What backward wrote.
    Written,
}

/// The β of what is written next: whatever is stale is overwritten.
fn begun(state: &mut State) -> f64 {
    if std::mem::replace(state, State::Written) == State::Stale { 0.0 } else { 1.0 }
}

impl Grads {
    /// Room for the gradients of `params`.
    pub fn new(params: &Params) -> Result<Grads> {
        let flat = Buffer::zeros(&params.device(), params.dtype(), params.count())?;
        Ok(Grads { entries: params.entries.clone(), flat, state: vec![State::Stale; params.entries.len()] })
    }

    /// Which gradients have been written up to now.
    pub fn marks(&self) -> Marks {
        Marks(self.state.clone())
    }

    /// Says which gradients have been written: for a recorded backward pass, which writes them without being called.
    ///
    /// # Panics
    /// When the marks are those of other parameters.
    pub fn restore(&mut self, marks: &Marks) {
        assert_eq!(marks.0.len(), self.state.len(), "marks of other gradients");
        self.state.clone_from(&marks.0);
    }

    /// Forgets all gradients: the next step begins.
    pub fn reset(&mut self) {
        self.state.fill(State::Stale);
    }

    /// Parameters that no backward has written since the last reset. Their gradient is zero; a method whose parameters
    /// stay here has them in the wrong place.
    pub fn unwritten(&self) -> Vec<&str> {
        let unwritten = self.entries.iter().zip(&self.state).filter(|(_, s)| **s != State::Written);
        unwritten.map(|(e, _)| e.name.as_str()).collect()
    }

    /// All gradients as one row; what nobody wrote is zero.
    pub fn flat_mut(&mut self) -> Result<MatMut<'_>> {
        for i in 0..self.entries.len() {
            if self.state[i] == State::Stale {
                let (offset, len) = self.place(i);
                lora_kernels::fill(0.0, MatMut::new(&mut self.flat, offset, 1, len))?;
                self.state[i] = State::Zero;
            }
        }
        let len = self.flat.len();
        Ok(MatMut::new(&mut self.flat, 0, 1, len))
    }

    /// One gradient, copied; `None` when nobody wrote it.
    pub fn get(&self, id: ParamId) -> Result<Option<Tensor>> {
        if self.state[id.0] != State::Written {
            return Ok(None);
        }
        let (offset, len) = self.place(id.0);
        Ok(Some(Tensor::from_buffer(&self.entries[id.0].shape, self.flat.try_clone(offset..offset + len)?)))
    }

    /// Where the next gradient of this parameter goes.
    pub(crate) fn acc(&mut self, id: ParamId) -> Acc<'_> {
        let e = &self.entries[id.0];
        let (rows, cols) = e.matrix();
        Acc { beta: begun(&mut self.state[id.0]), to: MatMut::new(&mut self.flat, e.offset, rows, cols) }
    }

    /// Where the next gradients of several parameters go, for a kernel that writes them together; none when a parameter is
    /// named twice.
    pub(crate) fn accs(&mut self, ids: &[ParamId]) -> Option<Vec<Acc<'_>>> {
        let mut order: Vec<usize> = (0..ids.len()).collect();
        order.sort_by_key(|&i| ids[i]);
        if order.windows(2).any(|pair| ids[pair[0]] == ids[pair[1]]) {
            return None;
        }
        let (len, mut at) = (self.flat.len(), 0);
        let mut rest = MatMut::new(&mut self.flat, 0, 1, len);
        let mut accs: Vec<Option<Acc>> = ids.iter().map(|_| None).collect();
        for i in order {
            let e = &self.entries[ids[i].0];
            let (rows, cols) = e.matrix();
            let (to, after) = rest.split_cols(e.offset - at).1.split_cols(rows * cols);
            (rest, at) = (after, e.offset + rows * cols);
            accs[i] = Some(Acc { to: to.reshape(rows, cols), beta: begun(&mut self.state[ids[i].0]) });
        }
        accs.into_iter().collect()
    }

    fn place(&self, i: usize) -> (usize, usize) {
        let e = &self.entries[i];
        (e.offset, e.shape.iter().product())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_copied_once_per_holder_and_else_written_in_place() {
        let mut b = ParamsBuilder::new();
        b.add("w", &[2, 3], Init::Ones);
        let mut p = b.build(&Device::Cpu, DType::F32, 0).unwrap();
        let place = |p: &mut Params| {
            p.flat_mut().unwrap();
            Arc::as_ptr(&p.flat)
        };
        let first = place(&mut p);
        assert_eq!(place(&mut p), first);
        let tape = crate::Tape::new(&p);
        let second = place(&mut p);
        assert_ne!(second, first);
        drop(tape);
        assert_eq!(place(&mut p), second);
    }
}
