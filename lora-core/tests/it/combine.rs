//! Several updates in one, against sums that are known beforehand. PEFT's own results: `lora-model/tests/it/combine.rs`.

use lora_core::lowrank::{self, Combination, Error, LowRank, MajoritySign, Rule};
use ndarray::{Array2, array};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn random(rng: &mut ChaCha8Rng, (out, cols, r): (usize, usize, usize), scale: f64) -> LowRank<f64> {
    let mut matrix = |rows, cols| Array2::from_shape_fn((rows, cols), |_| rng.random_range(-1.0..1.0));
    LowRank::new(matrix(r, cols), matrix(out, r), scale).unwrap()
}

fn norm(m: &Array2<f64>) -> f64 {
    m.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// An update whose A is the given row, and whose B is 1.
fn row<const N: usize>(a: [f64; N]) -> LowRank<f64> {
    LowRank::new(Array2::from_shape_vec((1, N), a.to_vec()).unwrap(), array![[1.0]], 1.0).unwrap()
}

/// The A of such updates with weights of one; their B is 1, and stays it.
fn combined(updates: &[LowRank<f64>], rule: Rule) -> Vec<f64> {
    let updates: Vec<_> = updates.iter().map(|u| (1.0, u)).collect();
    lowrank::combine(&updates, Combination::Factors(rule)).unwrap().adapter.a().iter().copied().collect()
}

#[test]
fn cat_and_the_svd_of_a_sum_are_the_sum() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let updates =
        [random(&mut rng, (9, 7, 2), 0.5), random(&mut rng, (9, 7, 3), -2.0), random(&mut rng, (9, 7, 1), 1.0)];
    let weighted: Vec<_> = [0.7, 0.3, -1.1].into_iter().zip(&updates).collect();
    let sum = weighted.iter().fold(Array2::<f64>::zeros((9, 7)), |sum, (w, u)| sum + u.delta() * *w);
    let cat = lowrank::combine(&weighted, Combination::Cat).unwrap();
    assert_eq!((cat.adapter.rank(), cat.adapter.scale(), cat.error), (6, 1.0, 0.0));
    assert!(norm(&(cat.adapter.delta() - &sum)) < 1e-13);

    // At every rank the nearest there is, which the dense SVD of the sum gives too.
    for rank in 1..=7 {
        let cut = lowrank::combine(&weighted, Combination::Delta(Rule::Linear, rank)).unwrap();
        let nearest = lowrank::truncate(sum.view(), rank).unwrap();
        assert_eq!(cut.adapter.rank(), rank);
        assert!((cut.error - nearest.error).abs() < 1e-12, "{rank}: {} {}", cut.error, nearest.error);
        let left = norm(&(cut.adapter.delta() - &sum));
        assert!((left - cut.error).abs() < 1e-12, "{rank}: {left} {}", cut.error);
    }
}

#[test]
fn linear_scales_both_factors() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let u = random(&mut rng, (4, 5, 2), 3.0);
    for weight in [0.4, -0.4] {
        // One update is scaled exactly, whatever its sign.
        let one = lowrank::combine(&[(weight, &u)], Combination::Factors(Rule::Linear)).unwrap().adapter;
        assert!(norm(&(one.delta() - u.delta() * weight)) < 1e-14, "{weight}");
    }
    // Of two the products of one's B with the other's A come in: √(½)A₁ + √(½)A₂ and B alike.
    let v = random(&mut rng, (4, 5, 2), 3.0);
    let both = lowrank::combine(&[(0.5, &u), (0.5, &v)], Combination::Factors(Rule::Linear)).unwrap().adapter;
    let (a, b) = (&u.a() + &v.a(), &u.b() + &v.b());
    assert!(norm(&(both.delta() - b.dot(&a) * 1.5)) < 1e-13);
}

#[test]
fn ties_trims_elects_and_merges() {
    let updates = [row([4.0, -1.0, 0.5, 2.0]), row([-1.0, -3.0, 0.1, 2.0]), row([-2.0, 0.2, 1.0, -3.0])];
    let ties = |sign| Rule::Ties { density: 0.5, sign };
    // Two of four elements stay of each: [4, 0, 0, 2], [0, -3, 0, 2], [-2, 0, 0, -3].
    // By sums: 4 - 2 > 0: 4. -3: -3. 0: nothing agrees with +, 0. 2 + 2 - 3 > 0: (2 + 2)/2.
    assert_eq!(combined(&updates, ties(MajoritySign::Total)), [4.0, -3.0, 0.0, 2.0]);
    // By counts one against one is +, and the same elements win.
    assert_eq!(combined(&updates, ties(MajoritySign::Frequency)), [4.0, -3.0, 0.0, 2.0]);
    // A large one against two small ones wins by its size alone.
    let updates = [row([-5.0]), row([1.0]), row([2.0])];
    let all = |sign| Rule::Ties { density: 1.0, sign };
    assert_eq!(combined(&updates, all(MajoritySign::Total)), [-5.0]);
    assert_eq!(combined(&updates, all(MajoritySign::Frequency)), [1.5]);
    // Pruning alone sums what stays; of equal elements the first do.
    let equal = [row([1.0, -1.0, 1.0, 0.5]), row([0.0, 2.0, 0.0, 3.0])];
    assert_eq!(combined(&equal, Rule::MagnitudePrune { density: 0.5 }), [1.0, 1.0, 0.0, 3.0]);
    assert_eq!(combined(&equal[..1], Rule::MagnitudePrune { density: 0.49 }), [1.0, 0.0, 0.0, 0.0]);
}

#[test]
fn dropping_keeps_the_expectation_and_follows_its_seed() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let (u, v) = (random(&mut rng, (3, 4, 2), 1.0), random(&mut rng, (3, 4, 2), 0.5));
    let merged = |density, seed| {
        let how = Combination::Delta(Rule::DareLinear { density, seed }, 3);
        lowrank::combine(&[(0.7, &u), (-0.2, &v)], how).unwrap().adapter.delta()
    };
    assert_eq!(merged(0.3, 5), merged(0.3, 5));
    assert_ne!(merged(0.3, 5), merged(0.3, 6));
    let sum = u.delta() * 0.7 + v.delta() * -0.2;
    assert!(norm(&(merged(1.0, 0) - &sum)) < 1e-13, "at density 1 nothing drops");

    const N: u64 = 20_000;
    let density = 0.3;
    let mean = (0..N).fold(Array2::<f64>::zeros((3, 4)), |mean, seed| mean + merged(density, seed) / N as f64);
    // An element's variance is (1/p − 1)·Σ (wₖxₖ)².
    for (at, mean) in mean.indexed_iter() {
        let squares = (0.7 * u.delta()[at]).powi(2) + (0.2 * v.delta()[at]).powi(2);
        let deviation = ((1.0 / density - 1.0) * squares / N as f64).sqrt();
        assert!((mean - sum[at]).abs() < 5.0 * deviation, "{at:?}: {mean} for {} ± {deviation}", sum[at]);
    }
    // A and B of one update drop different elements, and so do two updates.
    let ones = LowRank::new(Array2::<f64>::ones((2, 300)), Array2::ones((300, 2)), 1.0).unwrap();
    let kept = |updates: &[(f64, &LowRank<f64>)]| {
        let how = Combination::Factors(Rule::DareLinear { density: 0.5, seed: 9 });
        lowrank::combine(updates, how).unwrap().adapter
    };
    let one = kept(&[(1.0, &ones)]);
    assert_ne!(one.a(), one.b().t());
    let share = one.a().iter().filter(|x| **x != 0.0).count();
    assert!((240..360).contains(&share) && one.a().iter().all(|x| [0.0, 2.0].contains(x)), "{share} of 600");
    let both = kept(&[(1.0, &ones), (1.0, &ones)]);
    assert_eq!(both.a().iter().map(|x| *x as u8).collect::<std::collections::BTreeSet<_>>(), [0, 2, 4].into());
}

/// Above the smaller side nothing is cut, and nothing is refused.
#[test]
fn ranks_above_the_smaller_side_hold_the_whole_sum() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let (u, v) = (random(&mut rng, (4, 5, 6), 0.5), random(&mut rng, (4, 5, 3), 2.0));
    let sum = u.delta() * 0.7 + v.delta() * -0.2;
    let density = 1.0;
    for (how, rank) in [
        (Combination::Cat, 9),
        (Combination::Delta(Rule::Linear, 9), 9),
        (Combination::Delta(Rule::MagnitudePrune { density }, 7), 7),
    ] {
        let merged = lowrank::combine(&[(0.7, &u), (-0.2, &v)], how).unwrap();
        assert_eq!(merged.adapter.rank(), rank, "{how:?}");
        let off = norm(&(merged.adapter.delta() - &sum)) / norm(&sum);
        assert!(off < 1e-13 && merged.error < 1e-13, "{how:?}: {off:e}, {:e}", merged.error);
    }
}

#[test]
fn what_cannot_be_combined_says_why() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let (u, other) = (random(&mut rng, (4, 5, 2), 1.0), random(&mut rng, (5, 4, 2), 1.0));
    let wide = random(&mut rng, (4, 5, 3), 1.0);
    let refused = |updates: &[(f64, &LowRank<f64>)], how| lowrank::combine(updates, how).unwrap_err();
    let linear = Combination::Factors(Rule::Linear);
    assert_eq!(refused(&[], linear), Error::Nothing);
    for (e, part) in [
        (refused(&[(1.0, &u), (1.0, &other)], Combination::Cat), "one shape"),
        (refused(&[(1.0, &u), (1.0, &wide)], linear), "one rank"),
        (refused(&[(f64::NAN, &u)], linear), "NaN"),
        (refused(&[(1.0, &u)], Combination::Delta(Rule::Linear, 0)), "rank 0"),
        (refused(&[(1.0, &u)], Combination::Factors(Rule::MagnitudePrune { density: 0.0 })), "density 0"),
        (refused(&[(1.0, &u)], Combination::Factors(Rule::MagnitudePrune { density: 1.5 })), "density 1.5"),
        (refused(&[(1.0, &u)], Combination::Delta(Rule::DareLinear { density: f64::NAN, seed: 0 }, 1)), "density NaN"),
    ] {
        assert!(e.to_string().contains(part), "{e}");
    }
}
