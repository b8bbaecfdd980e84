//! PEFT's types of adapters and their options beside what the goldens of `peft` have: what is refused, by its key or the
//! tensor's name, and what is another spelling of the same.

use std::{collections::BTreeMap, fs, path::Path};

use lora_core::{
    Tensor,
    peft::{Adapted, Lora, LoraConfig, METHODS, Modules, Options, find, parameters},
};
use lora_kernels::DType;
use lora_model::{Model, Texts, adapter, checkpoint::TensorFile, convert, load};
use serde_json::{Value, from_slice, json};

use crate::common::{CPU, copied, edit, goldens, refused, rename, set};

/// A copy of an adapter of PEFT's, and its base.
fn case(model: &str, variant: &str) -> (tempfile::TempDir, Box<dyn Model>) {
    let base = load(&goldens().join(model).join("model"), &CPU).unwrap();
    (copied(&goldens().join("peft").join(model).join(variant)), base)
}

/// The logits of an adapter in a folder.
fn logits(dir: &Path, model: &dyn Model) -> Vec<f32> {
    let adapted = adapter::attach(dir, model, &CPU).unwrap();
    let batch = model.batch(&adapted, &Texts::new(&[5, 17, 9, 3, 42], &[5])).unwrap();
    model.logits(&adapted, &batch).unwrap().to_vec().unwrap()
}

#[test]
fn what_is_not_done_is_refused_by_its_key() {
    for (model, variant, key, value, wanted) in [
        ("gpt2", "vera", "bias", json!("all"), &["all"][..]),
        ("gpt2", "vera", "exclude_modules", json!(["c_fc"]), &["c_fc"]),
        ("gpt2", "vera", "r", Value::Null, &["missing"]),
        ("gpt2", "vera", "vera_dropout", json!(1.5), &["1.5", "[0, 1)"]),
        ("gpt2", "vera", "d_initial", json!(0), &["0", "nothing would ever train"]),
        ("gpt2", "adalora", "bias", json!("lora_only"), &["lora_only"]),
        ("gpt2", "adalora", "use_dora", json!(true), &["true"]),
        ("gpt2", "adalora", "alpha_pattern", json!({"c_attn": 2}), &["c_attn"]),
        ("gpt2", "adalora", "deltaT", json!(0), &["0", "from cut to cut"]),
        ("gpt2", "adalora", "beta1", json!(1.0), &["1", "between 0 and 1"]),
        ("gpt2", "adalora", "beta2", json!(0.0), &["0", "between 0 and 1"]),
        ("gpt2", "adalora", "rank_pattern", json!({"h.0.mlp.lora_E": [true, false, true, true]}), &["h.0.mlp"]),
        ("llama3", "lokr", "use_something_new", json!(true), &["not supported with this type"]),
        ("llama3", "lokr", "r", Value::Null, &["missing"]),
        ("gpt2", "ia3", "layers_to_transform", json!([0]), &["not supported with this type"]),
        ("gpt2", "ia3", "something_new", json!(3), &["not supported with this type"]),
        ("gpt2", "ln_tuning", "r", json!(4), &["not supported with this type"]),
        ("gpt2", "prompt", "task_type", json!("SEQ_CLS"), &["SEQ_CLS", "CAUSAL_LM"]),
        ("gpt2", "prompt", "num_transformer_submodules", json!(2), &["2"]),
        ("gpt2", "prefix", "num_transformer_submodules", json!(2), &["2"]),
        ("gpt2", "prompt", "prefix_projection", json!(true), &["not supported with this type"]),
        ("gpt2", "prefix", "num_virtual_tokens", Value::Null, &["missing"]),
        ("gpt2", "prefix", "num_virtual_tokens", json!(99), &["99", "positions"]),
        ("gpt2", "embedding", "ensure_weight_tying", json!(true), &["output head too"]),
        ("gpt2", "embedding", "use_dora", json!(true), &["transformer.wte", "an embedding"]),
        ("gpt2", "default", "trainable_token_indices", json!([1]), &["rows of the embedding"]),
        ("gpt2", "default", "lora_bias", json!(true), &["a bias of the adapter's own"]),
        ("gpt2", "default", "layer_replication", json!([[0, 1]]), &["layers that are repeated"]),
    ] {
        let (dir, model) = case(model, variant);
        set(dir.path(), key, value);
        println!("{variant}: {key}");
        let place = format!("adapter_config.json: key {key:?}");
        refused(dir.path(), &*model, &[&[place.as_str()], wanted].concat());
    }
}

/// A configuration that asks for another rank than the tensors have is refused before anything is made as large as it says.
#[test]
fn ranks_are_those_of_the_tensors() {
    for (variant, key, value, wanted) in [
        ("vera", "r", json!(1u64 << 40), &["vera_lambda_d", "[5]", "rank is 5"][..]),
        ("adalora", "init_r", json!(1 << 20), &["c_attn.lora_A", "[4, 32]", "rank is 4"]),
        ("default", "r", json!(1 << 20), &["c_attn.lora_A.weight", "[2, 32]", "rank is 2"]),
    ] {
        let (dir, model) = case("gpt2", variant);
        set(dir.path(), key, value.clone());
        let value = value.to_string();
        refused(dir.path(), &*model, &[&["adapter_model.safetensors", value.as_str()], wanted].concat());
    }
}

#[test]
fn tensors_that_do_not_belong_are_refused_by_name() {
    const GPT2: &str = "base_model.model.transformer.h";
    let strange = "not a tensor of this kind of adapter";
    // What is renamed lies under another name of the first layer's afterwards, and so do two of one parameter.
    for (model, variant, from, to, wanted) in [
        ("gpt2", "ia3", "1.attn.c_attn.ia3_l", "0.attn.c_attn.ia3_l.default", "are the same parameter"),
        ("gpt2", "ia3", "1.attn.c_attn.ia3_l", "1.attn.c_attn.lora_A.weight", strange),
        ("gpt2", "vera", "1.attn.c_attn.vera_lambda_b", "0.attn.c_attn.vera_lambda_b.x", "are the same parameter"),
        ("gpt2", "adalora", "1.attn.c_attn.lora_E", "0.attn.c_attn.lora_E.default", "are the same parameter"),
        (
            "gpt2",
            "ln_tuning",
            "1.ln_1.ln_tuning_layers.bias",
            "0.ln_1.ln_tuning_layers.a.bias",
            "are the same parameter",
        ),
        ("gpt2", "ln_tuning", "1.ln_1.ln_tuning_layers.bias", "1.ln_1.bias", strange),
        ("gpt2", "bias_lora_only", "1.mlp.c_fc.base_layer.bias", "0.mlp.c_fc.bias", "are the same parameter"),
        (
            "gpt2",
            "dora",
            "1.mlp.c_fc.lora_magnitude_vector",
            "0.mlp.c_fc.lora_magnitude_vector.x",
            "are the same parameter",
        ),
        ("gpt2", "default", "1.attn.c_attn.lora_B.weight", "0.attn.c_attn.lora_B.x.weight", "are the same parameter"),
        ("llama3", "lokr", "1.self_attn.q_proj.lokr_w1", "0.self_attn.q_proj.lokr_w1.x", "are the same parameter"),
    ] {
        let (dir, base) = case(model, variant);
        let prefix = if model == "gpt2" { GPT2 } else { "base_model.model.model.layers" };
        let [from, to] = [from, to].map(|name| &*format!("{prefix}.{name}").leak());
        edit(dir.path(), rename(from, to));
        println!("{variant}: {to}");
        refused(dir.path(), &*base, &["adapter_model.safetensors", to, wanted]);
    }
    let (dir, base) = case("gpt2", "prompt");
    edit(dir.path(), rename("prompt_embeddings", "base_model.prompt_embeddings"));
    refused(dir.path(), &*base, &["base_model.prompt_embeddings", strange]);
}

/// Beside an adapter of the embeddings PEFT saves their weight, and puts it over the base's.
#[test]
fn weights_of_the_base_that_a_file_repeats_have_to_be_the_bases() {
    let (dir, base) = case("llama3", "embedding");
    const NAME: &str = "base_model.model.model.embed_tokens.base_layer.weight";
    edit(dir.path(), |header, data| {
        let at = header[NAME]["data_offsets"][0].as_u64().unwrap() as usize;
        data[at..at + 4].copy_from_slice(&7f32.to_le_bytes());
    });
    refused(dir.path(), &*base, &["adapter_model.safetensors", "repeats", "model.embed_tokens.weight"]);
}

/// PEFT adds the weights of embeddings and the output head to any adapter where it is asked to, and where it thinks that the
/// vocabulary was resized: they have to be the base's, which of a head without a matrix of its own has the embeddings'.
#[test]
fn embeddings_that_a_file_repeats_have_to_be_the_bases() {
    for (model, variant, module, table) in [
        ("gpt2", "default", "transformer.wte", "transformer.wte.weight"),
        ("gpt2", "ia3", "lm_head", "transformer.wte.weight"),
        ("llama3", "vera", "model.embed_tokens", "model.embed_tokens.weight"),
        ("bert_classification", "lokr", "bert.embeddings.word_embeddings", "bert.embeddings.word_embeddings.weight"),
    ] {
        let (dir, base) = case(model, variant);
        let before = logits(dir.path(), &*base);
        let file = TensorFile::open(&dir.path().join(adapter::WEIGHTS_FILE)).unwrap();
        let tensor = |name: &str| file.tensor(name, &file.info(name).unwrap().shape, &CPU).unwrap();
        let mut tensors: BTreeMap<String, Tensor> = file.names().map(|n| (n.to_owned(), tensor(n))).collect();
        let own = base.tensor(table).unwrap();
        let name = format!("{}{module}.weight", adapter::PREFIX);
        tensors.insert(name.clone(), own.clone());
        fs::remove_file(dir.path().join(adapter::WEIGHTS_FILE)).unwrap();
        convert::write_state_dict(&dir.path().join("adapter_model.bin"), &tensors).unwrap();
        assert!(logits(dir.path(), &*base) == before, "{model} {variant}");

        let mut values = own.to_vec::<f32>().unwrap();
        values[3] += 0.5;
        tensors.insert(name, Tensor::from_slice(&CPU, own.shape(), &values).unwrap());
        convert::write_state_dict(&dir.path().join("adapter_model.bin"), &tensors).unwrap();
        refused(dir.path(), &*base, &["adapter_model.bin", "repeats", module, "other values"]);
    }
    // An adapter of a head that has no matrix of its own.
    let (dir, base) = case("gpt2", "ia3");
    edit(
        dir.path(),
        rename("base_model.model.transformer.h.0.attn.c_attn.ia3_l", "base_model.model.lm_head.base_layer.weight"),
    );
    refused(dir.path(), &*base, &["adapter_config.json", "target_modules", "lm_head", "output heads"]);
}

/// Another spelling of the same adapter computes the same.
#[test]
fn what_means_the_same_is_the_same() {
    type Change = fn(&Path);
    let rows: [(&str, &str, Change); 8] = [
        ("gpt2", "prefix", |dir| set(dir, "prefix_projection", json!(true))),
        ("gpt2", "exclude", |dir| set(dir, "layers_pattern", json!([]))),
        ("gpt2", "default", |dir| set(dir, "exclude_modules", json!([]))),
        ("gpt2", "ia3", |dir| set(dir, "exclude_modules", json!([]))),
        ("llama3", "lokr", |dir| {
            set(dir, "exclude_modules", json!([]));
            set(dir, "rank_dropout", json!(0.1));
            set(dir, "module_dropout", json!(0.2));
        }),
        ("gpt2", "dora", |dir| {
            const NAMES: [&str; 2] = ["h.0.attn.c_attn", "h.1.attn.c_attn"];
            for (module, end) in NAMES.iter().zip([".default", ".default.weight"]) {
                let name = format!("base_model.model.transformer.{module}.lora_magnitude_vector");
                edit(dir, rename(name.clone().leak(), format!("{name}{end}").leak()));
            }
        }),
        // PEFT's older format.
        ("gpt2", "default", pickled),
        ("gpt2", "prompt", pickled),
    ];
    for (model, variant, change) in rows {
        let (dir, base) = case(model, variant);
        let before = logits(dir.path(), &*base);
        change(dir.path());
        assert!(logits(dir.path(), &*base) == before, "{model} {variant}");
    }
}

/// `adapter_model.bin` in the place of `adapter_model.safetensors`.
fn pickled(dir: &Path) {
    let tensors = adapter::load(dir).unwrap().tensors;
    let stored = tensors.into_iter().map(|(name, t)| match name.as_str() {
        "prompt_embeddings" => (name, t),
        _ => (format!("{}{name}", adapter::PREFIX), t),
    });
    convert::write_state_dict(&dir.join("adapter_model.bin"), &stored.collect()).unwrap();
    fs::remove_file(dir.join(adapter::WEIGHTS_FILE)).unwrap();
}

/// `layers_to_transform` leaves alone what a target names from its beginning, a part of it too.
#[test]
fn whole_names_are_adapted_in_any_layer() {
    let (_, base) = case("gpt2", "default");
    for (first, end) in [("transformer.h.0.attn.c_attn", "c_attn"), ("transformer.h.0.attn.c_attn.v", "c_attn.v")] {
        let lora = Lora::new(LoraConfig {
            targets: [first, "c_fc"].into_iter().collect(),
            layers_to_transform: vec![1],
            ..LoraConfig::default()
        });
        let names = parameters(&lora.unwrap(), base.outline()).unwrap().into_iter().map(|(name, _)| name);
        let adapted: Vec<String> = names.filter(|name| name.ends_with("lora_A.weight")).collect();
        let wanted = [format!("h.0.attn.{end}"), "h.1.mlp.c_fc".into()];
        assert_eq!(adapted, wanted.map(|module| format!("transformer.{module}.lora_A.weight")));
    }
}

/// Targets that are named without feed-forward modules have PEFT's for the architecture among them, by the ends of names;
/// what is written PEFT reads as that, which takes of a list only the targets' own names.
#[test]
fn feedforward_modules_that_nobody_named_are_pefts() {
    const REGEX: &str = r".*\.(k|down)_proj";
    for (model, targets, feedforward, written) in [
        ("gpt2", "c_attn", "", json!([])),
        ("gpt2", "c_attn,mlp.c_proj", "mlp.c_proj", json!(["mlp.c_proj"])),
        ("gpt2", "c_attn,c_proj", "mlp.c_proj", json!(r".*(mlp\.c_proj)")),
        ("llama3", "k_proj,down_proj", "down_proj", json!(["down_proj"])),
        ("llama3", "k_proj,up_proj", "", json!([])),
        ("llama3", REGEX, "down_proj", json!(["down_proj"])),
    ] {
        let (_, base) = case(model, "default");
        let options = Options { targets: Modules::of_line(targets), ..Options::default() };
        let method = (find("ia3").unwrap().build)(&options).unwrap();
        let adapted = Adapted::new(&*method, &*base, &CPU, DType::F32, 0).unwrap();
        let of_inputs = |adapted: &Adapted| -> Vec<String> {
            let ids = adapted.params.ids().filter(|id| adapted.params.shape(*id)[0] == 1);
            ids.map(|id| adapted.params.name(id).trim_end_matches(".ia3_l").to_owned()).collect()
        };
        let found = of_inputs(&adapted);
        assert_eq!(found.len(), if feedforward.is_empty() { 0 } else { 2 }, "{model} {targets}: {found:?}");
        assert!(found.iter().all(|name| name.ends_with(feedforward)), "{model} {targets}: {found:?}");

        let dir = tempfile::tempdir().unwrap();
        adapter::save(dir.path(), "ia3", &options, &adapted, &*base, None).unwrap();
        let config: Value = from_slice(&fs::read(dir.path().join(adapter::CONFIG_FILE)).unwrap()).unwrap();
        assert_eq!(config["feedforward_modules"], written, "{model} {targets}");
        assert_eq!(of_inputs(&adapter::attach(dir.path(), &*base, &CPU).unwrap()), found, "{model} {targets}");
    }
    // An empty list is PEFT's word for none, whatever the architecture has.
    let (dir, base) = case("gpt2", "ia3");
    set(dir.path(), "feedforward_modules", json!([]));
    refused(dir.path(), &*base, &["mlp.c_proj.ia3_l", "shape"]);
}

/// What a type cannot be, or does not fit, is told by the key that says the type.
#[test]
fn a_type_that_does_not_fit_is_told_by_its_key() {
    let key = "adapter_config.json: key \"peft_type\"";
    let (dir, _) = case("gpt2", "ia3");
    let e = adapter::load(dir.path()).unwrap().updates().unwrap_err().to_string();
    assert!(e.contains(key) && e.contains("method ia3"), "{e}");
    let (dir, _) = case("gpt2", "prefix");
    let deberta = load(&goldens().join("deberta_v2_masked_lm/model"), &CPU).unwrap();
    refused(dir.path(), &*deberta, &[key, "deberta-v2"]);
}

/// What only PEFT's format holds, in a configuration of our own.
#[test]
fn methods_of_pefts_format_are_refused_in_ours() {
    let (dir, base) = case("gpt2", "default");
    for row in METHODS.iter().filter(|row| !row.whole_model) {
        let general =
            json!({"method": row.name, "architecture": "gpt2", "task_type": null, "base_model_name_or_path": null});
        let mut config = general.as_object().unwrap().clone();
        config.extend(row.options.iter().map(|option| (option.replace('-', "_"), Value::Null)));
        fs::write(dir.path().join(adapter::CONFIG_FILE), Value::from(config).to_string()).unwrap();
        let wanted: &[&str] = match row.name {
            "lora" | "ia3" | "ln-tuning" | "vera" | "adalora" => &["key \"method\"", row.name, "peft_type"],
            _ => &[],
        };
        refused(dir.path(), &*base, wanted);
    }
}
