//! The low-rank mathematics against plain loops in f64, and against answers known beforehand.

use approx::{assert_abs_diff_eq, assert_relative_eq};
use lora_core::lowrank::{self, Layout, LowRank, Real, Scaling, Side};
use ndarray::{Array2, ArrayView2, array, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// (out, in, r): single elements, thin and wide, full rank, and more rows than one block of the code takes.
const SHAPES: [(usize, usize, usize); 7] =
    [(1, 1, 1), (5, 3, 2), (3, 5, 3), (1, 7, 1), (64, 64, 8), (65, 130, 4), (129, 66, 64)];

// ---- oracles ----

fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

fn random<T: Real>(rng: &mut ChaCha8Rng, rows: usize, cols: usize) -> Array2<T> {
    Array2::from_shape_fn((rows, cols), |_| T::round(rng.random_range(-1.0..1.0)))
}

fn random_adapter<T: Real>(rng: &mut ChaCha8Rng, (out, cols, r): (usize, usize, usize), scale: f64) -> LowRank<T> {
    LowRank::new(random(rng, r, cols), random(rng, out, r), scale).unwrap()
}

fn wide<T: Real>(m: ArrayView2<'_, T>) -> Array2<f64> {
    m.mapv(Into::into)
}

fn times(x: ArrayView2<'_, f64>, y: ArrayView2<'_, f64>) -> Array2<f64> {
    Array2::from_shape_fn((x.nrows(), y.ncols()), |(i, j)| (0..x.ncols()).map(|k| x[[i, k]] * y[[k, j]]).sum())
}

fn delta_oracle<T: Real>(adapter: &LowRank<T>) -> Array2<f64> {
    times(wide(adapter.b()).view(), wide(adapter.a()).view()) * adapter.scale()
}

fn norm(m: &Array2<f64>) -> f64 {
    m.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// ‖x − y‖_F.
fn distance(x: &Array2<f64>, y: &Array2<f64>) -> f64 {
    norm(&(x - y))
}

/// An orthogonal n × n matrix: two reflections I − 2·v·vᵀ/‖v‖².
fn orthogonal(rng: &mut ChaCha8Rng, n: usize) -> Array2<f64> {
    let mut reflection = || {
        let v: Array2<f64> = random(rng, n, 1);
        Array2::eye(n) - times(v.view(), v.t()) * (2.0 / norm(&v).powi(2))
    };
    times(reflection().view(), reflection().view())
}

/// U·diag(σ)·Vᵀ over the columns of `u` and `v` from `first` on.
fn with_sigma(u: &Array2<f64>, sigma: &[f64], v: &Array2<f64>, first: usize) -> Array2<f64> {
    let columns = s![.., first..first + sigma.len()];
    let scaled = &u.slice(columns) * &ndarray::aview1(sigma);
    times(scaled.view(), v.slice(columns).t())
}

// ---- ΔW, apply, merge ----

#[test]
fn scaling_rules() {
    for (scaling, alpha, rank, scale) in [
        (Scaling::Lora, 16.0, 8, 2.0),
        (Scaling::Lora, 32.0, 4, 8.0),
        (Scaling::Lora, -1.0, 2, -0.5),
        (Scaling::RsLora, 16.0, 4, 8.0),
        (Scaling::RsLora, 3.0, 9, 1.0),
    ] {
        assert_eq!(scaling.scale(alpha, rank).unwrap(), scale, "{scaling:?} {alpha} {rank}");
        let (a, b) = (Array2::<f32>::ones((rank, 10)), Array2::ones((9, rank)));
        let adapter = LowRank::with_alpha(a, b, alpha, scaling).unwrap();
        assert_eq!((adapter.scale(), adapter.rank(), adapter.dim()), (scale, rank, (9, 10)));
    }
}

/// `tolerance` is relative: what rounding each element once to `T` may leave.
fn delta_apply_and_merge_agree<T: Real>(tolerance: f64) {
    let mut rng = rng(1);
    for shape @ (out, cols, _) in SHAPES {
        for scale in [1.0, 0.25, -3.0, 0.0] {
            let adapter: LowRank<T> = random_adapter(&mut rng, shape, scale);
            let exact = delta_oracle(&adapter);
            let off = distance(&wide(adapter.delta().view()), &exact);
            assert!(off <= tolerance * norm(&exact), "delta of {shape:?} at scale {scale}: {off:e}");

            let w0: Array2<T> = random(&mut rng, out, cols);
            // The same W₀ as GPT-2 stores it gives the same W, transposed.
            let conv1d = w0.t().as_standard_layout().into_owned();
            let linear = lowrank::merge(w0.view(), &adapter, Layout::OutIn).unwrap();
            let turned = lowrank::merge(conv1d.view(), &adapter, Layout::InOut).unwrap();
            let off = distance(&wide(linear.weight()), &wide(turned.weight().t()));
            assert!(off <= tolerance * norm(&exact), "layouts of {shape:?} at scale {scale}: {off:e}");

            for n in [0, 1, 3, 70] {
                let x = random::<T>(&mut rng, n, cols);
                let x64 = wide(x.view());
                // The base layer's output, the adapter's on top of it, and the merged layer's.
                let base = times(x64.view(), wide(w0.t()).view());
                let mut y = base.mapv(T::round);
                adapter.apply(x.view(), y.view_mut()).unwrap();
                let y = wide(y.view());
                let expected = &base + &times(x64.view(), exact.t());
                let off = distance(&y, &expected);
                assert!(off <= 3.0 * tolerance * norm(&base).max(norm(&expected)), "apply {n} × {shape:?}: {off:e}");
                let off = distance(&times(x64.view(), wide(linear.weight().t()).view()), &y);
                assert!(off <= 5.0 * tolerance * norm(&base).max(norm(&expected)), "merge {n} × {shape:?}: {off:e}");
            }
        }
    }
}

#[test]
fn delta_apply_and_merge_agree_f32() {
    delta_apply_and_merge_agree::<f32>(1e-7);
}

#[test]
fn delta_apply_and_merge_agree_f64() {
    delta_apply_and_merge_agree::<f64>(1e-15);
}

#[test]
fn a_merged_f32_is_the_nearest_to_the_exact_sum() {
    let mut rng = rng(2);
    for shape @ (out, cols, _) in SHAPES {
        let adapter: LowRank<f32> = random_adapter(&mut rng, shape, 0.7);
        let w0: Array2<f32> = random(&mut rng, out, cols);
        let exact = wide(w0.view()) + delta_oracle(&adapter);
        let merged = lowrank::merge(w0.view(), &adapter, Layout::OutIn).unwrap();
        for (&w, &exact) in merged.weight().iter().zip(&exact) {
            let ulp = f64::from(w.abs().next_up() - w.abs());
            assert!((f64::from(w) - exact).abs() <= 0.5000001 * ulp, "{w:e} for {exact:e} in {shape:?}");
        }
    }
}

#[test]
fn any_stride_is_read_and_written() {
    let mut rng = rng(3);
    let adapter: LowRank<f64> = random_adapter(&mut rng, (70, 9, 2), 1.5);
    // W₀ [70, 9] is every second column of a transposed array.
    let big: Array2<f64> = random(&mut rng, 9, 140);
    let w0 = big.slice(s![.., ..;2]).reversed_axes();
    let exact = delta_oracle(&adapter);
    let merged = lowrank::merge(w0, &adapter, Layout::OutIn).unwrap();
    assert!(distance(&merged.into_weight(), &(&w0 + &exact)) < 1e-13);

    let mut y = Array2::zeros((70, 70)).reversed_axes();
    adapter.apply(w0, y.view_mut()).unwrap();
    assert!(distance(&y, &times(w0, exact.t())) < 1e-12);

    let (a, b, scale) = adapter.into_parts();
    let a = a.t().as_standard_layout().into_owned().reversed_axes();
    let column_major = LowRank::new(a, b, scale).unwrap();
    assert!(distance(&column_major.delta(), &exact) < 1e-13);
}

#[test]
fn a_thousand_merges_leave_every_bit() {
    let mut rng = rng(4);
    let mut w0: Array2<f32> = random(&mut rng, 12, 10);
    // What adding and subtracting again would lose.
    w0.row_mut(0).assign(&array![0.0, -0.0, 1e-45, -1e-45, f32::MIN_POSITIVE, 1e30, -1e30, 1.0, f32::EPSILON, 3e-39]);
    let bits = |w: ArrayView2<'_, f32>| w.iter().map(|w| w.to_bits()).collect::<Vec<_>>();
    let (before, address) = (bits(w0.view()), w0.as_ptr());
    let mut base = w0.view();
    for i in 0..1000 {
        let adapter: LowRank<f32> = random_adapter(&mut rng, (12, 10, 1 + i % 10), 1e3);
        let merged = lowrank::merge(base, &adapter, Layout::OutIn).unwrap();
        assert_ne!(merged.weight(), base, "merge {i} did nothing");
        base = merged.unmerge();
    }
    assert_eq!(bits(base), before);
    assert_eq!(base.as_ptr(), address, "the same memory, not a copy");
}

// ---- singular values ----

#[test]
fn truncation_leaves_the_dropped_singular_values() {
    let mut rng = rng(5);
    for (out, cols, sigma, rank, error) in [
        (8, 6, &[5.0, 4.0, 3.0, 2.0][..], 2, 13.0_f64.sqrt()),
        (6, 8, &[5.0, 4.0, 3.0, 2.0], 3, 2.0),
        (8, 6, &[5.0, 4.0, 3.0, 2.0], 4, 0.0), // exactly of low rank: recovered
        (70, 90, &[1.0, 1e-3], 2, 0.0),
        (70, 90, &[1.0, 1e-3], 1, 1e-3),
        (5, 5, &[7.0, 7.0, 1.0], 2, 1.0), // equal ones, both kept
        (5, 5, &[3.0], 5, 0.0),           // more rank than there is
        (1, 4, &[2.0], 1, 0.0),
        (4, 4, &[0.0], 2, 0.0), // ΔW = 0
    ] {
        let case = format!("[{out}, {cols}] with σ {sigma:?} at rank {rank}");
        let delta = with_sigma(&orthogonal(&mut rng, out), sigma, &orthogonal(&mut rng, cols), 0);
        let nearest = lowrank::truncate(delta.view(), rank).unwrap();
        let (adapter, left) = (&nearest.adapter, distance(&delta, &delta_oracle(&nearest.adapter)));
        assert_eq!((adapter.rank(), adapter.scale()), (rank, 1.0), "{case}");
        assert!((nearest.error - error).abs() < 1e-13, "{case}: says {}", nearest.error);
        assert!((left - error).abs() < 1e-13, "{case}: leaves {left}");
        // Balanced: column k of B and row k of A both have the norm √σ_k.
        for k in 0..rank {
            let root = sigma.get(k).copied().unwrap_or(0.0).sqrt();
            let a = norm(&adapter.a().slice(s![k..=k, ..]).to_owned());
            let b = norm(&adapter.b().slice(s![.., k..=k]).to_owned());
            assert!((a - root).abs() < 1e-6 && (b - root).abs() < 1e-6, "{case}: {a} and {b}");
        }
        // f32 does the same to its own precision.
        let single = lowrank::truncate(delta.mapv(|x| x as f32).view(), rank).unwrap();
        assert!(distance(&wide(single.adapter.delta().view()), &adapter.delta()) < 3e-6, "{case} in f32");
    }
}

#[test]
fn no_adapter_of_the_rank_is_nearer() {
    let mut rng = rng(6);
    for shape @ (out, cols, rank) in [(5, 7, 2), (9, 4, 1), (6, 6, 4)] {
        let delta: Array2<f64> = random(&mut rng, out, cols);
        let nearest = lowrank::truncate(delta.view(), rank).unwrap();
        for i in 0..300 {
            // From strangers to close neighbours of the best.
            let step = 10.0_f64.powi(-(i % 7));
            let a = &nearest.adapter.a() + &(random::<f64>(&mut rng, rank, cols) * step);
            let b = &nearest.adapter.b() + &(random::<f64>(&mut rng, out, rank) * step);
            let left = distance(&delta, &times(b.view(), a.view()));
            assert!(left >= nearest.error - 1e-14, "{shape:?}: {left} beats {}", nearest.error);
        }
    }
}

#[test]
fn the_svd_through_the_factors_is_the_svd_of_delta() {
    let mut rng = rng(7);
    for shape @ (_, _, rank) in SHAPES {
        for scale in [2.0, -0.5] {
            let case = format!("{shape:?} at scale {scale}");
            let adapter: LowRank<f64> = random_adapter(&mut rng, shape, scale);
            let delta = delta_oracle(&adapter);
            let small = lowrank::svd_of(&adapter).unwrap();
            let rebuilt = with_sigma(&small.u, small.sigma.as_slice().unwrap(), &small.v, 0);
            assert!(distance(&rebuilt, &delta) < 1e-13 * norm(&delta), "{case}");
            for side in [&small.u, &small.v] {
                assert!(distance(&times(side.t(), side.view()), &Array2::eye(rank)) < 1e-12, "{case}: orthonormal");
            }
            // Element by element, because the signs are chosen and random singular values are distinct.
            let full = lowrank::svd(delta.view()).unwrap();
            assert_eq!((full.rank(), small.rank()), (rank, rank), "{case}");
            assert!(distance(&small.u, &full.u.slice(s![.., ..rank]).to_owned()) < 1e-10, "{case}: U");
            assert!(distance(&small.v, &full.v.slice(s![.., ..rank]).to_owned()) < 1e-10, "{case}: V");
            for (k, (small, full)) in small.sigma.iter().zip(&full.sigma).enumerate() {
                assert!((small - full).abs() < 1e-12, "{case}: σ_{k} is {small} and {full}");
            }
            for u in small.u.columns() {
                let largest = u.iter().copied().max_by(|x, y| x.abs().total_cmp(&y.abs())).unwrap();
                assert!(largest > 0.0, "{case}: sign");
            }
            assert_eq!(small, lowrank::svd_of(&adapter).unwrap(), "{case}: the same bits again");
            // Lowering the rank by either way is the same adapter.
            let lower = rank.div_ceil(2);
            let (x, y) = (small.truncate::<f64>(lower).unwrap(), full.truncate::<f64>(lower).unwrap());
            assert!((x.error - y.error).abs() < 1e-10, "{case}: {} and {}", x.error, y.error);
            assert!(distance(&x.adapter.delta(), &y.adapter.delta()) < 1e-10, "{case}: truncated");
        }
    }
}

#[test]
fn the_svd_of_an_adapter_never_holds_delta() {
    // ΔW would take 320 GB.
    let n = 200_000;
    let adapter = LowRank::new(Array2::<f32>::ones((1, n)), Array2::ones((n, 1)), 0.5).unwrap();
    let svd = lowrank::svd_of(&adapter).unwrap();
    assert_relative_eq!(svd.sigma[0], 0.5 * n as f64, max_relative = 1e-12);
    assert!(svd.u.iter().chain(&svd.v).all(|x| (x * (n as f64).sqrt() - 1.0).abs() < 1e-10));
}

// ---- section 7 ----

#[test]
fn similarity_by_hand() {
    let (sin, cos) = 0.5_f64.sin_cos();
    let c = cos * cos;
    // Directions e₁ and e₂ …
    let x = array![[2.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]];
    // … against e₁ turned by half a radian out of their plane, e₂, and e₄,
    let turned = array![[3.0 * cos, 0.0, 3.0 * sin, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]];
    let elsewhere = array![[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 4.0, -2.0]];
    // another basis of the same plane, whose single directions are at 45°,
    let diagonal = array![[2.0, 2.0, 0.0, 0.0], [1.0, -1.0, 0.0, 0.0]];
    // and a factor of rank 1, with one direction to compare.
    let repeated = array![[1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0]];
    for (case, y, expected) in [
        ("turned", &turned, array![[c, c, c], [c, (1.0 + c) / 2.0, (1.0 + c) / 2.0]]),
        ("orthogonal", &elsewhere, Array2::zeros((2, 2))),
        ("itself", &x, Array2::ones((2, 2))),
        ("another basis", &diagonal, array![[0.5, 1.0], [1.0, 1.0]]),
        ("of rank 1", &repeated, array![[1.0 / 30.0], [5.0 / 30.0]]),
    ] {
        let phi = lowrank::subspace_similarity(x.view(), y.view(), Side::Right).unwrap();
        assert_eq!(phi.dim(), expected.dim(), "{case}");
        assert!(distance(&phi, &expected) < 1e-14, "{case}: {phi}");
        let exchanged = lowrank::subspace_similarity(y.view(), x.view(), Side::Right).unwrap();
        assert!(distance(&exchanged.t().to_owned(), &phi) < 1e-14, "{case}, exchanged");
        let left = lowrank::subspace_similarity(x.t(), y.t(), Side::Left).unwrap();
        assert!(distance(&left, &phi) < 1e-14, "{case}, as left directions");
    }
}

#[test]
fn similarity_of_random_factors() {
    let mut rng = rng(8);
    for (r1, r2, dim) in [(8, 64, 96), (3, 2, 5), (4, 4, 4), (1, 1, 300)] {
        let (x, y): (Array2<f32>, Array2<f32>) = (random(&mut rng, r1, dim), random(&mut rng, r2, dim));
        let phi = lowrank::subspace_similarity(x.view(), y.view(), Side::Right).unwrap();
        assert_eq!(phi.dim(), (r1, r2));
        // The definition, by loops, over the directions that `svd` gives.
        let (ux, uy) = (lowrank::svd(x.view()).unwrap().v, lowrank::svd(y.view()).unwrap().v);
        let cross = times(ux.t(), uy.view());
        for ((i, j), &phi) in phi.indexed_iter() {
            let block: f64 = cross.slice(s![..=i, ..=j]).iter().map(|x| x * x).sum();
            assert!((phi - block / (i + 1).min(j + 1) as f64).abs() < 1e-13, "φ({}, {}) = {phi}", i + 1, j + 1);
            assert!((0.0..=1.0).contains(&phi));
        }
        let own = lowrank::subspace_similarity(x.view(), x.view(), Side::Right).unwrap();
        assert!(own.iter().all(|phi| (phi - 1.0).abs() < 1e-12 && *phi <= 1.0), "a subspace contains itself");
        if r2 == dim {
            assert!((phi[[r1 - 1, r2 - 1]] - 1.0).abs() < 1e-12, "the whole space contains everything");
        }
    }
}

#[test]
fn amplification_of_known_directions() {
    let mut rng = rng(9);
    for (out, cols) in [(7, 9), (9, 7), (8, 8), (6, 70)] {
        let (u, v) = (orthogonal(&mut rng, out), orthogonal(&mut rng, cols));
        let w0 = with_sigma(&u, &[50.0, 30.0, 4.0, 3.0], &v, 0);
        let conv1d = w0.t().as_standard_layout().into_owned();
        for (case, delta, first, delta_norm, projected_norm) in [
            ("the third and fourth direction", &[8.0, 6.0][..], 2, 10.0, 5.0),
            ("the first", &[5.0], 0, 5.0, 50.0),
            ("one that W₀ has and one that it has not", &[3.0, 4.0], 3, 5.0, 3.0),
            ("the second, by an adapter of rank 3", &[6.0, 0.0, 0.0], 1, 6.0, 30.0),
        ] {
            // Unbalanced factors with a scale: only s·B·A counts.
            let (rank, delta) = (delta.len(), with_sigma(&u, delta, &v, first));
            let (a, b, _) = lowrank::truncate(delta.view(), rank).unwrap().adapter.into_parts();
            let adapter = LowRank::new(a * -8.0, b * 0.5, -0.25).unwrap();
            for (w0, layout) in [(&w0, Layout::OutIn), (&conv1d, Layout::InOut)] {
                let found = lowrank::amplification(w0.view(), &adapter, layout).unwrap();
                println!("{case}: {found:?}"); // shown when one of these fails
                assert_abs_diff_eq!(found.delta_norm, delta_norm, epsilon = 1e-12);
                assert_abs_diff_eq!(found.projected_norm, projected_norm, epsilon = 1e-11);
                assert_abs_diff_eq!(found.factor(), delta_norm / projected_norm, epsilon = 1e-11);
            }
        }
    }
    let adapter = LowRank::new(array![[0.0, 1.0]], array![[1.0], [0.0]], 1.0).unwrap();
    let found = lowrank::amplification(Array2::eye(2).view(), &adapter, Layout::OutIn).unwrap();
    assert_eq!(found.factor(), f64::INFINITY, "W₀ has nothing of this direction");
}

// ---- refusals ----

#[test]
fn every_error_is_provoked_and_explains_itself() {
    use lowrank::{amplification, merge, subspace_similarity, svd, svd_of, truncate};
    let (nan, inf) = (f64::NAN, f64::INFINITY);
    let ones = |rows, cols| Array2::<f64>::ones((rows, cols));
    let zeros = |rows, cols| Array2::<f64>::zeros((rows, cols));
    let with = |at: [usize; 2], value: f64| {
        let mut m = ones(2, 3);
        m[at] = value;
        m
    };
    let new = LowRank::<f64>::new;
    let good = new(ones(1, 3), ones(2, 1), 1.0).unwrap();
    let untrained = new(ones(1, 3), zeros(2, 1), 1.0).unwrap();
    let huge = new(ones(1, 3) * 1e200, ones(2, 1) * 1e200, 1.0).unwrap();
    let f32_max = Array2::<f32>::from_elem((2, 3), f32::MAX);
    let large = LowRank::new(f32_max.slice(s![..1, ..]).to_owned(), Array2::ones((2, 1)), 1.0).unwrap();
    let right = |x: Array2<f64>, y: Array2<f64>| subspace_similarity(x.view(), y.view(), Side::Right).err();
    let left = |x: Array2<f64>, y: Array2<f64>| subspace_similarity(x.view(), y.view(), Side::Left).err();
    let apply = |x: Array2<f64>, mut y: Array2<f64>| good.apply(x.view(), y.view_mut()).err();
    let merged = |w0: Array2<f64>, layout| merge(w0.view(), &good, layout).err();

    for (error, variant, says) in [
        (new(ones(2, 3), ones(3, 1), 1.0).err(), "Shape", "A is [2, 3] but B is [3, 1]: A is [r, in]"),
        (apply(ones(4, 2), ones(4, 2)), "Shape", "x is [4, 2] but A is [1, 3]"),
        (apply(ones(4, 3), ones(4, 3)), "Shape", "y is [4, 3] but x·Aᵀ·Bᵀ is [4, 2]"),
        (apply(ones(4, 3), ones(5, 2)), "Shape", "y is [5, 2] but x·Aᵀ·Bᵀ is [4, 2]"),
        (merged(ones(3, 2), Layout::OutIn), "Shape", "W₀ is [3, 2] but ΔW in W₀'s layout is [2, 3]"),
        (merged(ones(2, 3), Layout::InOut), "Shape", "W₀ is [2, 3] but ΔW in W₀'s layout is [3, 2]"),
        (amplification(ones(3, 2).view(), &good, Layout::OutIn).err(), "Shape", "W₀ is [3, 2]"),
        (right(ones(1, 3), ones(1, 4)), "Shape", "[1, 3] but the other is [1, 4]: right directions"),
        (left(ones(3, 1), ones(4, 1)), "Shape", "[3, 1] but the other is [4, 1]: left directions"),
        (new(ones(0, 3), ones(2, 0), 1.0).err(), "Rank", "rank 0 is impossible for a ΔW of shape [2, 3]: a rank is at"),
        (new(ones(3, 0), ones(2, 3), 1.0).err(), "Rank", "shape [2, 0]: it holds nothing"),
        (truncate(ones(2, 3).view(), 0).err(), "Rank", "choose one from 1 to 2"),
        (truncate(ones(2, 3).view(), 3).err(), "Rank", "rank 3"),
        (truncate(ones(0, 3).view(), 1).err(), "Rank", "shape [0, 3]: it holds nothing"),
        (svd_of(&good).unwrap().truncate::<f64>(2).err(), "Rank", "only rank 1"),
        (new(with([1, 2], nan), ones(4, 2), 1.0).err(), "NonFinite", "A is NaN at [1, 2]"),
        (new(ones(2, 4), with([1, 0], -inf).reversed_axes(), 1.0).err(), "NonFinite", "B is -inf at [0, 1]"),
        (merged(with([1, 0], nan), Layout::OutIn), "NonFinite", "W₀ is NaN at [1, 0]"),
        (merge(with([0, 2], inf).t(), &good, Layout::InOut).err(), "NonFinite", "W₀ is inf at [2, 0]"),
        (merge(f32_max.view(), &large, Layout::OutIn).err(), "NonFinite", "W₀ + ΔW is inf at [0, 0]"),
        (truncate(with([1, 1], nan).view(), 1).err(), "NonFinite", "the matrix is NaN at [1, 1]"),
        (svd(with([0, 0], inf).view()).err(), "NonFinite", "the matrix is inf at [0, 0]"),
        (right(with([0, 1], nan), ones(1, 3)), "NonFinite", "NaN at [0, 1]"),
        (amplification(with([1, 2], nan).view(), &good, Layout::OutIn).err(), "NonFinite", "W₀ is NaN at [1, 2]"),
        (new(ones(1, 3), ones(2, 1), nan).err(), "Scale", "the scale NaN"),
        (new(ones(1, 3), ones(2, 1), inf).err(), "Scale", "the scale inf"),
        (LowRank::with_alpha(ones(1, 3), ones(2, 1), inf, Scaling::Lora).err(), "Alpha", "alpha inf at rank 1"),
        (Scaling::Lora.scale(nan, 4).err(), "Alpha", "alpha NaN at rank 4"),
        (Scaling::Lora.scale(1.0, 0).err(), "Alpha", "alpha 1 at rank 0"),
        (Scaling::RsLora.scale(0.0, 0).err(), "Alpha", "alpha 0 at rank 0"),
        (right(ones(1, 3), zeros(2, 3)), "Zero", "the other matrix is zero"),
        (right(ones(0, 3), ones(1, 3)), "Zero", "one matrix is zero"),
        (amplification(ones(2, 3).view(), &untrained, Layout::OutIn).err(), "Zero", "ΔW is zero"),
        (svd_of(&huge).err(), "Svd", "overflows"),
        (svd((ones(4, 3) * 1e300).view()).err(), "Svd", "4×3"),
    ] {
        let error = error.unwrap_or_else(|| panic!("nothing refused where {variant} should say {says:?}"));
        assert!(format!("{error:?}").starts_with(variant), "{error:?} is not {variant}");
        assert!(error.to_string().contains(says), "{error} does not say {says:?}");
    }
}

// ---- where an adapter begins ----

/// B·A is what W has most of, B and A share it equally; iterations find the same.
#[test]
fn pissa_is_the_best_approximation_of_the_weight() {
    let mut rng = rng(11);
    for (out, cols, r) in SHAPES {
        let w: Array2<f64> = random(&mut rng, out, cols);
        for scale in [1.0, 0.25, 3.0] {
            let begun = lowrank::pissa(w.view(), r, scale).unwrap();
            let best = lowrank::truncate(w.view(), r).unwrap();
            assert_eq!((begun.scale(), begun.dim(), begun.rank()), (scale, (out, cols), r));
            let left = distance(&delta_oracle(&begun), &w);
            assert_abs_diff_eq!(left, best.error, epsilon = 1e-12 * norm(&w));
            assert_abs_diff_eq!(norm(&begun.a().to_owned()), norm(&begun.b().to_owned()), epsilon = 1e-12 * norm(&w));
            // A weight of rank r has nothing else for the iterations to find.
            let w = delta_oracle(&begun);
            let omega: Array2<f64> = random(&mut rng, cols, r);
            let found = lowrank::pissa_by_iterations(w.view(), omega.view(), 1, scale).unwrap();
            assert_abs_diff_eq!(distance(&delta_oracle(&found), &w), 0.0, epsilon = 1e-11 * norm(&w));
        }
    }
    // Where the spectrum falls slowly each iteration comes nearer.
    let w: Array2<f64> = random(&mut rng, 40, 60);
    let omega: Array2<f64> = random(&mut rng, 60, 4);
    let best = delta_oracle(&lowrank::pissa(w.view(), 4, 1.0).unwrap());
    let off = |niter| {
        let found = lowrank::pissa_by_iterations(w.view(), omega.view(), niter, 1.0).unwrap();
        distance(&delta_oracle(&found), &best) / norm(&best)
    };
    assert!(off(0) > 0.3 && off(4) < off(0) && off(300) < 1e-4, "{} {} {}", off(0), off(4), off(300));
}

#[test]
fn olora_begins_at_orthonormal_directions_of_the_weight() {
    let mut rng = rng(12);
    for (out, cols, r) in SHAPES {
        let w: Array2<f64> = random(&mut rng, out, cols);
        let begun = lowrank::olora(w.view(), r, 0.5).unwrap();
        let (a, b) = (begun.a().to_owned(), begun.b().to_owned());
        assert_abs_diff_eq!(distance(&times(b.t(), b.view()), &Array2::eye(r)), 0.0, epsilon = 1e-12);
        // A holds what these directions have of W, and a column's own direction is the first that it needs.
        assert_abs_diff_eq!(distance(&times(b.t(), w.view()), &a), 0.0, epsilon = 1e-12 * norm(&w));
        for i in 0..r {
            assert!(a[[i, i]] >= 0.0 && (0..i).all(|j| a[[i, j]].abs() < 1e-12), "{out}×{cols}: row {i} of A");
        }
    }
}

#[test]
fn orthogonal_factors_are_not_zero_and_their_product_is() {
    let mut rng = rng(13);
    for r in [2, 8] {
        let [x, left, right] = [(r, r), (20, r / 2), (30, r / 2)].map(|(n, m)| random::<f64>(&mut rng, n, m));
        let (a, b) = lowrank::orthogonal(x.view(), left.view(), right.view());
        assert_eq!((a.dim(), b.dim()), ((r, 30), (20, r)));
        assert_abs_diff_eq!(norm(&times(b.view(), a.view())), 0.0, epsilon = 1e-14);
        // Rows of an orthogonal matrix keep lengths.
        assert_relative_eq!(norm(&a), 0.1 * norm(&right), max_relative = 1e-12);
        assert_relative_eq!(norm(&b), 0.1 * norm(&left), max_relative = 1e-12);
    }
}

#[test]
fn weights_that_nothing_can_begin_at_are_refused() {
    let w = array![[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]];
    let bad = array![[1.0, f64::NAN, 3.0], [4.0, 5.0, 6.0]];
    let omega = |r| Array2::<f64>::ones((3, r));
    for rank in [0, 3] {
        assert!(matches!(lowrank::pissa(w.view(), rank, 1.0), Err(lowrank::Error::Rank { .. })));
        assert!(matches!(lowrank::olora(w.view(), rank, 1.0), Err(lowrank::Error::Rank { .. })));
        let found = lowrank::pissa_by_iterations(w.view(), omega(rank).view(), 1, 1.0);
        assert!(matches!(found, Err(lowrank::Error::Rank { .. })));
    }
    assert!(matches!(lowrank::pissa(bad.view(), 1, 1.0), Err(lowrank::Error::NonFinite { .. })));
    assert!(matches!(lowrank::olora(bad.view(), 1, 1.0), Err(lowrank::Error::NonFinite { .. })));
    let found = lowrank::pissa_by_iterations(bad.view(), omega(1).view(), 1, 1.0);
    assert!(matches!(found, Err(lowrank::Error::NonFinite { .. })));
    assert!(matches!(lowrank::olora(w.view(), 1, f64::INFINITY), Err(lowrank::Error::Scale { .. })));
}
