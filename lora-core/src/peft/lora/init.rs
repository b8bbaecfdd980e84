use std::ops::Range;

use lora_kernels::{Device, axpby};
use ndarray::{Array2, ArrayView2};

use super::super::{LinearSite, Plan, Site};
use crate::{
    Error, Init, Result, Tape, Tensor, Var,
    lowrank::{self, Layout, LowRank},
    ops,
};

/// How A and B begin: PEFT's `init_lora_weights`.
///
/// Three ways leave the base's own output as it is: B zero (`true`, `gaussian`), or a product of zero (`orthogonal`). With
/// `false` it changes at random. PiSSA and OLoRA begin at a part s·B₀·A₀ of W₀ itself and train beside the rest,
///
/// ```text
/// y = (W₀ − s·B₀·A₀)·x + s·B·A·x
/// ```
/// PEFT writes the rest over W₀. Here W₀ stays, and −s·B₀·A₀ is a constant beside B·A; so what is saved, both together, is
/// an ordinary adapter of rank 2r for the base as it is, that which PEFT's conversion gives:
/// \[A; A₀\] [2r, in], [B, −B₀] [out, 2r], and α such that the scale stays ([`LoraConfig::saved`](super::LoraConfig::saved)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InitLoraWeights {
    /// `true`: A Kaiming-uniform, B zero, as the authors' code has it.
    #[default]
    Kaiming,
    /// `false`: A and B Kaiming-uniform.
    Random,
    /// `gaussian`: A normal with deviation 1/r, B zero.
    Gaussian,
    /// `pissa`, or `pissa_niter_N` with N subspace iterations in place of the whole decomposition: see [`lowrank::pissa`].
    Pissa {
        /// N.
        niter: Option<u32>,
    },
    /// `olora`: see [`lowrank::olora`].
    Olora,
    /// `orthogonal`: see [`lowrank::orthogonal`].
    Orthogonal,
}

const OPTION: &str = "init-lora-weights";

/// PEFT's words that are refused, and why.
const REFUSED: [(&str, &str); 5] = [
    ("eva", "it begins at directions of the activations of the training data, which are not computed here"),
    ("corda", "it begins at directions of the covariance of activations, which is not computed here"),
    ("loftq", "it begins at what quantising the base loses, and bases are not quantised here"),
    ("lora_ga", "it begins at directions of the gradient of the training data, which is not computed here"),
    ("mica", "it trains A alone, beside a B that stays, which is not done here"),
];

impl InitLoraWeights {
    /// Reads PEFT's word, in any case.
    ///
    /// # Errors
    /// [`Error::Option`] for another, or one that is not done here.
    pub fn parse(text: &str) -> Result<InitLoraWeights> {
        let word = text.trim().to_ascii_lowercase();
        let refuse = |why: &str| Err(Error::Option { option: OPTION, value: text.into(), why: why.into() });
        Ok(match word.as_str() {
            "true" => InitLoraWeights::Kaiming,
            "false" => InitLoraWeights::Random,
            "gaussian" => InitLoraWeights::Gaussian,
            "pissa" => InitLoraWeights::Pissa { niter: None },
            "olora" => InitLoraWeights::Olora,
            "orthogonal" => InitLoraWeights::Orthogonal,
            other => match other.strip_prefix("pissa_niter_").map(str::parse) {
                Some(Ok(niter @ 0..=1000)) => InitLoraWeights::Pissa { niter: Some(niter) },
                _ => {
                    let known = REFUSED.iter().find(|(refused, _)| *refused == other).map(|(_, why)| *why);
                    return refuse(known.unwrap_or(
                        "adapters begin as true, false, gaussian, pissa, pissa_niter_N (N iterations, up to 1000), olora, or orthogonal",
                    ));
                }
            },
        })
    }

    /// PEFT's word.
    pub fn word(self) -> String {
        match self {
            InitLoraWeights::Kaiming => "true".into(),
            InitLoraWeights::Random => "false".into(),
            InitLoraWeights::Gaussian => "gaussian".into(),
            InitLoraWeights::Pissa { niter: None } => "pissa".into(),
            InitLoraWeights::Pissa { niter: Some(niter) } => format!("pissa_niter_{niter}"),
            InitLoraWeights::Olora => "olora".into(),
            InitLoraWeights::Orthogonal => "orthogonal".into(),
        }
    }

    /// Whether the adapter begins at a part of the base, which gives way to it.
    pub fn takes_from_base(self) -> bool {
        matches!(self, InitLoraWeights::Pissa { .. } | InitLoraWeights::Olora)
    }
}

/// How the update of some outputs of a site begins.
pub(super) struct Begin {
    pub(super) a: Init,
    pub(super) b: Init,
    pub(super) origin: Option<Origin>,
}

impl InitLoraWeights {
    /// For the outputs `cols` of a site, whose parameters are named after `prefix`.
    ///
    /// # Errors
    /// [`Error::Option`] for a rank that this way cannot have; [`Error::Structure`] for a weight that is not finite.
    pub(super) fn begin(
        self,
        (site, linear): (&Site, &LinearSite),
        (prefix, cols): (&str, Range<usize>),
        (rank, scale): (usize, f64),
        plan: &Plan,
    ) -> Result<Begin> {
        let refuse = |why: String| Err(Error::Option { option: OPTION, value: self.word(), why });
        let (inputs, outputs) = (linear.inputs, cols.len());
        let plain = |a, b| Ok(Begin { a, b, origin: None });
        match self {
            InitLoraWeights::Kaiming => return plain(Init::kaiming_uniform(inputs), Init::Zeros),
            InitLoraWeights::Random => return plain(Init::kaiming_uniform(inputs), Init::kaiming_uniform(rank)),
            InitLoraWeights::Gaussian => return plain(Init::Normal { std: 1.0 / rank as f64 }, Init::Zeros),
            InitLoraWeights::Orthogonal if rank % 2 == 1 => {
                return refuse(format!(
                    "A and B get half of the directions each, so the rank is even, and that of {prefix} is {rank}"
                ));
            }
            _ if self.takes_from_base() && rank > inputs.min(outputs) => {
                return refuse(format!(
                    "it begins at directions of the weight, and {prefix}, which is {outputs}×{inputs}, has not the {rank} that \
                     its rank asks for"
                ));
            }
            _ => {}
        }
        let name = format!("{}.weight", site.name);
        let Some(w) = plan.base_tensor(&name) else { return plain(Init::Zeros, Init::Zeros) };
        let device = w.device();
        let dtype = device.activations(w.dtype()).accumulator();
        let place = |m: ArrayView2<f64>| -> Result<Tensor> {
            let values: Vec<f64> = m.iter().copied().collect();
            Tensor::from_slice(&Device::Cpu, &[m.nrows(), m.ncols()], &values)?.to(&device, dtype)
        };
        let normal = |stream: &str, rows, cols| plan.normal(&format!("{prefix}.{stream}"), rows, cols);
        if self == InitLoraWeights::Orthogonal {
            let half = rank / 2;
            let (x, left, right) =
                (normal("lora_Q", rank, rank), normal("lora_B", outputs, half), normal("lora_A", inputs, half));
            let (a, b) = lowrank::orthogonal(x.view(), left.view(), right.view());
            return plain(Init::Copy(place(a.view())?), Init::Copy(place(b.view())?));
        }
        let shape = if linear.layout == Layout::OutIn { (linear.outputs, inputs) } else { (inputs, linear.outputs) };
        let stored = Array2::from_shape_vec(shape, w.to_f64()?).expect("the outline's shape was checked");
        let whole = if linear.layout == Layout::OutIn { stored.view() } else { stored.t() };
        let block = whole.slice(ndarray::s![cols, ..]);
        let begun: lowrank::Result<LowRank<f64>> = match self {
            InitLoraWeights::Olora => lowrank::olora(block, rank, scale),
            InitLoraWeights::Pissa { niter: Some(niter) } => {
                let omega = normal("lora_omega", inputs, rank);
                lowrank::pissa_by_iterations(block, omega.view(), niter as usize, scale)
            }
            _ => lowrank::pissa(block, rank, scale),
        };
        let begun =
            begun.map_err(|e| Error::Structure { name, why: format!("{} cannot begin at it: {e}", self.word()) })?;
        let (a, b) = (place(begun.a())?, place(begun.b())?);
        let origin = Origin { a: a.clone(), minus_b: place((-&begun.b()).view())? };
        Ok(Begin { a: Init::Copy(a), b: Init::Copy(b), origin: Some(origin) })
    }
}

/// What an adapter began at and the base gave way to: A₀ [r, in] and −B₀ [out, r], constants.
#[derive(Debug)]
pub(super) struct Origin {
    pub(super) a: Tensor,
    minus_b: Tensor,
}

impl Origin {
    /// y[:, cols] −= s·(x·A₀ᵀ)·B₀ᵀ.
    pub(super) fn take(&self, t: &mut Tape, x: &Var, y: Var, cols: Range<usize>, scale: f64) -> Result<Var> {
        let [a, minus_b] = self.constants(t, x)?;
        let u = ops::linear(t, x, &a, Layout::OutIn, None)?;
        ops::linear_onto(t, y, cols, &u, &minus_b, scale)
    }

    /// A₀ and −B₀ in the type of x.
    pub(super) fn constants(&self, t: &Tape, x: &Var) -> Result<[Var; 2]> {
        let dtype = x.value().dtype();
        Ok([t.constant(&self.a.to_dtype(dtype)?), t.constant(&self.minus_b.to_dtype(dtype)?)])
    }

    /// \[A; A₀\] and [B, −B₀], in the type of A and B.
    pub(super) fn beside(&self, a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
        let ((r, cols), (rows, device, dtype)) = ((a.rows(), a.cols()), (b.rows(), a.device(), a.dtype()));
        let mut both_a = Tensor::empty(&device, dtype, &[2 * r, cols])?;
        let mut both_b = Tensor::empty(&device, dtype, &[rows, 2 * r])?;
        let (own_a, own_b) = (self.a.to_dtype(dtype)?, self.minus_b.to_dtype(dtype)?);
        for (i, (a, b)) in [(a, b), (&own_a, &own_b)].into_iter().enumerate() {
            let half = i * r..(i + 1) * r;
            axpby(1.0, a.mat(), 0.0, both_a.make_mut()?.rows_in(half.clone()))?;
            axpby(1.0, b.mat(), 0.0, both_b.make_mut()?.cols_in(half))?;
        }
        Ok((both_a, both_b))
    }
}
