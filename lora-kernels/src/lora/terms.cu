// A projection with its low-rank updates as one product, C = α·A·B + Σ A_t·B_t + β·C + bias: after the panels of A and B
// those of the terms go through the same pipeline into the same sums. C is written once, and read only where β asks.

// A low-rank term: A [m, k] times B [k, …], whose columns go to those of C from `first` on. Flags are VECTOR_A, VECTOR_B.
constexpr int TERMS = 3;
struct Term { const void* a; const void* b; i64 lda, ldb; int k, first; u32 flags, unused; };
// Columns of C that get the same terms, `from` up to `to`. Their tiles stand side by side from number `tile` on, so that
// no tile lies over the edge of a term. Segments that are not used have the largest of all numbers.
constexpr int SEGMENTS = 2 * TERMS + 1;
struct Segment { int col, end, tile, from, to; };
struct Lora { Gemm g; Term terms[TERMS]; Segment segments[SEGMENTS]; int tiles; };

// Where a block's tile is, and which terms it gets.
struct Place { int row, col, from, to; };
// Cuts g down to the tile's segment.
template <class T, int BM, int BN, bool TB> DEVICE Place place_of_block(const Lora& l, Gemm& g) {
  g.n = l.tiles * BN;
  Tile tile = tile_of_block<BM, BN>(g);
  int number = tile.col / BN;
  Segment s = l.segments[0];
#pragma unroll
  for (int i = 1; i < SEGMENTS; i++)
    if (l.segments[i].tile <= number) s = l.segments[i];
  g.n = s.end;
  // Vectors begin where the segment begins.
  if (s.col % (16 / (int)sizeof(T)) != 0) g.flags &= ~(TB ? VECTOR_C : VECTOR_B | VECTOR_C);
  return {tile.row, s.col + (number - s.tile) * BN, s.from, s.to};
}

// The panels of a tile in their order: those of A and B, then those of each term.
template <class T, int BM, int BN, int BK, bool TB, bool TB2, int THREADS> struct Feed {
  using LoadA = Loader<T, BM, BK, true, THREADS>;
  using LoadB = Loader<T, BN, BK, TB, THREADS>;
  using LoadB2 = Loader<T, BN, BK, TB2, THREADS>;
  const Gemm& g;
  const Term* terms;
  const Place& at;
  LoadA a;
  LoadB b;
  LoadB2 b2;
  int term;  // the next one
  bool base;

  DEVICE Feed(const Gemm& g, const Term* terms, const Place& at)
      : g(g), terms(terms), at(at), a((const T*)g.a, g.lda, at.row, g.m, 0, g.k, g.flags & VECTOR_A),
        b((const T*)g.b, g.ldb, at.col, g.n, 0, g.k, g.flags & VECTOR_B), b2((const T*)g.b, 0, 0, 0, 0, 0, true),
        term(at.from), base(true) {}

  // Starts the next panel, which exists.
  DEVICE void next(T* pa, T* pb) {
    if (a.k >= a.k_end) {
      const Term& t = terms[term++];
      a = LoadA((const T*)t.a, t.lda, at.row, g.m, 0, t.k, t.flags & VECTOR_A);
      b2 = LoadB2((const T*)t.b, t.ldb, at.col - t.first, g.n - t.first, 0, t.k, t.flags & VECTOR_B);
      base = false;
    }
    a.start(pa);
    if (base) b.start(pb);
    else b2.start(pb);
  }
};

// One tile on tensor cores, as `tensor` does it. TB2: as TB, for the terms.
template <class T, int BM, int BN, int BK, int STAGES, int WARPS_M, int WARPS_N, bool TB, bool TB2>
DEVICE void tensor_terms(const Gemm& g, const Term* terms, const Place& at) {
  constexpr int THREADS = WARPS_M * WARPS_N * 32, WM = BM / WARPS_M, WN = BN / WARPS_N, MI = WM / 16, NI = WN / 8;
  constexpr int A = Layout<T, BM, BK, true>::ELEMENTS, STAGE = A + Layout<T, BN, BK, TB>::ELEMENTS, LD = BN + 8;
  static_assert(STAGE == A + Layout<T, BN, BK, TB2>::ELEMENTS, "a stage holds either layout");
  static_assert(WM * LD * sizeof(float) <= STAGES * STAGE * sizeof(T), "the sums fit where the panels were");
  DYNAMIC_SHARED(shared);
  T* stages = (T*)shared;
  int base = (g.k + BK - 1) / BK, panels = base;
#pragma unroll 1
  for (int t = at.from; t < at.to; t++) panels += (terms[t].k + BK - 1) / BK;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_row = warp / WARPS_N, warp_col = warp % WARPS_N;

  float acc[MI][NI][4];
#pragma unroll
  for (int i = 0; i < MI; i++)
#pragma unroll
    for (int j = 0; j < NI; j++)
#pragma unroll
      for (int x = 0; x < 4; x++) acc[i][j][x] = 0.f;

  Feed<T, BM, BN, BK, TB, TB2, THREADS> feed(g, terms, at);
#pragma unroll 1
  for (int p = 0; p < STAGES - 1; p++) {
    if (p < panels) feed.next(stages + p * STAGE, stages + p * STAGE + A);
    cp_async_commit();
  }
  int now = 0, free = STAGES - 1;
#pragma unroll 1
  for (int p = 0; p < panels; p++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    if (p + STAGES - 1 < panels) feed.next(stages + free * STAGE, stages + free * STAGE + A);
    cp_async_commit();
    const T* panel = stages + now * STAGE;
    if (TB == TB2 || p < base)
      Multiply<T, BM, BN, BK, false, TB, MI, NI>::panel(acc, panel, panel + A, warp_row * WM, warp_col * WN, lane);
    else
      Multiply<T, BM, BN, BK, false, TB2, MI, NI>::panel(acc, panel, panel + A, warp_row * WM, warp_col * WN, lane);
    free = now;
    now = now + 1 == STAGES ? 0 : now + 1;
  }

  // The rows of warps hand over their sums in turn.
  float* sums = (float*)shared;
#pragma unroll 1
  for (int turn = 0; turn < WARPS_M; turn++) {
    __syncthreads();
    if (warp_row == turn) {
#pragma unroll
      for (int i = 0; i < MI; i++)
#pragma unroll
        for (int j = 0; j < NI; j++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            float* to = sums + (i * 16 + lane / 4 + h * 8) * LD + warp_col * WN + j * 8 + lane % 4 * 2;
            *(float2*)to = make_float2(acc[i][j][h * 2], acc[i][j][h * 2 + 1]);
          }
    }
    __syncthreads();
    finish_tile<T, 16 / sizeof(T), WM, BN, LD, THREADS>(g, sums, 0, at.row + turn * WM, at.col);
  }
}

// The tiles of a type, LARGE or small: 128×128 and 64×64, as those of plain products.
template <class T, bool LARGE> struct Tiles {
  static constexpr int SIZE = LARGE ? 128 : 64, THREADS = LARGE ? 256 : 128;
  template <bool TB, bool TB2> static DEVICE void compute(Gemm& g, const Term* terms, const Place& at) {
    tensor_terms<T, SIZE, SIZE, LARGE ? 32 : 64, 4, 2, LARGE ? 4 : 2, TB, TB2>(g, terms, at);
  }
};

template <class T, bool LARGE, bool TB, bool TB2> DEVICE void lora_product(const Lora& l) {
  Gemm g = l.g;
  constexpr int SIZE = Tiles<T, LARGE>::SIZE;
  Place at = place_of_block<T, SIZE, SIZE, TB>(l, g);
  Tiles<T, LARGE>::template compute<TB, TB2>(g, l.terms, at);
}

// Rows of a batch with different adapters, y += s·(x·Aᵀ)·Bᵀ: one entry per up to 64 rows of one adapter, for which y has
// the columns that B has rows. Entries lie in device memory.
struct Entry { const void* a; const void* b; i64 lda, ldb; int row, rows, rank, col, cols; float scale; u32 flags, unused; };
struct Grouped { const Entry* entries; const void* x; void* h; void* y; i64 ldx, ldh, ldy; int k; u32 flags; };

// h = s·x·Aᵀ. Block (entry, 64 ranks).
template <class T> DEVICE void grouped_down(const Grouped& p) {
  Entry e = p.entries[blockIdx.x];
  int col = blockIdx.y * 64;
  if (col >= e.rank) return;
  Gemm g = {};
  g.a = (const T*)p.x + e.row * p.ldx, g.b = e.a, g.c = (T*)p.h + e.row * p.ldh;
  g.m = e.rows, g.n = e.rank, g.k = p.k, g.lda = p.ldx, g.ldb = e.lda, g.ldc = p.ldh, g.alpha = e.scale;
  g.flags = (p.flags & VECTOR_A) | (e.flags & VECTOR_A ? VECTOR_B : 0) | VECTOR_C;
  Tiles<T, false>::template compute<true, true>(g, (const Term*)nullptr, {0, col, 0, 0});
}

// y += h·Bᵀ. Block (entry, 64 columns).
template <class T> DEVICE void grouped_up(const Grouped& p) {
  Entry e = p.entries[blockIdx.x];
  int col = blockIdx.y * 64;
  if (col >= e.cols) return;
  Gemm g = {};
  g.a = (const T*)p.h + e.row * p.ldh, g.b = e.b, g.c = (T*)p.y + e.row * p.ldy + e.col;
  g.m = e.rows, g.n = e.cols, g.k = e.rank, g.lda = p.ldh, g.ldb = e.ldb, g.ldc = p.ldy, g.alpha = g.beta = 1.f;
  g.flags = VECTOR_A | (e.flags & VECTOR_B) | (p.flags & e.flags & VECTOR_C);
  Tiles<T, false>::template compute<true, true>(g, (const Term*)nullptr, {0, col, 0, 0});
}

// All kernels of one type. Two blocks of large tiles to a multiprocessor: at most 128 registers.
#define LORA_LARGE(what, layout, TB, TB2, T, name)                                                    \
  extern "C" __global__ void __launch_bounds__(256, 2) lora_##what##_large_##layout##_##name(Lora l) { \
    lora_product<T, true, TB, TB2>(l);                                                                 \
  }
#define LORA_SMALL(what, layout, TB, TB2, T, name, threads) \
  extern "C" __global__ void __launch_bounds__(threads, 2) lora_##what##_small_##layout##_##name(Lora l) { \
    lora_product<T, false, TB, TB2>(l);                                                                        \
  }
#define LORA_PRODUCT(what, layout, TB, TB2, T, name, threads) \
  LORA_LARGE(what, layout, TB, TB2, T, name)                  \
  LORA_SMALL(what, layout, TB, TB2, T, name, threads)
#define LORA_TERMS(T, name, threads)                                                  \
  LORA_PRODUCT(forward, nn, false, true, T, name, threads)                            \
  LORA_PRODUCT(forward, nt, true, true, T, name, threads)                             \
  LORA_PRODUCT(input, nn, false, false, T, name, threads)                             \
  LORA_PRODUCT(input, nt, true, false, T, name, threads)                              \
  extern "C" __global__ void __launch_bounds__(threads, 2) lora_grouped_down_##name(Grouped p) { grouped_down<T>(p); } \
  extern "C" __global__ void __launch_bounds__(threads, 2) lora_grouped_up_##name(Grouped p) { grouped_up<T>(p); }
