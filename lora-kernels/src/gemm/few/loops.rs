use super::{
    Part, Weight,
    lanes::{LANES, Lanes, fetch},
};

/// Rows of B that are read side by side where B is stored by rows. Their products are summed before they are added to C,
/// so that a long sum keeps its digits, and C, which is read and written as often, costs little beside B.
const DEPTH: usize = 16;

/// So many columns of B, where they lie together, before its use a cache line is asked for; of rows, the next [`DEPTH`].
const AHEAD: usize = 8;

/// Calls `$f::<V, W, M, N>` for `$m` rows and `$n` vectors, or columns, in the sizes that 32 registers hold.
macro_rules! sized {
    ($m:expr, $n:expr, $f:ident $args:tt) => {
        sized!(@ $m, $n, $f $args, (1, 1) (2, 1) (3, 1) (4, 1) (5, 1) (6, 1) (7, 1) (8, 1)
            (1, 4) (2, 4) (3, 4) (4, 4) (5, 4) (6, 4) (6, 3) (7, 3) (8, 3))
    };
    (@ $m:expr, $n:expr, $f:ident $args:tt, $(($M:literal, $N:literal))*) => {
        match ($m, $n) {
            $(($M, $N) => $f::<V, W, $M, $N> $args,)*
            (m, n) => unreachable!("{m} rows by {n}"),
        }
    };
}

impl<W: Weight> Part<'_, W> {
    /// # Safety
    /// The fields describe memory that can be read and, of C, written by nobody else; the processor has `V`'s vectors.
    #[inline(always)]
    pub(super) unsafe fn run<V: Lanes>(&self) {
        let wide = if self.rows.most() <= 6 { 4 } else { 3 };
        // SAFETY: as the caller promises.
        unsafe {
            match self.b.transposed {
                // One row is fastest with memory read from one end to the other, as the processor foresees; with more,
                // several columns together, because A has to be loaded for each.
                true => self.dots::<V>(if self.rows.m == 1 { 1 } else { wide }),
                false => self.sums::<V>(wide),
            }
        }
    }

    /// B stored by rows: rows of B times numbers of A are added to the rows of C, for some rows of B side by side. Reads go
    /// along the rows, as far as they reach: longer runs are worth more than a C that stays in the nearest cache.
    ///
    /// # Safety
    /// As [`Part::run`].
    #[inline(always)]
    unsafe fn sums<V: Lanes>(&self, wide: usize) {
        // Once even for no products at all, because C takes its β in any case.
        for p in (0..self.k.max(1)).step_by(DEPTH) {
            let depth = DEPTH.min(self.k - p);
            // What the rows of C begin with: what the rows of B before left there.
            let beta = if p == 0 { self.beta } else { 1.0 };
            let mut j = 0;
            while j < self.n {
                let vectors = if self.n - j >= wide * LANES { wide } else { 1 };
                let len = LANES.min(self.n - j);
                for (first, size) in self.rows.groups() {
                    // SAFETY: the tile's columns from j on, and the group's rows, lie inside A, B and C.
                    unsafe {
                        let a = self.a.as_ptr().add(first * self.k + p);
                        let b = self.b.ptr().add(p * self.b.ld + j);
                        let c = self.c.add(first * self.ldc + j);
                        sized!(
                            size,
                            vectors,
                            sum_tile(a, self.k, b, self.b.ld, depth, self.alpha, beta, c, self.ldc, len)
                        );
                    }
                }
                j += vectors * LANES;
            }
        }
    }

    /// B transposed: its columns, which lie one after the other, times the rows of A.
    ///
    /// # Safety
    /// As [`Part::run`].
    #[inline(always)]
    unsafe fn dots<V: Lanes>(&self, wide: usize) {
        let mut j = 0;
        while j < self.n {
            let columns = if self.n - j >= wide { wide } else { 1 };
            for (first, size) in self.rows.groups() {
                // SAFETY: the columns from j on, and the group's rows, lie inside A, B and C.
                unsafe {
                    let a = self.a.as_ptr().add(first * self.k);
                    let b = self.b.ptr().add(j * self.b.ld);
                    let c = self.c.add(first * self.ldc + j);
                    sized!(size, columns, dot_tile(a, b, self.b.ld, self.k, self.alpha, self.beta, c, self.ldc));
                }
            }
            j += columns;
        }
    }
}

/// C [M, 16·N] = β·C + α·A [M, depth]·B [depth, 16·N]; with N = 1 only `len` columns.
///
/// # Safety
/// The matrices have that many rows and columns, from where they begin and by their strides; the processor has `V`'s vectors.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // three matrices with their strides
unsafe fn sum_tile<V: Lanes, W: Weight, const M: usize, const N: usize>(
    a: *const f32,
    lda: usize,
    b: *const W,
    ldb: usize,
    depth: usize,
    alpha: f32,
    beta: f32,
    c: *mut f32,
    ldc: usize,
    len: usize,
) {
    let len = if N > 1 { LANES } else { len };
    // SAFETY: the caller gives matrices of this size.
    unsafe {
        let zero = V::splat(0.0);
        let mut acc = [[zero; N]; M];
        for p in 0..depth {
            let (a, b) = (a.add(p), b.add(p * ldb));
            let mut w = [zero; N];
            for (v, w) in w.iter_mut().enumerate() {
                *w = W::load(b.add(v * LANES), len);
                fetch(b.wrapping_add(DEPTH * ldb + v * LANES));
            }
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = V::splat(*a.add(i * lda));
                for (acc, w) in acc.iter_mut().zip(w) {
                    *acc = x.mul_add(w, *acc);
                }
            }
        }
        for (i, acc) in acc.into_iter().enumerate() {
            for (v, acc) in acc.into_iter().enumerate() {
                let c = c.add(i * ldc + v * LANES);
                let old = match beta {
                    0.0 => zero,
                    1.0 => V::load(c, len),
                    beta => V::load(c, len).mul_add(V::splat(beta), zero),
                };
                acc.mul_add(V::splat(alpha), old).store(c, len);
            }
        }
    }
}

/// C [M, N] = β·C + α·A [M, k]·B [k, N], B column by column.
///
/// # Safety
/// The matrices have that many rows and columns, from where they begin and by their strides; the processor has `V`'s vectors.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // three matrices with their strides
unsafe fn dot_tile<V: Lanes, W: Weight, const M: usize, const N: usize>(
    a: *const f32,
    b: *const W,
    ldb: usize,
    k: usize,
    alpha: f32,
    beta: f32,
    c: *mut f32,
    ldc: usize,
) {
    // SAFETY: the caller gives matrices of this size.
    unsafe {
        let mut acc = [[V::splat(0.0); N]; M];
        let whole = k / LANES * LANES;
        for p in (0..whole).step_by(LANES) {
            dot_step(a.add(p), k, b.add(p), ldb, &mut acc, LANES);
        }
        if whole < k {
            dot_step(a.add(whole), k, b.add(whole), ldb, &mut acc, k - whole);
        }
        for (i, acc) in acc.into_iter().enumerate() {
            for (j, acc) in acc.into_iter().enumerate() {
                let (c, sum) = (c.add(i * ldc + j), acc.sum());
                *c = alpha.mul_add(sum, if beta == 0.0 { 0.0 } else { beta * *c });
            }
        }
    }
}

/// `len` of k elements more of every row of A times every column of B.
///
/// # Safety
/// They can be read; the processor has `V`'s vectors.
#[inline(always)]
unsafe fn dot_step<V: Lanes, W: Weight, const M: usize, const N: usize>(
    a: *const f32,
    lda: usize,
    b: *const W,
    ldb: usize,
    acc: &mut [[V; N]; M],
    len: usize,
) {
    // SAFETY: the caller gives matrices of this size.
    unsafe {
        let mut w = [V::splat(0.0); N];
        for (j, w) in w.iter_mut().enumerate() {
            *w = W::load(b.add(j * ldb), len);
            if N > 1 {
                fetch(b.wrapping_add((AHEAD + j) * ldb));
            }
        }
        for (i, acc) in acc.iter_mut().enumerate() {
            let x = V::load(a.add(i * lda), len);
            for (acc, w) in acc.iter_mut().zip(w) {
                *acc = x.mul_add(w, *acc);
            }
        }
    }
}
