//! Training on every GPU at hand (with their features the emulated device and the first CUDA device) against the CPU.

use std::{fs, path::Path};

use lora_core::{Tensor, peft::Adapted};
use lora_kernels::{DType, Device, cuda::Gpu};
use lora_model::{Gpt2, Model, adapter, config::Gpt2Config, load_as, tokenizer::Tokenizer};
use lora_train::{
    Evaluation, Observer, Step, TrainConfig, Trainer, checkpoint,
    data::{Dataset, Sequence},
    train,
};

const CPU: Device = Device::Cpu;
const VOCAB: u32 = 101;

/// A model of 2 layers; a folder, so that each device can load it.
fn base(dir: &Path) {
    let config = Gpt2Config {
        vocab_size: VOCAB as usize,
        n_positions: 40,
        n_embd: 24,
        n_layer: 2,
        n_head: 2,
        ..Gpt2Config::small()
    };
    Gpt2::init(config, dir, 3, &CPU).unwrap().save(dir, &Default::default()).unwrap();
}

fn loaded(dir: &Path, device: &Device, dtype: DType) -> Box<dyn Model> {
    let mut model = load_as(dir, device, dtype).unwrap();
    model.set_base_dropout(0.1);
    model
}

fn data(lengths: &[usize]) -> Dataset {
    let sequence = |(i, &n): (usize, &usize)| {
        let tokens = (0..n as u32).map(|j| (j * j * 7 + i as u32 * 13 + j) % VOCAB).collect();
        Sequence::after(tokens, 1 + i % (n - 1))
    };
    Dataset::new(lengths.iter().enumerate().map(sequence).collect())
}

fn varied() -> Dataset {
    data(&[5, 17, 9, 2, 33, 8, 12, 3, 21, 6])
}

fn config(method: &str) -> TrainConfig {
    TrainConfig {
        method: method.into(),
        rank: 3,
        dropout: 0.1,
        targets: ["c_attn.q", "c_attn.v", "c_fc", "attn.c_proj"].into_iter().collect(),
        steps: Some(6),
        batch_size: 4,
        grad_accum: 2,
        lr: 2e-3,
        warmup: 2,
        clip: 0.3,
        no_decay_vectors: method == "full",
        label_smoothing: 0.1,
        ..TrainConfig::default()
    }
}

fn trainer<'a>(model: &'a dyn Model, config: &'a TrainConfig, dtype: DType, data: &Dataset) -> Trainer<'a> {
    let method = config.method_options().unwrap();
    let adapted = Adapted::new(&*method, model, &model.device(), dtype, config.seed).unwrap();
    Trainer::new(model, adapted, config, data.sequences.len()).unwrap()
}

/// All steps of a run, and where they end.
fn trained(model: &dyn Model, config: &TrainConfig, dtype: DType, data: &Dataset) -> (Vec<Step>, Tensor, Evaluation) {
    let mut t = trainer(model, config, dtype, data);
    let steps = (0..t.total_steps()).map(|_| t.step(data).unwrap()).collect();
    (steps, t.adapted.params.flat(), t.evaluate(data).unwrap())
}

fn relative(x: &[f64], reference: &[f64]) -> f64 {
    assert_eq!(x.len(), reference.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut x.iter().zip(reference).map(|(x, r)| x - r)) / norm(&mut reference.iter().copied())
}

#[track_caller]
fn within(what: &str, error: f64, most: f64) {
    // Not `error > most`: a NaN is not within anything.
    assert!(error <= most, "{what}: {error:.2e} is above {most:.0e}");
    println!("{what}: {error:.2e}");
}

#[test]
fn training_agrees_with_the_cpu() {
    let dir = tempfile::tempdir().unwrap();
    base(dir.path());
    let (data, on_cpu) = (varied(), loaded(dir.path(), &CPU, DType::F32));
    for method in ["lora", "full"] {
        let config = config(method);
        let (steps, params, evaluation) = trained(&*on_cpu, &config, DType::F32, &data);
        let clipped = steps.iter().filter(|s| s.grad_norm > config.clip).count();
        assert!(clipped > 0 && (method == "full" || clipped < steps.len()), "{clipped} steps are clipped");
        let of = |steps: &[Step], f: fn(&Step) -> f64| steps.iter().map(f).collect::<Vec<f64>>();
        for device in crate::common::gpus().into_iter().map(Device::Cuda) {
            for (dtype, most) in [(DType::F32, 1e-5), (DType::Bf16, 1e-2)] {
                let label = |what: &str| format!("{what} of {method} on {device} in {dtype:?}");
                // Base weights that train are kept in f32 and computed with in `dtype`.
                let model = loaded(dir.path(), &device, if method == "full" { DType::F32 } else { dtype });
                let (got, p, e) = trained(&*model, &config, dtype, &data);
                for (i, (a, b)) in got.iter().zip(&steps).enumerate() {
                    within(&label(&format!("loss {i}")), (a.loss - b.loss).abs() / b.loss, most);
                    assert_eq!((a.step, a.tokens, a.lr), (b.step, b.tokens, b.lr));
                }
                within(&label("held-out loss"), (e.loss - evaluation.loss).abs() / evaluation.loss, most);
                let norms = |s: &[Step]| of(s, |s| s.grad_norm);
                // In bf16 gradients have bf16's digits; see the golden test of the model.
                let norms_within = if dtype == DType::F32 { most } else { 2e-2 };
                within(&label("norms"), relative(&norms(&got), &norms(&steps)), norms_within);
                if dtype == DType::F32 {
                    within(&label("parameters"), relative(&p.to_f64().unwrap(), &params.to_f64().unwrap()), most);
                }
            }
        }
    }
}

/// What is asked of the device is waited for once a step, and nothing is uploaded for each layer.
#[test]
fn a_step_reads_back_its_loss_and_norm_alone() {
    let dir = tempfile::tempdir().unwrap();
    base(dir.path());
    let data = varied();
    for gpu in crate::common::gpus() {
        for method in ["lora", "full"] {
            let (config, device) = (config(method), Device::Cuda(gpu.clone()));
            let model = loaded(dir.path(), &device, DType::F32);
            let mut t = trainer(&*model, &config, DType::F32, &data);
            let counts = || (gpu.reads(), gpu.writes());
            for i in 0..t.total_steps() {
                let before = counts();
                t.step(&data).unwrap();
                let (reads, writes) = counts();
                assert_eq!(reads - before.0, 2, "{method}, step {i}: loss and norm");
                // Two micro-batches: tokens, positions, target rows, target ids, and the tiles of their attention.
                assert!(writes - before.1 <= 2 * 5, "{method}, step {i}: {} uploads", writes - before.1);
            }
            let before = gpu.reads();
            t.evaluate(&data).unwrap();
            assert_eq!(gpu.reads() - before, 1, "{method}: an evaluation of three batches");
        }
    }
}

/// Where shapes repeat, passes are recorded and replayed: what they compute stays the same, for new numbers each time and
/// parameters that have moved on, and another shape in between is no harm.
#[test]
fn repeated_shapes_are_replayed() {
    let dir = tempfile::tempdir().unwrap();
    base(dir.path());
    // Five targets each, whatever the length: the loss's scale is part of the shape.
    let sequences = |length: fn(u32) -> u32| {
        let sequence = |i: u32| {
            let n = length(i);
            let tokens = (0..n).map(|j| (j * j * 7 + i * 5) % VOCAB).collect();
            Sequence::after(tokens, n as usize - 5)
        };
        Dataset::new((0..48).map(sequence).collect())
    };
    let shapes = [
        // The first step runs as it is, the second records, two replay; the fifth has another shape, the sixth runs as it
        // is, the seventh records, five replay. Two passes each.
        (sequences(|i| if (16..20).contains(&i) { 7 } else { 9 }), 14),
        // The first pass of a step is of another shape each time, the second always of the same: the first step runs as it
        // is, the second records, ten replay.
        (sequences(|i| if i % 4 < 2 && i / 4 % 2 == 0 { 7 } else { 9 }), 10),
    ];
    let cases = [
        ("lora", DType::F32, 1e-5),
        ("lora", DType::Bf16, 1e-2),
        ("full", DType::F32, 1e-5),
        ("full", DType::Bf16, 1e-2),
    ];
    for gpu in crate::common::gpus() {
        for ((data, expected), (method, dtype, close)) in shapes.iter().flat_map(|s| cases.map(|c| (s, c))) {
            let config = TrainConfig {
                base_dropout: Some(0.0),
                dropout: 0.0,
                no_shuffle: true,
                steps: Some(12),
                // Far enough each step that values of an earlier one would show in bf16.
                lr: 2e-2,
                clip: 0.0,
                ..config(method)
            };
            let run = |device: &Device, dtype: DType| {
                let mut model = loaded(dir.path(), device, if method == "full" { DType::F32 } else { dtype });
                model.set_base_dropout(0.0);
                let mut t = trainer(&*model, &config, dtype, data);
                let losses: Vec<f64> = (0..12).map(|_| t.step(data).unwrap().loss).collect();
                (losses, t.replayed())
            };
            let (want, none) = run(&CPU, DType::F32);
            let (got, replayed) = run(&Device::Cuda(gpu.clone()), dtype);
            assert_eq!((none, replayed), (0, *expected), "{method} {dtype:?} on {gpu}");
            for (step, (g, w)) in got.iter().zip(&want).enumerate() {
                assert!((g - w).abs() <= close * w, "{method} {dtype:?} on {gpu}, step {step}: {g}, expected {w}");
            }
            println!(
                "{method} {dtype:?} on {gpu}: losses {:.3} to {:.3}, {replayed} passes replayed",
                want[0], want[11]
            );
        }
    }
}

#[test]
fn steady_training_takes_no_memory_from_the_device() {
    let dir = tempfile::tempdir().unwrap();
    base(dir.path());
    // Steps of one shape, with as many targets in each.
    let sequence = |i: u32| Sequence::after((0..9).map(|j| (j * j * 7 + i) % VOCAB).collect(), 4);
    let data = Dataset::new((0..8).map(sequence).collect());
    let pooled = [
        #[cfg(feature = "emulator")]
        Gpu::emulated_pooled(),
        Gpu::open(0),
    ];
    for gpu in pooled.into_iter().filter_map(|gpu| gpu.inspect_err(|e| println!("skipped: no CUDA device ({e})")).ok())
    {
        for (method, dtype) in [("lora", DType::F32), ("lora", DType::Bf16), ("full", DType::Bf16)] {
            let (config, device) = (config(method), Device::Cuda(gpu.clone()));
            let model = loaded(dir.path(), &device, if method == "full" { DType::F32 } else { dtype });
            let mut t = trainer(&*model, &config, dtype, &data);
            let mut misses = Vec::new();
            while t.steps_done() < t.total_steps() {
                t.step(&data).unwrap();
                misses.push(gpu.pool_stats().misses);
            }
            assert!(misses[0] > 0, "the pool is in use");
            assert_eq!(misses[1], misses[5], "{method} in {dtype:?}: {misses:?}");
        }
    }
}

/// A step whose loss is no number changes neither parameters nor moments, on the device as on the CPU.
#[test]
fn a_diverged_step_leaves_everything_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    base(dir.path());
    let whole = load_as(dir.path(), &CPU, DType::F32).unwrap();
    const NAME: &str = "transformer.wpe.weight";
    let (_, wpe) = whole.tensors().find(|(name, _)| *name == NAME).unwrap();
    let mut values: Vec<f32> = wpe.to_vec().unwrap();
    // Only sequences of over 30 tokens come so far. A NaN would not be written: it takes this number's place in the file.
    const PLACE: f32 = 1.234_567_8e30;
    values[30 * wpe.cols()] = PLACE;
    let broken = Tensor::from_slice(&CPU, wpe.shape(), &values).unwrap();
    let nan = dir.path().join("nan");
    fs::create_dir(&nan).unwrap();
    whole.save(&nan, &[(NAME.to_owned(), broken)].into()).unwrap();
    let file = nan.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let at = bytes.windows(4).position(|w| w == PLACE.to_le_bytes()).unwrap();
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&file, bytes).unwrap();
    let (short, long) = (data(&[9, 8, 7, 6]), data(&[9, 8, 35, 6]));
    let config = TrainConfig { batch_size: 4, grad_accum: 1, ..config("lora") };
    for device in crate::common::gpus().into_iter().map(Device::Cuda) {
        for dtype in [DType::F32, DType::Bf16] {
            let model = loaded(&nan, &device, dtype);
            let mut t = trainer(&*model, &config, dtype, &short);
            let mut other = trainer(&*model, &config, dtype, &short);
            for _ in 0..2 {
                assert_eq!(t.step(&short).unwrap(), other.step(&short).unwrap());
            }
            let before = t.adapted.params.flat().to_vec::<f32>().unwrap();
            let e = t.step(&long).unwrap_err().to_string();
            assert!(e.contains("step 3") && e.contains("NaN"), "{e}");
            assert_eq!(t.adapted.params.flat().to_vec::<f32>().unwrap(), before, "{device} {dtype:?}");
            // What follows is what follows without it: the moments are as they were, too.
            assert_eq!(t.step(&short).unwrap(), other.step(&short).unwrap());
            assert_eq!(t.step(&short).unwrap(), other.step(&short).unwrap());
            let [a, b] = [&t, &other].map(|t| t.adapted.params.flat().to_vec::<f32>().unwrap());
            assert_eq!(a, b, "{device} {dtype:?}");
        }
    }
}

/// Names of `--device` for the devices at hand.
fn names() -> Vec<&'static str> {
    let names = [
        #[cfg(feature = "emulator")]
        "emulated",
        "cuda",
    ];
    let usable = |name: &&str| Device::open(name).inspect_err(|e| println!("skipped: no CUDA device ({e})")).is_ok();
    names.into_iter().filter(usable).collect()
}

/// Stops a run after some steps, and keeps what it is told.
#[derive(Default)]
struct Watch {
    stop_after: Option<u64>,
    losses: Vec<f64>,
    notes: Vec<String>,
}

impl Observer for Watch {
    fn step(&mut self, step: &Step, _: f64) {
        self.losses.push(step.loss);
        self.stop_after = self.stop_after.map(|n| n - 1);
    }
    fn note(&mut self, message: &str) {
        self.notes.push(message.into());
    }
    fn stop(&mut self) -> bool {
        self.stop_after == Some(0)
    }
}

/// A folder with `base`, its tokenizer and `train.txt`.
fn lab() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let line = |i: usize| format!("name : {} | near : {}||it is near the {} .\n", ["a", "b c"][i % 2], i % 5, i % 5);
    let text: String = (0..20).map(line).collect();
    fs::write(dir.path().join("train.txt"), &text).unwrap();
    let tokenizer = Tokenizer::train_bpe([&text].into_iter(), 270).unwrap();
    let config = Gpt2Config {
        vocab_size: tokenizer.vocab_size(),
        n_positions: 48,
        n_embd: 16,
        n_layer: 1,
        n_head: 2,
        ..Gpt2Config::small()
    };
    let base = dir.path().join("base");
    fs::create_dir(&base).unwrap();
    Gpt2::init(config, &base, 3, &CPU).unwrap().save(&base, &Default::default()).unwrap();
    tokenizer.save(&base).unwrap();
    dir
}

fn run(lab: &Path, out: &str, device: &str, dtype: &str) -> TrainConfig {
    TrainConfig {
        model: lab.join("base"),
        data: lab.join("train.txt"),
        out: lab.join(out),
        device: device.into(),
        dtype: dtype.into(),
        label_smoothing: 0.0,
        targets: ["c_attn"].into_iter().collect(),
        ..config("lora")
    }
}

/// The newest checkpoint's bytes: parameters and both moments.
fn state(config: &TrainConfig) -> Vec<u8> {
    let (_, newest) = checkpoint::list(&config.out).unwrap().pop().unwrap();
    fs::read(newest.join(checkpoint::TENSORS)).unwrap()
}

#[test]
fn a_run_on_a_device_is_resumed_bit_for_bit() {
    let lab = lab();
    for name in names() {
        for dtype in ["f32", "auto"] {
            let configured = |out: &str| TrainConfig {
                save_every: 6,
                ..run(lab.path(), &format!("{out}-{name}-{dtype}"), name, dtype)
            };
            let (whole, parted) = (configured("whole"), configured("parted"));
            let mut all = Watch::default();
            train(&whole, false, &mut all).unwrap();
            let mut first = Watch { stop_after: Some(3), ..Watch::default() };
            assert!(train(&parted, false, &mut first).unwrap().interrupted);
            let mut second = Watch::default();
            train(&parted, true, &mut second).unwrap();
            assert_eq!([first.losses, second.losses].concat(), all.losses);
            assert!(state(&whole) == state(&parted), "{name} {dtype}");
            let file = |c: &TrainConfig| fs::read(c.out.join(adapter::WEIGHTS_FILE)).unwrap();
            assert!(file(&whole) == file(&parted), "{name} {dtype}");
            let said = fs::read_to_string(whole.out.join(lora_train::RUN_FILE)).unwrap();
            let kept = if dtype == "f32" { "f32" } else { "bf16" };
            assert!(said.contains(&format!("dtype = \"{kept}\"")) && said.contains("device = \"cuda:0\""), "{said}");
        }
    }
}

#[test]
fn a_run_moves_between_devices() {
    let lab = lab();
    let on_cpu = TrainConfig { save_every: 6, ..run(lab.path(), "cpu", "cpu", "auto") };
    let mut all = Watch::default();
    train(&on_cpu, false, &mut all).unwrap();
    let values = |c: &TrainConfig| -> Vec<f64> {
        let bytes = state(c);
        let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes[start..].chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
    };
    for name in names() {
        for (from, to) in [("cpu", name), (name, "cpu")] {
            // A type that is not given is that of the run: in bf16, CUDA's own, nothing would agree.
            let dtype = if from == "cpu" { "auto" } else { "f32" };
            let out = format!("{from}-{to}");
            let begun = TrainConfig { save_every: 6, ..run(lab.path(), &out, from, dtype) };
            let mut first = Watch { stop_after: Some(3), ..Watch::default() };
            train(&begun, false, &mut first).unwrap();
            let mut second = Watch::default();
            let moved = TrainConfig { device: to.into(), dtype: "auto".into(), ..begun.clone() };
            train(&moved, true, &mut second).unwrap();
            assert!(second.notes.iter().any(|n| n.contains("so far")), "{:?}", second.notes);
            within(&format!("losses {out}"), relative(&[first.losses, second.losses].concat(), &all.losses), 1e-5);
            within(&format!("state {out}"), relative(&values(&moved), &values(&on_cpu)), 1e-5);

            // The adapter is a file like any other: it loads on both, and says the same.
            let dataset = varied();
            let held_out = |device: &Device| {
                let model = load_as(&begun.model, device, DType::F32).unwrap();
                let adapted = adapter::attach(&begun.out, &*model, device).unwrap();
                lora_train::evaluate(&*model, &adapted, &dataset, 4).unwrap().loss
            };
            let [a, b] = [CPU, Device::open(name).unwrap()].map(|d| held_out(&d));
            within(&format!("held-out loss {out}"), (a - b).abs() / a, 1e-5);
        }

        // A run in bf16 stays one: no other type continues it, but the CPU does.
        let begun = run(lab.path(), &format!("bf16-{name}"), name, "auto");
        train(&begun, false, &mut Watch { stop_after: Some(2), ..Watch::default() }).unwrap();
        let moved = |device: &str, dtype: &str| {
            let config = TrainConfig { device: device.into(), dtype: dtype.into(), ..begun.clone() };
            train(&config, true, &mut Watch { stop_after: Some(1), ..Watch::default() })
        };
        for device in [name, "cpu"] {
            let e = moved(device, "f32").unwrap_err().to_string();
            assert!(e.contains("dtype = \"bf16\"") && e.contains("\"f32\""), "{e}");
        }
        moved("cpu", "auto").unwrap();
        train(&begun, true, &mut ()).unwrap();
    }
}

/// All of a new model trains in bf16 with f32 kept.
#[test]
fn a_model_from_nothing_on_a_device() {
    let lab = lab();
    let pretrained = |device: &str, out: &str| {
        let config = lora_train::PretrainConfig {
            text: vec![lab.path().join("train.txt")],
            out: lab.path().join(out),
            vocab: 270,
            layers: 1,
            dim: 16,
            heads: 2,
            context: 16,
            steps: Some(4),
            batch_size: 4,
            warmup: 1,
            device: device.into(),
            ..lora_train::PretrainConfig::default()
        };
        let mut watch = Watch::default();
        lora_train::pretrain(&config, false, &mut watch).unwrap();
        load_as(&config.out, &CPU, DType::F32).unwrap();
        watch.losses
    };
    let on_cpu = pretrained("cpu", "new-cpu");
    for name in names() {
        let losses = pretrained(name, &format!("new-{name}"));
        within(&format!("losses on {name}"), relative(&losses, &on_cpu), 1e-2);
    }
}

#[test]
fn an_error_of_memory_says_how_much_where_and_what_to_lower() {
    for device in crate::common::gpus().into_iter().map(Device::Cuda) {
        let e = Tensor::empty(&device, DType::F32, &[1 << 44]).unwrap_err().to_string();
        assert!(e.contains("cuda:0") || e.contains("the emulated device"), "{e}");
        for part in ["70368744177664 bytes", "batch", "sequences"] {
            assert!(e.contains(part), "no {part:?} in: {e}");
        }
    }
}
