//! The angles of rotary position embeddings, as Transformers has them for each `rope_type`.

use std::f64::consts::TAU;

use lora_core::{Result, Tensor};
use lora_kernels::{DType, Device};

use crate::config::{RopeConfig, RopeScaling};

/// The angle by which one position turns each pair of a head's columns, [head_dim / 2]:
/// ```text
/// default   ωᵢ = θ^(−2i / head_dim)
/// linear    ωᵢ / factor
/// llama3    ωᵢ for waves shorter than L / high, ωᵢ / factor for those longer than L / low,
///           (1 − s)·ωᵢ / factor + s·ωᵢ between, s = (L·ωᵢ / 2π − low) / (high − low)
/// yarn      (1 − r)·ωᵢ + r·ωᵢ / factor, r rising from 0 to 1 between the pairs that turn beta_fast and beta_slow
///           times over L
/// ```
/// with L the original length. Sources: Su et al. 2021, section 3.2.2; Chen et al. 2023; the release of Llama 3.1; Peng
/// et al. 2023, section 3.2.
pub fn frequencies(rope: &RopeConfig, head_dim: usize) -> Vec<f64> {
    let plain = |i: usize| rope.rope_theta.powf(-((2 * i) as f64) / head_dim as f64);
    let half = 0..head_dim / 2;
    match rope.scaling {
        RopeScaling::Default | RopeScaling::Dynamic { .. } => half.map(plain).collect(),
        RopeScaling::Linear { factor } => half.map(|i| plain(i) / factor).collect(),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: length,
        } => {
            let scaled = |w: f64| {
                // How often the wave turns over the original length.
                let turns = length as f64 * w / TAU;
                let s = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - s) * w / factor + s * w
            };
            half.map(|i| scaled(plain(i))).collect()
        }
        RopeScaling::Yarn {
            factor, original_max_position_embeddings: length, beta_fast, beta_slow, truncate, ..
        } => {
            // The pair, as a real number, that turns so often over the original length.
            let pair =
                |turns: f64| head_dim as f64 * (length as f64 / (turns * TAU)).ln() / (2.0 * rope.rope_theta.ln());
            let (mut from, mut to) = (pair(beta_fast), pair(beta_slow));
            if truncate {
                (from, to) = (from.floor(), to.ceil());
            }
            // Transformers bounds the end by the head's width, not by half of it.
            (from, to) = (from.max(0.0), to.min(head_dim as f64 - 1.0));
            if from == to {
                to += 0.001;
            }
            let ramp = |i: usize| ((i as f64 - from) / (to - from)).clamp(0.0, 1.0);
            half.map(|i| (1.0 - ramp(i)) * plain(i) + ramp(i) * plain(i) / factor).collect()
        }
    }
}

/// What cosines and sines are multiplied by: 1, or YaRN's `attention_factor`, whose square multiplies the scores.
fn amplitude(rope: &RopeConfig) -> f64 {
    match rope.scaling {
        RopeScaling::Yarn { attention_factor, .. } => attention_factor,
        _ => 1.0,
    }
}

/// Cosines and sines of the angles of all positions, each [positions, head_dim / 2], made in f64 and rounded to `dtype`
/// (f32 or f64).
///
/// # Errors
/// No memory.
///
/// # Panics
/// For another type.
pub fn tables(
    rope: &RopeConfig,
    positions: usize,
    head_dim: usize,
    device: &Device,
    dtype: DType,
) -> Result<(Tensor, Tensor)> {
    let frequencies = frequencies(rope, head_dim);
    let amplitude = amplitude(rope);
    let angles = || (0..positions).flat_map(|p| frequencies.iter().map(move |w| p as f64 * w));
    let table = |of: fn(f64) -> f64| {
        let shape = [positions, frequencies.len()];
        match dtype {
            DType::F64 => Tensor::from_slice(device, &shape, &angles().map(|a| amplitude * of(a)).collect::<Vec<_>>()),
            DType::F32 => {
                let rounded: Vec<f32> = angles().map(|a| (amplitude * of(a)) as f32).collect();
                Tensor::from_slice(device, &shape, &rounded)
            }
            other => panic!("tables are f32 or f64, not {other:?}"),
        }
    };
    Ok((table(f64::cos)?, table(f64::sin)?))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;
    use crate::config::{LlamaConfig, RawConfig};

    fn read(rope_parameters: Value) -> RopeConfig {
        let keys = json!({"model_type": "llama", "max_position_embeddings": 4096, "rope_parameters": rope_parameters});
        let Value::Object(keys) = keys else { unreachable!() };
        LlamaConfig::from_raw(&RawConfig::new(Path::new("config.json"), keys)).unwrap().rope
    }

    /// What Transformers 5.23 has for heads of 16 columns, in f32, and the factor of cosines and sines: for each row
    /// ```python
    /// config = LlamaConfig(head_dim=16, max_position_embeddings=4096, rope_parameters={"rope_theta": 5e5, **row})
    /// print(modeling_rope_utils.ROPE_INIT_FUNCTIONS[row["rope_type"]](config))
    /// ```
    #[test]
    #[rustfmt::skip]
    fn angles_are_those_of_transformers() {
        let yarn = [1.0, 0.1575622, 0.02350377, 0.003190541, 0.0003535534, 6.856205e-05, 1.329574e-05, 2.578346e-06];
        let rows = [
            (json!({"rope_type": "linear", "factor": 4.0}),
             [0.25, 0.04848069, 0.009401508, 0.001823166, 0.0003535534, 6.856205e-05, 1.329574e-05, 2.578346e-06], 1.0),
            (json!({"rope_type": "dynamic", "factor": 2.0}),
             [1.0, 0.1939228, 0.03760603, 0.007292665, 0.001414213, 0.0002742482, 5.318296e-05, 1.031339e-05], 1.0),
            (json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
             [1.0, 0.1939228, 0.03760603, 0.001312569, 0.0001767767, 3.428102e-05, 6.64787e-06, 1.289173e-06], 1.0),
            (json!({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 0.05, "high_freq_factor": 40.0}),
             [1.0, 0.1735463, 0.0216641, 0.003750248, 0.0007103012, 0.0001371241, 2.659148e-05, 5.156693e-06], 1.0),
            (json!({"rope_type": "yarn", "factor": 4.0}), yarn, 1.138629436111989),
            (json!({"rope_type": "yarn", "factor": 4.0, "mscale": 1.3}), yarn, 1.138629436111989),
            (json!({"rope_type": "yarn", "factor": 4.0, "mscale": 1.3, "mscale_all_dim": 0.4}), yarn, 1.1182114574267705),
            (json!({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}), yarn, 1.5),
            (json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": 64, "beta_slow": 0.02}),
             [1.0, 0.1696824, 0.02820452, 0.004557915, 0.0007071067, 0.0001028431, 1.329574e-05, 2.578346e-06],
             1.138629436111989),
            (json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": 64, "beta_slow": 0.02, "truncate": false}),
             [1.0, 0.1812078, 0.02940814, 0.00459131, 0.0006747956, 8.905547e-05, 1.329574e-05, 2.578346e-06],
             1.138629436111989),
            (json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 1, "truncate": false}),
             [1.0, 0.1939228, 0.03760603, 0.007292665, 0.0003535534, 6.856205e-05, 1.329574e-05, 2.578346e-06],
             1.138629436111989),
        ];
        for (mut row, wanted, factor) in rows {
            row["rope_theta"] = json!(5e5);
            if !["linear", "dynamic"].contains(&row["rope_type"].as_str().unwrap()) {
                row["original_max_position_embeddings"] = json!(1024);
            }
            let rope = read(row.clone());
            for (i, (x, y)) in frequencies(&rope, 16).iter().zip(&wanted).enumerate() {
                assert!((x / y - 1.0).abs() < 1e-6, "{row}, pair {i}: {x:e} for {y:e}");
            }
            assert!((amplitude(&rope) - factor).abs() < 1e-12, "{row}");
        }
    }

    #[test]
    fn tables_hold_every_position() {
        let rope = read(json!({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}));
        let (cos, sin) = tables(&rope, 100, 8, &Device::Cpu, DType::F32).unwrap();
        assert_eq!([cos.shape(), sin.shape()], [[100, 4]; 2]);
        let (cos, sin) = (cos.to_vec::<f32>().unwrap(), sin.to_vec::<f32>().unwrap());
        let w = frequencies(&rope, 8);
        for (i, (c, s)) in cos.iter().zip(&sin).enumerate() {
            let (sine, cosine) = ((i / 4) as f64 * w[i % 4]).sin_cos();
            assert_eq!((*c, *s), ((1.5 * cosine) as f32, (1.5 * sine) as f32), "{i}");
        }
    }
}
