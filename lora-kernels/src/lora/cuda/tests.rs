use super::{grouped::*, hopper::*, up::*, *};
use crate::{
    cuda::testing::*, lora_backward_down, lora_backward_input, lora_backward_up, lora_down, lora_forward, lora_grouped,
    testing::Padded,
};

/// Columns and rank of each part.
type Parts = &'static [(Range<usize>, usize)];

/// A projection of a test.
struct Case {
    n: usize,
    k: usize,
    out: usize,
    parts: Parts,
    /// Padding of every matrix: where rows begin.
    pad: usize,
}

const CASES: &[Case] = &[
    // All edges inside of vectors and tiles.
    Case { n: 33, k: 40, out: 129, parts: &[(0..129, 8)], pad: 0 },
    Case { n: 129, k: 33, out: 150, parts: &[(0..50, 4), (100..150, 7)], pad: 3 },
    Case { n: 9, k: 7, out: 31, parts: &[(3..20, 1)], pad: 1 },
    // A fused projection whose parts begin where tiles do, and one whose parts begin where vectors do not.
    Case { n: 64, k: 64, out: 192, parts: &[(0..64, 16), (64..128, 16), (128..192, 16)], pad: 0 },
    Case { n: 31, k: 72, out: 144, parts: &[(4..20, 8), (20..21, 8), (44..140, 8)], pad: 0 },
    // A rank of several panels; a projection that is all rank.
    Case { n: 130, k: 72, out: 140, parts: &[(64..140, 70)], pad: 0 },
    Case { n: 20, k: 0, out: 16, parts: &[(0..16, 5)], pad: 0 },
];

impl Case {
    fn rank(&self) -> usize {
        self.parts.iter().map(|(_, r)| r).sum()
    }

    /// The B's, in matrices of their own.
    fn b(&self, s: &Side) -> Vec<Padded> {
        self.parts.iter().zip(20..).map(|((cols, r), seed)| s.random(seed, cols.len(), *r, self.pad, 1.0)).collect()
    }

    /// The A's, one below the other.
    fn a(&self, s: &Side) -> Padded {
        s.random(30, self.rank(), self.k, self.pad, 1.0)
    }

    fn list<'a>(&self, b: &'a [Padded]) -> Vec<LoraPart<'a>> {
        self.parts.iter().zip(b).map(|((cols, _), b)| LoraPart { cols: cols.clone(), b: b.mat() }).collect()
    }

    fn ranges(&self) -> Vec<Range<usize>> {
        ranges(self.parts.iter().map(|(_, r)| *r))
    }
}

fn a_list<'a>(a: &'a Padded, case: &Case) -> Vec<Mat<'a>> {
    case.ranges().into_iter().map(|range| a.mat().rows_in(range)).collect()
}

/// The fused kernel with given tiles on a device, the composition on the host.
fn forward_once(s: &Side, case: &Case, i: usize, size: Size) {
    let Case { n, k, out, pad, .. } = *case;
    let transposed = i.is_multiple_of(2);
    let x = s.random(1, n, k, pad, 1.0);
    let w = if transposed { s.random(2, out, k, pad, 1.0) } else { s.random(2, k, out, pad, 1.0) };
    let w = w.mat().t_if(transposed);
    let bias = if i.is_multiple_of(3) { s.random_acc(3, 1, out, 0, 1.0) } else { s.random(3, 1, out, i % 2, 1.0) };
    let bias = (i % 4 != 3).then(|| bias.mat());
    let h = s.random(4, n, case.rank(), pad, 1.0);
    let b = case.b(s);
    let mut y = if i % 5 == 4 { s.poison_acc(n, out, pad) } else { s.poison(n, out, pad) };
    match s.device() {
        Device::Cuda(gpu) => {
            let mut y = y.mat_mut();
            let job = forward_job(gpu, x.mat(), w, bias, h.mat(), &case.list(&b), &y).expect("a shape for the kernel");
            launch(gpu, &job, &mut y, size).unwrap();
        }
        _ => lora_forward(x.mat(), w, bias, h.mat(), &case.list(&b), y.mat_mut()).unwrap(),
    }
    s.out(format!("y {n}×{k}×{out} {:?} {size:?} {i}", case.parts), y.get());
}

fn input_once(s: &Side, case: &Case, i: usize, size: Size) {
    let Case { n, k, out, pad, .. } = *case;
    if k == 0 {
        return;
    }
    let transposed = i.is_multiple_of(2);
    let dy = s.random(1, n, out, pad, 1.0);
    let w = if transposed { s.random(2, out, k, pad, 1.0) } else { s.random(2, k, out, pad, 1.0) };
    let w = w.mat().t_if(transposed);
    let g = s.random(4, n, case.rank(), pad, 1.0);
    // One below the other, or each in memory of its own.
    let together = case.a(s);
    let apart = apart(s, case);
    let a: Vec<_> = if i % 4 < 2 { a_list(&together, case) } else { apart.iter().map(Padded::mat).collect() };
    let beta = [0.0, 1.0][i % 2];
    let mut dx = s.target(5, n, k, pad, beta);
    match s.device() {
        Device::Cuda(gpu) => {
            let mut dx = dx.acc(beta);
            let job = input_job(gpu, dy.mat(), w, g.mat(), &a, &dx).expect("a shape for the kernel");
            launch(gpu, &job, &mut dx.to, size).unwrap();
        }
        _ => lora_backward_input(dy.mat(), w, g.mat(), &a, dx.acc(beta)).unwrap(),
    }
    s.out(format!("dx {n}×{k}×{out} {:?} {size:?} {i}", case.parts), dx.get());
}

fn terms(s: &Side) {
    for (i, case) in CASES.iter().enumerate() {
        let (one, other) = if i.is_multiple_of(2) { (Size::Small, Size::Large) } else { (Size::Large, Size::Small) };
        forward_once(s, case, i, one);
        forward_once(s, case, i + 1, other);
        input_once(s, case, i, other);
        input_once(s, case, i + 1, one);
    }
}

#[test]
fn projections_with_their_terms_equal_the_reference() {
    parity("lora terms", &[(Bf16, 2e-2), (F16, 3e-3)], terms);
}

#[test]
fn projections_with_their_terms_equal_the_reference_in_f32() {
    parity("lora terms", &[(F32, 1e-5)], terms);
}

/// A's in memory of their own.
fn apart(s: &Side, case: &Case) -> Vec<Padded> {
    case.parts.iter().zip(40..).map(|((_, r), seed)| s.random(seed, *r, case.k, case.pad, 1.0)).collect()
}

fn weight(s: &Side, case: &Case, transposed: bool) -> Padded {
    let (rows, cols) = if transposed { (case.out, case.k) } else { (case.k, case.out) };
    s.random(2, rows, cols, case.pad, 1.0)
}

/// B of all terms as the device puts it together, [Σ r, n].
fn unpacked(gpu: &Arc<Gpu>, job: &Job, n: usize) -> Vec<f64> {
    let (to, ld) = packed(gpu, job, n).unwrap();
    assert_eq!(ld % 8, 0);
    let values = to.to_vec::<half::bf16>(0..to.len()).unwrap();
    let at = |i: usize| if job.by_rank() { i / n * ld + i % n } else { i % n * ld + i / n };
    (0..job.low.cols() * n).map(|i| values[at(i)].to_f64()).collect()
}

fn packs(s: &Side) {
    for (i, case) in CASES.iter().enumerate() {
        let &Case { n, k, out, parts, pad } = case;
        for transposed in [false, true] {
            let (x, h, w) =
                (s.random(1, n, k, pad, 1.0), s.random(4, n, case.rank(), pad, 1.0), weight(s, case, transposed));
            let (w, b, a) = (w.mat().t_if(transposed), case.b(s), apart(s, case));
            let (mut y, dy, mut dx) = (s.poison(n, out, pad), s.random(5, n, out, pad, 1.0), s.poison(n, k, pad));
            let Device::Cuda(gpu) = s.device() else {
                let mut of_b = vec![0.0; case.rank() * out];
                for ((b, range), (cols, r)) in b.iter().zip(case.ranges()).zip(parts) {
                    for (j, v) in b.get().into_iter().enumerate() {
                        of_b[(range.start + j % r) * out + cols.start + j / r] = v;
                    }
                }
                s.out(format!("B {i}"), of_b);
                s.out(format!("A {i}"), a.iter().flat_map(Padded::get).collect());
                continue;
            };
            let (one, aligned) = (parts.len() == 1, pad == 0);
            let job = forward_job(gpu, x.mat(), w, None, h.mat(), &case.list(&b), &y.mat_mut()).unwrap();
            let direct = one && aligned && transposed && parts[0].0 == (0..out) && case.rank().is_multiple_of(8);
            assert_eq!(job.whole(out).is_some(), s.tested() == Bf16 && direct, "{i}");
            s.out(format!("B {i}"), unpacked(gpu, &job, out));
            let a: Vec<_> = a.iter().map(Padded::mat).collect();
            let Some(job) = input_job(gpu, dy.mat(), w, h.mat(), &a, &dx.acc(0.0)) else {
                assert_eq!(k, 0);
                s.out("nothing", Vec::new());
                continue;
            };
            let direct = one && aligned && transposed && k.is_multiple_of(8);
            assert_eq!(job.whole(k).is_some(), direct, "{i}");
            s.out(format!("A {i}"), unpacked(gpu, &job, k));
        }
    }
}

#[test]
fn matrices_of_all_parts_are_put_together() {
    parity("lora pack", &[(Bf16, 0.0)], packs);
}

/// Results of the variants on a device, for a job that they can compute.
type OfVariants<'a> = dyn Fn(&Arc<Gpu>) -> Option<Vec<Vec<f64>>> + 'a;

/// Kernels for Hopper, where there is one: every variant by itself. Elsewhere what the public functions choose.
#[test]
fn projections_on_hopper_equal_the_reference() {
    const VARIANTS: usize = 5;
    let cases = [
        // More panels than the ring has stages; B as it lies, or turned.
        Case { n: 130, k: 520, out: 328, parts: &[(0..328, 16)], pad: 0 },
        // Zeros between the blocks of two parts, and ranks in more than one panel in rows that TMA cannot read.
        Case { n: 257, k: 64, out: 192, parts: &[(0..64, 8), (128..192, 8)], pad: 0 },
        Case { n: 64, k: 72, out: 200, parts: &[(8..101, 5), (101..200, 70)], pad: 0 },
    ];
    parity("lora hopper", &[(Bf16, 2e-2)], |s| {
        // Each variant's result, or one result as that of each.
        let each = |job: &OfVariants, other: &dyn Fn() -> Vec<f64>| {
            let results = match s.device() {
                Device::Cuda(gpu) if gpu.info().compute_capability == (9, 0) => job(gpu).expect("a job"),
                _ => vec![other(); VARIANTS],
            };
            assert_eq!(results.len(), VARIANTS);
            results.into_iter().for_each(|v| s.out("C", v));
        };
        for case in &cases {
            let &Case { n, k, out, .. } = case;
            for transposed in [false, true] {
                let (x, h, w) =
                    (s.random(1, n, k, 0, 0.1), s.random(4, n, case.rank(), 0, 0.25), weight(s, case, transposed));
                let (w, b, a) = (w.mat().t_if(transposed), case.b(s), apart(s, case));
                let (bias, dy) = (s.random_acc(3, 1, out, 0, 1.0), s.random(5, n, out, 0, 0.1));
                let bias = transposed.then(|| bias.mat());
                let a: Vec<_> = a.iter().map(Padded::mat).collect();
                let forward = |gpu: &Arc<Gpu>| {
                    let mut y = s.poison(n, out, 0);
                    let job = forward_job(gpu, x.mat(), w, bias, h.mat(), &case.list(&b), &y.mat_mut())?;
                    Some(every_variant(gpu, &job, &mut y, None))
                };
                each(&forward, &|| {
                    let mut y = s.poison(n, out, 0);
                    lora_forward(x.mat(), w, bias, h.mat(), &case.list(&b), y.mat_mut()).unwrap();
                    y.get()
                });
                let old = || s.random(6, n, k, 0, 1.0);
                let input = |gpu: &Arc<Gpu>| {
                    let mut dx = old();
                    let job = input_job(gpu, dy.mat(), w, h.mat(), &a, &dx.acc(1.0))?;
                    Some(every_variant(gpu, &job, &mut dx, Some(&old)))
                };
                each(&input, &|| {
                    let mut dx = old();
                    lora_backward_input(dy.mat(), w, h.mat(), &a, dx.acc(1.0)).unwrap();
                    dx.get()
                });
            }
        }
    });
}

/// What each variant makes of a job, in a C that is new each time where it is read.
fn every_variant(gpu: &Arc<Gpu>, job: &Job, c: &mut Padded, new: Option<&dyn Fn() -> Padded>) -> Vec<Vec<f64>> {
    let info = gpu.info();
    let shape = Shape::of(&job.projection(c.mat_mut()), false);
    let variants = wgmma::variants(info.compute_capability, info.multiprocessors, &shape);
    let mut result = |variant| {
        if let Some(new) = new {
            *c = new();
        }
        // SAFETY: one of the variants for the projection on this device.
        unsafe { launch_hopper(gpu, job, &mut c.mat_mut(), variant).unwrap() };
        c.get()
    };
    variants.into_iter().map(&mut result).collect()
}

#[test]
fn the_engine_of_the_projection_decides() {
    let variant = Variant { columns: 256, cluster: 2 };
    let (hopper, tiles) = (Engine::Wgmma(variant), Way::Tiles(Size::Large));
    let large = Some(Size::Large);
    assert_eq!(way(hopper, false, true, large), Way::Hopper(variant));
    assert_eq!(way(hopper, false, false, large), Way::Apart, "too many zeros");
    assert_eq!(way(Engine::Base, false, false, large), tiles);
    assert_eq!(way(Engine::Base, false, true, None), Way::Apart, "few rows");
    assert_eq!(way(Engine::Base, true, true, large), Way::Apart, "tf32");
    assert_eq!(way(Engine::CublasLt(0), false, true, large), Way::Apart, "the faster, or what LORA_GEMM asks for");
    assert_eq!(size(132, 8192, &[768, 768, 768]), large);
    assert_eq!(size(132, 512, &[768]), None);
    assert_eq!(size(132, 1024, &[768]), Some(Size::Small));
    assert_eq!(size(1, 8, &[768]), None);
}

/// dy read once: shapes for one block and for several across and down.
fn up(s: &Side) {
    let cases: &[(usize, Parts, usize)] = &[
        (33, &[(0..129, 8)], 0),
        (129, &[(0..50, 4), (100..150, 16)], 3),
        (1, &[(3..20, 1)], 1),
        (600, &[(0..257, 24)], 0),
        (70, &[(8..72, 17), (72..73, 32), (80..120, 1)], 0),
    ];
    for (i, &(n, parts, pad)) in cases.iter().enumerate() {
        let case = Case { n, k: 0, out: 300, parts, pad };
        let dy = s.random(1, n, 300, pad, 1.0);
        let h = s.random(2, n, case.rank(), pad, 1.0);
        let b = case.b(s);
        let mut g = s.poison(n, case.rank(), pad);
        let beta = [0.0, 1.0][i % 2];
        let mut db: Vec<Padded> = parts
            .iter()
            .zip(50..)
            .map(|((cols, r), seed)| match i % 3 {
                0 => s.target(seed, cols.len(), *r, pad, beta),
                _ => s.target_acc(seed, cols.len(), *r, pad, beta),
            })
            .collect();
        // Sometimes one of the gradients is not asked for.
        let skip = if parts.len() > 1 { Some(i % 2) } else { None };
        let mut wanted: Vec<_> =
            db.iter_mut().enumerate().map(|(j, db)| (Some(j) != skip).then(|| db.acc(beta))).collect();
        match s.device() {
            Device::Cuda(gpu) => {
                let mut g = g.mat_mut();
                let parts = case.list(&b);
                assert!(backward_up(gpu, -0.5, dy.mat(), h.mat(), &parts, &mut g, &mut wanted).unwrap());
            }
            _ => lora_backward_up(-0.5, dy.mat(), Some(h.mat()), &case.list(&b), Some(g.mat_mut()), wanted).unwrap(),
        }
        s.out(format!("g {i}"), g.get());
        for (j, db) in db.iter().enumerate() {
            s.out(format!("dB {j} of {i}"), db.get());
        }
    }
}

#[test]
fn gradients_that_read_dy_once_equal_the_reference() {
    parity("lora up", &[(F32, 2e-5), (Bf16, 2e-2), (F16, 4e-3)], up);
    // Ranks up to 64 on tensor cores.
    parity("lora up, rank 64", &[(Bf16, 2e-2)], |s| {
        let case = Case { n: 70, k: 0, out: 270, parts: &[(0..264, 61)], pad: 0 };
        let (dy, h, b) = (s.random(1, 70, 270, 0, 1.0), s.random(2, 70, 61, 3, 1.0), case.b(s));
        let (mut g, mut db) = (s.poison(70, 61, 0), s.poison_acc(264, 61, 1));
        let wanted = vec![Some(db.acc(0.0))];
        lora_backward_up(0.25, dy.mat(), Some(h.mat()), &case.list(&b), Some(g.mat_mut()), wanted).unwrap();
        s.out("g", g.get());
        s.out("dB", db.get());
    });
}

/// The public functions one after the other, whatever way they choose: large enough that the kernels are chosen.
#[test]
fn a_step_of_training_equals_the_reference() {
    parity("lora step", &[(F32, 2e-5), (Bf16, 4e-2)], |s| {
        for (i, n) in [3, 70].into_iter().enumerate() {
            let case = Case { n, k: 48, out: 160, parts: &[(0..64, 4), (96..160, 4)], pad: 0 };
            let (x, dy) = (s.random(1, n, 48, 0, 1.0), s.random(2, n, 160, 0, 1.0));
            let (w, b, a) = (s.random(3, 48, 160, 0, 0.5), case.b(s), case.a(s));
            let apart: Vec<_> = (40..42).map(|seed| s.random(seed, 4, 48, 0, 1.0)).collect();
            let a = if i == 0 { apart.iter().map(Padded::mat).collect() } else { a_list(&a, &case) };
            let (mut h, mut y, mut g) = (s.poison(n, 8, 0), s.poison(n, 160, 0), s.poison(n, 8, 0));
            lora_down(0.25, x.mat(), &a, h.mat_mut()).unwrap();
            lora_forward(x.mat(), w.mat(), None, h.mat(), &case.list(&b), y.mat_mut()).unwrap();
            let mut db = [s.poison_acc(64, 4, 0), s.poison_acc(64, 4, 0)];
            let wanted = db.iter_mut().map(|db| Some(db.acc(0.0))).collect();
            lora_backward_up(0.25, dy.mat(), Some(h.mat()), &case.list(&b), Some(g.mat_mut()), wanted).unwrap();
            // Gradients that lie together, and apart.
            let mut da = s.poison_acc(8, 48, 0);
            let [mut first, mut second] = [40, 41].map(|_| s.poison_acc(4, 48, 1));
            let (top, bottom) = da.mat_mut().reshape(1, 8 * 48).split_cols(4 * 48);
            let [top, bottom] = [top, bottom].map(|to| Acc { to: to.reshape(4, 48), beta: 0.0 });
            lora_backward_down(g.mat(), x.mat(), vec![(0..4, top), (4..8, bottom)]).unwrap();
            lora_backward_down(g.mat(), x.mat(), vec![(0..4, first.acc(0.0)), (4..8, second.acc(0.0))]).unwrap();
            let mut dx = s.target(9, n, 48, 0, 1.0);
            lora_backward_input(dy.mat(), w.mat(), g.mat(), &a, dx.acc(1.0)).unwrap();
            for (what, v) in [
                ("h", &h),
                ("y", &y),
                ("g", &g),
                ("dB", &db[1]),
                ("dA", &da),
                ("dA 0", &first),
                ("dA 1", &second),
                ("dx", &dx),
            ] {
                s.out(format!("{what} of {n}"), v.get());
            }
        }
    });
}

#[test]
fn rows_with_adapters_of_their_own_equal_the_reference() {
    parity("lora grouped", &[(F32, 2e-5), (Bf16, 2e-2), (F16, 3e-3)], |s| {
        for (k, out, pad) in [(40, 72, 0), (33, 70, 3)] {
            let x = s.random(1, 150, k, pad, 1.0);
            let mut y = s.random(2, 150, out, pad, 1.0);
            let of = |seed, rows, cols| s.random(seed, rows, cols, pad, 0.5);
            let (a1, b1, a2, b2) = (of(3, 5, k), of(4, out, 5), of(5, 66, k), of(6, 9, 66));
            let first = LoraAdapter { scale: 0.5, a: a1.mat(), b: b1.mat(), cols: 0..out };
            let second = LoraAdapter { scale: -0.25, a: a2.mat(), b: b2.mat(), cols: 8..17 };
            let groups = [
                (0..70, Some(first.clone())),
                (70..80, None),
                (80..80, Some(first.clone())),
                (80..81, Some(second.clone())),
                (84..149, Some(second)),
                (149..150, Some(first)),
            ];
            lora_grouped(x.mat(), &groups, y.mat_mut()).unwrap();
            s.out(format!("y {k} {out}"), y.get());
            // Nobody has an adapter.
            lora_grouped(x.mat(), &[(0..150, None)], y.mat_mut()).unwrap();
            s.out("y as it was", y.get());
        }
    });
}

#[test]
fn matrices_that_lie_together_are_one() {
    for gpu in gpus() {
        let device = Device::Cuda(gpu);
        let mut whole = Buffer::zeros(&device, F32, 60).unwrap();
        let m = Mat::new(&whole, 0, 10, 6);
        let all = stacked(&[m.rows_in(1..3), m.rows_in(3..4), m.rows_in(4..9)]).expect("they lie together");
        assert_eq!((all.rows(), all.address()), (8, m.rows_in(1..2).address()));
        // Columns of wider rows do too; others do not.
        assert!(stacked(&[m.cols_in(1..3).rows_in(0..2), m.cols_in(1..3).rows_in(2..5)]).is_some());
        assert!(stacked(&[m.rows_in(1..3), m.rows_in(4..9)]).is_none());
        assert!(stacked(&[m.rows_in(3..4), m.rows_in(1..3)]).is_none());
        assert!(stacked(&[m.t().cols_in(0..2).t(), m.rows_in(2..3).t()]).is_none());
        // Gradients as well, if they are written the same way.
        for (beta, count) in [(0.0, 1), (1.0, 2)] {
            let (top, bottom) = MatMut::new(&mut whole, 0, 1, 60).split_cols(24);
            let top = (0..4, Acc { to: top.reshape(4, 6), beta: 0.0 });
            let bottom = (4..10, Acc { to: bottom.reshape(6, 6), beta });
            assert_eq!(joined(vec![top, bottom]).len(), count);
        }
    }
}

#[test]
fn tiles_cover_the_columns_once_and_never_an_edge_of_a_part() {
    for (n, parts) in [
        (129, &[(0, 129)][..]),
        (150, &[(0, 50), (100, 150)]),
        (2304, &[(0, 768), (768, 1536), (1536, 2304)]),
        (2304, &[(768, 1536)]),
        (31, &[(3, 20), (20, 21), (22, 30)]),
        (5, &[]),
    ] {
        let parts: Vec<Range<usize>> = parts.iter().map(|&(from, to)| from..to).collect();
        let pieces = pieces(n, &parts);
        assert!(pieces.len() <= SEGMENTS);
        let list: Vec<_> = pieces.iter().map(|(c, p)| (c.clone(), p.map_or(0..0, |i| i..i + 1))).collect();
        for tile in [64, 128] {
            let (segments, tiles) = segments(&list, tile);
            let mut seen = vec![None; n];
            for number in 0..tiles {
                // As place_of_block finds it.
                let s = segments.iter().rfind(|s| s.tile <= number as i32).unwrap();
                let col = s.col as usize + (number - s.tile as usize) * tile;
                assert!(col < s.end as usize, "{n} {parts:?}: an empty tile");
                let end = (col + tile).min(s.end as usize);
                for (c, seen) in seen.iter_mut().enumerate().take(end).skip(col) {
                    assert!(seen.replace(s.from..s.to).is_none(), "{n} {parts:?}: column {c} twice");
                }
            }
            for (c, terms) in seen.into_iter().enumerate() {
                let part = parts.iter().position(|p| p.contains(&c));
                assert_eq!(terms, Some(part.map_or(0..0, |i| i as i32..i as i32 + 1)), "{n} {parts:?}: column {c}");
            }
        }
    }
}

#[test]
fn blocks_fit_a_multiprocessor_and_cover_all_rows() {
    for dtype in [F32, Bf16, F16] {
        for size in [Size::Large, Size::Small] {
            assert!(2 * size.shared(dtype) <= 163 << 10, "{dtype:?} {size:?}");
        }
        for rank in [1, 8, 16, 17, 32, 33, 64, 65, 256] {
            let limit = if dtype == F32 { 32 } else { 64 };
            let padded = padded(dtype, rank);
            assert_eq!(padded.is_some(), rank <= limit, "{dtype:?} {rank}");
            assert!(padded.is_none_or(|r| r >= rank && up_shared(dtype, r) <= 163 << 10), "{dtype:?} {rank}");
        }
    }
    // B, three stages of dy and h, and the sums, in bytes.
    assert_eq!(up_shared(Bf16, 16), (4 * 64 * 24 + 3 * (64 * 64 + 64 * 24)) * 2 + 256 * 16 * 4);
    for (n, across) in [(1, 1), (63, 3), (8192, 16), (8192, 9), (100_000, 43)] {
        for multiprocessors in [4, 108, 132] {
            let rows = up_rows(n, across, multiprocessors);
            assert!(rows.is_multiple_of(64) && rows > 0);
            let down = n.div_ceil(rows);
            assert!((down - 1) * rows < n && n <= down * rows && down < 1 << 16);
            // One wave of two blocks for each multiprocessor, more or less.
            assert!(down * across <= 2 * multiprocessors + across, "{n} {across}: {down} blocks down");
        }
    }
    assert_eq!(up_rows(8192, 16, 132), 512);
}

#[test]
fn arguments_are_laid_out_as_in_c() {
    assert_eq!((size_of::<Product>(), size_of::<Term>(), size_of::<Segment>()), (136, 48, 20));
    assert_eq!((size_of::<Arguments>(), std::mem::offset_of!(Arguments, segments)), (424, 280));
    assert_eq!((size_of::<Block>(), size_of::<Pack>()), (40, 152));
    assert_eq!((size_of::<UpPart>(), size_of::<Up>()), (88, 304));
    assert_eq!((size_of::<Grouped>(), std::mem::offset_of!(Grouped, k)), (64, 56));
}

pub(crate) const MUTATIONS: &[Mutation] = &[
    Mutation {
        name: "no barrier before a panel of a projection is multiplied",
        module: "lora_bf16",
        from: "cp_async_wait<STAGES - 2>();\n    __syncthreads();\n    if (p + STAGES - 1 < panels) feed",
        to: "cp_async_wait<STAGES - 2>();\n    if (p + STAGES - 1 < panels) feed",
        check: projections_with_their_terms_equal_the_reference,
    },
    Mutation {
        name: "the last steps of a term are left out",
        module: "lora_bf16",
        from: "panels += (terms[t].k + BK - 1) / BK",
        to: "panels += terms[t].k / BK",
        check: projections_with_their_terms_equal_the_reference,
    },
    Mutation {
        name: "a term begins at C's first column",
        module: "lora_bf16",
        from: "at.col - t.first, g.n - t.first",
        to: "at.col, g.n - t.first",
        check: projections_with_their_terms_equal_the_reference,
    },
    Mutation {
        name: "a term's panels are read as the projection's lie",
        module: "lora_bf16",
        from: "if (TB == TB2 || p < base)",
        to: "if (true)",
        check: projections_with_their_terms_equal_the_reference,
    },
    Mutation {
        name: "vectors across the edge of a part",
        module: "lora_bf16",
        from: "g.flags &= ~(TB ? VECTOR_C : VECTOR_B | VECTOR_C);",
        to: "g.flags &= ~0u;",
        check: projections_with_their_terms_equal_the_reference,
    },
    Mutation {
        name: "a tile of the next segment",
        module: "lora_f32",
        from: "l.segments[i].tile <= number",
        to: "l.segments[i].tile <= number + 1",
        check: projections_with_their_terms_equal_the_reference_in_f32,
    },
    Mutation {
        name: "no barrier between a term's panel and its products",
        module: "lora_f32",
        from: "    __syncthreads();\n    simt_panel",
        to: "    simt_panel",
        check: projections_with_their_terms_equal_the_reference_in_f32,
    },
    Mutation {
        name: "no barrier after a term's products",
        module: "lora_f32",
        from: "buffers + DEPTH * LA + in_b);\n    __syncthreads();",
        to: "buffers + DEPTH * LA + in_b);",
        check: projections_with_their_terms_equal_the_reference_in_f32,
    },
    Mutation {
        name: "blocks of another storage",
        module: "lora_bf16",
        from: "(col - k.col) * k.step_col + (rank - k.rank) * k.step_rank",
        to: "(col - k.col) * k.step_rank + (rank - k.rank) * k.step_col",
        check: matrices_of_all_parts_are_put_together,
    },
    Mutation {
        name: "a block is one rank too wide",
        module: "lora_bf16",
        from: "rank < k.rank_end",
        to: "rank <= k.rank_end",
        check: matrices_of_all_parts_are_put_together,
    },
    Mutation {
        name: "no barrier before a tile of dy is multiplied",
        module: "lora_bf16",
        from: "    __syncthreads();\n    if (t + STAGES",
        to: "    if (t + STAGES",
        check: gradients_that_read_dy_once_equal_the_reference,
    },
    Mutation {
        name: "dB of the last row of tiles only",
        module: "lora_bf16",
        from: "down == 0 ? 0.f : mine[e * UP_THREADS]",
        to: "0.f",
        check: gradients_that_read_dy_once_equal_the_reference,
    },
    Mutation {
        name: "g of the last tile across only",
        module: "lora_f32",
        from: "if (right_of == 0) {",
        to: "if (true) {",
        check: gradients_that_read_dy_once_equal_the_reference,
    },
    Mutation {
        name: "the last block of rows is not added to dB",
        module: "lora_bf16",
        from: "(u.n + u.rows - 1) / u.rows",
        to: "imax(u.n / u.rows, 1)",
        check: gradients_that_read_dy_once_equal_the_reference,
    },
    Mutation {
        name: "rows of another block count for dB",
        module: "lora_f16",
        from: "row, bottom, part.flags & VECTOR_C",
        to: "row, bottom + 1, part.flags & VECTOR_C",
        check: gradients_that_read_dy_once_equal_the_reference,
    },
    Mutation {
        name: "g is not scaled",
        module: "lora_f32",
        from: "from_f32<T>(u.scale * sum)",
        to: "from_f32<T>(sum)",
        check: gradients_that_read_dy_once_equal_the_reference,
    },
    Mutation {
        name: "an adapter's scale is forgotten",
        module: "lora_bf16",
        from: "g.alpha = e.scale",
        to: "g.alpha = 1.f",
        check: rows_with_adapters_of_their_own_equal_the_reference,
    },
    Mutation {
        name: "an adapter has a rank of 64 at most",
        module: "lora_bf16",
        from: "g.m = e.rows, g.n = e.rank, g.k = p.k",
        to: "g.m = e.rows, g.n = imin(e.rank, 64), g.k = p.k",
        check: rows_with_adapters_of_their_own_equal_the_reference,
    },
];

#[cfg(feature = "emulator")]
#[test]
fn planted_bugs_are_caught() {
    all_are_caught(MUTATIONS);
}
