use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

/// Both kinds of vectors, where the processor has them.
fn vectors() -> Vec<Vectors> {
    let mut all = vec![Vectors::Portable, Vectors::best()];
    all.dedup();
    all
}

/// A stored matrix with `pad` elements of poison after each row.
struct Stored<T> {
    data: Vec<T>,
    rows: usize,
    cols: usize,
    pad: usize,
}

impl<T: Element> Stored<T> {
    fn new(rows: usize, cols: usize, pad: usize, poison: T, mut next: impl FnMut() -> T) -> Stored<T> {
        let data = (0..rows * (cols + pad)).map(|i| if i % (cols + pad) < cols { next() } else { poison }).collect();
        Stored { data, rows, cols, pad }
    }

    fn mat(&self) -> HostMat<'_, T> {
        HostMat::from_slice(&self.data, self.rows, self.cols + self.pad).block(0..self.rows, 0..self.cols)
    }

    fn at(&self, i: usize, j: usize, transposed: bool) -> T {
        let (i, j) = if transposed { (j, i) } else { (i, j) };
        self.data[i * (self.cols + self.pad) + j]
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    m: usize,
    k: usize,
    n: usize,
    ta: bool,
    tb: bool,
    alpha: f64,
    beta: f64,
}

fn shape(r: usize, c: usize, transposed: bool) -> (usize, usize) {
    if transposed { (c, r) } else { (r, c) }
}

/// One product against plain loops in f64; with β = 0 C is NaN before. Returns C.
fn check<W: Weight>(rng: &mut ChaCha8Rng, case: Case, poison: W, weight: fn(f32) -> W, of: fn(W) -> f64) {
    let Case { m, k, n, ta, tb, alpha, beta } = case;
    let ((ar, ac), (br, bc)) = (shape(m, k, ta), shape(k, n, tb));
    let a = Stored::new(ar, ac, 3, f32::NAN, || rng.random_range(-1.0..1.0));
    let b = Stored::new(br, bc, 5, poison, || weight(rng.random_range(-1.0..1.0)));
    let old = Stored::new(m, n, 2, -7.0, || if beta == 0.0 { f32::NAN } else { rng.random_range(-1.0..1.0) });
    let mut first: Option<Vec<u32>> = None;
    for vectors in vectors() {
        let mut c = old.data.clone();
        let (x, y) = (if ta { a.mat().t() } else { a.mat() }, if tb { b.mat().t() } else { b.mat() });
        let mut to = HostMut::from_slice(&mut c, m, n + 2);
        on(vectors, alpha, x, y, beta, to.block_mut(0..m, 0..n)).unwrap();
        for i in 0..m {
            for j in 0..n {
                let sum: f64 = (0..k).map(|p| f64::from(W::beside(a.at(i, p, ta))) * of(b.at(p, j, tb))).sum();
                let kept = if beta == 0.0 { 0.0 } else { beta * f64::from(old.at(i, j, false)) };
                let (got, want) = (f64::from(c[i * (n + 2) + j]), alpha * sum + kept);
                let near = (got - want).abs() <= 1e-6 * (k as f64 + 4.0);
                assert!(near, "{case:?} {vectors:?} at {i},{j}: {got} {want}");
            }
            assert_eq!(c[i * (n + 2) + n..(i + 1) * (n + 2)], [-7.0; 2], "{case:?}: a neighbour was written");
        }
        let bits: Vec<u32> = c.iter().map(|x| x.to_bits()).collect();
        assert!(first.get_or_insert_with(|| bits.clone()) == &bits, "{case:?}: {vectors:?} changes the bits");
    }
}

#[test]
fn equals_plain_loops_in_all_layouts_sizes_and_scalars() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    // All numbers of rows; sizes around the vectors, the runs of rows, and what is shared out.
    let sizes = [(1, 1), (3, 17), (15, 16), (16, 31), (17, 63), (33, 64), (40, 65), (7, 200), (129, 97)];
    let cases = (1..=ROWS).flat_map(|m| sizes.map(|(k, n)| (m, k, n)));
    let cases = cases.chain([(3, 70, 1300), (10, 300, 331), (17, 9, 70), (2, 0, 3), (0, 3, 2), (3, 2, 0)]);
    for (at, (m, k, n)) in cases.enumerate() {
        let scalars = [(1.0, 0.0), (0.5, 1.0), (-2.0, 0.25)];
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            let (alpha, beta) = scalars[(at + usize::from(ta) + 2 * usize::from(tb)) % 3];
            let case = Case { m, k, n, ta, tb, alpha, beta };
            check::<f32>(&mut rng, case, f32::NAN, |x| x, f64::from);
            check::<bf16>(&mut rng, case, bf16::NAN, bf16::from_f32, f64::from);
        }
    }
}

#[test]
fn neither_threads_nor_other_rows_change_the_bits() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for (k, n) in [(768, 2304), (768, 5003), (3072, 768), (70, 1030), (768, 8)] {
        let a: Vec<f32> = (0..ROWS * k).map(|_| rng.random_range(-1.0..1.0)).collect();
        let b: Vec<f32> = (0..k * n).map(|_| rng.random_range(-1.0..1.0)).collect();
        let narrow: Vec<bf16> = b.iter().map(|&x| bf16::from_f32(x)).collect();
        let run = |threads: usize, m: usize, tb: bool| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (mut wide, mut c) = (vec![0.0; m * n], vec![0.0; m * n]);
            let a = HostMat::from_slice(&a, m, k);
            let (r, s) = shape(k, n, tb);
            pool.install(|| {
                let (b, w) = (HostMat::from_slice(&b, r, s), HostMat::from_slice(&narrow, r, s));
                let (b, w) = if tb { (b.t(), w.t()) } else { (b, w) };
                product(1.0, a, b, 0.0, HostMut::from_slice(&mut wide, m, n)).unwrap();
                product(1.0, a, w, 0.0, HostMut::from_slice(&mut c, m, n)).unwrap();
            });
            [wide, c].map(|c| c.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
        };
        for tb in [false, true] {
            let one = run(1, ROWS, tb);
            for (threads, m) in [(2, ROWS), (3, ROWS), (5, ROWS), (1, 1), (2, 3), (2, 8), (2, 11)] {
                for (one, other) in one.iter().zip(run(threads, m, tb)) {
                    assert!(one[..m * n] == other, "{m}×{k}×{n}, transposed {tb}: {threads} threads change the bits");
                }
            }
        }
    }
}

#[test]
fn made_for_few_rows_of_a_large_weight() {
    for (m, k, n, yes) in [
        (1, 768, 768, true),
        (ROWS, 768, 50_257, true),
        (ROWS + 1, 768, 768, false),
        (0, 768, 768, false),
        (1, 0, 768, false),
        (1, 768, 8, false),
        (1, LONG, 768, true),
        (1, LONG + 1, 768, false),
    ] {
        assert_eq!(fits(m, k, n), yes, "{m}×{k}×{n}");
    }
}
