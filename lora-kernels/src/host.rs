//! What a program does with numbers that came back to the host.

use crate::{
    mat::HostMut,
    real::{Real, simd},
    reduce::{max, run, sum},
};

/// Numbers whose exponentials are summed in f32; the sums of such runs are added in f64.
const BLOCK: usize = 512;

/// `z = z − ln Σⱼ exp zⱼ` for every row of `cols` numbers, in place: log-probabilities, from which texts are chosen.
///
/// The largest of a row is subtracted first, so nothing overflows. Error: below 2⁻²¹ + 2⁻²³·|z − max z|.
///
/// # Panics
/// When the numbers are not whole rows.
pub fn log_softmax(z: &mut [f32], cols: usize) {
    if z.is_empty() {
        return;
    }
    assert!(cols > 0 && z.len().is_multiple_of(cols), "log_softmax: {} numbers in rows of {cols}", z.len());
    let rows = z.len() / cols;
    run(HostMut::from_slice(z, rows, cols).row_chunks(1), |_, mut row| {
        simd(
            #[inline(always)]
            || {
                let z = row.row_mut(0);
                let max = max(z);
                let mut total = 0.0;
                let mut exps = [0.0; BLOCK];
                for part in z.chunks(BLOCK) {
                    let exps = &mut exps[..part.len()];
                    for (e, &z) in exps.iter_mut().zip(part) {
                        *e = Real::exp(z - max);
                    }
                    total += f64::from(sum(
                        [&*exps],
                        #[inline(always)]
                        |[e]| e,
                    ));
                }
                let log_sum = f64::from(max) + total.ln();
                for z in z {
                    *z = (f64::from(*z) - log_sum) as f32;
                }
            },
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::testing::{random, same_bits};

    #[test]
    fn log_softmax_equals_its_formula_far_from_zero_too() {
        for (rows, cols, at) in [(0, 3, 0.0), (1, 1, 5.0), (3, 7, 1e4), (2, 513, -1e4), (4, 50_257, 0.0)] {
            let data: Vec<f64> = random(1, rows * cols, 20.0).into_iter().map(|z| f64::from((z + at) as f32)).collect();
            let mut z: Vec<f32> = data.iter().map(|&z| z as f32).collect();
            log_softmax(&mut z, cols);
            for (got, z) in z.chunks(cols).zip(data.chunks(cols)) {
                let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let log_sum = max + z.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
                for (&got, z) in got.iter().zip(z) {
                    let (want, tol) = (z - log_sum, 2f64.powi(-21) + (z - max).abs() * 2f64.powi(-23));
                    assert!((f64::from(got) - want).abs() <= tol, "{rows}×{cols} at {at}: {got} {want}");
                }
            }
        }
        let mut z = [f32::NEG_INFINITY, 0.0];
        log_softmax(&mut z, 2);
        assert_eq!(z, [f32::NEG_INFINITY, 0.0]);
    }

    #[test]
    fn same_bits_for_any_number_of_threads() {
        same_bits("log_softmax", || {
            let mut z: Vec<f32> = random(2, 9 * 5003, 4.0).into_iter().map(|z| z as f32).collect();
            Device::Cpu.run(|| log_softmax(&mut z, 5003));
            z.into_iter().map(f64::from).collect()
        });
    }
}
