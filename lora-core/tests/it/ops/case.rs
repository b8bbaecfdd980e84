//! A row of the table, and what is done with each.

use lora_core::{Init, Params, ParamsBuilder, Result, Tape, Tensor, Var, ops};
use lora_kernels::{DType, Device};
use ndarray::Array2;

use crate::common::{self, random, tensor};

pub(crate) type M = Array2<f64>;
type Op = dyn Fn(&mut Tape, Vec<Var>) -> Result<Var>;
type Oracle = dyn Fn(&[M]) -> M;

/// One row of the table: an operation on inputs of the given shapes, and the same by plain loops.
pub(crate) struct Case {
    pub(crate) name: String,
    /// Name, shape and range of each input; any of them may train.
    pub(crate) inputs: Vec<(&'static str, Vec<usize>, f32)>,
    pub(crate) op: Box<Op>,
    oracle: Box<Oracle>,
}

pub(crate) fn case(
    name: impl Into<String>,
    inputs: &[(&'static str, &[usize])],
    op: impl Fn(&mut Tape, Vec<Var>) -> Result<Var> + 'static,
    oracle: impl Fn(&[M]) -> M + 'static,
) -> Case {
    let inputs = inputs.iter().map(|&(n, s)| (n, s.to_vec(), 1.0)).collect();
    Case { name: name.into(), inputs, op: Box::new(op), oracle: Box::new(oracle) }
}

impl Case {
    /// The inputs' values, which f32 holds exactly.
    pub(crate) fn values(&self) -> Vec<Vec<f64>> {
        let len = |shape: &[usize]| shape.iter().product();
        self.inputs.iter().zip(1..).map(|((_, shape, scale), seed)| random(seed, len(shape), *scale)).collect()
    }

    pub(crate) fn expected(&self) -> M {
        let matrix = |(v, (_, shape, _)): (Vec<f64>, &(_, Vec<usize>, _))| {
            let cols = *shape.last().unwrap();
            M::from_shape_vec((v.len() / cols, cols), v).unwrap()
        };
        let inputs: Vec<M> = self.values().into_iter().zip(&self.inputs).map(matrix).collect();
        (self.oracle)(&inputs)
    }

    pub(crate) fn params(&self, dtype: DType, trains: &[bool]) -> Params {
        self.params_on(&Device::Cpu, dtype, trains)
    }

    pub(crate) fn params_on(&self, device: &Device, dtype: DType, trains: &[bool]) -> Params {
        let mut b = ParamsBuilder::new();
        for (((name, shape, _), v), _) in self.inputs.iter().zip(self.values()).zip(trains).filter(|(_, t)| **t) {
            b.add(*name, shape, Init::Copy(tensor(dtype.accumulator(), shape, &v)));
        }
        b.build(device, dtype, 0).unwrap()
    }

    /// The inputs as variables: what trains is a parameter itself, or a value computed from one.
    pub(crate) fn vars(&self, t: &mut Tape, params: &Params, trains: &[bool], computed: bool) -> Result<Vec<Var>> {
        let mut vars = Vec::new();
        let (device, dtype) = (params.device(), params.compute_dtype());
        let place = |v: &[f64], shape: &[usize]| tensor(DType::F64, shape, v).to_dtype(dtype)?.to_device(&device);
        for (((name, shape, _), v), &trains) in self.inputs.iter().zip(self.values()).zip(trains) {
            vars.push(match trains {
                false => t.constant(&place(&v, shape)?),
                true => {
                    let p = t.param(params.find(name).unwrap()).unwrap();
                    match p.slot() {
                        Some(s) if computed => {
                            let copy = place(&p.value().to_f64()?, shape)?;
                            t.record(copy, true, move |dy, g| g.pass(s, dy))
                        }
                        _ => p,
                    }
                }
            });
        }
        Ok(vars)
    }

    pub(crate) fn run(&self, t: &mut Tape, params: &Params, trains: &[bool], computed: bool) -> Result<Var> {
        let vars = self.vars(t, params, trains, computed)?;
        (self.op)(t, vars)
    }

    /// The operation twice on the same variables, added: each gradient has two sources.
    pub(crate) fn run_twice(&self, t: &mut Tape, params: &Params, trains: &[bool], computed: bool) -> Result<Var> {
        let vars = self.vars(t, params, trains, computed)?;
        let again = vars.iter().map(Var::share).collect();
        let y = (self.op)(t, vars)?;
        let z = (self.op)(t, again)?;
        ops::add(t, y, z)
    }
}

/// None, all, each alone, all but each: whatever can be frozen is frozen once.
pub(crate) fn choices(n: usize) -> Vec<Vec<bool>> {
    let mut all = vec![vec![false; n], vec![true; n]];
    for i in 0..n {
        all.push((0..n).map(|j| j == i).collect());
        all.push((0..n).map(|j| j != i).collect());
    }
    all.sort();
    all.dedup();
    all
}

/// Ids where the computation lies.
pub(crate) fn ids(t: &Tape, ids: &[u32]) -> Tensor {
    common::ids(ids).to_device(&t.device()).unwrap()
}

/// Numbers that are no input, such as targets, beside x and in the type of sums of its type.
pub(crate) fn numbers(x: &Var, shape: &[usize], values: &[f64]) -> Tensor {
    let x = x.value();
    tensor(DType::F64, shape, values).to_dtype(x.dtype().accumulator()).unwrap().to_device(&x.device()).unwrap()
}
