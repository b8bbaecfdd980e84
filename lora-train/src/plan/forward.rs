//! The forward passes of `lora_model`'s architectures without numbers. Each follows `Model::hidden` of its namesake.

use std::rc::Rc;

use lora_kernels::RelativePositions;
use lora_model::{
    Task,
    config::{BertConfig, DebertaV2Config, Gpt2Config, LlamaConfig, RobertaConfig},
};

use super::{
    adapted::Adapted,
    ops::{self, Qkv},
    tape::{Tape, Var},
};

/// A configuration of any architecture.
pub(super) enum Config {
    Gpt2(Gpt2Config),
    Bert(BertConfig),
    Roberta(RobertaConfig),
    Deberta(DebertaV2Config),
    Llama(LlamaConfig),
}

/// One pass over sequences of equal length.
pub(super) struct Pass<'a> {
    pub(super) adapted: &'a Adapted<'a>,
    /// What the head gives.
    pub(super) task: Task,
    pub(super) sequences: u128,
    /// Tokens of a sequence.
    pub(super) tokens: u128,
    /// Of the base; `None` is what the configuration says.
    pub(super) base_dropout: Option<f64>,
    /// Whether layers are computed once more on the way back.
    pub(super) checkpoint: bool,
}

/// Keys and values of virtual tokens, where there are any.
type Prefix = Option<Rc<Var>>;

/// Heads of queries and of keys, and their width.
#[derive(Clone, Copy)]
struct Heads {
    queries: u128,
    keys: u128,
    width: u128,
}

impl Pass<'_> {
    /// The most bytes that are held in a pass and its backward, parameters and weights aside; `None` when they are absurdly
    /// many.
    pub(super) fn peak(&self, config: &Config, size: u128) -> Option<u128> {
        let mut t = Tape::new(size, self.checkpoint);
        let ledger = t.ledger.clone();
        // Tokens, positions, segments, target rows and targets.
        let _batch = t.wide(5, self.rows());
        let loss = self.loss(&mut t, config);
        t.backward(loss);
        ledger.peak()
    }

    fn rate(&self, p: f64) -> f64 {
        self.base_dropout.unwrap_or(p)
    }

    /// Rows of the stream.
    fn rows(&self) -> u128 {
        self.sequences * (self.tokens + self.adapted.virtual_tokens()[0] as u128)
    }

    /// Rows that are looked at in the end.
    fn targets(&self) -> u128 {
        if self.task == Task::CausalLm { self.sequences * self.tokens } else { self.sequences }
    }

    /// What goes on after attention of the last layer.
    fn wanted<const N: usize>(&self, t: &mut Tape, x: [Var; N]) -> [Var; N] {
        x.map(|x| ops::gather(t, &x, self.targets()))
    }

    fn loss<'m>(&'m self, t: &mut Tape<'m>, config: &'m Config) -> Var {
        let x = self.hidden(t, config);
        let (x, module, classes) = match config {
            Config::Gpt2(c) => (x, if c.tie_word_embeddings { "transformer.wte" } else { "lm_head" }, c.vocab_size),
            Config::Llama(c) => (x, if c.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" }, c.vocab_size),
            _ => self.classifier(t, config, x),
        };
        let map = self.adapted.map(module, classes as u128);
        let u = self.adapted.beside_head(t, module, &x);
        ops::loss_head(t, &x, u.as_ref(), classes as u128, map)
    }

    /// What stands between an encoder's hidden states and the matrix of its head.
    fn classifier(&self, t: &mut Tape, config: &Config, x: Var) -> (Var, &'static str, usize) {
        let (dense, module, before, after) = match config {
            Config::Roberta(c) => {
                let p = c.bert.head_dropout();
                ("classifier.dense", "classifier.out_proj", Some(p), p)
            }
            Config::Deberta(c) => {
                let after = c.cls_dropout.unwrap_or(c.hidden_dropout_prob);
                ("pooler.dense", "classifier", Some(c.pooler_dropout), after)
            }
            Config::Bert(c) => ("bert.pooler.dense", "classifier", None, c.head_dropout()),
            Config::Gpt2(_) | Config::Llama(_) => ("", "", None, 0.0),
        };
        let outputs = if let Task::Classification { labels } = self.task { labels } else { 1 };
        let d = x.value.cols;
        let x = ops::dropout(t, x, before.map_or(0.0, |p| self.rate(p)));
        let x = match config {
            // No place for adapters there.
            Config::Roberta(_) => ops::linear(t, &x, self.adapted.map(dense, d)),
            _ => self.adapted.project(t, dense, &x),
        };
        let x = ops::activation(t, &x);
        (ops::dropout(t, x, self.rate(after)), module, outputs)
    }

    fn hidden<'m>(&'m self, t: &mut Tape<'m>, config: &'m Config) -> Var {
        match config {
            Config::Gpt2(c) => self.gpt2(t, c),
            Config::Bert(c) => self.encoder(t, c, "bert"),
            Config::Roberta(c) => self.encoder(t, &c.bert, "roberta"),
            Config::Deberta(c) => self.deberta(t, c),
            Config::Llama(c) => self.llama(t, c),
        }
    }

    /// The embeddings of the tokens, and of virtual ones among them.
    fn embed(&self, t: &mut Tape, table: &str, vocab: usize, d: u128) -> Var {
        let x = self.adapted.embed(t, table, [vocab as u128, d], self.sequences * self.tokens);
        match self.adapted.virtual_tokens()[0] as u128 {
            0 => x,
            l => {
                let rows = t.weight(l, d, true);
                let x = ops::concat_rows(t, &x, &rows);
                ops::gather(t, &x, self.rows())
            }
        }
    }

    /// x and the rows of another table.
    fn plus_table(&self, t: &mut Tape, x: Var, table: &str, rows: usize) -> Var {
        let more = self.adapted.embed(t, table, [rows as u128, x.value.cols], self.rows());
        ops::add(t, x, more)
    }

    /// Keys and values of virtual tokens, which all layers read.
    fn prefix(&self, t: &mut Tape, layers: usize, heads: Heads) -> Prefix {
        let Heads { keys, width, .. } = heads;
        let tokens = self.adapted.virtual_tokens()[1];
        (tokens > 0).then(|| Rc::new(self.adapted.keys_values(t, 2 * layers as u128 * keys * width)))
    }

    fn layer_norm(&self, t: &mut Tape, module: &str, x: &Var) -> Var {
        let trains = ["weight", "bias"].map(|w| self.adapted.trains(&format!("{module}.{w}")));
        ops::norm(t, x, trains, 2)
    }

    fn attend(&self, t: &mut Tape, prefix: &Prefix, heads: Heads, qkv: Qkv) -> Var {
        let Heads { queries, keys, width } = heads;
        let (q_cols, kv_cols) = (queries * width, keys * width);
        let Some(prefix) = prefix else { return ops::attention(t, qkv, None, q_cols, queries) };
        let l = prefix.value.rows;
        let split;
        let [q, k, v] = match qkv {
            Qkv::Separate(all) => all,
            Qkv::Fused(qkv) => {
                split = [q_cols, kv_cols, kv_cols].map(|cols| ops::columns(t, qkv, cols));
                split.each_ref()
            }
        };
        let (own, run) = (self.rows(), self.sequences * (self.tokens + l));
        let between = |t: &mut Tape, own: &Var| {
            let rows = ops::columns(t, prefix, kv_cols);
            let all = ops::concat_rows(t, own, &rows);
            ops::gather(t, &all, run)
        };
        let (k, v) = (between(t, k), between(t, v));
        let none = Var { value: t.empty(l, q_cols), slot: None };
        let q = ops::concat_rows(t, q, &none);
        let q = ops::gather(t, &q, run);
        let y = ops::attention(t, Qkv::Separate([&q, &k, &v]), None, q_cols, queries);
        ops::gather(t, &y, own)
    }

    fn gpt2<'m>(&'m self, t: &mut Tape<'m>, c: &'m Gpt2Config) -> Var {
        let a = self.adapted;
        let x = self.embed(t, "transformer.wte.weight", c.vocab_size, c.n_embd as u128);
        let h = self.plus_table(t, x, "transformer.wpe.weight", c.n_positions);
        let mut h = ops::dropout(t, h, self.rate(c.embd_pdrop));
        let heads = Heads { queries: c.n_head as u128, keys: c.n_head as u128, width: c.head_dim() as u128 };
        let prefix = self.prefix(t, c.n_layer, heads);
        for i in 0..c.n_layer {
            let prefix = prefix.clone();
            h = t.checkpoint(h, move |t, mut h| {
                let module = |name: &str| format!("transformer.h.{i}.{name}");
                let x = self.layer_norm(t, &module("ln_1"), &h);
                let qkv = a.project(t, &module("attn.c_attn"), &x);
                drop(x);
                let mut y = self.attend(t, &prefix, heads, Qkv::Fused(&qkv));
                drop(qkv);
                if i + 1 == c.n_layer {
                    [y, h] = self.wanted(t, [y, h]);
                }
                let f = a.project(t, &module("attn.c_proj"), &y);
                drop(y);
                let f = ops::dropout(t, f, self.rate(c.resid_pdrop));
                h = a.join(t, &module("attn"), h, f, None);
                let x = self.layer_norm(t, &module("ln_2"), &h);
                let x = a.project(t, &module("mlp.c_fc"), &x);
                let x = ops::activation(t, &x);
                let f = a.project(t, &module("mlp.c_proj"), &x);
                drop(x);
                let f = ops::dropout(t, f, self.rate(c.resid_pdrop));
                a.join(t, &module("mlp"), h, f, None)
            });
        }
        self.layer_norm(t, "transformer.ln_f", &h)
    }

    fn llama<'m>(&'m self, t: &mut Tape<'m>, c: &'m LlamaConfig) -> Var {
        let a = self.adapted;
        let (heads, keys) = (c.num_attention_heads as u128, c.num_key_value_heads as u128);
        let cfg = Heads { queries: heads, keys, width: c.head_dim as u128 };
        let norm = |t: &mut Tape, module: &str, x: &Var, parts| {
            ops::norm(t, x, [a.trains(&format!("{module}.weight")), false], parts)
        };
        let mut h = self.embed(t, "model.embed_tokens.weight", c.vocab_size, c.hidden_size as u128);
        let prefix = self.prefix(t, c.num_hidden_layers, cfg);
        for i in 0..c.num_hidden_layers {
            let prefix = prefix.clone();
            h = t.checkpoint(h, move |t, mut h| {
                let module = |name: &str| format!("model.layers.{i}.{name}");
                let x = norm(t, &module("input_layernorm"), &h, 1);
                let mut q = a.project(t, &module("self_attn.q_proj"), &x);
                let mut k = a.project(t, &module("self_attn.k_proj"), &x);
                let v = a.project(t, &module("self_attn.v_proj"), &x);
                drop(x);
                if c.qk_norm() {
                    q = norm(t, &module("self_attn.q_norm"), &q, heads);
                    k = norm(t, &module("self_attn.k_norm"), &k, keys);
                }
                q = ops::rope(t, &q);
                k = ops::rope(t, &k);
                let mut y = self.attend(t, &prefix, cfg, Qkv::Separate([&q, &k, &v]));
                drop((q, k, v));
                if i + 1 == c.num_hidden_layers {
                    [y, h] = self.wanted(t, [y, h]);
                }
                let f = a.project(t, &module("self_attn.o_proj"), &y);
                drop(y);
                h = a.join(t, &module("self_attn"), h, f, None);
                let x = norm(t, &module("post_attention_layernorm"), &h, 1);
                let gate = a.project(t, &module("mlp.gate_proj"), &x);
                let up = a.project(t, &module("mlp.up_proj"), &x);
                drop(x);
                let x = ops::silu_gate(t, &gate, &up);
                drop((gate, up));
                let f = a.project(t, &module("mlp.down_proj"), &x);
                drop(x);
                a.join(t, &module("mlp"), h, f, None)
            });
        }
        norm(t, "model.norm", &h, 1)
    }

    fn encoder<'m>(&'m self, t: &mut Tape<'m>, c: &'m BertConfig, root: &'static str) -> Var {
        let a = self.adapted;
        let table = |name: &str| format!("{root}.embeddings.{name}_embeddings.weight");
        let x = self.embed(t, &table("word"), c.vocab_size, c.hidden_size as u128);
        let x = self.plus_table(t, x, &table("token_type"), c.type_vocab_size);
        let x = self.plus_table(t, x, &table("position"), c.max_position_embeddings);
        let h = self.layer_norm(t, &format!("{root}.embeddings.LayerNorm"), &x);
        drop(x);
        let mut h = ops::dropout(t, h, self.rate(c.hidden_dropout_prob));
        let heads = c.num_attention_heads as u128;
        let cfg = Heads { queries: heads, keys: heads, width: c.head_dim() as u128 };
        let prefix = self.prefix(t, c.num_hidden_layers, cfg);
        for i in 0..c.num_hidden_layers {
            let prefix = prefix.clone();
            h = t.checkpoint(h, move |t, mut h| {
                let module = |name: &str| format!("{root}.encoder.layer.{i}.{name}");
                let [q, k, v] =
                    ["query", "key", "value"].map(|m| a.project(t, &module(&format!("attention.self.{m}")), &h));
                let mut y = self.attend(t, &prefix, cfg, Qkv::Separate([&q, &k, &v]));
                drop((q, k, v));
                if i + 1 == c.num_hidden_layers {
                    [y, h] = self.wanted(t, [y, h]);
                }
                self.post_norm(t, &module(""), h, y, self.rate(c.hidden_dropout_prob))
            });
        }
        h
    }

    /// What a layer of an encoder does of its attention's output y: projections, MLP, and norms after both sums.
    fn post_norm(&self, t: &mut Tape, layer: &str, h: Var, y: Var, p: f64) -> Var {
        let a = self.adapted;
        let module = |name: &str| format!("{layer}{name}");
        let norm = |name: &str| {
            let module = module(name);
            move |t: &mut Tape, x: &Var| self.layer_norm(t, &module, x)
        };
        let f = a.project(t, &module("attention.output.dense"), &y);
        drop(y);
        let f = ops::dropout(t, f, p);
        let h = a.join(t, &module("attention.output"), h, f, Some(&norm("attention.output.LayerNorm")));
        let x = a.project(t, &module("intermediate.dense"), &h);
        let x = ops::activation(t, &x);
        let f = a.project(t, &module("output.dense"), &x);
        drop(x);
        let f = ops::dropout(t, f, p);
        a.join(t, &module("output"), h, f, Some(&norm("output.LayerNorm")))
    }

    fn deberta<'m>(&'m self, t: &mut Tape<'m>, c: &'m DebertaV2Config) -> Var {
        let a = self.adapted;
        let (d, p) = (c.hidden_size as u128, self.rate(c.hidden_dropout_prob));
        let table = |name: &str| format!("deberta.embeddings.{name}_embeddings.weight");
        let mut x = self.embed(t, &table("word"), c.vocab_size, d);
        if c.position_biased_input {
            x = self.plus_table(t, x, &table("position"), c.max_position_embeddings);
        }
        if c.type_vocab_size > 0 {
            x = self.plus_table(t, x, &table("token_type"), c.type_vocab_size);
        }
        let h = self.layer_norm(t, "deberta.embeddings.LayerNorm", &x);
        drop(x);
        let mut h = ops::dropout(t, h, p);
        let relative = c.positions().filter(|_| c.is_disentangled());
        let relative = relative.map(|positions| Rc::new(self.relative(t, c, positions)));
        let heads = c.num_attention_heads as u128;
        let cfg = Heads { queries: heads, keys: heads, width: c.head_dim() as u128 };
        let prefix = self.prefix(t, c.num_hidden_layers, cfg);
        for i in 0..c.num_hidden_layers {
            let (prefix, relative) = (prefix.clone(), relative.clone());
            h = t.checkpoint(h, move |t, mut h| {
                let module = |name: &str| format!("deberta.encoder.layer.{i}.{name}");
                let before = (i == 0).then_some(c.conv_kernel_size).flatten().map(|width| (width, h.share()));
                let [q, k, v] =
                    ["query", "key", "value"].map(|m| a.project(t, &module(&format!("attention.self.{m}_proj")), &h));
                let qkv = Qkv::Separate([&q, &k, &v]);
                let mut y = match &relative {
                    None => self.attend(t, &prefix, cfg, qkv),
                    Some(table) => {
                        let table = ops::dropout(t, table.share(), p);
                        let kinds = [(c.c2p, "key"), (c.p2c, "query")].into_iter().filter(|(wanted, _)| *wanted);
                        let own = if c.share_att_key { "" } else { "pos_" };
                        let tables: Vec<Var> = kinds
                            .map(|(_, m)| a.project(t, &module(&format!("attention.self.{own}{m}_proj")), &table))
                            .collect();
                        ops::attention(t, qkv, Some((&tables, self.rows() / self.sequences)), d, heads)
                    }
                };
                drop((q, k, v));
                let last = i + 1 == c.num_hidden_layers;
                if last {
                    [y, h] = self.wanted(t, [y, h]);
                }
                h = self.post_norm(t, &module(""), h, y, p);
                if let Some((width, x)) = before {
                    let map = a.map("deberta.encoder.conv.conv", d);
                    let mut y = ops::convolution(t, &x, width as u128, map);
                    if last {
                        [y] = self.wanted(t, [y]);
                    }
                    let y = ops::dropout(t, y, p);
                    let y = ops::activation(t, &y);
                    let y = ops::add(t, h, y);
                    h = self.layer_norm(t, "deberta.encoder.conv.LayerNorm", &y);
                }
                h
            });
        }
        h
    }

    /// The table of relative positions.
    fn relative(&self, t: &mut Tape, c: &DebertaV2Config, positions: RelativePositions) -> Var {
        let trains = self.adapted.trains("deberta.encoder.rel_embeddings.weight");
        let table = t.weight(2 * positions.span() as u128, c.hidden_size as u128, trains);
        if c.norm_rel_ebd { self.layer_norm(t, "deberta.encoder.LayerNorm", &table) } else { table }
    }
}
