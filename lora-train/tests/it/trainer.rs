//! Single steps of a trainer.

use std::path::Path;

use lora_core::peft::{Adapted, Layers};
use lora_kernels::Device;
use lora_model::load;
use lora_train::{
    Error, TrainConfig, Trainer,
    checkpoint::{self, Fingerprint, Spent},
    data::{Dataset, Goal, Sequence},
};

/// What the loss does not reach is told after the first step, and only then. AdaLoRA's penalty reaches A and B of every map.
#[test]
fn parameters_without_a_gradient_in_the_first_step_are_named() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lora-model/tests/golden/gpt2/model");
    let model = load(&golden, &Device::Cpu).unwrap();
    let sequence = Sequence { tokens: vec![5, 17, 9, 3, 42], second_from: 5, goal: Goal::After(1) };
    let data = Dataset::new(vec![sequence; 2]);
    for (method, ends) in [
        (
            "adapter-p",
            &["mlp.adapter_down.weight", "mlp.adapter_down.bias", "mlp.adapter_up.weight", "mlp.adapter_up.bias"][..],
        ),
        ("lora", &["attn.c_attn.lora_A.weight", "attn.c_attn.lora_B.weight"]),
        ("adalora", &["attn.c_attn.lora_E"]),
    ] {
        let config = TrainConfig { method: method.into(), steps: Some(2), batch_size: 2, ..TrainConfig::default() };
        let begun = || {
            let method = config.method_options().unwrap();
            Adapted::new(&*method, &*model, &Device::Cpu, model.dtype(), 0).unwrap()
        };
        let mut whole = Trainer::new(&*model, begun(), &config, 2).unwrap();
        whole.step(&data).unwrap();
        assert!(whole.unreached().is_empty(), "{method}: {:?}", whole.unreached());

        let mut adapted = begun();
        adapted.drop_layers(&Layers::First(1), model.outline()).unwrap();
        let mut trainer = Trainer::new(&*model, adapted, &config, 2).unwrap();
        trainer.step(&data).unwrap();
        let mut named = trainer.unreached().to_vec();
        named.sort();
        let mut wanted: Vec<String> = ends.iter().map(|end| format!("transformer.h.0.{end}")).collect();
        wanted.sort();
        assert_eq!(named, wanted, "{method}");
        trainer.step(&data).unwrap();
        assert!(trainer.unreached().is_empty(), "{method}");
    }
}

#[test]
fn a_trainer_goes_on_from_a_checkpoint_of_its_own_seed_data_and_base() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lora-model/tests/golden/gpt2/model");
    let model = load(&golden, &Device::Cpu).unwrap();
    let sequence = |n| Sequence { tokens: vec![5, 17, n, 3, 42], second_from: 5, goal: Goal::After(1) };
    let data = Dataset::new((0..6).map(sequence).collect());
    let config = |seed| TrainConfig { steps: Some(4), batch_size: 2, seed, lr: 1e-2, ..TrainConfig::default() };
    let (own, other) = (config(0), config(1));
    let trainer = |config| {
        let method = own.method_options().unwrap();
        let adapted = Adapted::new(&*method, &*model, &Device::Cpu, model.dtype(), 0).unwrap();
        Trainer::new(&*model, adapted, config, data.sequences.len()).unwrap()
    };
    let (inputs, out) = (Fingerprint::of(&data, &*model).unwrap(), tempfile::tempdir().unwrap());
    let mut first = trainer(&own);
    first.step(&data).unwrap();
    let saved = checkpoint::save(out.path(), &first, &inputs, Spent::default(), |_| Ok(())).unwrap();
    let second = first.step(&data).unwrap();
    let mut again = trainer(&own);
    checkpoint::load(&saved, &mut again, &inputs).unwrap();
    assert_eq!(again.steps_done(), 1);
    assert_eq!(again.step(&data).unwrap(), second);
    let refused = |config, inputs: &Fingerprint| match checkpoint::load(&saved, &mut trainer(config), inputs) {
        Err(Error::Checkpoint { problem, .. }) => problem,
        other => panic!("{other:?}"),
    };
    assert!(refused(&other, &inputs).contains("of a run with seed 0, not 1"));
    let less = Dataset::new(data.sequences[1..].to_vec());
    assert!(refused(&own, &Fingerprint::of(&less, &*model).unwrap()).contains("the data has changed"));
}
