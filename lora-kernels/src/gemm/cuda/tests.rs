use super::*;
use crate::{cuda::testing::*, gemm_batched, gemm_with, testing::Padded};

/// A matrix of a test, stored so that its rows begin at multiples of 16 bytes and end anywhere (`Aligned`), right
/// after each other (`Packed`), or at odd places (`Odd`).
#[derive(Clone, Copy)]
enum Store {
    Aligned,
    Packed,
    Odd,
}

impl Store {
    fn of(i: usize) -> Store {
        [Store::Aligned, Store::Odd, Store::Packed][i % 3]
    }

    /// Columns and padding of what is stored for `cols` columns.
    fn width(self, cols: usize) -> (usize, usize) {
        match self {
            Store::Aligned => (cols.next_multiple_of(8), 0),
            Store::Packed => (cols, 0),
            Store::Odd => (cols, 3),
        }
    }
}

struct Stored {
    whole: Padded,
    cols: usize,
}

impl Stored {
    fn random(s: &Side, seed: u64, rows: usize, cols: usize, store: Store) -> Stored {
        let (width, pad) = store.width(cols);
        Stored { whole: s.random(seed, rows, width, pad, 1.0), cols }
    }

    /// A C, or a residual, of the accumulator's type or of the tested one.
    fn sums(s: &Side, acc: bool, seed: u64, rows: usize, cols: usize, store: Store, beta: f64) -> Stored {
        let (width, pad) = store.width(cols);
        let whole = match acc {
            true => s.target_acc(seed, rows, width, pad, beta),
            false => s.target(seed, rows, width, pad, beta),
        };
        Stored { whole, cols }
    }

    fn mat(&self) -> Mat<'_> {
        self.whole.mat().cols_in(0..self.cols)
    }

    fn mat_mut(&mut self) -> MatMut<'_> {
        self.whole.mat_mut().cols_in(0..self.cols)
    }
}

/// One product of a test.
struct Case {
    m: usize,
    n: usize,
    k: usize,
    ta: bool,
    tb: bool,
    /// C in the accumulator's type.
    acc: bool,
    /// Everything else varies with it.
    i: usize,
}

/// Computes the case and reports C with all that stands around it. `forced`: the kernel and the ranges of k.
fn product(s: &Side, case: &Case, forced: Option<(bool, Kernel, usize)>) {
    let Case { m, n, k, ta, tb, acc, i } = *case;
    let shape = |rows, cols, t: bool| if t { (cols, rows) } else { (rows, cols) };
    let ((am, an), (bm, bn)) = (shape(m, k, ta), shape(k, n, tb));
    let a = Stored::random(s, 1, am, an, Store::of(i));
    let b = Stored::random(s, 2, bm, bn, Store::of(i / 2));
    let beta = [0.0, 1.0, -0.5][i % 3];
    let alpha = [1.0, 0.5][i % 2];
    let mut c = Stored::sums(s, acc, 3, m, n, Store::of(i / 3), beta);
    let bias = if acc { s.random_acc(4, 1, n, 0, 1.0) } else { s.random(4, 1, n, i % 2, 1.0) };
    let residual = Stored::sums(s, acc, 5, m, n, Store::of(i / 3), 1.0);
    let kinds = [
        None,
        Some(Activation::GeluTanh),
        Some(Activation::GeluErf),
        Some(Activation::Relu),
        Some(Activation::Silu),
        Some(Activation::Tanh),
    ];
    let epilogue = Epilogue {
        bias: (i % 4 != 0).then(|| bias.mat()),
        activation: kinds[i % 6],
        residual: (i % 5 > 1).then(|| residual.mat()),
    };
    let (x, y) = (a.mat().t_if(ta), b.mat().t_if(tb));
    match (s.device(), forced) {
        (Device::Cuda(gpu), Some((tf32, kernel, splits))) => {
            let p = Problem::single(alpha, x, y, beta, c.mat_mut(), epilogue);
            let family = family(p.a.dtype(), tf32).unwrap();
            let shape = Sizes::of(&p);
            let k_split = split(k, splits, tile(family, kernel, &shape).depth);
            run(gpu, &p, family, Cut { kernel, k_split }).unwrap();
        }
        _ => gemm_with(alpha, x, y, beta, c.mat_mut(), &epilogue).unwrap(),
    }
    let layout = Sizes { m, n, k, count: 1, ta, tb }.layout();
    s.out(format!("{m}×{n}×{k} {layout} i {i} {forced:?}"), c.whole.get());
}

const LAYOUTS: [(bool, bool); 4] = [(false, false), (false, true), (true, false), (true, true)];

/// All layouts and edges of tiles, with every storage, epilogue and number of ranges somewhere.
fn tiles(s: &Side, tf32: bool, acc: bool) {
    let sizes = [(1, 1, 1), (31, 129, 33), (129, 33, 40), (7, 127, 8), (64, 64, 64), (33, 8, 127), (127, 31, 130)];
    let mut i = 0;
    for (j, &(ta, tb)) in LAYOUTS.iter().enumerate() {
        for (l, &(m, n, k)) in sizes.iter().enumerate() {
            let mma = tf32 || s.tested() != F32;
            let kernel = if (j + l) % 2 == 0 && !(mma && ta && tb) { Kernel::Large } else { Kernel::Small };
            let splits = [1, 1, 3, 2][i % 4];
            product(s, &Case { m, n, k, ta, tb, acc, i }, Some((tf32, kernel, splits)));
            i += 1;
        }
    }
    // No steps at all: what remains is the epilogue.
    product(s, &Case { m: 9, n: 5, k: 0, ta: false, tb: false, acc, i: 7 }, Some((tf32, Kernel::Small, 1)));
    // More rows of tiles than go together.
    product(s, &Case { m: 650, n: 70, k: 3, ta: true, tb: false, acc, i: 0 }, Some((tf32, Kernel::Small, 1)));
}

fn few_rows(s: &Side, acc: bool) {
    for (i, (m, n, k)) in [(1, 1, 1), (1, 33, 129), (3, 129, 33), (8, 7, 127), (2, 64, 600), (1, 72, 320), (1, 50, 0)]
        .into_iter()
        .enumerate()
    {
        for tb in [false, true] {
            let splits = if tb || k == 0 { 1 } else { 1 + i % 3 };
            product(s, &Case { m, n, k, ta: false, tb, acc, i }, Some((false, Kernel::Gemv, splits)));
        }
    }
}

#[test]
fn f32_tiles_equal_the_reference() {
    parity("simt", &[(F32, 1e-5)], |s| tiles(s, false, false));
}

#[test]
fn bf16_tiles_equal_the_reference() {
    parity("mma", &[(Bf16, 1e-2)], |s| tiles(s, false, false));
    // Products of bf16 are exact in f32: only the sums round.
    parity("mma into f32", &[(Bf16, 1e-5)], |s| tiles(s, false, true));
}

#[test]
fn f16_tiles_equal_the_reference() {
    parity("mma", &[(F16, 2e-3)], |s| tiles(s, false, false));
    parity("mma into f32", &[(F16, 1e-5)], |s| tiles(s, false, true));
}

#[test]
fn tf32_tiles_equal_the_reference() {
    parity("mma tf32", &[(F32, 1e-2)], |s| tiles(s, true, false));
}

#[test]
fn few_rows_equal_the_reference() {
    parity("gemv", &[(F32, 1e-5), (Bf16, 1e-2), (F16, 2e-3)], |s| few_rows(s, false));
    parity("gemv into f32", &[(Bf16, 1e-5)], |s| few_rows(s, true));
}

/// Through the public functions: whatever plan they make.
#[test]
fn products_and_batches_equal_the_reference() {
    parity("gemm", &[(F32, 1e-5), (Bf16, 1e-2)], |s| {
        for (i, (m, n, k)) in
            [(0, 3, 2), (3, 0, 2), (5, 3, 0), (1, 70, 31), (40, 8, 300), (8, 40, 300)].into_iter().enumerate()
        {
            for (ta, tb) in LAYOUTS {
                product(s, &Case { m, n, k, ta, tb, acc: i % 2 == 0, i }, None);
            }
        }
        batches(s);
    });
}

fn batches(s: &Side) {
    use Stack::*;
    let count = 3;
    let stacked = |stack, rows, cols| match stack {
        Rows => (count * rows, cols),
        Cols => (rows, count * cols),
        Shared => (rows, cols),
    };
    for (i, (a, b, c)) in
        [(Rows, Rows, Rows), (Cols, Shared, Cols), (Shared, Cols, Rows), (Rows, Cols, Cols)].into_iter().enumerate()
    {
        for (ta, tb) in LAYOUTS {
            for (m, n, k) in [(7, 9, 33), (16, 8, 24)] {
                let beta = [0.0, 1.0][i % 2];
                let store = |stack, rows, cols, t: bool| {
                    let (rows, cols) = stacked(stack, rows, cols);
                    if t { (cols, rows) } else { (rows, cols) }
                };
                let ((am, an), (bm, bn), (cm, cn)) = (store(a, m, k, ta), store(b, k, n, tb), store(c, m, n, false));
                let x = Stored::random(s, 1, am, an, Store::of(i));
                let y = Stored::random(s, 2, bm, bn, Store::of(i));
                let mut z = Stored::sums(s, i == 2, 3, cm, cn, Store::of(i), beta);
                let batch = Batch { count, a, b, c };
                gemm_batched(0.5, x.mat().t_if(ta), y.mat().t_if(tb), beta, z.mat_mut(), &batch).unwrap();
                s.out(format!("{batch:?} {m}×{n}×{k} {ta} {tb}"), z.whole.get());
                // The same, over ranges of k.
                if let Device::Cuda(gpu) = s.device() {
                    let mut again = Stored::sums(s, i == 2, 3, cm, cn, Store::of(i), beta);
                    let p = Problem::batched(0.5, x.mat().t_if(ta), y.mat().t_if(tb), beta, again.mat_mut(), &batch);
                    let family = family(p.a.dtype(), false).unwrap();
                    run(gpu, &p, family, Cut { kernel: Kernel::Small, k_split: 16 }).unwrap();
                    s.out("over ranges", again.whole.get());
                } else {
                    s.out("over ranges", z.whole.get());
                }
            }
        }
    }
}

const FAMILIES: [Family; 4] = [Family::Simt, Family::Bf16, Family::F16, Family::Tf32];

fn shapes() -> Vec<Sizes> {
    let sizes = [1, 7, 8, 9, 31, 64, 127, 129, 768, 4096, 50257];
    let mut shapes = Vec::new();
    for (i, &m) in sizes.iter().enumerate() {
        for (j, &n) in sizes.iter().enumerate() {
            for k in [0, 1, 31, 129, 768, 8192, 100_003] {
                let (ta, tb) = LAYOUTS[(i + j) % 4];
                shapes.push(Sizes { m, n, k, count: 1 + (i * j) % 3, ta, tb });
            }
        }
    }
    shapes
}

#[test]
fn plans_cover_every_product_once() {
    for s in shapes() {
        for family in FAMILIES {
            for multiprocessors in [4, 108, 132] {
                let cut = cut(family, &s, multiprocessors);
                let tile = tile(family, cut.kernel, &s);
                let what = format!("{s:?} {family:?} {cut:?}");
                // As many tiles as reach the last row and column, none beyond them.
                let (rows, cols) = (s.m.div_ceil(tile.rows), s.n.div_ceil(tile.cols));
                assert_eq!(blocks(&tile, &s), rows * cols * s.count, "{what}");
                assert!((rows - 1) * tile.rows < s.m && s.m <= rows * tile.rows, "{what}");
                assert!((cols - 1) * tile.cols < s.n && s.n <= cols * tile.cols, "{what}");
                // Ranges of k follow each other, none is empty, and vectors of 16 bytes do not straddle them.
                let splits = s.k.div_ceil(cut.k_split).max(1);
                assert!(cut.k_split.is_multiple_of(tile.depth) && cut.k_split > 0, "{what}");
                assert!((splits - 1) * cut.k_split < s.k.max(1) && s.k <= splits * cut.k_split, "{what}");
                assert!(splits == 1 || tile.depth.is_multiple_of(16 / family.size()), "{what}");
                // What a launch may be.
                assert!(splits < 1 << 16 && blocks(&tile, &s) < 1 << 31, "{what}");
                assert!((tile.shared + 1024) * tile.resident <= 164 << 10, "{what}");
                assert!(splits == 1 || cut.kernel == Kernel::Gemv || partials(&s, splits) <= MOST_PARTIALS, "{what}");
                // What the kernels do not do.
                if cut.kernel == Kernel::Gemv {
                    assert!(s.m <= 8 && !s.ta && s.count == 1 && (!s.tb || splits == 1), "{what}");
                }
                assert!(!(cut.kernel == Kernel::Large && s.ta && s.tb && family != Family::Simt), "{what}");
            }
        }
    }
}

#[test]
fn partial_sums_have_whole_vectors_for_every_row() {
    let s = Sizes { m: 3, n: 33, k: 500, count: 2, ta: false, tb: false };
    assert_eq!(partials(&s, 5), 2 * 5 * 3 * 40);
    assert_eq!(partials(&Sizes { n: 40, ..s }, 1), 2 * 3 * 40);
}

#[test]
fn the_shapes_of_lora_fill_a_device() {
    let of = |m, n, k, ta, tb| {
        let s = Sizes { m, n, k, count: 1, ta, tb };
        let cut = cut(Family::Bf16, &s, 132);
        (cut.kernel, blocks(&tile(Family::Bf16, cut.kernel, &s), &s) * k.div_ceil(cut.k_split))
    };
    assert_eq!(of(4096, 4096, 4096, false, true), (Kernel::Large, 1024));
    for (what, (_, blocks)) in [
        ("h = x·Aᵀ", of(8192, 16, 768, false, true)),
        ("dA = gᵀ·x", of(16, 768, 8192, true, false)),
        ("dB = dyᵀ·h", of(768, 16, 8192, true, false)),
        ("dx of a few rows", of(256, 768, 2304, false, false)),
        ("decoding, W as [k, n]", of(1, 2304, 768, false, false)),
        ("decoding, the head", of(1, 50257, 768, false, true)),
    ] {
        assert!(blocks >= 100, "{what}: {blocks} blocks");
    }
    // Nothing to gain by ranges: each block has enough to do, and there are enough of them.
    assert_eq!(of(8192, 768, 16, false, true).1, of(8192, 768, 15, false, true).1);
}

#[test]
fn arguments_are_laid_out_as_in_c() {
    assert_eq!((size_of::<Arguments>(), align_of::<Arguments>()), (136, 8));
    assert_eq!(std::mem::offset_of!(Arguments, lda), 64);
    assert_eq!(std::mem::offset_of!(Arguments, flags), 128);
}

pub(crate) const MUTATIONS: &[Mutation] = &[
    Mutation {
        name: "no barrier before a panel is multiplied",
        module: "gemm_mma_bf16",
        from: "cp_async_wait<STAGES - 2>();\n    __syncthreads();",
        to: "cp_async_wait<STAGES - 2>();",
        check: bf16_tiles_equal_the_reference,
    },
    Mutation {
        name: "the wait for a panel lets one group too many be under way",
        module: "gemm_mma_bf16",
        from: "cp_async_wait<STAGES - 2>",
        to: "cp_async_wait<STAGES - 1>",
        check: bf16_tiles_equal_the_reference,
    },
    Mutation {
        name: "copies go into the buffer that is being multiplied",
        module: "gemm_mma_bf16",
        from: "free = now;",
        to: "free = now + 1 == STAGES ? 0 : now + 1;",
        check: bf16_tiles_equal_the_reference,
    },
    Mutation {
        name: "one row too many is loaded",
        module: "gemm_mma_bf16",
        from: "rows(rows - row)",
        to: "rows(rows - row + 1)",
        check: bf16_tiles_equal_the_reference,
    },
    Mutation {
        name: "one step too many, contiguous along k",
        module: "gemm_mma_bf16",
        from: "k_end - k - first",
        to: "k_end - k - first + 1",
        check: bf16_tiles_equal_the_reference,
    },
    Mutation {
        name: "one step too many, contiguous across",
        module: "gemm_mma_bf16",
        from: "rows : k_end - k;",
        to: "rows : k_end - k + 1;",
        check: bf16_tiles_equal_the_reference,
    },
    Mutation {
        name: "one step of the next range of k",
        module: "gemm_mma_bf16",
        from: "imin(g.k, begin + g.k_split)",
        to: "imin(g.k, begin + g.k_split + 1)",
        check: bf16_tiles_equal_the_reference,
    },
    Mutation {
        name: "the wrong matrices of a fragment of A",
        module: "gemm_mma_bf16",
        from: "pa + A::at(r + l8 + 8 * low, k / 8 + high)",
        to: "pa + A::at(r + l8 + 8 * high, k / 8 + low)",
        check: bf16_tiles_equal_the_reference,
    },
    Mutation {
        name: "the wrong matrices of a transposed fragment of B",
        module: "gemm_mma_bf16",
        from: "pb + B::at(k + l8 + 8 * low, c / 8 + high)",
        to: "pb + B::at(k + l8 + 8 * high, c / 8 + low)",
        check: bf16_tiles_equal_the_reference,
    },
    Mutation {
        name: "sums put down while panels are still read",
        module: "gemm_mma_bf16",
        from: "turn++) {\n    __syncthreads();",
        to: "turn++) {",
        check: bf16_tiles_equal_the_reference,
    },
    Mutation {
        name: "sums read before they are all put down",
        module: "gemm_mma_bf16",
        from: "    __syncthreads();\n    finish_tile",
        to: "    finish_tile",
        check: bf16_tiles_equal_the_reference,
    },
    Mutation {
        name: "one row too many is written",
        module: "gemm_mma_f16",
        from: "row + r >= g.m",
        to: "row + r > g.m",
        check: f16_tiles_equal_the_reference,
    },
    Mutation {
        name: "one column too many is written",
        module: "gemm_mma_f16",
        from: "int valid = g.n - col;",
        to: "int valid = g.n - col + 1;",
        check: f16_tiles_equal_the_reference,
    },
    Mutation {
        name: "no bias",
        module: "gemm_mma_bf16",
        from: "if (g.bias)",
        to: "if (false)",
        check: bf16_tiles_equal_the_reference,
    },
    Mutation {
        name: "β is forgotten",
        module: "gemm_mma_bf16",
        from: "if (g.beta != 0.f)",
        to: "if (false)",
        check: bf16_tiles_equal_the_reference,
    },
    Mutation {
        name: "C is read though β is 0",
        module: "gemm_mma_bf16",
        from: "if (g.beta != 0.f)",
        to: "if (true)",
        check: bf16_tiles_equal_the_reference,
    },
    Mutation {
        name: "no residual",
        module: "gemm_mma_bf16",
        from: "if (g.residual)",
        to: "if (false)",
        check: bf16_tiles_equal_the_reference,
    },
    Mutation {
        name: "no activation",
        module: "gemm_mma_bf16",
        from: "if (kind)",
        to: "if (false)",
        check: bf16_tiles_equal_the_reference,
    },
    Mutation {
        name: "the last range of k is not added",
        module: "gemm_simt",
        from: "s < splits",
        to: "s + 1 < splits",
        check: f32_tiles_equal_the_reference,
    },
    Mutation {
        name: "a band of tiles is one too high",
        module: "gemm_simt",
        from: "imin(rows - band * 8, 8)",
        to: "8",
        check: f32_tiles_equal_the_reference,
    },
    Mutation {
        name: "no barrier between panels",
        module: "gemm_simt",
        from: "    __syncthreads();\n  }\n\n  // The two rows",
        to: "  }\n\n  // The two rows",
        check: f32_tiles_equal_the_reference,
    },
    Mutation {
        name: "no barrier before the first panel",
        module: "gemm_simt",
        from: "  __syncthreads();\n  int now = 0;",
        to: "  int now = 0;",
        check: f32_tiles_equal_the_reference,
    },
    Mutation {
        name: "a panel is laid into the buffer that is being read",
        module: "gemm_simt",
        from: "    now ^= 1;\n    if (more) {",
        to: "    if (more) {",
        check: f32_tiles_equal_the_reference,
    },
    Mutation {
        name: "one step too many of the f32 panel",
        module: "gemm_simt",
        from: "k_end - p : 0",
        to: "k_end - p + 1 : 0",
        check: f32_tiles_equal_the_reference,
    },
    Mutation {
        name: "tf32 fragments in another order",
        module: "gemm_mma_tf32",
        from: "x % 2 * 8, k + t + x / 2 * 4",
        to: "x / 2 * 8, k + t + x % 2 * 4",
        check: tf32_tiles_equal_the_reference,
    },
    Mutation {
        name: "the second B of a batch is the first",
        module: "gemm_mma_bf16",
        from: "tile.batch * g.step_b",
        to: "0 * g.step_b",
        check: products_and_batches_equal_the_reference,
    },
    Mutation {
        name: "no barrier before the warps' sums are added up",
        module: "gemv",
        from: "  __syncthreads();\n  for (int i = threadIdx.x; i < g.m * WIDTH",
        to: "  for (int i = threadIdx.x; i < g.m * WIDTH",
        check: few_rows_equal_the_reference,
    },
    Mutation {
        name: "half of the lanes' sums are lost",
        module: "gemv",
        from: "v += shfl_xor(v, 16);",
        to: "",
        check: few_rows_equal_the_reference,
    },
    Mutation {
        name: "a column too many is read",
        module: "gemv",
        from: "col + c < g.n ? g.k - k : 0",
        to: "g.k - k",
        check: few_rows_equal_the_reference,
    },
];

#[cfg(feature = "emulator")]
#[test]
fn planted_bugs_are_caught() {
    all_are_caught(MUTATIONS);
}
