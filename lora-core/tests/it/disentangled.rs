//! Disentangled attention and the convolution beside it, by table: values against plain loops, and gradients against
//! finite differences for every choice of what is trainable.

use crate::common::{NOISE, make_noisy, random, relative, tensor};
use lora_core::{Init, Noise, Params, ParamsBuilder, Result, Tape, Var, gradcheck, ops};
use lora_kernels::{DType, Device, Disentangled, RelativePositions, Sequences, philox};

const HEADS: usize = 2;
const HEAD_DIM: usize = 3;
const WIDTH: usize = HEADS * HEAD_DIM;

/// One attention: which tables it has, its sequences, and its positions as (buckets, max).
struct Case {
    pos_key: bool,
    pos_query: bool,
    lengths: Vec<usize>,
    positions: (usize, usize),
    dropout: f64,
}

fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for (pos_key, pos_query) in [(true, true), (true, false), (false, true), (false, false)] {
        // Distances past the last row, buckets of several distances, and tables of which no sequence uses all.
        for (lengths, positions) in
            [(vec![5, 1, 0, 7], (4, 6)), (vec![6, 2], (0, 3)), (vec![3], (8, 20)), (vec![0], (4, 6))]
        {
            for dropout in [0.0, 0.4] {
                all.push(Case { pos_key, pos_query, lengths: lengths.clone(), positions, dropout });
            }
        }
    }
    all
}

impl Case {
    fn name(&self) -> String {
        let Case { pos_key, pos_query, lengths, positions, dropout } = self;
        format!("c2p {pos_key}, p2c {pos_query}, {lengths:?}, positions {positions:?}, dropout {dropout}")
    }

    fn positions(&self) -> RelativePositions {
        RelativePositions::new(self.positions.0, self.positions.1).unwrap()
    }

    /// Name and rows of each input; all are as wide.
    fn inputs(&self) -> Vec<(&'static str, usize)> {
        let (tokens, table) = (self.lengths.iter().sum(), 2 * self.positions().span());
        let tables = [("pos_key", self.pos_key), ("pos_query", self.pos_query)];
        let tables = tables.into_iter().filter(|(_, has)| *has).map(|(name, _)| (name, table));
        [("q", tokens), ("k", tokens), ("v", tokens)].into_iter().chain(tables).collect()
    }

    /// Values that f32 holds exactly.
    fn values(&self) -> Vec<Vec<f64>> {
        self.inputs().iter().zip(1..).map(|((_, rows), seed)| random(seed, rows * WIDTH, 1.0)).collect()
    }

    fn params(&self, dtype: DType, trains: &[bool]) -> Params {
        let mut b = ParamsBuilder::new();
        for (((name, rows), values), trains) in self.inputs().into_iter().zip(self.values()).zip(trains) {
            if *trains {
                b.add(name, &[rows, WIDTH], Init::Copy(tensor(DType::F64, &[rows, WIDTH], &values)));
            }
        }
        b.build(&Device::Cpu, dtype, 0).unwrap()
    }

    fn scale(&self) -> f64 {
        1.0 / ((HEAD_DIM * (1 + usize::from(self.pos_key) + usize::from(self.pos_query))) as f64).sqrt()
    }

    /// The operation, once or twice on the same variables, whose results are then added.
    fn run(&self, t: &mut Tape, params: &Params, twice: bool) -> Result<Var> {
        make_noisy(t, NOISE);
        let mut vars = Vec::new();
        for ((name, rows), values) in self.inputs().into_iter().zip(self.values()) {
            vars.push(match params.find(name) {
                Some(id) => t.param(id)?,
                None => t.constant(&tensor(params.dtype(), &[rows, WIDTH], &values)),
            });
        }
        let find = |name: &str| self.inputs().iter().position(|(n, _)| *n == name).map(|i| &vars[i]);
        let x = ops::DisentangledInputs {
            q: find("q").unwrap(),
            k: find("k").unwrap(),
            v: find("v").unwrap(),
            pos_key: find("pos_key"),
            pos_query: find("pos_query"),
        };
        let cfg = Disentangled {
            heads: HEADS,
            head_dim: HEAD_DIM,
            scale: self.scale(),
            positions: self.positions(),
            dropout: t.dropout_mask(self.dropout),
        };
        let sequences = Sequences::new(&self.lengths);
        let y = ops::disentangled(t, cfg, &sequences, x)?;
        if !twice {
            return Ok(y);
        }
        let z = ops::disentangled(t, cfg, &sequences, x)?;
        ops::add(t, y, z)
    }

    /// The formula, by loops over all pairs.
    fn expected(&self) -> Vec<f64> {
        let (inputs, values) = (self.inputs(), self.values());
        let find = |name: &str| inputs.iter().position(|(n, _)| *n == name).map(|i| &values[i]);
        let (q, k, v) = (find("q").unwrap(), find("k").unwrap(), find("v").unwrap());
        let (positions, mut y, mut start) = (self.positions(), vec![0.0; q.len()], 0);
        let dot = |a: &[f64], i: usize, b: &[f64], j: usize, h: usize| -> f64 {
            (h * HEAD_DIM..(h + 1) * HEAD_DIM).map(|c| a[i * WIDTH + c] * b[j * WIDTH + c]).sum()
        };
        for &n in &self.lengths {
            for (i, h) in (start..start + n).flat_map(|i| (0..HEADS).map(move |h| (i, h))) {
                let score = |j: usize| {
                    let row = positions.row(i as isize - j as isize);
                    let content = dot(q, i, k, j, h);
                    let c2p = find("pos_key").map_or(0.0, |t| dot(q, i, t, row, h));
                    let p2c = find("pos_query").map_or(0.0, |t| dot(k, j, t, row, h));
                    (self.scale() * (content + c2p + p2c)).exp()
                };
                let sum: f64 = (start..start + n).map(score).sum();
                for j in start..start + n {
                    let p = score(j) / sum * self.factor(h, i, j - start);
                    (h * HEAD_DIM..(h + 1) * HEAD_DIM).for_each(|c| y[i * WIDTH + c] += p * v[j * WIDTH + c]);
                }
            }
            start += n;
        }
        y
    }

    /// 0 or 1/(1 − p): the mask that the documentation of `Attention` defines, of the tape's first dropout.
    fn factor(&self, head: usize, row: usize, key: usize) -> f64 {
        if self.dropout == 0.0 {
            return 1.0;
        }
        let counters = [(key / 4) as u32, NOISE.row_offset + row as u32, (head as u32) << 16, NOISE.step];
        let lane = philox(NOISE.seed, counters)[key % 4];
        if f64::from(lane) >= self.dropout * 2f64.powi(32) { 1.0 / (1.0 - self.dropout) } else { 0.0 }
    }
}

/// None, all, each alone, all but each.
fn choices(n: usize) -> Vec<Vec<bool>> {
    let mut all = vec![vec![false; n], vec![true; n]];
    for i in 0..n {
        all.extend([(0..n).map(|j| j == i).collect(), (0..n).map(|j| j != i).collect::<Vec<_>>()]);
    }
    all
}

#[test]
fn values_are_those_of_plain_loops() {
    for c in cases() {
        let want = c.expected();
        for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F64, 1e-14)] {
            for trains in choices(c.inputs().len()) {
                let params = c.params(dtype, &trains);
                let y = c.run(&mut Tape::new(&params), &params, false).unwrap();
                assert_eq!(y.is_tracked(), trains.contains(&true), "{}, {trains:?}: tracked", c.name());
                let error = relative(&y.value().to_f64().unwrap(), &want);
                assert!(error <= tolerance, "{}, {dtype:?}: off by {error}", c.name());
            }
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for c in cases() {
        for trains in choices(c.inputs().len()) {
            let params = c.params(DType::F64, &trains);
            for twice in [false, true] {
                let worst = gradcheck(&params, |t| c.run(t, &params, twice)).unwrap();
                let what = format!("{}, {trains:?} trains, twice {twice}: {worst:?}", c.name());
                assert!(worst.error <= 1e-8, "{what}");
                let vain = !trains.contains(&true) || c.lengths == [0];
                assert!(worst.largest > 0.01 || vain, "{what} checks nothing");
            }
        }
    }
}

/// (channels, width, lengths)
const CONVOLUTIONS: [(usize, usize, &[usize]); 5] =
    [(3, 3, &[4, 1, 0, 5]), (2, 1, &[3]), (4, 5, &[2, 7]), (1, 3, &[1, 1, 1]), (2, 7, &[3, 2])];

/// y[t, o] = Σ_c Σⱼ w[o, c, j]·x[t + j − ⌊k/2⌋, c] + b[o].
#[test]
fn convolutions_are_those_of_plain_loops_and_of_finite_differences() {
    for (channels, width, lengths) in CONVOLUTIONS {
        let (tokens, out, half) = (lengths.iter().sum(), 2, width / 2);
        let inputs: [(&str, &[usize]); 3] = [("x", &[tokens, channels]), ("w", &[out, channels, width]), ("b", &[out])];
        let values = [tokens * channels, out * channels * width, out].map(|n| random(n as u64, n, 1.0));
        let (mut want, mut start) = (vec![0.0; tokens * out], 0);
        for &n in lengths {
            for (t, o) in (0..n).flat_map(|t| (0..out).map(move |o| (t, o))) {
                want[(start + t) * out + o] = values[2][o];
                for (c, j) in (0..channels).flat_map(|c| (0..width).map(move |j| (c, j))) {
                    if (half..n + half).contains(&(t + j)) {
                        let x = values[0][(start + t + j - half) * channels + c];
                        want[(start + t) * out + o] += values[1][(o * channels + c) * width + j] * x;
                    }
                }
            }
            start += n;
        }
        for trains in choices(3) {
            let mut b = ParamsBuilder::new();
            for (((name, shape), values), _) in inputs.iter().zip(&values).zip(&trains).filter(|(_, trains)| **trains) {
                b.add(*name, shape, Init::Copy(tensor(DType::F64, shape, values)));
            }
            let params = b.build(&Device::Cpu, DType::F64, 0).unwrap();
            let run = |t: &mut Tape| {
                let mut vars = Vec::new();
                for ((name, shape), values) in inputs.iter().zip(&values) {
                    vars.push(match params.find(name) {
                        Some(id) => t.param(id)?,
                        None => t.constant(&tensor(DType::F64, shape, values)),
                    });
                }
                ops::convolution(t, &Sequences::new(lengths), &vars[0], &vars[1], Some(&vars[2]))
            };
            let y = run(&mut Tape::new(&params)).unwrap();
            let what = format!("{channels} channels, width {width}, {lengths:?}, {trains:?} trains");
            assert_eq!(y.is_tracked(), trains.contains(&true), "{what}");
            let error = relative(&y.value().to_f64().unwrap(), &want);
            assert!(error <= 1e-14, "{what}: off by {error}");
            let worst = gradcheck(&params, run).unwrap();
            assert!(worst.error <= 1e-8, "{what}: {worst:?}");
            assert!(worst.largest > 0.01 || !trains.contains(&true), "{what} checks nothing");
        }
    }
}

#[test]
fn a_constant_is_unfolded_without_a_trace() {
    let params = Params::none(&Device::Cpu).unwrap();
    let mut t = Tape::new(&params);
    let x = t.constant(&tensor(DType::F32, &[3, 2], &random(1, 6, 1.0)));
    assert!(!ops::unfold(&mut t, &Sequences::new(&[3]), &x, 3).unwrap().is_tracked());
}

/// Tables are the same in all micro-batches, and so is what is dropped of them; tokens are not. What there is one of for
/// each target moves with the targets.
#[test]
fn masks_of_common_rows_do_not_move_with_the_batch() {
    let params = Params::none(&Device::Cpu).unwrap();
    let x = tensor(DType::F32, &[6, 40], &random(1, 240, 1.0));
    let dropped = |row_offset, target_offset| {
        let mut t = Tape::new(&params).with_noise(Noise { row_offset, target_offset, ..NOISE });
        let common = t.on_common_rows(|t| {
            let x = t.constant(&x);
            ops::dropout(t, x, 0.5).unwrap()
        });
        let own = t.constant(&x);
        let own = ops::dropout(&mut t, own, 0.5).unwrap();
        let targets = t.on_target_rows(|t| {
            let x = t.constant(&x);
            ops::dropout(t, x, 0.5).unwrap()
        });
        [common, own, targets].map(|y| y.value().to_f64().unwrap())
    };
    let ([common, own, targets], [common_later, own_later, targets_later]) = (dropped(0, 0), dropped(17, 2));
    assert_eq!(common, common_later);
    assert_ne!(own, own_later);
    let mask = |y: &[f64]| y.iter().map(|v| *v == 0.0).collect::<Vec<_>>();
    assert_eq!(mask(&targets[2 * 40..]), mask(&targets_later[..4 * 40]), "target 2 there is the first here");
    assert_ne!(common, own, "each dropout has a mask of its own");
}
