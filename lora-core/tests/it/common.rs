//! What the tests of tensors, tapes and methods share.

use lora_core::{Noise, Params, Tape, Tensor};
use lora_kernels::{DType, Device};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The generator state under which dropout is tested.
pub(crate) const NOISE: Noise =
    Noise { seed: 7 << 33 | 5, step: 3, row_offset: 40, sequence_offset: 4, target_offset: 9 };

/// `n` numbers in ±scale that f32 holds exactly.
pub(crate) fn random(seed: u64, n: usize, scale: f32) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| f64::from(rng.random_range(-scale..scale))).collect()
}

/// A tensor of either floating-point type.
pub(crate) fn tensor(dtype: DType, shape: &[usize], values: &[f64]) -> Tensor {
    Tensor::from_slice(&Device::Cpu, shape, values).unwrap().to_dtype(dtype).unwrap()
}

pub(crate) fn ids(ids: &[u32]) -> Tensor {
    Tensor::from_slice(&Device::Cpu, &[ids.len()], ids).unwrap()
}

/// Switches dropout on in a tape that somebody else made.
pub(crate) fn make_noisy(t: &mut Tape, noise: Noise) {
    let idle = Tape::inference(&Params::none(&Device::Cpu).unwrap());
    *t = std::mem::replace(t, idle).with_noise(noise);
}

/// The elements' bits, widened to f64's, which loses nothing.
pub(crate) fn bits(t: &Tensor) -> Vec<u64> {
    t.to_f64().unwrap().into_iter().map(f64::to_bits).collect()
}

/// ‖x − want‖ / ‖want‖.
pub(crate) fn relative(x: &[f64], want: &[f64]) -> f64 {
    assert_eq!(x.len(), want.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut x.iter().zip(want).map(|(a, b)| a - b)) / norm(&mut want.iter().copied()).max(1e-300)
}
