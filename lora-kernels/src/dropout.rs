#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use rayon::prelude::*;

use crate::{
    Acc, Mat, Result,
    real::{Real, dispatch, simd},
    reduce::rows_per_task,
};

/// Inverted dropout with a counter-based generator: an element is kept with probability 1 − p and then scaled by
/// 1/(1 − p), so that the mean stays.
///
/// Whether element (row, col) is kept depends on nothing but `seed`, `step`, `site`, `row_offset + row` and `col`:
/// lane col mod 4 of [`philox`]`(seed, [col/4, row_offset + row, site, step])`, kept when at least p·2³². No mask is
/// ever stored, the backward pass regenerates it, and neither the number of threads nor the splitting of a batch
/// changes it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability that an element becomes 0, in [0, 1).
    pub p: f64,
    /// The generator's key: one per run.
    pub seed: u64,
    /// The optimiser step.
    pub step: u32,
    /// Which dropout of the model this is. Attention adds the head in the upper 16 bits.
    pub site: u32,
    /// Index of the first row within the whole optimiser step: the tokens of the micro-batches before this one.
    pub row_offset: u32,
}

/// Philox4x32-10, a counter-based generator: 128 random bits per key and counter, without any state.
///
/// Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
pub fn philox(key: u64, ctr: [u32; 4]) -> [u32; 4] {
    lanes(key, ctr.map(|c| [c])).map(|c| c[0])
}

/// y = dropout(x) + β·y, with x and y [rows, cols]. Dropout is linear with a diagonal matrix, so that the same call on
/// dy is its backward.
///
/// # Panics
/// When the shapes differ or p lies outside [0, 1).
pub fn dropout(d: &Dropout, x: Mat, y: Acc) -> Result<()> {
    let Acc { to: y, beta } = y;
    assert_eq!((x.rows(), x.cols(), x.dtype()), (y.rows(), y.cols(), y.dtype()), "dropout: x and y are alike");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = y.gpu() {
        return cuda::dropout(gpu, d, x, &Acc { to: y, beta });
    }
    dispatch!("dropout", y.dtype(), T => {
        let (mask, beta) = (d.mask::<T>(), T::of(beta));
        let (x, rows) = (x.host::<T>(), rows_per_task(y.cols()));
        y.host::<T>().row_chunks(rows).into_par_iter().enumerate().for_each(|(i, mut y)| {
            simd(#[inline(always)] || {
                for r in 0..y.rows {
                    let row = i * rows + r;
                    let index = d.row_offset.wrapping_add(row as u32);
                    drop_row(&mask, index, d.site, x.row(row), beta, y.row_mut(r));
                }
            });
        });
        Ok(())
    })
}

#[inline(always)]
fn drop_row<T: Real>(mask: &Mask<T>, row: u32, site: u32, x: &[T], beta: T, y: &mut [T]) {
    let mut factors = [T::ZERO; CHUNK];
    for (c, (x, y)) in x.chunks(CHUNK).zip(y.chunks_mut(CHUNK)).enumerate() {
        mask.chunk(c * CHUNK, row, site, &mut factors);
        if beta == T::ZERO {
            for ((y, &x), &f) in y.iter_mut().zip(x).zip(&factors) {
                *y = x * f;
            }
        } else {
            for ((y, &x), &f) in y.iter_mut().zip(x).zip(&factors) {
                *y = x * f + beta * *y;
            }
        }
    }
}

/// Columns whose factors are made at once: 16 counters, one vector register of AVX-512 per word.
pub(crate) const CHUNK: usize = 64;

/// What of a [`Dropout`] is the same for all its elements.
pub(crate) struct Mask<T> {
    seed: u64,
    step: u32,
    /// Lanes from here on are kept.
    pub(crate) threshold: u32,
    pub(crate) scale: T,
}

impl Dropout {
    pub(crate) fn mask<T: Real>(&self) -> Mask<T> {
        assert!((0.0..1.0).contains(&self.p), "dropout: p = {} lies outside [0, 1)", self.p);
        let threshold = (self.p * 2f64.powi(32)).ceil() as u32;
        Mask { seed: self.seed, step: self.step, threshold, scale: T::of(1.0 / (1.0 - self.p)) }
    }
}

impl<T: Real> Mask<T> {
    /// The factors, 0 or 1/(1 − p), of the columns from `col` on, a multiple of 4.
    #[inline(always)]
    pub(crate) fn chunk(&self, col: usize, row: u32, site: u32, factors: &mut [T; CHUNK]) {
        if self.threshold == 0 {
            *factors = [self.scale; CHUNK];
            return;
        }
        const N: usize = CHUNK / 4;
        let mut first = [0; N];
        for (l, c) in first.iter_mut().enumerate() {
            *c = (col / 4 + l) as u32;
        }
        let words = lanes(self.seed, [first, [row; N], [site; N], [self.step; N]]);
        for (l, f) in factors.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            for w in 0..4 {
                f[w] = if words[w][l] >= self.threshold { self.scale } else { T::ZERO };
            }
        }
    }
}

/// N counters side by side, as words of vectors.
#[inline(always)]
fn lanes<const N: usize>(key: u64, mut c: [[u32; N]; 4]) -> [[u32; N]; 4] {
    let (mut k0, mut k1) = (key as u32, (key >> 32) as u32);
    for _ in 0..10 {
        let mut next = [[0; N]; 4];
        for l in 0..N {
            let p0 = u64::from(c[0][l]) * 0xD251_1F53;
            let p1 = u64::from(c[2][l]) * 0xCD9E_8D57;
            next[0][l] = (p1 >> 32) as u32 ^ c[1][l] ^ k0;
            next[1][l] = p1 as u32;
            next[2][l] = (p0 >> 32) as u32 ^ c[3][l] ^ k1;
            next[3][l] = p0 as u32;
        }
        c = next;
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Buffer, Device, MatMut};

    const D: Dropout = Dropout { p: 0.3, seed: 77, step: 5, site: 9, row_offset: 0 };

    /// dropout(x) + β·y of an [rows, cols] matrix.
    fn run(d: &Dropout, rows: usize, x: &[f32], beta: f64, y: &[f32]) -> Vec<f32> {
        let cols = x.len() / rows;
        let x = Buffer::from_slice(&Device::Cpu, x).unwrap();
        let mut b = Buffer::from_slice(&Device::Cpu, y).unwrap();
        dropout(d, Mat::new(&x, 0, rows, cols), Acc { to: MatMut::new(&mut b, 0, rows, cols), beta }).unwrap();
        b.to_vec(0..y.len()).unwrap()
    }

    fn ramp(n: usize) -> Vec<f32> {
        (0..n).map(|i| 1.0 + (i % 97) as f32 / 97.0).collect()
    }

    #[test]
    fn philox_gives_the_published_answers() {
        let cases = [
            (0, [0; 4], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            (u64::MAX, [u32::MAX; 4], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                0x299f_31d0_a409_3822,
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (key, ctr, want) in cases {
            assert_eq!(philox(key, ctr), want);
        }
    }

    #[test]
    fn the_mask_is_the_documented_one() {
        let (rows, cols) = (3, 131);
        let d = Dropout { row_offset: 11, ..D };
        let y = run(&d, rows, &vec![1.0; rows * cols], 0.0, &vec![f32::NAN; rows * cols]);
        for (i, y) in y.iter().enumerate() {
            let (r, c) = ((i / cols) as u32, (i % cols) as u32);
            let lane = philox(d.seed, [c / 4, d.row_offset + r, d.site, d.step])[(c % 4) as usize];
            let want = if f64::from(lane) >= d.p * 2f64.powi(32) { (1.0 / 0.7) as f32 } else { 0.0 };
            assert_eq!(*y, want, "row {r}, column {c}");
        }
    }

    #[test]
    fn keeps_its_share_and_the_mean() {
        let (rows, cols) = (400, 500);
        let n = (rows * cols) as f64;
        for p in [0.1, 0.5, 0.9] {
            let y = run(&Dropout { p, ..D }, rows, &vec![1.0; rows * cols], 0.0, &vec![0.0; rows * cols]);
            let kept = y.iter().filter(|&&v| v != 0.0).count() as f64 / n;
            let mean = y.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
            // Five standard deviations.
            let s = 5.0 * (p * (1.0 - p) / n).sqrt();
            assert!((kept - (1.0 - p)).abs() < s, "p {p}: kept {kept}");
            assert!((mean - 1.0).abs() < s / (1.0 - p), "p {p}: mean {mean}");
        }
    }

    #[test]
    fn zero_is_the_identity_and_beta_adds() {
        let x = ramp(5 * 70);
        assert_eq!(run(&Dropout { p: 0.0, ..D }, 5, &x, 0.0, &vec![f32::NAN; x.len()]), x);
        let (old, fresh) = (ramp(350), run(&D, 5, &x, 0.0, &vec![f32::NAN; x.len()]));
        for (got, (f, o)) in run(&D, 5, &x, 0.5, &old).iter().zip(fresh.iter().zip(&old)) {
            assert!((got - (f + 0.5 * o)).abs() < 1e-6);
        }
    }

    #[test]
    fn a_split_batch_draws_the_same_mask_and_other_steps_and_sites_others() {
        let (rows, cols) = (10, 67);
        let x = ramp(rows * cols);
        let y = run(&D, rows, &x, 0.0, &x);
        let (a, b) = x.split_at(4 * cols);
        let parts = [run(&D, 4, a, 0.0, a), run(&Dropout { row_offset: 4, ..D }, 6, b, 0.0, b)].concat();
        assert_eq!(y, parts);
        for other in [Dropout { step: 6, ..D }, Dropout { site: 8, ..D }, Dropout { seed: 78, ..D }] {
            assert_ne!(y, run(&other, rows, &x, 0.0, &x));
        }
    }

    #[test]
    fn is_its_own_backward() {
        // ⟨dropout(x), dy⟩ = ⟨x, dropout(dy)⟩ for a linear map that is its own transpose.
        let (x, dy) = (ramp(7 * 66), ramp(8 * 66).split_off(66));
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        let (y, dx) = (run(&D, 7, &x, 0.0, &x), run(&D, 7, &dy, 0.0, &dy));
        approx::assert_relative_eq!(dot(&y, &dy), dot(&x, &dx), max_relative = 1e-6);
    }

    #[test]
    fn same_bits_for_any_number_of_threads() {
        let x = ramp(300 * 400);
        let with = |n: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
            pool.install(|| run(&D, 300, &x, 0.0, &x))
        };
        let one = with(1);
        assert!(one == with(2) && one == with(3));
    }
}
