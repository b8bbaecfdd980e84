//! How many FLOPs of matrix products a training step needs.
//!
//! Counted from shapes, two for a multiplication with its addition, and only what cannot be left out:
//!
//! - every linear map forward; the gradient of its input only where something below trains; that of its weight only where
//!   it trains;
//! - LoRA's products with A and B, forward and backward;
//! - attention's Q·Kᵀ and P·V over the pairs of positions that see each other, and their four products backward (not the
//!   scores that a backward pass makes again);
//! - the last layer's queries, output projection and MLP for the rows alone that have a target, because nobody looks at the
//!   others;
//! - the head for those rows.

use anyhow::Result;
use lora_core::peft::{LinearSite, Method, Outline, parameters};
use lora_model::{Model, Task};
use lora_train::data::{Batch, Targets};
use serde::Serialize;

/// FLOPs by what they are spent on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Flops {
    /// The base's linear maps.
    pub linear: f64,
    /// LoRA's products.
    pub lora: f64,
    /// Attention.
    pub attention: f64,
    /// The head.
    pub head: f64,
}

impl Flops {
    /// All of them.
    pub fn total(&self) -> f64 {
        self.linear + self.lora + self.attention + self.head
    }
}

/// What is known of a model and a method before there is a batch.
#[derive(Clone, Debug)]
pub struct Needed {
    outline: Outline,
    /// What trains.
    parameters: Vec<(String, Vec<usize>)>,
    task: Task,
    /// The head's weight and its shape.
    head: (String, [usize; 2]),
}

/// The place of a linear map in its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Qkv,
    Output,
    Up,
    Down,
}

impl Stage {
    fn of(site: &str) -> Stage {
        let ends = |names: &[&str]| names.iter().any(|n| site.ends_with(n));
        match () {
            () if ends(&["attn.c_proj", "o_proj", "attention.output.dense"]) => Stage::Output,
            () if ends(&["c_fc", "gate_proj", "up_proj", "intermediate.dense"]) => Stage::Up,
            () if ends(&["mlp.c_proj", "down_proj", "output.dense"]) => Stage::Down,
            () => Stage::Qkv,
        }
    }
}

impl Needed {
    /// Of a model under a method.
    ///
    /// # Errors
    /// A method that does not fit.
    pub fn of(model: &dyn Model, method: &dyn Method) -> Result<Needed> {
        let (outline, head) = (model.outline().clone(), model.head().weight);
        let parameters = parameters(method, &outline)?;
        let shape = [head.tensor.rows(), head.tensor.cols()];
        Ok(Needed { outline, parameters, task: model.task(), head: (head.name.clone(), shape) })
    }

    /// The FLOPs of a batch, forward and backward.
    pub fn step(&self, batch: &Batch) -> Flops {
        let firsts: Vec<u32>;
        let wanted = match &batch.targets {
            Targets::Tokens { rows, .. } => rows,
            _ => {
                let starts = batch.lengths.iter().scan(0, |end, n| Some(std::mem::replace(end, *end + *n as u32)));
                firsts = starts.collect();
                &firsts
            }
        };
        self.count(&batch.lengths, wanted)
    }

    /// The same for sequences of these lengths and targets at these rows, ascending.
    fn count(&self, lengths: &[usize], wanted: &[u32]) -> Flops {
        let mut flops = Flops::default();
        let (rows, targets) = (lengths.iter().sum::<usize>() as f64, wanted.len() as f64);
        let mut tracked = self.embeddings_train();
        let sites: Vec<_> = self.outline.linear_sites().filter(|(site, _)| site.layer.is_some()).collect();
        let groups = sites.chunk_by(|(a, _), (b, _)| a.layer == b.layer && Stage::of(&a.name) == Stage::of(&b.name));
        for group in groups {
            let stage = Stage::of(&group[0].0.name);
            let last = group[0].0.layer == Some(self.outline.layers - 1);
            let seen = if last { targets } else { rows };
            let mut trains = false;
            for (site, linear) in group {
                let here = if stage == Stage::Qkv && !is_query(&site.name) { rows } else { seen };
                let outputs = match stage {
                    Stage::Qkv => outputs(&site.name, linear, rows, seen),
                    _ => seen * linear.outputs as f64,
                };
                let dense = 2.0 * linear.inputs as f64 * outputs;
                let own = self.trains(&format!("{}.weight", site.name));
                flops.linear += dense * (1.0 + count(tracked) + count(own));
                let [a, b] = self.low_rank(&site.name).map(|n| 2.0 * here * n);
                // h = x·Aᵀ and h·Bᵀ; dA, dB, dh = dy·B; dx = dh·A.
                flops.lora += 2.0 * (a + b) + b + a * count(tracked);
                trains |= own || a > 0.0;
            }
            tracked |= trains;
            if stage == Stage::Output {
                let queries = if last { Some(wanted) } else { None };
                let products = 2.0 + 4.0 * count(tracked);
                flops.attention += products * 2.0 * self.pairs(lengths, queries) * group[0].1.inputs as f64;
            }
        }
        flops.head = self.head_flops(lengths.len() as f64, targets, tracked);
        flops
    }

    fn head_flops(&self, sequences: f64, targets: f64, tracked: bool) -> f64 {
        let map = |rows: f64, name: &str, shape: &[usize]| {
            2.0 * rows * scalars(shape) * (1.0 + count(tracked) + count(self.trains(name)))
        };
        match self.task {
            Task::Classification { .. } | Task::Regression => {
                let own =
                    self.outline.tensors.iter().filter(|t| t.shape.len() == 2 && self.outline.is_saved_module(&t.name));
                own.map(|t| map(sequences, &t.name, &t.shape)).sum()
            }
            Task::CausalLm | Task::MaskedLm => map(targets, &self.head.0, &self.head.1),
        }
    }

    /// Pairs of a query and a key that it sees; of these queries alone, or of all.
    fn pairs(&self, lengths: &[usize], queries: Option<&[u32]>) -> f64 {
        let causal = matches!(self.task, Task::CausalLm);
        let mut queries = queries.map(|q| q.iter().map(|&row| row as usize).peekable());
        let (mut from, mut pairs) = (0, 0.0);
        for &n in lengths {
            let mut add = |row: usize| pairs += if causal { row - from + 1 } else { n } as f64;
            match &mut queries {
                None => (from..from + n).for_each(add),
                Some(rows) => {
                    while let Some(row) = rows.next_if(|row| *row < from + n) {
                        add(row);
                    }
                }
            }
            from += n;
        }
        pairs
    }

    fn trains(&self, name: &str) -> bool {
        self.parameters.iter().any(|(own, _)| own == name)
    }

    /// Whether something below the first layer trains.
    fn embeddings_train(&self) -> bool {
        let below = |t: &&lora_core::peft::BaseTensor| {
            t.layer.is_none() && !t.norm && t.name != "lm_head.weight" && !self.outline.is_saved_module(&t.name)
        };
        self.outline.tensors.iter().filter(below).any(|t| self.trains(&t.name))
    }

    /// Scalars of A and of B at a site.
    fn low_rank(&self, site: &str) -> [f64; 2] {
        let own = |end: &str| {
            let at = self.parameters.iter().filter(|(name, _)| {
                name.strip_prefix(site).is_some_and(|rest| rest.starts_with('.')) && name.ends_with(end)
            });
            at.map(|(_, shape)| scalars(shape)).sum()
        };
        [own("lora_A.weight"), own("lora_B.weight")]
    }
}

/// Output columns times rows: keys and values of all rows, queries of those that are looked at.
fn outputs(site: &str, linear: &LinearSite, rows: f64, seen: f64) -> f64 {
    if linear.parts.is_empty() {
        return linear.outputs as f64 * if is_query(site) { seen } else { rows };
    }
    linear.parts.iter().map(|(name, cols)| cols.len() as f64 * if *name == "q" { seen } else { rows }).sum()
}

/// Whether a linear map makes queries alone.
fn is_query(site: &str) -> bool {
    site.ends_with("q_proj") || site.ends_with("query")
}

fn scalars(shape: &[usize]) -> f64 {
    shape.iter().product::<usize>() as f64
}

fn count(yes: bool) -> f64 {
    f64::from(u8::from(yes))
}

#[cfg(test)]
mod tests {
    use lora_core::peft::{Options, find};
    use lora_model::{LoadOptions, config::RawConfig, outline};
    use serde_json::{Value, json};

    use super::*;

    fn needed(config: Value, method: &str, options: Options) -> Needed {
        let raw = RawConfig::new("test".as_ref(), config.as_object().unwrap().clone());
        let task = (raw.architecture().unwrap().task)(&raw).unwrap().unwrap_or(Task::Classification { labels: 2 });
        let outline = outline(&raw, &LoadOptions { task: Some(task), ..LoadOptions::default() }).unwrap();
        let method = (find(method).unwrap().build)(&options).unwrap();
        let parameters = parameters(&*method, &outline).unwrap();
        let head =
            ["lm_head.weight", "transformer.wte.weight", "model.embed_tokens.weight", "classifier.out_proj.weight"];
        let tensor = |n: &&str| outline.tensors.iter().find(|t| t.name == *n);
        let head = head.iter().find_map(tensor).unwrap();
        Needed { head: (head.name.clone(), [head.shape[0], head.shape[1]]), outline, parameters, task }
    }

    fn gpt2(layers: usize) -> Value {
        json!({"model_type": "gpt2", "n_layer": layers, "n_embd": 4, "n_head": 2, "vocab_size": 10, "n_positions": 16})
    }

    fn lora(rank: usize, targets: &[&str]) -> Options {
        Options { rank, targets: targets.iter().copied().collect(), ..Options::default() }
    }

    #[test]
    fn a_dense_step_by_hand() {
        // d = 4, f = 16: a layer's weights have 12·d² = 192 scalars. One sequence of 3 rows, all of them targets.
        let all = needed(gpt2(2), "full", Options::default()).count(&[3], &[0, 1, 2]);
        let (d, rows, pairs) = (4.0, 3.0, 6.0);
        assert_eq!(all.linear, 3.0 * 2.0 * rows * 2.0 * 192.0);
        assert_eq!(all.attention, 2.0 * 6.0 * 2.0 * pairs * d);
        assert_eq!((all.head, all.lora), (3.0 * 2.0 * rows * d * 10.0, 0.0));

        // LoRA on c_attn alone: dX everywhere but at the first c_attn, dW nowhere.
        let lora = needed(gpt2(2), "lora", lora(2, &["c_attn"])).count(&[3], &[0, 1, 2]);
        assert_eq!(lora.linear, 2.0 * 2.0 * rows * 2.0 * 192.0 - 2.0 * rows * 48.0);
        let (a, b) = (2.0 * rows * 2.0 * 4.0, 2.0 * rows * 12.0 * 2.0);
        assert_eq!(lora.lora, 2.0 * (2.0 * a + 3.0 * b) + a);
        assert_eq!((lora.attention, lora.head), (all.attention, 2.0 * 2.0 * rows * d * 10.0));
    }

    #[test]
    fn only_rows_with_a_target_cost_in_the_last_layer() {
        // One layer: queries, output, MLP and head for one row of three; keys and values for all.
        let n = needed(gpt2(1), "lora", lora(1, &["mlp.c_proj"]));
        let one = n.count(&[3], &[2]);
        let forward = 2.0 * (3.0 * 32.0 + 16.0 + 16.0 + 64.0 + 64.0);
        assert_eq!(one.linear, forward, "nothing below the last map trains");
        assert_eq!(one.attention, 2.0 * 2.0 * 3.0 * 4.0, "one query sees three keys; no backward");
        assert_eq!(one.lora, 2.0 * (2.0 * (16.0 + 4.0)) + 2.0 * 4.0);
        assert_eq!(one.head, 2.0 * 2.0 * 40.0);
        // Two sequences, the second from row 3: its row 4 sees two keys.
        assert_eq!(n.pairs(&[3, 2], Some(&[1, 4])), 4.0);
        assert_eq!(n.pairs(&[3, 2], None), 9.0);
    }

    #[test]
    fn neighbours_of_a_fused_stage_do_not_track_each_other() {
        let llama = json!({"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 4, "intermediate_size": 8,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10});
        let n = needed(llama, "lora", lora(1, &["q_proj", "down_proj"])).count(&[2], &[0, 1]);
        // q 4×4, k and v 4×2, o 4×4, gate, up and down 4×8: forward; dX from o on.
        let (qkv, rest) = (32.0, 16.0 + 3.0 * 32.0);
        assert_eq!(n.linear, 2.0 * 2.0 * (qkv + 2.0 * rest));

        let roberta = json!({"model_type": "roberta", "num_hidden_layers": 1, "hidden_size": 4, "intermediate_size": 8,
            "num_attention_heads": 2, "vocab_size": 10, "max_position_embeddings": 20, "type_vocab_size": 1});
        let n = needed(roberta, "lora", lora(1, &["query", "value"])).count(&[3, 3], &[0, 3]);
        let (kv, rest) = (2.0 * 16.0 * 6.0, (16.0 + 2.0 * 32.0) * 2.0);
        assert_eq!(n.linear, 2.0 * (kv + 16.0 * 2.0 + 2.0 * rest));
        assert_eq!(n.attention, 6.0 * 2.0 * 6.0 * 4.0, "two queries see three keys each");
        // A and B have 4 scalars each: two products forward, three backward; of the query for two rows, of the value for six.
        assert_eq!(n.lora, 5.0 * 2.0 * 4.0 * (2.0 + 6.0));
        // dense 4×4 and out_proj 2×4 train and pass the gradient on.
        assert_eq!(n.head, 3.0 * 2.0 * 2.0 * (16.0 + 8.0));
    }
}
