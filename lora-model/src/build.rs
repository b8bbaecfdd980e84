//! How a model comes into being: an architecture describes itself once, and the description gives the outline, the
//! weights it expects in a file, fresh weights, or the model.

use std::{collections::BTreeMap, path::Path};

use lora_core::{
    Tensor,
    lowrank::Layout as WeightLayout,
    peft::{Base, BaseTensor, LinearSite, Outline, Part, Site, SiteKind},
};
use lora_kernels::{DType, Device};

use crate::{
    Error, LoadOptions, Result,
    checkpoint::{Checkpoint, Layout, TensorSpec},
    config::RawConfig,
    fingerprint,
    layers::{LayerNorm, Projection, RmsNorm, Sublayer, Weight},
};

/// What all architectures have in common.
#[derive(Debug)]
pub struct Parts {
    pub(crate) raw: RawConfig,
    pub(crate) layout: Layout,
    pub(crate) outline: Outline,
    weights: Vec<Weight>,
}

impl Parts {
    pub(crate) fn tensors(&self) -> Box<dyn Iterator<Item = (&str, &Tensor)> + '_> {
        Box::new(self.weights.iter().map(|w| (w.name.as_str(), &w.tensor)))
    }
}

impl Base for Parts {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn tensors(&self) -> Box<dyn Iterator<Item = (&str, &Tensor)> + '_> {
        self.tensors()
    }
}

/// Where an architecture gets its weights from while it describes itself: it asks for them in the order of the model.
pub(crate) struct Build<'a> {
    tensor: &'a mut dyn FnMut(&str, &[usize]) -> Result<Tensor>,
    weights: Vec<Weight>,
    outline: Outline,
    /// The layer that the next weights belong to.
    layer: Option<usize>,
}

impl<'a> Build<'a> {
    fn new(tensor: &'a mut dyn FnMut(&str, &[usize]) -> Result<Tensor>) -> Build<'a> {
        Build { tensor, weights: Vec::new(), outline: Outline::default(), layer: None }
    }

    /// What the model is.
    pub(crate) fn describe(&mut self, architecture: &str, layers: usize, max_positions: usize, targets: &[&str]) {
        self.outline.architecture = architecture.to_owned();
        (self.outline.layers, self.outline.max_positions) = (layers, max_positions);
        self.outline.default_targets = targets.iter().map(|t| t.to_string()).collect();
    }

    /// What the model is for, by PEFT's name.
    pub(crate) fn task_type(&mut self, name: &'static str) {
        self.outline.task_type = Some(name);
    }

    /// What follows belongs to this layer, or to none.
    pub(crate) fn layer(&mut self, layer: Option<usize>) {
        self.layer = layer;
    }

    /// A weight of that name.
    pub(crate) fn weight(&mut self, name: impl Into<String>, shape: &[usize]) -> Result<Weight> {
        self.add(name.into(), shape, false)
    }

    fn add(&mut self, name: String, shape: &[usize], norm: bool) -> Result<Weight> {
        let tensor = (self.tensor)(&name, shape)?;
        let layer = self.layer;
        self.outline.tensors.push(BaseTensor { name: name.clone(), shape: shape.into(), layer, norm });
        let weight = Weight { name, tensor };
        self.weights.push(weight.clone());
        Ok(weight)
    }

    /// A linear map, which adapters can be attached to.
    pub(crate) fn linear(
        &mut self,
        module: impl Into<String>,
        [inputs, outputs]: [usize; 2],
        layout: WeightLayout,
        bias: bool,
    ) -> Result<Projection> {
        let module = module.into();
        let shape = match layout {
            WeightLayout::OutIn => [outputs, inputs],
            WeightLayout::InOut => [inputs, outputs],
        };
        let weight = self.weight(format!("{module}.weight"), &shape)?;
        let bias = bias.then(|| self.weight(format!("{module}.bias"), &[outputs])).transpose()?;
        self.site(module.clone(), SiteKind::Linear(LinearSite { inputs, outputs, layout, parts: Vec::new() }));
        Ok(Projection { module, weight, bias, layout })
    }

    /// The matrix of an output head of its own, which adapters can be attached to.
    pub(crate) fn lm_head(&mut self, [inputs, outputs]: [usize; 2]) -> Result<Weight> {
        let weight = self.weight("lm_head.weight", &[outputs, inputs])?;
        let linear = LinearSite { inputs, outputs, layout: WeightLayout::OutIn, parts: Vec::new() };
        self.site("lm_head".into(), SiteKind::Head(linear));
        Ok(weight)
    }

    /// Names the parts of the fused linear map that was described last, each with its number of columns.
    pub(crate) fn parts(&mut self, parts: &[(&'static str, usize)]) {
        let Some(Site { kind: SiteKind::Linear(linear), .. }) = self.outline.sites.last_mut() else {
            panic!("parts of a linear map");
        };
        let mut at = 0;
        for &(name, cols) in parts {
            linear.parts.push((name, at..at + cols));
            at += cols;
        }
        assert_eq!(at, linear.outputs, "the parts are all of it");
    }

    /// A layer norm.
    pub(crate) fn layer_norm(&mut self, module: impl AsRef<str>, width: usize, eps: f64) -> Result<LayerNorm> {
        let module = module.as_ref();
        let weight = self.add(format!("{module}.weight"), &[width], true)?;
        Ok(LayerNorm { weight, bias: self.add(format!("{module}.bias"), &[width], true)?, eps })
    }

    /// An RMS norm.
    pub(crate) fn rms_norm(&mut self, module: impl AsRef<str>, width: usize, eps: f64) -> Result<RmsNorm> {
        Ok(RmsNorm { weight: self.add(format!("{}.weight", module.as_ref()), &[width], true)?, eps })
    }

    /// The place where the output of a sublayer joins the stream.
    pub(crate) fn sublayer(&mut self, module: impl Into<String>, part: Part, width: usize) -> Sublayer {
        let module = module.into();
        self.site(module.clone(), SiteKind::Sublayer { part, width });
        Sublayer { module }
    }

    /// A table of embeddings, which adapters can be attached to.
    pub(crate) fn embedding(&mut self, module: impl Into<String>, [rows, width]: [usize; 2]) -> Result<Weight> {
        let module = module.into();
        let table = self.weight(format!("{module}.weight"), &[rows, width])?;
        self.site(module, SiteKind::Embedding { rows, width });
        Ok(table)
    }

    /// That virtual tokens can stand among the tokens, embedded by `table`.
    pub(crate) fn tokens(&mut self, table: &Weight) {
        let name = table.name.strip_suffix(".weight").unwrap_or(&table.name).to_owned();
        let width = table.tensor.cols();
        self.site(name, SiteKind::Tokens { table: table.name.clone(), width });
    }

    /// That attention takes further keys and values, of so many columns in each layer.
    pub(crate) fn keys_values(&mut self, cols: usize) {
        let layers = self.outline.layers;
        self.site("past_key_values".into(), SiteKind::KeysValues { layers, cols });
    }

    /// Modules that train with every method, since they begin at random.
    pub(crate) fn modules_to_save(&mut self, modules: &[&str]) {
        self.outline.modules_to_save.extend(modules.iter().map(|m| m.to_string()));
    }

    /// Has the module of a tensor that begins at random train with every method.
    pub(crate) fn save_module_of(&mut self, tensor: &str) {
        if !self.outline.is_saved_module(tensor) {
            let module = tensor.rsplit_once('.').map_or(tensor, |(module, _)| module);
            self.modules_to_save(&[module]);
        }
    }

    fn site(&mut self, name: String, kind: SiteKind) {
        let layer = if matches!(kind, SiteKind::KeysValues { .. }) { None } else { self.layer };
        self.outline.sites.push(Site { name, layer, kind });
    }
}

/// An architecture's description of itself.
pub(crate) trait Describe: Fn(&mut Build) -> Result<Self::Model> {
    type Model;
}

impl<M, F: Fn(&mut Build) -> Result<M>> Describe for F {
    type Model = M;
}

/// What the model looks like, without weights.
pub(crate) fn outline<M>(describe: impl Describe<Model = M>) -> Outline {
    let mut unbacked = |_: &str, shape: &[usize]| Ok(Tensor::unbacked(shape)?);
    let mut build = Build::new(&mut unbacked);
    describe(&mut build).expect("shapes without memory");
    build.outline
}

/// Names and shapes of all weights.
pub(crate) fn specs(outline: &Outline) -> Vec<TensorSpec> {
    outline.tensors.iter().map(|t| TensorSpec::new(t.name.clone(), t.shape.clone())).collect()
}

/// The model in a folder whose configuration was read. `rename` gives each tensor of the file its name here, or leaves
/// it out.
///
/// # Errors
/// Weights that are missing, damaged or of another shape.
pub(crate) fn load<M>(
    dir: &Path,
    raw: RawConfig,
    (device, options): (&Device, &LoadOptions),
    rename: impl Fn(&str) -> Option<String>,
    describe: impl Describe<Model = M>,
) -> Result<(M, Parts)> {
    let weights = Checkpoint::open(dir)?.rename(rename)?;
    let outline = outline(&describe);
    weights.expect(&specs(&outline))?;
    check_tied_head(dir, &weights, outline.tied_embedding())?;
    let layout = weights.layout().clone();
    let mut before = BTreeMap::new();
    let mut tensor = |name: &str, shape: &[usize]| kept(&weights, name, shape, (device, options), &mut before);
    let (model, mut parts) = make(raw, layout, &mut tensor, describe)?;
    parts.outline.before_rounding = before;
    Ok((model, parts))
}

/// Refuses a folder whose output head is by its configuration the table of embeddings, and by its file another matrix, which
/// Transformers would use. A sample of the elements tells.
///
/// # Errors
/// [`Error::Weights`].
pub(crate) fn check_tied_head(dir: &Path, weights: &Checkpoint, table: Option<&str>) -> Result<()> {
    const HEADS: [&str; 3] = ["lm_head.weight", "lm_head.decoder.weight", "cls.predictions.decoder.weight"];
    let Some((table, shape)) = table.and_then(|table| Some((table, weights.info(table)?.shape))) else { return Ok(()) };
    let stored = Checkpoint::open(dir)?;
    for name in HEADS {
        let Some(head) = stored.info(name) else { continue };
        let elements = |file: &Checkpoint, name| fingerprint::elements(&file.tensor(name, &shape, &Device::Cpu)?);
        if head.shape != shape || elements(&stored, name)? != elements(weights, table)? {
            let problem = format!(
                "{name} has other values than {table}, although the output head is that table by tie_word_embeddings: set that \
                 to false in config.json, where this architecture can have a head of its own, or remove the tensor"
            );
            return Err(Error::Weights { file: dir.into(), problem });
        }
    }
    Ok(())
}

/// A weight of a file as a model keeps it: on the device, in [its type](LoadOptions::kept). Of one that f16 rounds some
/// elements go to `before` ([`Outline::before_rounding`]).
pub(crate) fn kept(
    weights: &Checkpoint,
    name: &str,
    shape: &[usize],
    (device, options): (&Device, &LoadOptions),
    before: &mut BTreeMap<String, Vec<f32>>,
) -> Result<Tensor> {
    match options.kept(device, shape) {
        DType::Bf16 if device.is_cpu() => weights.tensor_bf16(name, shape),
        dtype => {
            let t = weights.tensor(name, shape, &Device::Cpu)?;
            if dtype == DType::F16 {
                before.insert(name.to_owned(), fingerprint::elements(&t)?);
            }
            Ok(t.to(device, dtype)?)
        }
    }
}

/// The model with the weights that `tensor` gives.
pub(crate) fn make<M>(
    raw: RawConfig,
    layout: Layout,
    tensor: &mut dyn FnMut(&str, &[usize]) -> Result<Tensor>,
    describe: impl Describe<Model = M>,
) -> Result<(M, Parts)> {
    let mut build = Build::new(tensor);
    let model = describe(&mut build)?;
    Ok((model, Parts { raw, layout, outline: build.outline, weights: build.weights }))
}
