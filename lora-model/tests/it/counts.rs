//! How many scalars each method trains on the LoRA paper's models (Hu et al. 2021), from their outlines: no weight is made,
//! least of all 175 billion. Where that paper prints another number, the row says so.

use std::collections::BTreeMap;

use lora_core::{
    Tensor,
    peft::{Frozen, Layers, Options, Outline, Part, SiteKind, find, trainable},
};
use lora_kernels::{DType, Device};
use lora_model::{
    Task,
    config::{Gpt2Config, RobertaConfig},
};

/// GPT-3 as a GPT-2 of its size: 96 layers of 12,288 columns (Brown et al. 2020, table 2.1).
fn gpt3() -> Outline {
    Gpt2Config { n_layer: 96, n_embd: 12_288, n_head: 96, n_positions: 2048, ..Gpt2Config::default() }.outline()
}

fn roberta(config: RobertaConfig) -> Outline {
    config.outline(Task::Classification { labels: 2 })
}

/// What the method itself trains: a classifier's head, which trains with every method, is left out as the paper does.
fn own(method: &str, outline: &Outline, o: &Options) -> usize {
    let head = outline.tensors.iter().filter(|t| outline.is_saved_module(&t.name));
    let head: usize = head.map(|t| t.shape.iter().product::<usize>()).sum();
    let method = (find(method).unwrap().build)(o).unwrap();
    trainable(method.as_ref(), outline).unwrap() - head
}

/// A method, the model, the options that differ from the defaults, the count.
type Row<'a> = (&'a str, &'a Outline, Options, usize);

fn plain() -> Options {
    Options::default()
}

fn bottleneck(bottleneck: usize) -> Options {
    Options { bottleneck, ..plain() }
}

/// LoRA of queries and values, as in the paper's tables.
fn lora(rank: usize, targets: [&str; 2]) -> Options {
    Options { rank, targets: targets.into_iter().collect(), ..plain() }
}

fn prefix(prefix: usize, infix: usize) -> Options {
    Options { prefix, infix, ..plain() }
}

#[test]
fn methods_train_as_many_scalars_as_the_paper_counts() {
    let [medium, large] = [Gpt2Config::medium(), Gpt2Config::large()].map(|c| c.outline());
    let [base, big] = [RobertaConfig::base(), RobertaConfig::large()].map(roberta);
    let gpt3 = gpt3();
    const FUSED: [&str; 2] = ["c_attn.q", "c_attn.v"];
    const SEPARATE: [&str; 2] = ["query", "value"];
    let table: [Row; 25] = [
        // Table 3, which prints 354.92M for the first.
        ("full", &medium, plain(), 354_823_168),
        ("full", &large, plain(), 774_030_080),
        ("top2", &medium, plain(), 25_192_448),
        ("adapter-l", &medium, bottleneck(6), 368_784),
        ("adapter-l", &medium, bottleneck(224), 11_089_152),
        ("adapter-l", &large, bottleneck(8), 875_808),
        ("adapter-l", &large, bottleneck(248), 23_002_848),
        // Printed as 0.35M and 0.77M; 2·L̂·d·r with L̂ = 48 and 72 is these.
        ("lora", &medium, lora(4, FUSED), 393_216),
        ("lora", &large, lora(4, FUSED), 737_280),
        // The paper counts one activation of each layer, L·d·l: keys and values are twice as many.
        ("pre-layer", &medium, prefix(14, 0), 2 * 24 * 1024 * 14),
        // Table 2.
        ("lora", &base, lora(8, SEPARATE), 294_912),
        ("lora", &big, lora(8, SEPARATE), 786_432),
        ("bitfit", &base, plain(), 102_144),
        ("adapter-p", &big, bottleneck(16), 811_392),
        ("adapter-h", &big, bottleneck(8), 835_968),
        // With the base's 49 LayerNorms, as Houlsby et al. 2019 train them; the LoRA paper's counts leave them out.
        ("adapter-h", &big, Options { train_norms: true, ..bottleneck(8) }, 835_968 + 49 * 2 * 1024),
        // What is printed are the adapters of all twelve layers; five dropped ones, the default, leave seven.
        ("adapter-d", &base, Options { drop_layers: Some(Layers::NONE), ..bottleneck(48) }, 894_528),
        ("adapter-d", &base, bottleneck(48), 894_528 / 12 * 7),
        // GPT-3, printed as 4.7M and 37.7M, 7.1M and 40.1M, 3.2M.
        ("lora", &gpt3, lora(1, FUSED), 4_718_592),
        ("lora", &gpt3, lora(8, FUSED), 37_748_736),
        ("adapter-h", &gpt3, bottleneck(1), 7_078_080),
        ("adapter-h", &gpt3, bottleneck(8), 40_109_568),
        ("pre-embed", &gpt3, prefix(256, 8), 3_244_032),
        ("lora+pre-embed", &gpt3, Options { prefix: 256, infix: 8, ..lora(8, FUSED) }, 37_748_736 + 3_244_032),
        (
            "lora+pre-layer",
            &gpt3,
            Options { prefix: 8, infix: 4, ..lora(64, FUSED) },
            64 * 4_718_592 + 2 * 96 * 12_288 * 12,
        ),
    ];
    for (method, outline, o, count) in &table {
        let got = own(method, outline, o);
        assert_eq!(got, *count, "{method} on {} of {} layers with {o:?}", outline.architecture, outline.layers);
    }
}

#[test]
fn a_fusion_trains_its_attention_alone() {
    let outline = Gpt2Config::small().outline();
    let zeros = |shape: &[usize]| Tensor::zeros(&Device::Cpu, DType::F32, shape).unwrap();
    let mut tensors = BTreeMap::new();
    for site in &outline.sites {
        if let SiteKind::Sublayer { part: Part::Mlp, width } = site.kind {
            for (name, shape) in [
                ("adapter_down.weight", &[1, width][..]),
                ("adapter_down.bias", &[1]),
                ("adapter_up.weight", &[width, 1]),
                ("adapter_up.bias", &[width]),
            ] {
                tensors.insert(format!("{}.{name}", site.name), zeros(shape));
            }
        }
    }
    let adapter = |name: &str| Frozen { name: name.into(), bottleneck: 1, tensors: tensors.clone() };
    let o = Options { fuse: vec![adapter("a"), adapter("b")], ..plain() };
    assert_eq!(own("fusion", &outline, &o), 12 * (3 * 768 * 768 + 768));
}
