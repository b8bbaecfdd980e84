use super::*;
use crate::{
    attention, attention_backward, attention_cached,
    cuda::{Graph, testing::*},
    testing::{Padded, random},
};

const TYPES: [(DType, f64); 3] = [(F32, 1e-5), (Bf16, 2e-2), (F16, 4e-3)];
const DROPOUT: Dropout = Dropout { p: 0.25, seed: 1 << 40 | 3, step: 17, site: 5, row_offset: 1000 };

fn shape(heads: usize, kv_heads: usize, head_dim: usize, causal: bool) -> Attention {
    Attention { heads, kv_heads, head_dim, scale: 0.4, causal, dropout: None }
}

/// Attentions, lengths and gaps: every path of the loads, one and several steps, each size of the tiles.
fn cases(thorough: bool) -> Vec<(Attention, &'static [usize], usize)> {
    let mut cases = vec![
        (Attention { dropout: Some(DROPOUT), ..shape(4, 2, 8, true) }, &[7, 1, 33][..], 0),
        (Attention { scale: -0.4, ..shape(1, 1, 16, false) }, &[0, 65, 3], 8),
        (Attention { dropout: Some(DROPOUT), ..shape(2, 1, 10, false) }, &[70], 3),
        (shape(2, 2, 64, true), &[131], 0),
    ];
    if thorough {
        cases.extend([
            (shape(1, 1, 8, true), &[1][..], 0),
            (shape(3, 1, 16, true), &[64, 65], 0),
            (Attention { dropout: Some(DROPOUT), ..shape(1, 1, 128, true) }, &[66, 2], 0),
            (shape(1, 1, 72, false), &[40], 8),
            (Attention { dropout: Some(DROPOUT), ..shape(1, 1, 136, true) }, &[50], 0),
            (shape(2, 1, 256, true), &[33, 70], 0),
        ]);
    }
    cases
}

/// q, k and v as columns of one matrix.
fn widths(cfg: &Attention) -> [usize; 3] {
    [cfg.heads, cfg.kv_heads, cfg.kv_heads].map(|h| h * cfg.head_dim)
}

fn fused<'a>(cfg: &Attention, m: &'a Padded) -> [Mat<'a>; 3] {
    let [a, b, c] = widths(cfg);
    [m.mat().cols_in(0..a), m.mat().cols_in(a..a + b), m.mat().cols_in(a + b..a + b + c)]
}

fn run_forward(s: &Side, cfg: &Attention, seqs: &Sequences, qkv: &Padded, pad: usize) -> (Padded, Padded) {
    let t = seqs.tokens();
    let (mut out, mut lse) = (s.poison(t, cfg.heads * cfg.head_dim, pad), s.poison_acc(t, cfg.heads, pad));
    let [q, k, v] = fused(cfg, qkv);
    attention(cfg, seqs, q, k, v, out.mat_mut(), lse.mat_mut()).unwrap();
    (out, lse)
}

fn forward_parity(types: &[(DType, f64)], thorough: bool) {
    parity("attention", types, |s| {
        for (cfg, lengths, pad) in cases(thorough) {
            let seqs = Sequences::new(lengths);
            let qkv = s.random(1, seqs.tokens(), widths(&cfg).iter().sum(), pad, 1.0);
            let (out, lse) = run_forward(s, &cfg, &seqs, &qkv, pad);
            s.out(format!("out of {cfg:?} {lengths:?}"), out.get());
            s.out(format!("lse of {cfg:?} {lengths:?}"), lse.get());
        }
    });
}

fn backward_parity(types: &[(DType, f64)], thorough: bool) {
    parity("attention_backward", types, |s| {
        for (i, (cfg, lengths, pad)) in cases(thorough).into_iter().enumerate() {
            let (seqs, [wq, wk, wv]) = (Sequences::new(lengths), widths(&cfg));
            let (t, w) = (seqs.tokens(), wq + wk + wv);
            let (qkv, dout) = (s.random(1, t, w, pad, 1.0), s.random(2, t, wq, pad, 1.0));
            let (out, lse) = run_forward(s, &cfg, &seqs, &qkv, pad);
            let beta = if i % 2 == 0 { 0.5 } else { 0.0 };
            let mut grad = if i % 4 < 2 { s.target(3, t, w, pad, beta) } else { s.target_acc(3, t, w, pad, beta) };
            let (dq, dkv) = grad.mat_mut().split_cols(wq);
            let (dk, dv) = dkv.split_cols(wk);
            let [dq, dk, dv] = [dq, dk, dv].map(|to| Acc { to, beta });
            let [q, k, v] = fused(&cfg, &qkv);
            attention_backward(&cfg, &seqs, q, k, v, out.mat(), lse.mat(), dout.mat(), dq, dk, dv).unwrap();
            s.out(format!("gradients of {cfg:?} {lengths:?}"), grad.get());
        }
    });
}

/// Sequences of a shuffled pool, the second with the first rows of the first.
fn cached_parity(types: &[(DType, f64)], thorough: bool) {
    parity("attention_cached", types, |s| {
        let mut cases = vec![
            (shape(4, 2, 8, true), vec![13, 14, 1], vec![1, 2, 1], 0),
            (shape(2, 2, 16, false), vec![140, 0, 66], vec![1, 0, 3], 8),
            (shape(6, 2, 10, true), vec![70, 40], vec![30, 4], 3),
        ];
        if thorough {
            cases.push((shape(2, 1, 64, true), vec![1100], vec![1], 0));
            cases.push((shape(1, 1, 128, true), vec![70], vec![66], 0));
            cases.push((shape(1, 1, 256, true), vec![80], vec![2], 0));
        }
        for (cfg, lengths, new, pad) in cases {
            let capacity = lengths.iter().sum::<usize>() + 5;
            let (wq, wk) = (cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
            let mut free = (0..capacity as u32).map(|i| (i * 7 + 3) % capacity as u32).collect::<Vec<_>>();
            if capacity % 7 == 0 {
                free = (0..capacity as u32).rev().collect();
            }
            let mut lists: Vec<Vec<u32>> = lengths.iter().map(|&n| free.drain(..n).collect()).collect();
            if let [first, second, ..] = &mut lists[..] {
                let common = (first.len() - new[0]).min(second.len() - new[1]);
                second[..common].copy_from_slice(&first[..common]);
            }
            let mut rows = CachedRows::new(s.device(), cfg.heads / cfg.kv_heads);
            rows.set(&lists, &new).unwrap();
            // Rows of nobody hold NaN.
            let pool = |seed| {
                let mut data = random(seed, capacity * wk, 1.0);
                free.iter().for_each(|&r| data[r as usize * wk..][..wk].fill(f64::NAN));
                s.given(capacity, wk, pad, &data)
            };
            let (k, v) = (pool(2), pool(3));
            let queries = new.iter().sum();
            let (q, mut out) = (s.random(1, queries, wq, pad, 1.0), s.poison(queries, wq, pad));
            attention_cached(&cfg, q.mat(), k.mat(), v.mat(), &rows, out.mat_mut()).unwrap();
            s.out(format!("out of {cfg:?} {lengths:?} new {new:?}"), out.get());
        }
    });
}

#[test]
fn forward_equals_the_reference() {
    forward_parity(&TYPES[..2], true);
    forward_parity(&TYPES[2..], false);
}

#[test]
fn backward_equals_the_reference() {
    backward_parity(&TYPES[..2], true);
    backward_parity(&TYPES[2..], false);
}

#[test]
fn cached_equals_the_reference() {
    cached_parity(&TYPES[..2], true);
    cached_parity(&TYPES[2..], false);
}

/// Twice the same, with the threads in another order in the emulation.
#[test]
fn runs_are_equal_to_the_bit() {
    for gpu in gpus() {
        let device = Device::Cuda(gpu);
        let cfg = Attention { dropout: Some(DROPOUT), ..shape(4, 2, 8, true) };
        let (seqs, [wq, wk, wv]) = (Sequences::new(&[70, 9]), widths(&cfg));
        let (t, w) = (seqs.tokens(), wq + wk + wv);
        let matrix = |dtype, cols, seed| Padded::on(&device, dtype, t, cols, 0, &random(seed, t * cols, 1.0));
        let (qkv, dout) = (matrix(Bf16, w, 1), matrix(Bf16, wq, 2));
        let run = || {
            let (mut out, mut lse, mut grad) = (matrix(Bf16, wq, 3), matrix(F32, 4, 3), matrix(F32, w, 3));
            let [q, k, v] = fused(&cfg, &qkv);
            attention(&cfg, &seqs, q, k, v, out.mat_mut(), lse.mat_mut()).unwrap();
            let (dq, dkv) = grad.mat_mut().split_cols(wq);
            let (dk, dv) = dkv.split_cols(wk);
            let [dq, dk, dv] = [dq, dk, dv].map(|to| Acc { to, beta: 1.0 });
            attention_backward(&cfg, &seqs, q, k, v, out.mat(), lse.mat(), dout.mat(), dq, dk, dv).unwrap();
            [out, lse, grad].map(|m| m.get()).concat()
        };
        assert!(run() == run());
    }
}

#[test]
fn what_is_only_recorded_is_not_kept() {
    for gpu in gpus() {
        let (device, seqs) = (Device::Cuda(gpu.clone()), Sequences::new(&[3, 90]));
        let (first, _graph) = Graph::record(&device, || seqs.on_device.tiles(&gpu, &seqs)).unwrap();
        let second = seqs.on_device.tiles(&gpu, &seqs).unwrap();
        assert!(!Arc::ptr_eq(&first, &second));
        assert_eq!(second.to_vec::<u32>(0..second.len()).unwrap(), tiles(&seqs));
    }
}

#[test]
fn cached_sequences_do_not_depend_on_their_batch() {
    for gpu in gpus() {
        let device = Device::Cuda(gpu);
        let cfg = shape(2, 1, 8, true);
        let matrix = |rows, cols, seed| Padded::on(&device, Bf16, rows, cols, 0, &random(seed, rows * cols, 1.0));
        let (q, k, v) = (matrix(3, 16, 1), matrix(400, 8, 2), matrix(400, 8, 3));
        let lists: [Vec<u32>; 3] = [(0..90).collect(), (10..400).rev().collect(), vec![5]];
        let run = |sequences: std::ops::Range<usize>| {
            let mut out = matrix(sequences.len(), 16, 4);
            let (q, lists) = (q.mat().rows_in(sequences.clone()), &lists[sequences]);
            let mut rows = CachedRows::new(&device, 2);
            rows.set(lists, &vec![1; lists.len()]).unwrap();
            attention_cached(&cfg, q, k.mat(), v.mat(), &rows, out.mat_mut()).unwrap();
            out.get()
        };
        assert_eq!([run(0..1), run(1..2), run(2..3)].concat(), run(0..3));
    }
}

#[test]
fn tiles_cover_every_token_once_from_the_latest_on() {
    let tiles = tiles(&Sequences::new(&[3, 0, 130, 64]));
    let words: Vec<&[u32]> = tiles.chunks(TILE_WORDS).collect();
    let late = [[3, 130, 128, 0], [3, 130, 64, 0]];
    let early = [[0, 3, 0, 0], [3, 130, 0, 0], [133, 64, 0, 0]];
    assert_eq!(words, [&late[..], &early[..]].concat());
    assert!(super::tiles(&Sequences::new(&[0, 0])).is_empty());
}

#[test]
fn sequences_are_equal_whatever_lies_on_a_device() {
    for gpu in gpus() {
        let (used, other) = (Sequences::new(&[70, 2]), Sequences::new(&[70, 2]));
        let first = used.on_device.tiles(&gpu, &used).unwrap();
        assert!(used == other && used != Sequences::new(&[72]));
        // A clone shares what was uploaded.
        let clone = used.clone();
        assert!(Arc::ptr_eq(&first, &clone.on_device.tiles(&gpu, &clone).unwrap()));
    }
}

#[test]
fn blocks_fit_into_shared_memory() {
    // Heads of 64 columns: four forward blocks of 16-bit types on a multiprocessor of compute capability 9.0.
    assert_eq!(forward_shared(64, 2), (64 + 4 * 64) * 144);
    assert!(4 * forward_shared(64, 2) <= 227 << 10);
    assert_eq!(backward_shared(100, 2), (128 + 128) * 272 + 512);
    // All run on compute capability 8.0.
    for (head_dim, size) in [(1, 2), (64, 4), (65, 2), (128, 4), (129, 2), (256, 4)] {
        assert!(forward_shared(head_dim, size).max(backward_shared(head_dim, size)) <= 163 << 10);
    }
    assert_eq!([1, 64, 65, 128, 129, 256].map(|n| padded(n).unwrap()), [64, 64, 128, 128, 256, 256]);
    assert!(padded(257).unwrap_err().to_string().contains("257"));
}

#[test]
fn keys_are_split_for_few_queries_only() {
    assert_eq!([1, 64, 65, 1024, 1025, 4096].map(|keys| chunk(keys, 1)), [64, 64, 64, 64, 128, 256]);
    assert!((1..5000usize).all(|keys| keys.div_ceil(chunk(keys, 8)) <= RANGES));
    assert_eq!(chunk(1000, 65), 1024);
    let lists: Vec<Vec<u32>> = vec![(0..200).collect(), vec![7], (300..370).collect()];
    let plan = Plan::new(&lists, &[1, 0, 40], 2);
    assert_eq!((plan.tiles, plan.ranges), (3, 4));
    // 40 queries of 2 heads are two tiles; the unused list is left out.
    assert_eq!(plan.words[..8], [0, 199, 1, 0, 0, 64, 0, 0]);
    assert_eq!(plan.words[8..24], [200, 30, 40, 1, 0, 128, 0, 0, 200, 30, 40, 1, 64, 128, 0, 0]);
    assert_eq!((plan.words.len(), plan.words[24 + 199], plan.words[24 + 200]), (24 + 270, 199, 300));
    // One token each: the launch does not depend on the lengths.
    assert_eq!([1, 70, 5000].map(|n| Plan::new(&[(0..n).collect()], &[1], 1).ranges), [RANGES; 3]);
}

/// Recorded once, done for every next token.
#[test]
fn recorded_attention_looks_at_the_newest_rows() {
    for gpu in gpus() {
        let device = Device::Cuda(gpu);
        let cfg = shape(2, 1, 8, true);
        let matrix = |rows, cols, seed| Padded::on(&device, F32, rows, cols, 0, &random(seed, rows * cols, 1.0));
        let (q, k, v) = (matrix(2, 16, 1), matrix(300, 8, 2), matrix(300, 8, 3));
        let lists = |n: u32| [(0..n).collect(), (100..100 + n / 2).rev().collect::<Vec<u32>>()];
        let mut rows = CachedRows::new(&device, 2);
        rows.set(&lists(40), &[1; 2]).unwrap();
        let mut out = matrix(2, 16, 4);
        let attend = |rows: &CachedRows, out: &mut Padded| {
            attention_cached(&cfg, q.mat(), k.mat(), v.mat(), rows, out.mat_mut())
        };
        let ((), graph) = Graph::record(&device, || attend(&rows, &mut out)).unwrap();
        let shape = rows.shape();
        for n in [41, 64, 70] {
            rows.set(&lists(n), &[1; 2]).unwrap();
            assert_eq!(rows.shape(), shape, "{n} keys");
            graph.launch().unwrap();
            let mut plain = matrix(2, 16, 5);
            attend(&rows, &mut plain).unwrap();
            assert_eq!(out.get(), plain.get(), "{n} keys");
        }
        rows.set(&lists(190), &[1; 2]).unwrap();
        assert_ne!(rows.shape(), shape, "the lists have moved");
    }
}

#[test]
#[should_panic(expected = "outside the pool")]
fn rows_outside_the_pool_are_refused() {
    let Some(gpu) = gpus().pop() else { panic!("outside the pool: nothing to refuse without a device") };
    let mut b = Buffer::zeros(&Device::Cuda(gpu), DType::F32, 16).unwrap();
    let x = b.try_clone(0..16).unwrap();
    let (q, kv) = (Mat::new(&x, 0, 1, 8), Mat::new(&x, 0, 2, 8));
    let mut rows = CachedRows::new(b.device(), 1);
    rows.set(&[vec![0, 2]], &[1]).unwrap();
    let _ = attention_cached(&shape(1, 1, 8, true), q, kv, kv, &rows, MatMut::new(&mut b, 0, 1, 8));
}

const BOTH: &[(DType, f64)] = TYPES.split_at(2).0;

fn forward_check() {
    forward_parity(BOTH, false);
}

fn backward_check() {
    backward_parity(BOTH, false);
}

fn cached_check() {
    cached_parity(BOTH, false);
}

pub(crate) const MUTATIONS: &[Mutation] = &[
    Mutation {
        name: "no barrier before the keys are read",
        module: "attention",
        from: "cp_async_wait<0>();\n      __syncthreads();",
        to: "cp_async_wait<0>();",
        check: forward_check,
    },
    Mutation {
        name: "a step's copies are not waited for",
        module: "attention",
        from: "cp_async_wait<0>();",
        to: "cp_async_wait<1>();",
        check: forward_check,
    },
    Mutation {
        name: "no barrier before the outputs take the tiles' memory",
        module: "attention",
        from: "outputs'.\n  __syncthreads();",
        to: "outputs'.\n",
        check: forward_check,
    },
    Mutation {
        name: "a query sees one key too many",
        module: "attention",
        from: "i % 2 >= limit[i / 2]",
        to: "i % 2 > limit[i / 2]",
        check: forward_check,
    },
    Mutation {
        name: "the last key is left out",
        module: "attention",
        from: "return at < end ?",
        to: "return at < end - 1 ?",
        check: forward_check,
    },
    Mutation {
        name: "the accumulator is not rescaled",
        module: "attention",
        from: "o[c][2 * r + e] *= shrink;",
        to: ";",
        check: forward_check,
    },
    Mutation {
        name: "quarters of a right fragment exchanged",
        module: "attention",
        from: "left[2] = {y[0], y[1]}, right[2] = {y[2], y[3]}",
        to: "left[2] = {y[0], y[2]}, right[2] = {y[1], y[3]}",
        check: forward_check,
    },
    Mutation {
        name: "P packed in the wrong order",
        module: "attention",
        from: "pack(x[2], x[3], T{}), pack(y[0], y[1], T{})",
        to: "pack(y[0], y[1], T{}), pack(x[2], x[3], T{})",
        check: forward_check,
    },
    Mutation {
        name: "masks of two rows exchanged",
        module: "attention",
        from: "upper = odd ? other : own",
        to: "upper = odd ? own : other",
        check: forward_check,
    },
    Mutation {
        name: "every query head reads its own key head",
        module: "attention",
        from: "kv_head = head / (a.heads / a.kv_heads)",
        to: "kv_head = head % a.kv_heads",
        check: forward_check,
    },
    Mutation {
        name: "D is read from outputs that the next keys replace",
        module: "attention_backward",
        from: "room.\n      __syncthreads();",
        to: "room.\n",
        check: backward_check,
    },
    Mutation {
        name: "β is dropped where elements are stored in pairs",
        module: "attention_backward",
        from: "if (beta != 0.f) to =",
        to: "if (false) to =",
        check: backward_check,
    },
    Mutation {
        name: "the first head of a group counts for all",
        module: "attention_backward",
        from: "next_query = from, next_head++",
        to: "next_query = from",
        check: backward_check,
    },
    Mutation {
        name: "the diagonal is hidden",
        module: "attention_backward",
        from: "i % 2 < key + i / 2 * 8",
        to: "i % 2 <= key + i / 2 * 8",
        check: backward_check,
    },
    Mutation {
        name: "keys' masks come from the wrong counter",
        module: "attention_backward",
        from: "t / 2 * 2 + lane() / 16",
        to: "t / 2 + lane() / 16 * 2",
        check: backward_check,
    },
    Mutation {
        name: "dP is not dropped in dK",
        module: "attention_backward",
        from: "ds[n][i] * factor - d",
        to: "ds[n][i] - d",
        check: backward_check,
    },
    Mutation {
        name: "a cached query sees the next one",
        module: "attention_cached",
        from: "row + 8 * r) / group + 1)",
        to: "row + 8 * r) / group + 2)",
        check: cached_check,
    },
    Mutation {
        name: "ranges are joined without their weights",
        module: "attention_cached",
        from: "o += fast_exp2(part_sums[i * range + x].v[0] - max) *",
        to: "o +=",
        check: cached_check,
    },
    Mutation {
        name: "rows of the pool are taken in order",
        module: "attention_cached",
        from: "k + list[at] * ldk",
        to: "k + at * ldk",
        check: cached_check,
    },
];

#[cfg(feature = "emulator")]
#[test]
fn planted_bugs_are_caught() {
    all_are_caught(MUTATIONS);
}
