//! The rows that a last layer computes: those that are looked at and no other, and what training makes of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    ops::Range,
    path::Path,
    sync::{Arc, Mutex},
};

use crate::common::{CPU, goldens};
use lora_core::{
    Grads, Init, Noise, Params, Result, Tape, Tensor, Var,
    peft::{
        Adapted, Adapter, Attached, Linear, LinearAdapter, METHODS, Method, Norm, Options, Plan, Site, SiteKind,
        SublayerAdapter, join,
    },
};
use lora_kernels::DType;
use lora_model::{Batch, LoadOptions, Model, Targets, Task, Texts, assemble, config::RawConfig, load_with};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

const LENGTHS: [usize; 4] = [6, 3, 4, 5];
const TARGETS: [u32; 9] = [2, 3, 4, 7, 9, 10, 11, 13, 17];

/// The golden models in f64, by the names of their cases.
fn models() -> Vec<(String, Box<dyn Model>)> {
    let mut cases: Vec<_> = fs::read_dir(goldens()).unwrap().map(|e| e.unwrap().path()).collect();
    cases.retain(|case| case.join("model/config.json").exists());
    cases.sort();
    let options = LoadOptions { dtype: DType::F64, ..LoadOptions::default() };
    let model = |case: &Path| load_with(&case.join("model"), &CPU, &options).unwrap();
    cases.iter().map(|case| (case.file_name().unwrap().to_str().unwrap().to_owned(), model(case))).collect()
}

/// Some of the sequences, with their targets, and how many rows and targets are in those before them.
fn part(model: &dyn Model, adapted: &Adapted, which: Range<usize>) -> (Batch, [u32; 2]) {
    let limits = model.limits();
    let rows = LENGTHS[..which.start].iter().sum()..LENGTHS[..which.end].iter().sum::<usize>();
    let tokens: Vec<u32> = rows.clone().map(|i| (i * i * 7 + 5) as u32 % limits.vocab_size as u32).collect();
    let segments: Vec<u32> = rows.clone().map(|i| u32::from(limits.segments > 1 && i % 3 == 2)).collect();
    let at = TARGETS.iter().filter(|&&r| rows.contains(&(r as usize)));
    let ids: Vec<u32> = at.clone().map(|r| (r * 11 + 3) % limits.vocab_size as u32).collect();
    let at: Vec<u32> = at.map(|r| r - rows.start as u32).collect();
    let before = TARGETS.iter().filter(|&&r| (r as usize) < rows.start).count();
    let (targets, before) = match model.task() {
        Task::CausalLm | Task::MaskedLm => (Targets::Tokens { rows: &at, ids: &ids }, before),
        Task::Classification { .. } => (Targets::Labels(&[1, 0, 1, 0][which.clone()]), which.start),
        Task::Regression => (Targets::Values(&[0.5, -1.0, 2.0, 0.0][which.clone()]), which.start),
    };
    let mut texts = Texts::new(&tokens, &LENGTHS[which]).targets(targets);
    if limits.segments > 0 {
        texts = texts.segments(&segments);
    }
    (model.batch(adapted, &texts).unwrap(), [rows.start as u32, before as u32])
}

/// Attached everywhere, it changes nothing and writes down how many rows come by.
#[derive(Debug, Default)]
struct Probe(Arc<Mutex<BTreeMap<String, BTreeSet<usize>>>>);

#[derive(Debug)]
struct At {
    site: String,
    seen: Arc<Mutex<BTreeMap<String, BTreeSet<usize>>>>,
}

impl Method for Probe {
    fn name(&self) -> &'static str {
        "probe"
    }

    fn attach(&self, site: &Site, plan: &mut Plan) -> Result<Option<Attached>> {
        let at = Box::new(At { site: site.name.clone(), seen: self.0.clone() });
        let attached = match site.kind {
            SiteKind::Linear(_) => Attached::Linear(at),
            SiteKind::Sublayer { .. } => Attached::Sublayer(at),
            _ => return Ok(None),
        };
        plan.add(format!("{}.probe", site.name), &[1], Init::Zeros);
        Ok(Some(attached))
    }
}

impl At {
    fn see(&self, x: &Var) {
        self.seen.lock().unwrap().entry(self.site.clone()).or_default().insert(x.value().rows());
    }
}

impl Adapter for At {
    fn save(&self, _params: &Params) -> Result<Vec<(String, Tensor)>> {
        Ok(Vec::new())
    }

    fn load(&self, _params: &mut Params, _site: &str, _tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        Ok(())
    }
}

impl LinearAdapter for At {
    fn apply(&self, t: &mut Tape, x: &Var, base: &Linear) -> Result<Var> {
        self.see(x);
        base.apply(t, x)
    }

    fn merge(&self, _params: &Params, w: &Tensor) -> Result<Tensor> {
        Ok(w.clone())
    }
}

impl SublayerAdapter for At {
    fn join(&self, t: &mut Tape, x: Var, f: Var, norm: Norm) -> Result<Var> {
        assert_eq!(x.value().rows(), f.value().rows());
        self.see(&x);
        join(t, x, f, norm)
    }
}

/// Of the linear maps those before attention, which makes keys and values of all rows.
fn before_attention(site: &str) -> bool {
    ["query", "key", "value", "query_proj", "key_proj", "value_proj", "q_proj", "k_proj", "v_proj", "c_attn"]
        .iter()
        .any(|module| site.rsplit('.').next() == Some(module))
}

#[test]
fn the_last_layer_computes_the_rows_that_are_looked_at() {
    let all: usize = LENGTHS.iter().sum();
    for (case, model) in models() {
        let probe = Probe::default();
        let adapted = Adapted::new(&probe, &*model, &CPU, DType::F64, 0).unwrap();
        let (batch, _) = part(&*model, &adapted, 0..4);
        let tokens = matches!(model.task(), Task::CausalLm | Task::MaskedLm);
        let targets = if tokens { TARGETS.len() } else { LENGTHS.len() };
        let outline = model.outline();
        let check = |what: &str, all: usize, wanted: usize| {
            let seen = std::mem::take(&mut *probe.0.lock().unwrap());
            let mut fewer = 0;
            // Relative positions are rows of a table of their own; they pass through the maps of tokens too.
            let of_tokens = |site: &&Site| site.layer.is_some() && !site.name.contains(".pos_");
            for site in outline.sites.iter().filter(of_tokens) {
                let Some(rows) = seen.get(&site.name) else { continue };
                let last = site.layer == Some(outline.layers - 1) && !before_attention(&site.name);
                fewer += usize::from(last);
                let n = if last { wanted } else { all };
                assert!(rows.contains(&n), "{case}, {what}: {} computes {rows:?} rows of {all}, not {n}", site.name);
                assert!(rows.len() == 1 || !last, "{case}, {what}: {} computes {rows:?} rows", site.name);
            }
            // The projection after attention, two or three maps of the MLP, two sums.
            assert!((5..=6).contains(&fewer), "{case}, {what}: {fewer} sites");
        };
        model.loss(&mut Tape::new(&adapted.params), &adapted, &batch, 0.0, 1.0).unwrap();
        check("loss", all, targets);
        model.logits(&adapted, &batch).unwrap();
        check("logits", all, if tokens { all } else { targets });
        if model.task() == Task::CausalLm {
            let mut cache = model.cache(2, 8).unwrap();
            model.step(&adapted, &mut cache, &[1, 2, 3, 4, 5, 6], &[4, 2]).unwrap();
            check("prompts", 6, 2);
            model.step(&adapted, &mut cache, &[7, 8], &[1, 1]).unwrap();
            check("one more", 2, 2);
        }
    }
}

/// −Σ log p of the targets, of the logits of all tokens.
fn loss_by_logits(model: &dyn Model, adapted: &Adapted) -> f64 {
    let logits = model.logits(adapted, &part(model, adapted, 0..4).0).unwrap();
    let of = |row: usize| logits.rows_in(row..row + 1).to_f64().unwrap();
    let nll = |z: Vec<f64>, id: usize| z.iter().map(|v| v.exp()).sum::<f64>().ln() - z[id];
    let vocab_size = model.limits().vocab_size;
    match model.task() {
        Task::CausalLm | Task::MaskedLm => {
            TARGETS.iter().map(|&r| nll(of(r as usize), (r as usize * 11 + 3) % vocab_size)).sum()
        }
        Task::Classification { .. } => [1, 0, 1, 0].into_iter().enumerate().map(|(i, label)| nll(of(i), label)).sum(),
        Task::Regression => [0.5, -1.0, 2.0, 0.0].iter().enumerate().map(|(i, y)| (of(i)[0] - y).powi(2)).sum(),
    }
}

/// A single layer is the first and the last: DeBERTa's convolution stands beside it.
fn one_layer() -> Box<dyn Model> {
    let raw = json!({
        "model_type": "deberta-v2", "vocab_size": 60, "hidden_size": 12, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 20, "max_position_embeddings": 40, "type_vocab_size": 0,
        "relative_attention": true, "position_buckets": 4, "max_relative_positions": -1, "share_att_key": true,
        "pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm", "position_biased_input": false,
        "conv_kernel_size": 3, "conv_act": "gelu",
    });
    let raw = RawConfig::new("model".as_ref(), raw.as_object().unwrap().clone());
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut random = |_: &str, shape: &[usize]| {
        let values: Vec<f64> = (0..shape.iter().product()).map(|_| rng.random_range(-0.5..0.5)).collect();
        Ok(Tensor::from_slice(&CPU, shape, &values)?)
    };
    let options = LoadOptions { dtype: DType::F64, task: Some(Task::MaskedLm), ..LoadOptions::default() };
    assemble(raw, &CPU, &options, &mut random).unwrap()
}

#[test]
fn the_loss_is_that_of_the_logits_of_all_rows() {
    let adapted = Adapted::none(&CPU).unwrap();
    for (case, model) in models().into_iter().chain([("one layer".into(), one_layer())]) {
        let batch = part(&*model, &adapted, 0..4).0;
        let loss = model.loss(&mut Tape::inference(&adapted.params), &adapted, &batch, 0.0, 1.0).unwrap();
        let (loss, want) = (loss.value().to_f64().unwrap()[0], loss_by_logits(&*model, &adapted));
        assert!((loss - want).abs() <= 1e-10 * want, "{case}: {loss} for {want}");
    }
}

/// Dropout everywhere, before and after the rows become fewer: loss and gradient are those of the whole batch.
#[test]
fn micro_batches_change_nothing_where_rows_are_dropped_out() {
    let mut pairs = 0;
    for (case, mut model) in models().into_iter().chain([("one layer".into(), one_layer())]) {
        model.set_base_dropout(0.3);
        let maps = model.outline().linear_sites().map(|(site, _)| site.name.rsplit('.').next().unwrap().to_owned());
        let targets = maps.collect::<BTreeSet<_>>().into_iter().collect();
        let o = Options { rank: 2, dropout: 0.3, targets, bottleneck: 3, prefix: 2, infix: 1, ..Options::default() };
        for row in METHODS.iter().filter(|row| row.name != "fusion") {
            let method = (row.build)(&o).unwrap();
            let Ok(mut adapted) = Adapted::new(&*method, &*model, &CPU, DType::F64, 1) else { continue };
            let mut rng = ChaCha8Rng::seed_from_u64(77);
            let values: Vec<f64> = (0..adapted.params.count()).map(|_| rng.random_range(-0.3..0.3)).collect();
            let noise = Tensor::from_slice(&CPU, &[1, values.len()], &values).unwrap();
            lora_kernels::axpby(1.0, noise.mat(), 1.0, adapted.params.flat_mut().unwrap()).unwrap();
            let run = |ends: &[usize]| {
                let mut grads = Grads::new(&adapted.params).unwrap();
                let mut total = 0.0;
                for ends in ends.windows(2) {
                    let (batch, [row_offset, target_offset]) = part(&*model, &adapted, ends[0]..ends[1]);
                    let sequence_offset = ends[0] as u32;
                    let noise = Noise { seed: 5, step: 3, row_offset, sequence_offset, target_offset };
                    let mut t = Tape::new(&adapted.params).with_noise(noise);
                    let loss = model.loss(&mut t, &adapted, &batch, 0.0, 0.1).unwrap();
                    total += loss.value().to_f64().unwrap()[0];
                    t.backward(loss, &mut grads).unwrap();
                }
                let ids = adapted.params.ids();
                let all = ids.filter_map(|id| grads.get(id).unwrap()).flat_map(|g| g.to_f64().unwrap());
                (total, all.collect::<Vec<f64>>())
            };
            let (loss, grads) = run(&[0, 4]);
            let size = grads.iter().map(|g| g * g).sum::<f64>().sqrt();
            for ends in [&[0, 1, 2, 3, 4][..], &[0, 3, 4]] {
                let (split, others) = run(ends);
                let far = grads.iter().zip(&others).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
                let what = format!("{case}, {}, split at {ends:?}", row.name);
                assert!((split - loss).abs() <= 1e-11 * loss.abs(), "{what}: loss {split} for {loss}");
                assert!(far <= 1e-10 * size, "{what}: gradients differ by {far} of {size}");
            }
            pairs += 1;
        }
    }
    assert!(pairs > 150, "{pairs} pairs");
}
