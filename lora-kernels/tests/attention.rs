//! Attention against plain loops in f64, against finite differences, and against itself cut differently.

use lora_kernels::{
    Acc, Attention, Buffer, CachedRows, DType, Device, Dropout, Element, Mat, MatMut, Sequences, attention,
    attention_backward, attention_cached, philox,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const DROPOUT: Dropout = Dropout { p: 0.25, seed: 1 << 40 | 3, step: 17, site: 5, row_offset: 1000 };

/// Every combination of causal, heads, lengths and dropout.
fn cases() -> Vec<(Attention, Vec<usize>)> {
    let mut all = Vec::new();
    for causal in [true, false] {
        for (heads, kv_heads) in [(4, 4), (4, 2), (4, 1)] {
            for lengths in [vec![1], vec![5, 1, 7], vec![33], vec![130, 3], vec![0, 2], vec![270]] {
                for dropout in [None, Some(DROPOUT)] {
                    let head_dim = if lengths.len() == 3 { 6 } else { 8 };
                    all.push((Attention { heads, kv_heads, head_dim, scale: 0.6, causal, dropout }, lengths.clone()));
                }
            }
        }
    }
    all
}

fn random(rng: &mut ChaCha8Rng, n: usize) -> Vec<f64> {
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn buffer<T: Element>(data: &[f64], of: fn(f64) -> T) -> Buffer {
    Buffer::from_slice(&Device::Cpu, &data.iter().map(|&v| of(v)).collect::<Vec<_>>()).unwrap()
}

fn relative(x: &[f64], want: &[f64]) -> f64 {
    assert_eq!(x.len(), want.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let diff = norm(&mut x.iter().zip(want).map(|(a, b)| a - b));
    diff / norm(&mut want.iter().copied()).max(1e-300)
}

/// Columns of q, k and v in the fused projection.
fn widths(cfg: &Attention) -> [usize; 3] {
    [cfg.heads, cfg.kv_heads, cfg.kv_heads].map(|h| h * cfg.head_dim)
}

fn width(cfg: &Attention) -> usize {
    widths(cfg).iter().sum()
}

fn parts<'a>(cfg: &Attention, qkv: &'a Buffer) -> [Mat<'a>; 3] {
    let [a, b, c] = widths(cfg);
    let m = Mat::new(qkv, 0, qkv.len() / (a + b + c), a + b + c);
    [m.cols_in(0..a), m.cols_in(a..a + b), m.cols_in(a + b..a + b + c)]
}

/// Output and log-sum-exp of the kernel.
fn forward(cfg: &Attention, seqs: &Sequences, qkv: &Buffer) -> (Buffer, Buffer) {
    let t = seqs.tokens();
    let empty = |n| {
        let mut b = Buffer::empty(&Device::Cpu, qkv.dtype(), t * n).unwrap();
        poison(&mut b);
        b
    };
    let (mut out, mut lse) = (empty(cfg.heads * cfg.head_dim), empty(cfg.heads));
    let [q, k, v] = parts(cfg, qkv);
    let o = MatMut::new(&mut out, 0, t, cfg.heads * cfg.head_dim);
    attention(cfg, seqs, q, k, v, o, MatMut::new(&mut lse, 0, t, cfg.heads)).unwrap();
    (out, lse)
}

/// Adds result + β·old of the gradients to a fused buffer.
fn backward(cfg: &Attention, seqs: &Sequences, qkv: &Buffer, dout: &Buffer, beta: f64, dqkv: &mut Buffer) {
    let (out, lse) = forward(cfg, seqs, qkv);
    let (t, n) = (seqs.tokens(), cfg.heads * cfg.head_dim);
    let [q, k, v] = parts(cfg, qkv);
    let (dq, dkv) = MatMut::new(dqkv, 0, t, width(cfg)).split_cols(n);
    let (dk, dv) = dkv.split_cols(cfg.kv_heads * cfg.head_dim);
    let [dq, dk, dv] = [dq, dk, dv].map(|to| Acc { to, beta });
    let (out, lse, dout) = (Mat::new(&out, 0, t, n), Mat::new(&lse, 0, t, cfg.heads), Mat::new(dout, 0, t, n));
    attention_backward(cfg, seqs, q, k, v, out, lse, dout, dq, dk, dv).unwrap();
}

fn poison(b: &mut Buffer) {
    match b.dtype() {
        DType::F64 => b.write(0, &vec![f64::NAN; b.len()]).unwrap(),
        _ => b.write(0, &vec![f32::NAN; b.len()]).unwrap(),
    }
}

fn values(b: &Buffer) -> Vec<f64> {
    match b.dtype() {
        DType::F64 => b.to_vec::<f64>(0..b.len()).unwrap(),
        _ => b.to_vec::<f32>(0..b.len()).unwrap().into_iter().map(f64::from).collect(),
    }
}

/// The equations of the module, by loops over whole matrices.
fn oracle(cfg: &Attention, seqs: &Sequences, qkv: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let (w, hd) = (width(cfg), cfg.head_dim);
    let [wq, wk, _] = widths(cfg);
    let (mut out, mut lse) = (vec![0.0; seqs.tokens() * wq], vec![0.0; seqs.tokens() * cfg.heads]);
    for s in 0..seqs.len() {
        let seq = seqs.range(s);
        for h in 0..cfg.heads {
            let g = h * cfg.kv_heads / cfg.heads;
            for i in seq.clone() {
                let end = if cfg.causal { i + 1 } else { seq.end };
                let q = &qkv[i * w + h * hd..][..hd];
                let score = |j: usize| {
                    let k = &qkv[j * w + wq + g * hd..][..hd];
                    cfg.scale * q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>()
                };
                let l = (seq.start..end).map(|j| score(j).exp()).sum::<f64>().ln();
                lse[i * cfg.heads + h] = l;
                for j in seq.start..end {
                    let factor = cfg.dropout.map_or(1.0, |d| {
                        let (pos, site) = ((j - seq.start) as u32, d.site + ((h as u32) << 16));
                        let words = philox(d.seed, [pos / 4, d.row_offset + i as u32, site, d.step]);
                        let kept = f64::from(words[(pos % 4) as usize]) >= d.p * 2f64.powi(32);
                        if kept { 1.0 / (1.0 - d.p) } else { 0.0 }
                    });
                    let p = (score(j) - l).exp() * factor;
                    for c in 0..hd {
                        out[i * wq + h * hd + c] += p * qkv[j * w + wq + wk + g * hd + c];
                    }
                }
            }
        }
    }
    (out, lse)
}

#[test]
fn forward_equals_plain_loops() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for (cfg, lengths) in cases() {
        let seqs = Sequences::new(&lengths);
        let qkv = random(&mut rng, seqs.tokens() * width(&cfg));
        let (want, want_lse) = oracle(&cfg, &seqs, &qkv);
        for (name, qkv, tolerance) in [("f64", buffer(&qkv, |v| v), 1e-13), ("f32", buffer(&qkv, |v| v as f32), 2e-6)] {
            let (out, lse) = forward(&cfg, &seqs, &qkv);
            let (e, el) = (relative(&values(&out), &want), relative(&values(&lse), &want_lse));
            assert!(e < tolerance && el < tolerance, "{name} {cfg:?} {lengths:?}: {e:.1e}, lse {el:.1e}");
        }
    }
}

#[test]
fn backward_equals_finite_differences() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for (cfg, lengths) in cases() {
        let seqs = Sequences::new(&lengths);
        let n = seqs.tokens() * width(&cfg);
        let (qkv, w) = (random(&mut rng, n), random(&mut rng, seqs.tokens() * widths(&cfg)[0]));
        let mut grad = buffer(&vec![0.0; n], |v| v);
        poison(&mut grad);
        backward(&cfg, &seqs, &buffer(&qkv, |v| v), &buffer(&w, |v| v), 0.0, &mut grad);
        let grad = values(&grad);

        let along = |u: &[f64]| {
            let loss = |step: f64| {
                let x: Vec<f64> = qkv.iter().zip(u).map(|(x, u)| x + step * u).collect();
                let (out, _) = forward(&cfg, &seqs, &buffer(&x, |v| v));
                values(&out).iter().zip(&w).map(|(o, w)| o * w).sum::<f64>()
            };
            (loss(1e-5) - loss(-1e-5)) / 2e-5
        };
        // Some single coordinates, then all at once in random directions.
        let mut directions: Vec<Vec<f64>> = (0..3).map(|_| random(&mut rng, n)).collect();
        for _ in 0..24 {
            let mut u = vec![0.0; n];
            u[rng.random_range(0..n)] = 1.0;
            directions.push(u);
        }
        for u in directions {
            let (got, want) = (grad.iter().zip(&u).map(|(g, u)| g * u).sum::<f64>(), along(&u));
            assert!((got - want).abs() < 1e-7 * (1.0 + want.abs()), "{cfg:?} {lengths:?}: {got} for {want}");
        }
    }
}

#[test]
fn backward_in_f32_equals_f64_and_adds_with_beta() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for (cfg, lengths) in cases() {
        let seqs = Sequences::new(&lengths);
        let n = seqs.tokens() * width(&cfg);
        let (qkv, w) = (random(&mut rng, n), random(&mut rng, seqs.tokens() * widths(&cfg)[0]));
        let old = random(&mut rng, n);
        // The same inputs, rounded to f32, for both.
        let [qkv, w, old] = [qkv, w, old].map(|x| x.iter().map(|&v| f64::from(v as f32)).collect::<Vec<_>>());
        for beta in [0.0, 1.0] {
            let (mut d64, mut d32) = (buffer(&old, |v| v), buffer(&old, |v| v as f32));
            if beta == 0.0 {
                poison(&mut d64);
                poison(&mut d32);
            }
            backward(&cfg, &seqs, &buffer(&qkv, |v| v), &buffer(&w, |v| v), beta, &mut d64);
            backward(&cfg, &seqs, &buffer(&qkv, |v| v as f32), &buffer(&w, |v| v as f32), beta, &mut d32);
            let e = relative(&values(&d32), &values(&d64));
            assert!(e < 1e-5, "{cfg:?} {lengths:?} β {beta}: {e:.1e}");
            if beta == 1.0 {
                let mut fresh = buffer(&old, |v| v);
                backward(&cfg, &seqs, &buffer(&qkv, |v| v), &buffer(&w, |v| v), 0.0, &mut fresh);
                let sum: Vec<f64> = values(&fresh).iter().zip(&old).map(|(a, b)| a + b).collect();
                let e = relative(&values(&d64), &sum);
                assert!(e < 1e-13, "{cfg:?} {lengths:?}: β adds, {e:.1e}");
            }
        }
    }
}

#[test]
fn same_bits_for_any_number_of_threads() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let lengths = [70, 1, 300, 128, 9];
    let seqs = Sequences::new(&lengths);
    let cfg = Attention { heads: 4, kv_heads: 2, head_dim: 64, scale: 0.125, causal: true, dropout: Some(DROPOUT) };
    let qkv = buffer(&random(&mut rng, seqs.tokens() * width(&cfg)), |v| v as f32);
    let dout = buffer(&random(&mut rng, seqs.tokens() * 256), |v| v as f32);
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (out, lse) = forward(&cfg, &seqs, &qkv);
            let mut grad = Buffer::empty(&Device::Cpu, DType::F32, qkv.len()).unwrap();
            backward(&cfg, &seqs, &qkv, &dout, 0.0, &mut grad);
            [out, lse, grad].map(|b| b.to_vec::<f32>(0..b.len()).unwrap())
        })
    };
    let one = with(1);
    assert!(one.iter().flatten().all(|v| v.is_finite()));
    assert!(one == with(2) && one == with(3));
}

#[test]
fn a_split_batch_drops_the_same_probabilities() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let cfg = Attention { heads: 2, kv_heads: 1, head_dim: 8, scale: 0.3, causal: true, dropout: Some(DROPOUT) };
    let (whole, first, second) = (Sequences::new(&[20, 9, 40]), Sequences::new(&[20]), Sequences::new(&[9, 40]));
    let x = random(&mut rng, whole.tokens() * width(&cfg));
    let (a, b) = x.split_at(20 * width(&cfg));
    let run = |cfg: &Attention, seqs: &Sequences, x: &[f64]| values(&forward(cfg, seqs, &buffer(x, |v| v)).0);
    let later = Attention { dropout: Some(Dropout { row_offset: DROPOUT.row_offset + 20, ..DROPOUT }), ..cfg };
    let parts = [run(&cfg, &first, a), run(&later, &second, b)].concat();
    assert!(relative(&parts, &run(&cfg, &whole, &x)) < 1e-14);
}

#[test]
fn dropout_keeps_the_mean_of_the_output() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let seqs = Sequences::new(&[24]);
    let plain = Attention { heads: 2, kv_heads: 2, head_dim: 4, scale: 0.5, causal: true, dropout: None };
    let qkv = buffer(&random(&mut rng, 24 * width(&plain)), |v| v);
    let want = values(&forward(&plain, &seqs, &qkv).0);
    let mut mean = vec![0.0; want.len()];
    for step in 0..2000 {
        let cfg = Attention { dropout: Some(Dropout { step, ..DROPOUT }), ..plain };
        let (out, _) = forward(&cfg, &seqs, &qkv);
        mean.iter_mut().zip(values(&out)).for_each(|(m, v)| *m += v / 2000.0);
    }
    let e = relative(&mean, &want);
    assert!(e < 0.03, "mean of 2000 masks is {e} away");
}

fn cached(rows: &[Vec<u32>], new: &[usize]) -> CachedRows {
    let mut cached = CachedRows::new(&Device::Cpu, 1);
    cached.set(rows, new).unwrap();
    cached
}

#[test]
fn cached_equals_full_attention_with_rows_shared_between_beams() {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    for (heads, kv_heads) in [(4, 4), (4, 1)] {
        for new in [1, 2, 3, 5, 40, 80] {
            let cfg = Attention { heads, kv_heads, head_dim: 12, scale: 0.4, causal: true, dropout: None };
            let [wq, wk, _] = widths(&cfg);
            // Two beams share their first 13 positions; a third sequence stands alone; the pool is larger and shuffled.
            let lengths = [13 + new, 13 + new, new + 2];
            let seqs = Sequences::new(&lengths);
            let mut qkv = random(&mut rng, seqs.tokens() * width(&cfg));
            qkv.copy_within(0..13 * width(&cfg), lengths[0] * width(&cfg));
            let capacity = seqs.tokens() + 7;
            let mut order: Vec<u32> = (0..capacity as u32).collect();
            for i in (1..capacity).rev() {
                order.swap(i, rng.random_range(0..=i));
            }
            let (mut k, mut v) = (vec![f64::NAN; capacity * wk], vec![f64::NAN; capacity * wk]);
            let mut rows: Vec<Vec<u32>> = Vec::new();
            let mut queries = Vec::new();
            for (s, &length) in lengths.iter().enumerate() {
                let mut r = Vec::new();
                for (i, t) in seqs.range(s).enumerate() {
                    let row = if s == 1 && i < 13 { rows[0][i] } else { order[t] };
                    r.push(row);
                    let token = &qkv[t * width(&cfg)..][..width(&cfg)];
                    k[row as usize * wk..][..wk].copy_from_slice(&token[wq..wq + wk]);
                    v[row as usize * wk..][..wk].copy_from_slice(&token[wq + wk..]);
                    if i >= length - new {
                        queries.extend_from_slice(&token[..wq]);
                    }
                }
                rows.push(r);
            }
            let (q, k, v) = (buffer(&queries, |v| v), buffer(&k, |v| v), buffer(&v, |v| v));
            let mut out = buffer(&vec![f64::NAN; 3 * new * wq], |v| v);
            attention_cached(
                &cfg,
                Mat::new(&q, 0, 3 * new, wq),
                Mat::new(&k, 0, capacity, wk),
                Mat::new(&v, 0, capacity, wk),
                &cached(&rows, &[new; 3]),
                MatMut::new(&mut out, 0, 3 * new, wq),
            )
            .unwrap();
            let full = values(&forward(&cfg, &seqs, &buffer(&qkv, |v| v)).0);
            let want: Vec<f64> =
                (0..3).flat_map(|s| full[(seqs.range(s).end - new) * wq..seqs.range(s).end * wq].to_vec()).collect();
            let e = relative(&values(&out), &want);
            assert!(e < 1e-13, "{heads}/{kv_heads} heads, {new} new: {e:.1e}");
        }
    }
}

#[test]
fn long_sequences_need_only_blocks_of_scores() {
    let seqs = Sequences::new(&[8192]);
    let cfg = Attention { heads: 1, kv_heads: 1, head_dim: 8, scale: 0.3, causal: true, dropout: None };
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let x = random(&mut rng, 8192 * width(&cfg));
    let (out, _) = forward(&cfg, &seqs, &buffer(&x, |v| v as f32));
    let got = values(&out);
    // The first queries as a sequence of their own, and the last one by hand through its own short problem.
    let (want, _) = oracle(&cfg, &Sequences::new(&[100]), &x[..100 * width(&cfg)]);
    assert!(relative(&got[..100 * 8], &want) < 1e-5);
    let last = &x[8191 * 24..][..8];
    let weights: Vec<f64> = (0..8192)
        .map(|j| (0.3 * last.iter().zip(&x[j * 24 + 8..][..8]).map(|(a, b)| a * b).sum::<f64>()).exp())
        .collect();
    let sum: f64 = weights.iter().sum();
    let want: Vec<f64> =
        (0..8).map(|c| (0..8192).map(|j| weights[j] / sum * x[j * 24 + 16 + c]).sum::<f64>()).collect();
    assert!(relative(&got[8191 * 8..], &want) < 1e-5);
}
