use std::{collections::BTreeMap, ops::Range};

use lora_kernels::Device;
use ndarray::{Array2, Axis, s};

use super::{
    Adapter, Attached, BaseTensor, Linear, LinearAdapter, LinearSite, Method, Modules, Outline, Plan, Site, SiteKind,
    added, load_plain, save_plain,
    selection::{Selection, Wanted},
    take,
    torch_generator::TorchGenerator,
    whole::WholeModules,
};
use crate::{Error, Init, ParamId, Params, Result, Tape, Tensor, Var, lowrank::Layout, ops};

/// VeRA (Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation", equation 2): one pair of random matrices, which
/// stay as they are, serves all adapted maps, and vectors between them train,
///
/// ```text
/// h = W₀·x + λ_b ∘ B·(λ_d ∘ A·x)        A [r, in], B [out, r], λ_d [r], λ_b [out]
/// ```
/// λ_d begins at `d_initial`, λ_b at zero. A and B are as large as the widest maps need, and a map takes A's first columns and
/// B's first rows, as in PEFT. They are Kaiming-uniform (with a gain of √2), drawn by PyTorch's generator of the CPU from
/// `projection_prng_key`, so that an adapter saved without them is rebuilt here as PyTorch would.
#[derive(Clone, Debug)]
pub struct Vera {
    config: VeraConfig,
    selection: Selection,
    whole: WholeModules,
}

/// The configuration of [`Vera`], under PEFT's names but for rank (`r`), dropout (`vera_dropout`) and targets
/// (`target_modules`).
#[derive(Clone, Debug)]
pub struct VeraConfig {
    /// Rank r of A and B.
    pub rank: usize,
    /// Dropout on x before A, in training.
    pub dropout: f64,
    /// What to adapt; without any names the architecture's default, as in PEFT.
    pub targets: Modules,
    /// The layers that targets (a list of names) are looked for in, from 0; none: all of them.
    pub layers_to_transform: Vec<usize>,
    /// What stands before the number of a layer; none: anything.
    pub layers_pattern: Vec<String>,
    /// Modules of the base that train whole and are saved beside the adapter.
    pub modules_to_save: Vec<String>,
    /// What λ_d begins at.
    pub d_initial: f64,
    /// The seed of A and B.
    pub projection_prng_key: u64,
    /// Whether A and B are saved.
    pub save_projection: bool,
    /// A and B of an adapter that was read; else they are drawn.
    pub projection: Option<[Tensor; 2]>,
}

/// PEFT's names of A and B in a file.
const PROJECTIONS: [&str; 2] = ["vera_A", "vera_B"];

impl Vera {
    /// Checks what can be checked without a model.
    ///
    /// # Errors
    /// [`Error::Option`] for an option that makes no sense.
    pub fn new(config: VeraConfig) -> Result<Vera> {
        let bad = |option, value: String, why: &str| Err(Error::Option { option, value, why: why.into() });
        if config.rank == 0 {
            return bad("rank", "0".into(), "a rank is at least 1");
        }
        if !(0.0..1.0).contains(&config.dropout) {
            return bad("dropout", config.dropout.to_string(), "a dropout rate is in [0, 1)");
        }
        if !config.d_initial.is_finite() || config.d_initial == 0.0 {
            let why = "is a number other than 0, small and positive in the paper; with 0 nothing would ever train";
            return bad("d-initial", config.d_initial.to_string(), why);
        }
        Ok(Vera {
            selection: Selection::new(&Wanted {
                targets: &config.targets,
                exclude_modules: &Modules::default(),
                layers_to_transform: &config.layers_to_transform,
                layers_pattern: &config.layers_pattern,
                modules_to_save: &config.modules_to_save,
                others: false,
            })?,
            whole: WholeModules::new(&config.modules_to_save)?,
            config,
        })
    }

    /// The shapes of A and B: the most inputs and outputs of an adapted map.
    fn shapes(&self, outline: &Outline) -> Result<[[usize; 2]; 2]> {
        let adapted = self.selection.whole_modules(outline)?;
        let of = |width: fn(&LinearSite) -> usize| {
            let all = outline.linear_sites().filter(|(site, _)| adapted.contains(&site.name.as_str()));
            all.map(|(_, linear)| width(linear)).max().unwrap_or_default()
        };
        Ok([[self.config.rank, of(|l| l.inputs)], [of(|l| l.outputs), self.config.rank]])
    }

    /// A and B, whole, on the CPU.
    fn projections(&self, outline: &Outline) -> Result<[Tensor; 2]> {
        let shapes = self.shapes(outline)?;
        if let Some(given) = &self.config.projection {
            for ((name, t), shape) in PROJECTIONS.iter().zip(given).zip(shapes) {
                if t.shape() != shape {
                    return Err(Error::Shape { name: (*name).into(), found: t.shape().into(), expected: shape.into() });
                }
            }
            return Ok(given.clone());
        }
        let mut generator = TorchGenerator::new(self.config.projection_prng_key);
        let mut next = |shape: [usize; 2]| {
            // PyTorch's order of roundings.
            let bound = 3f64.sqrt() * (2f64.sqrt() / (shape[1] as f64).sqrt());
            Tensor::from_slice(&Device::Cpu, &shape, &generator.uniform(bound, shape[0] * shape[1]))
        };
        Ok([next(shapes[0])?, next(shapes[1])?])
    }
}

impl Method for Vera {
    fn name(&self) -> &'static str {
        "vera"
    }

    fn trains(&self, tensor: &BaseTensor, _outline: &Outline) -> bool {
        self.whole.trains(&tensor.name)
    }

    fn check(&self, outline: &Outline) -> Result<()> {
        self.selection.check(outline)?;
        const LARGEST: usize = 1 << 32;
        let shapes = self.shapes(outline)?;
        if shapes.iter().any(|[rows, cols]| rows.checked_mul(*cols).is_none_or(|n| n > LARGEST)) {
            let why =
                format!("the shared matrices would be {:?} and {:?}, larger than is sensible", shapes[0], shapes[1]);
            return Err(Error::Option { option: "rank", value: self.config.rank.to_string(), why });
        }
        self.whole.check(outline)
    }

    fn attach(&self, site: &Site, plan: &mut Plan) -> Result<Option<Attached>> {
        let SiteKind::Linear(linear) = &site.kind else { return Ok(None) };
        let outline = plan.outline();
        if self.selection.of(site, linear, outline)?.is_empty() {
            return Ok(None);
        }
        let (r, inputs, outputs) = (self.config.rank, linear.inputs, linear.outputs);
        let is_first = self.selection.whole_modules(outline)?.first() == Some(&site.name.as_str());
        let (mut projections, mut saved) = ([Tensor::unbacked(&[r, inputs])?, Tensor::unbacked(&[outputs, r])?], None);
        if let Some(w) = plan.base_tensor(&format!("{}.weight", site.name)) {
            let (device, dtype) = (w.device(), w.device().activations(w.dtype()));
            let whole = plan.shared("vera", || self.projections(outline))?;
            // One copy for all maps of these inputs, or of as many outputs at most.
            let a = plan.shared(&format!("vera_A {inputs}"), || {
                let columns = whole[0].to_array()?.slice(s![.., ..inputs]).iter().copied().collect::<Vec<f32>>();
                Ok([Tensor::from_slice(&Device::Cpu, &[r, inputs], &columns)?.to(&device, dtype)?])
            })?;
            let b = plan.shared("vera_B", || Ok([whole[1].to(&device, dtype)?]))?;
            projections = [a[0].clone(), b[0].rows_in(0..outputs)];
            saved = (is_first && self.config.save_projection).then_some(whole);
        }
        let initial = Tensor::from_slice(&Device::Cpu, &[r], &vec![self.config.d_initial as f32; r])?;
        Ok(Some(Attached::Linear(Box::new(Vectors {
            site: site.name.clone(),
            d: plan.add(format!("{}.vera_lambda_d", site.name), &[r], Init::Copy(initial)),
            b: plan.add(format!("{}.vera_lambda_b", site.name), &[outputs], Init::Zeros),
            projections,
            saved,
            dropout: self.config.dropout,
            linear: linear.clone(),
        }))))
    }
}

#[derive(Debug)]
struct Vectors {
    site: String,
    /// λ_d.
    d: ParamId,
    /// λ_b.
    b: ParamId,
    /// The parts of A and B that this map takes, where its weight lies.
    projections: [Tensor; 2],
    /// A and B for the file, whole, at the first site.
    saved: Option<Vec<Tensor>>,
    dropout: f64,
    linear: LinearSite,
}

impl LinearAdapter for Vectors {
    fn apply(&self, t: &mut Tape, x: &Var, base: &Linear) -> Result<Var> {
        let (y, mask) = (base.apply(t, x)?, t.dropout_mask(self.dropout));
        let [a, b] = [&self.projections[0], &self.projections[1]].map(|p| t.constant(p));
        let (lambda_d, lambda_b) = (t.param(self.d)?, t.param(self.b)?);
        let u = match mask {
            Some(mask) => {
                let x = ops::dropout_by(t, x.share(), mask)?;
                ops::linear(t, &x, &a, Layout::OutIn, None)?
            }
            None => ops::linear(t, x, &a, Layout::OutIn, None)?,
        };
        let u = ops::scale_columns(t, &u, &lambda_d)?;
        let more = ops::linear(t, &u, &b, Layout::OutIn, None)?;
        let more = ops::scale_columns(t, &more, &lambda_b)?;
        ops::add(t, y, more)
    }

    fn merge(&self, params: &Params, w: &Tensor) -> Result<Tensor> {
        let matrix = |t: &Tensor| -> Result<Array2<f64>> { Ok(t.to_array()?.mapv(f64::from)) };
        let column = |id| -> Result<Array2<f64>> { Ok(matrix(&params.tensor(id))?.reversed_axes()) };
        let [a, b] = &self.projections;
        let (a, b) = (matrix(a)? * column(self.d)?, matrix(b)? * column(self.b)?);
        added(params, w, &self.linear, |rows: Range<usize>| b.slice_axis(Axis(0), rows.into()).dot(&a))
    }
}

impl Adapter for Vectors {
    fn save(&self, params: &Params) -> Result<Vec<(String, Tensor)>> {
        let mut all = save_plain(params, &self.site, &[self.d, self.b]);
        let shared = self.saved.iter().flatten();
        all.extend(PROJECTIONS.iter().zip(shared).map(|(name, t)| ((*name).to_owned(), t.clone())));
        Ok(all)
    }

    fn load(&self, params: &mut Params, site: &str, tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        load_plain(params, &[self.d, self.b], tensors)?;
        for (name, own) in PROJECTIONS.iter().zip(self.saved.iter().flatten()) {
            let name = format!("{site}.{name}");
            let given = take(tensors, &name, own.shape())?;
            if given.to_f64()? != own.to_f64()? {
                let why = "it is another random matrix than this adapter was made with; make it with that one".into();
                return Err(Error::Structure { name, why });
            }
        }
        Ok(())
    }
}
