//! Single steps of a trainer.

use std::path::Path;

use lora_core::peft::{Adapted, Layers};
use lora_kernels::Device;
use lora_model::load;
use lora_train::{
    TrainConfig, Trainer,
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
