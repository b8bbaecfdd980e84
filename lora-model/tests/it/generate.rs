//! Generation against Transformers (the golden files), against the uncached forward pass, and against itself; what a
//! device computes, on every device at hand.

use std::path::{Path, PathBuf};

use lora_core::peft::Adapted;
use lora_kernels::{DType, Device};
use lora_model::{
    Error, Gpt2, LoadOptions, Model, Texts, assemble,
    config::Gpt2Config,
    generate::{Generated, GenerationConfig, check, distribution, end_tokens, generate},
    load,
};
use serde_json::Value;

const CPU: Device = Device::Cpu;

fn golden_dir() -> PathBuf {
    // As cargo says when the test runs, so that a copied executable finds a copied folder.
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&package).join("tests/golden/gpt2")
}

fn golden() -> Value {
    serde_json::from_slice(&std::fs::read(golden_dir().join("golden.json")).unwrap()).unwrap()
}

fn golden_model() -> (Box<dyn Model>, Adapted) {
    golden_model_on(&CPU)
}

fn golden_model_on(device: &Device) -> (Box<dyn Model>, Adapted) {
    (load(&golden_dir().join("model"), device).unwrap(), Adapted::none(device).unwrap())
}

/// The host, and with their features the emulated device and the first CUDA device.
fn devices() -> Vec<Device> {
    let devices: Vec<Device> = [
        Ok(CPU),
        #[cfg(feature = "emulator")]
        lora_kernels::cuda::Gpu::emulated(0).map(Device::Cuda),
        #[cfg(feature = "cuda")]
        Device::cuda(0),
    ]
    .into_iter()
    .filter_map(|device: Result<Device, lora_kernels::Error>| {
        device.inspect_err(|e| println!("skipped: no CUDA device ({e})")).ok()
    })
    .collect();
    let required = std::env::var_os("LORA_GATES").is_some_and(|v| v == "required");
    assert!(!(required && devices.len() == 1), "required, but there is no CUDA device");
    devices
}

/// A random model of another size, whose logits are small.
fn random_model(vocab_size: usize) -> (Gpt2, Adapted) {
    let config = Gpt2Config {
        vocab_size,
        n_positions: 12,
        n_embd: 16,
        n_layer: 1,
        n_head: 2,
        bos_token_id: None,
        eos_token_id: None,
        ..golden_config()
    };
    (Gpt2::init(config, Path::new("random"), 3, &CPU).unwrap(), Adapted::none(&CPU).unwrap())
}

fn golden_config() -> Gpt2Config {
    let dir = golden_dir().join("model");
    Gpt2Config::from_raw(&lora_model::config::RawConfig::from_dir(&dir).unwrap()).unwrap()
}

fn ids(v: &Value) -> Vec<u32> {
    v.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// The settings of a golden, by their names in Transformers.
fn settings(v: &Value) -> GenerationConfig {
    let mut config = GenerationConfig::default();
    for (name, v) in v.as_object().unwrap() {
        let n = v.as_u64().unwrap_or_default() as usize;
        match name.as_str() {
            "max_new_tokens" => config.max_new_tokens = n,
            "repetition_penalty" => config.repetition_penalty = v.as_f64().unwrap(),
            "no_repeat_ngram_size" => config.no_repeat_ngram_size = n,
            "repeat_prompt_ngrams" => config.repeat_prompt_ngrams = v.as_bool().unwrap(),
            "num_beams" => config.num_beams = n,
            "length_penalty" => config.length_penalty = v.as_f64().unwrap(),
            "early_stopping" => config.early_stopping = v.as_bool().unwrap(),
            "eos_token_id" => config.eos_token_id = vec![n as u32],
            "temperature" => config.temperature = v.as_f64().unwrap(),
            "top_k" => config.top_k = n,
            "top_p" => config.top_p = v.as_f64().unwrap(),
            // Only the best is returned here.
            "num_return_sequences" => {}
            other => panic!("unknown setting {other}"),
        }
    }
    config
}

/// The logits after a text, uncached.
fn logits(model: &dyn Model, adapted: &Adapted, text: &[u32]) -> Vec<f32> {
    let batch = model.batch(adapted, &Texts::new(text, &[text.len()])).unwrap();
    model.logits(adapted, &batch).unwrap().rows_in(text.len() - 1..text.len()).to_vec().unwrap()
}

fn log_softmax(z: &[f32]) -> Vec<f64> {
    let sum: f64 = z.iter().map(|&z| f64::from(z).exp()).sum();
    z.iter().map(|&z| f64::from(z) - sum.ln()).collect()
}

const PROMPTS: [&[u32]; 4] = [&[7, 61, 22, 90], &[3], &[99, 0, 41, 41, 5, 6], &[76, 12]];

fn prompts() -> Vec<Vec<u32>> {
    PROMPTS.iter().map(|p| p.to_vec()).collect()
}

#[test]
fn greedy_and_beam_search_equal_transformers() {
    devices().iter().for_each(greedy_and_beam_search_equal_transformers_on);
}

fn greedy_and_beam_search_equal_transformers_on(device: &Device) {
    let ((model, adapted), golden) = (golden_model_on(device), golden());
    for (name, case) in golden["generation"].as_object().unwrap() {
        let config = settings(&case["settings"]);
        let outputs = case["outputs"].as_array().unwrap();
        let prompts: Vec<Vec<u32>> = outputs.iter().map(|o| ids(&o["prompt"])).collect();
        let texts = generate(&*model, &adapted, &prompts, &config, None).unwrap();
        assert_eq!(texts.len(), 4);
        for (text, output) in texts.iter().zip(outputs) {
            assert_eq!(text.tokens, ids(&output["new"][0]), "{name}: {}", output["prompt"]);
            assert_eq!(text.finished, text.tokens.last() == config.eos_token_id.first(), "{name}");
            let score = output.get("scores").map(|s| s[0].as_f64().unwrap());
            assert_eq!(text.score.is_some(), score.is_some());
            let difference = text.score.unwrap_or_default() - score.unwrap_or_default();
            assert!(difference.abs() < 1e-4, "{name}: score {:?} is not {score:?}", text.score);
        }
    }
}

#[test]
fn the_distribution_to_draw_from_is_that_of_transformers() {
    let ((model, adapted), golden) = (golden_model(), golden());
    let (case, prompt) = (&golden["warped"], ids(&golden["warped"]["prompt"]));
    let mut found =
        distribution(&settings(&case["settings"]), &prompt, prompt.len(), logits(&*model, &adapted, &prompt));
    found.sort_unstable_by_key(|k| k.0);
    assert_eq!(found.iter().map(|k| k.0).collect::<Vec<_>>(), ids(&case["kept"]));
    for ((token, p), wanted) in found.iter().zip(case["probabilities"].as_array().unwrap()) {
        assert!((p - wanted.as_f64().unwrap()).abs() < 1e-6, "token {token}: {p} is not {wanted}");
    }
}

#[test]
fn cached_logits_equal_uncached_ones_through_growth_forks_and_departures() {
    devices().iter().for_each(cached_logits_equal_uncached_ones_on);
}

fn cached_logits_equal_uncached_ones_on(device: &Device) {
    let (model, adapted) = golden_model_on(device);
    let close = |found: &[f32], wanted: &[f32]| {
        let norm = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let difference = norm(&mut found.iter().zip(wanted).map(|(a, b)| a - b)) / norm(&mut wanted.iter().copied());
        assert!(difference < 1e-5, "relative difference {difference}");
    };
    // One row of room: the cache has to grow.
    let (mut texts, mut cache) = (prompts(), model.cache(4, 1).unwrap());
    let lengths: Vec<usize> = texts.iter().map(Vec::len).collect();
    let mut z = model.step(&adapted, &mut cache, &texts.concat(), &lengths).unwrap();
    // Which texts go on, and how many tokens each gets.
    for (step, (parents, new)) in [
        (&[0, 1, 2, 3][..], &[1, 1, 1, 1][..]),
        (&[2, 0, 0], &[1, 1, 1]),
        (&[0, 0, 1, 2, 2], &[1, 2, 5, 1, 3]),
        (&[4, 2, 0], &[1, 1, 1]),
        (&[1], &[1]),
    ]
    .into_iter()
    .enumerate()
    {
        for (i, text) in texts.iter().enumerate() {
            close(&z.rows_in(i..i + 1).to_vec::<f32>().unwrap(), &logits(&*model, &adapted, text));
        }
        let tokens: Vec<Vec<u32>> = new
            .iter()
            .enumerate()
            .map(|(i, &n)| (0..n).map(|j| ((step * 31 + i * 7 + j * 3) % 101) as u32).collect())
            .collect();
        texts = parents.iter().zip(&tokens).map(|(&p, t)| [&texts[p][..], t].concat()).collect();
        cache.reorder(parents);
        z = model.step(&adapted, &mut cache, &tokens.concat(), new).unwrap();
    }
    close(&z.to_vec::<f32>().unwrap(), &logits(&*model, &adapted, &texts[0]));
}

/// Greedy decoding, sampling and beam search.
fn modes() -> [GenerationConfig; 3] {
    let common = GenerationConfig { eos_token_id: vec![38, 97], seed: 5, ..Default::default() };
    [
        common.clone(),
        GenerationConfig { do_sample: true, temperature: 1.3, top_k: 0, top_p: 0.95, ..common.clone() },
        GenerationConfig { num_beams: 3, no_repeat_ngram_size: 2, ..common },
    ]
}

#[test]
fn every_device_writes_the_same() {
    let texts = |device: &Device| {
        let (model, adapted) = golden_model_on(device);
        modes().map(|config| generate(&*model, &adapted, &prompts(), &config, None).unwrap())
    };
    let on_cpu = texts(&CPU);
    for device in devices().into_iter().skip(1) {
        for (found, wanted) in texts(&device).iter().flatten().zip(on_cpu.iter().flatten()) {
            assert_eq!((&found.tokens, found.finished), (&wanted.tokens, wanted.finished), "{device}");
            let difference = found.score.unwrap_or_default() - wanted.score.unwrap_or_default();
            assert!(difference.abs() < 1e-4, "{device}: {found:?} is not {wanted:?}");
        }
    }
}

/// Of every token only its logits are read back, whatever the number of layers.
#[cfg(feature = "cuda")]
#[test]
fn a_token_is_one_read() {
    for device in devices() {
        let Device::Cuda(gpu) = &device else { continue };
        let (model, adapted) = golden_model_on(&device);
        for config in modes() {
            let config = GenerationConfig { max_new_tokens: 8, eos_token_id: vec![], ..config };
            let before = gpu.reads();
            generate(&*model, &adapted, &prompts(), &config, None).unwrap();
            assert_eq!(gpu.reads() - before, 8, "{device}: {config:?}");
        }
    }
}

#[test]
fn a_prompt_does_not_depend_on_the_others() {
    let (model, adapted) = golden_model();
    for config in modes() {
        let together = generate(&*model, &adapted, &prompts(), &config, None).unwrap();
        assert!(together.iter().any(|t| t.finished), "some leave the batch early");
        assert!(together.iter().any(|t| t.tokens.len() > 9), "some stay");
        for i in 0..4 {
            // Its index chooses the random stream: it stays the same, or is given.
            let mut others = vec![vec![1]; i + 1];
            others[i] = PROMPTS[i].to_vec();
            let alone = generate(&*model, &adapted, &others, &config, None).unwrap().remove(i);
            assert_eq!(alone.tokens, together[i].tokens, "prompt {i} of {config:?}");
            assert_eq!(alone.finished, together[i].finished);
            let config = GenerationConfig { first_stream: i as u64, ..config.clone() };
            let alone = generate(&*model, &adapted, &prompts()[i..=i], &config, None).unwrap();
            assert_eq!(alone[0].tokens, together[i].tokens, "prompt {i} of {config:?}");
        }
    }
}

#[test]
fn every_token_is_streamed_once_and_ends_are_ends() {
    let (model, adapted) = golden_model();
    for config in modes() {
        let mut streamed = vec![Vec::new(); 4];
        let mut on_token = |prompt: usize, token| streamed[prompt].push(token);
        let texts = generate(&*model, &adapted, &prompts(), &config, Some(&mut on_token)).unwrap();
        for (Generated { tokens, finished, score }, streamed) in texts.iter().zip(&streamed) {
            assert_eq!(tokens, streamed);
            let end = |t: &u32| config.eos_token_id.contains(t);
            assert_eq!(tokens.last().is_some_and(end), *finished);
            assert!(!tokens[..tokens.len() - 1].iter().any(end), "nothing follows an end");
            assert!(*finished || tokens.len() == config.max_new_tokens);
            assert_eq!(score.is_some(), config.num_beams > 1);
        }
    }
}

#[test]
fn seeds_choose_the_text() {
    let (model, adapted) = golden_model();
    let [_, config, _] = modes();
    let texts = |seed| {
        let config = GenerationConfig { seed, ..config.clone() };
        generate(&*model, &adapted, &[vec![7], vec![7]], &config, None).unwrap()
    };
    assert_eq!(texts(1), texts(1));
    assert_ne!(texts(1), texts(2));
    assert_ne!(texts(1)[0], texts(1)[1], "equal prompts have different streams");
    let one = GenerationConfig { top_k: 1, eos_token_id: vec![], ..config };
    let greedy = GenerationConfig { do_sample: false, ..one.clone() };
    let run = |config| generate(&*model, &adapted, &prompts(), config, None).unwrap();
    assert_eq!(run(&one), run(&greedy), "of one token the draw is certain");
}

#[test]
fn samples_have_the_frequencies_of_the_distribution() {
    let (model, adapted) = golden_model();
    let (prompt, n) = (vec![7, 61, 22, 90], 4000);
    let z = logits(&*model, &adapted, &prompt);
    // Softmax of the nine largest logits over the temperature, straight from the definition.
    let mut order: Vec<usize> = (0..z.len()).collect();
    order.sort_by(|&a, &b| z[b].total_cmp(&z[a]));
    let weight = |&i: &usize| (f64::from(z[i]) / 0.8).exp();
    let sum: f64 = order[..9].iter().map(weight).sum();
    let config = GenerationConfig {
        max_new_tokens: 1,
        do_sample: true,
        temperature: 0.8,
        top_k: 9,
        seed: 11,
        ..Default::default()
    };
    let texts = generate(&*model, &adapted, &vec![prompt; n], &config, None).unwrap();
    let mut counts = vec![0.0; z.len()];
    texts.iter().for_each(|text| counts[text.tokens[0] as usize] += 1.0);
    assert!(order[9..].iter().all(|&i| counts[i] == 0.0), "only the nine are drawn");
    let chi_square: f64 = order[..9]
        .iter()
        .map(|i| {
            let expected = n as f64 * weight(i) / sum;
            (counts[*i] - expected).powi(2) / expected
        })
        .sum();
    // The mean is 8; by chance it is over 26 once in a thousand seeds.
    assert!(chi_square < 26.0, "chi-square {chi_square}");
}

/// With as many beams as tokens, two tokens are searched exhaustively: the best is that of all pairs and ends.
#[test]
fn wide_beams_find_the_best_text() {
    let (model, adapted) = random_model(30);
    for (eos, length_penalty) in [(None, 1.0), (Some(4), 0.0), (Some(4), 1.0), (Some(4), 3.0)] {
        let prompt = vec![5, 17, 2];
        let first = log_softmax(&logits(&model, &adapted, &prompt));
        let mut all: Vec<(f64, Vec<u32>)> = Vec::new();
        for a in 0..30 {
            if eos == Some(a) {
                all.push((first[a as usize], vec![a]));
                continue;
            }
            let second = log_softmax(&logits(&model, &adapted, &[&prompt[..], &[a]].concat()));
            all.extend(
                (0..30).map(|b| ((first[a as usize] + second[b as usize]) / 2f64.powf(length_penalty), vec![a, b])),
            );
        }
        let (score, tokens) = all.into_iter().max_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
        let config = GenerationConfig {
            max_new_tokens: 2,
            num_beams: 30,
            length_penalty,
            eos_token_id: eos.into_iter().collect(),
            ..Default::default()
        };
        let text = generate(&model, &adapted, &[prompt], &config, None).unwrap().remove(0);
        assert_eq!(text.tokens, tokens, "{eos:?} {length_penalty}");
        assert!((text.score.unwrap() - score).abs() < 1e-5);
    }
}

#[test]
fn early_stopping_takes_the_first_finished_texts() {
    let (model, adapted) = golden_model();
    let patient = GenerationConfig { length_penalty: 4.0, ..modes()[2].clone() };
    let eager = GenerationConfig { early_stopping: true, ..patient.clone() };
    let [patient, eager] = [patient, eager].map(|c| generate(&*model, &adapted, &prompts(), &c, None).unwrap());
    let better = |(a, b): (&Generated, &Generated)| a.score > b.score && a.tokens.len() > b.tokens.len();
    assert!(patient.iter().zip(&eager).any(better), "{patient:?} {eager:?}");
    assert!(patient.iter().zip(&eager).all(|(a, b)| a.score >= b.score));
}

#[test]
fn texts_end_where_positions_do() {
    let (model, adapted) = random_model(30);
    for num_beams in [1, 2] {
        let config = GenerationConfig { max_new_tokens: 10, num_beams, ..Default::default() };
        let prompts = [vec![1; 11], vec![2; 3], vec![3; 1]];
        let texts = generate(&model, &adapted, &prompts, &config, None).unwrap();
        let lengths: Vec<usize> = texts.iter().map(|t| t.tokens.len()).collect();
        assert_eq!(lengths, [1, 9, 10]);
        assert!(texts.iter().all(|t| !t.finished));
    }
    assert_eq!(generate(&model, &adapted, &[], &GenerationConfig::default(), None).unwrap(), []);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let (model, adapted) = random_model(30);
    let d = GenerationConfig::default;
    for (config, option) in [
        (GenerationConfig { max_new_tokens: 0, ..d() }, "max_new_tokens = 0"),
        (GenerationConfig { temperature: 0.0, ..d() }, "temperature = 0"),
        (GenerationConfig { temperature: -1.0, ..d() }, "temperature = -1"),
        (GenerationConfig { temperature: f64::NAN, ..d() }, "temperature = NaN"),
        (GenerationConfig { temperature: f64::INFINITY, ..d() }, "temperature = inf"),
        (GenerationConfig { top_p: 0.0, ..d() }, "top_p = 0"),
        (GenerationConfig { top_p: 1.01, ..d() }, "top_p = 1.01"),
        (GenerationConfig { top_p: f64::NAN, ..d() }, "top_p = NaN"),
        (GenerationConfig { repetition_penalty: 0.0, ..d() }, "repetition_penalty = 0"),
        (GenerationConfig { length_penalty: f64::NAN, ..d() }, "length_penalty = NaN"),
        (GenerationConfig { num_beams: 0, ..d() }, "num_beams = 0"),
        (GenerationConfig { num_beams: usize::MAX, ..d() }, "the 30 tokens of the vocabulary"),
        (GenerationConfig { num_beams: 2, do_sample: true, ..d() }, "do_sample = true: beam search does not draw"),
    ] {
        let e = generate(&model, &adapted, &[vec![1]], &config, None).unwrap_err();
        assert!(matches!(e, Error::Option { .. }) && e.to_string().contains(option), "{e} lacks {option}");
    }
    for (prompt, message) in [
        (vec![], "prompt 2: it has no tokens"),
        (vec![1; 12], "prompt 2: its 12 tokens leave none of the model's 12 positions free"),
        (vec![1; 99], "99 tokens"),
        (vec![30], "token 30 is outside the model's vocabulary of 30"),
    ] {
        let prompts = [vec![1], prompt];
        let e = generate(&model, &adapted, &prompts, &d(), None).unwrap_err();
        assert!(matches!(e, Error::Prompt { index: 1, .. }) && e.to_string().contains(message), "{e} lacks {message}");
        assert_eq!(check(&model, &adapted, &prompts, &d()).unwrap_err().to_string(), e.to_string());
    }
}

#[test]
fn a_diverged_model_generates_nothing() {
    let (model, _) = golden_model();
    let head = model.head().weight;
    let (name, head) = (head.name.as_str(), &head.tensor);
    let mut values: Vec<f32> = head.to_vec().unwrap();
    values[40] = f32::NAN;
    let head = lora_core::Tensor::from_slice(&CPU, head.shape(), &values).unwrap();
    for device in devices() {
        let mut fetch = |n: &str, _: &[usize]| {
            let own = if n == name { &head } else { model.tensor(n).unwrap() };
            Ok(own.to(&device, DType::F32)?)
        };
        let broken = assemble(model.config().clone(), &device, &LoadOptions::default(), &mut fetch).unwrap();
        let adapted = Adapted::none(&device).unwrap();
        for config in modes() {
            let e = generate(&*broken, &adapted, &prompts(), &config, None).unwrap_err();
            assert!(matches!(e, Error::NotFinite), "{device}: {e}");
        }
    }
}

#[test]
fn the_tokens_that_end_a_text_are_those_of_the_files() {
    let table = [
        (r#"{"eos_token_id": 2}"#, None, Ok(vec![2])),
        (r#"{"eos_token_id": [5, 2]}"#, None, Ok(vec![5, 2])),
        (r#"{"eos_token_id": 2}"#, Some(r#"{"eos_token_id": [128001, 128008]}"#), Ok(vec![128001, 128008])),
        (r#"{"eos_token_id": 2}"#, Some(r#"{"eos_token_id": 3}"#), Ok(vec![3])),
        (r#"{"eos_token_id": 2}"#, Some(r#"{"do_sample": true}"#), Ok(vec![2])),
        (r#"{"eos_token_id": null}"#, Some("{}"), Ok(vec![])),
        ("{}", None, Ok(vec![])),
        (r#"{"eos_token_id": [1, "a"]}"#, None, Err(["config.json", "eos_token_id"])),
        ("{}", Some(r#"{"eos_token_id": -1}"#), Err(["generation_config.json", "eos_token_id"])),
        ("{}", Some(r#"{"eos_token_id": [4294967296]}"#), Err(["generation_config.json", "eos_token_id"])),
        ("{}", Some("{"), Err(["generation_config.json", "JSON"])),
    ];
    for (config, generation, want) in table {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        if let Some(text) = generation {
            std::fs::write(dir.path().join("generation_config.json"), text).unwrap();
        }
        let got = end_tokens(dir.path());
        match want {
            Ok(ids) => assert_eq!(got.unwrap(), ids, "{config}, {generation:?}"),
            Err(parts) => {
                let e = got.unwrap_err().to_string();
                assert!(parts.iter().all(|part| e.contains(part)), "{config}, {generation:?}: {e}");
            }
        }
    }
}
