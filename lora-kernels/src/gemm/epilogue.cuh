// What all GEMM kernels share: their parameters, and the way a sum becomes an element of C,
//   C = act(α·A·B + β·C + bias) + residual.

// 16 bytes in one load or store.
struct alignas(16) Chunk { u32 w[4]; };

// Bits of Gemm::flags. The lowest three are the activation (0 for none).
enum : u32 { ACTIVATION = 7, C_F32 = 8, BIAS_F32 = 16, VECTOR_A = 32, VECTOR_B = 64, VECTOR_C = 128 };

// What a kernel is told, as its launcher lays it out: a product of [m, k] and [k, n] matrices, or of pairs of them
// `step_*` elements apart. Leading dimensions and steps count elements. Block y takes the y-th range of `k_split` steps
// of k; if there are several, the raw sums go to `partial`, and reduce_splits completes them.
struct Gemm {
  const void* a; const void* b; void* c; const void* bias; const void* residual; float* partial;
  int m, n, k, k_split;
  i64 lda, ldb, ldc, ldr, step_a, step_b, step_c;
  float alpha, beta;
  u32 flags;
};
DEVICE int imin(int a, int b) { return a < b ? a : b; }
DEVICE int imax(int a, int b) { return a > b ? a : b; }
DEVICE int clamp(int x, int low, int high) { return imin(imax(x, low), high); }

// Rows of `partial`: whole chunks, so that they are written without looking at the tail.
DEVICE i64 partial_ld(int n) { return ((i64)n + 7) / 8 * 8; }

// Which tile a block computes: eight rows of tiles at a time, column by column, so that the blocks that run together
// share the panels of A and B in L2.
struct Tile { int row, col; i64 batch; };
template <int BM, int BN> DEVICE Tile tile_of_block(const Gemm& g) {
  int rows = (g.m + BM - 1) / BM, cols = (g.n + BN - 1) / BN;
  i64 tiles = (i64)rows * cols, batch = blockIdx.x / tiles, id = blockIdx.x % tiles;
  int band = (int)(id / (8 * (i64)cols)), in_band = (int)(id % (8 * (i64)cols)), height = imin(rows - band * 8, 8);
  return {(band * 8 + in_band % height) * BM, in_band / height * BN, batch};
}

template <class T> DEVICE float half_of(u32 word, int high) { return to_f32(T{(u16)(high ? word >> 16 : word)}); }

// W consecutive elements, of which the first `valid` exist; the others are 0. `vector`: `from` is a multiple of 16 bytes.
template <class T, int W> DEVICE void load_row(float (&v)[W], const T* from, int valid, bool vector) {
  constexpr int IN_CHUNK = 16 / sizeof(T);
  if constexpr (W % IN_CHUNK == 0) {
    if (vector && valid >= W) {
#pragma unroll
      for (int i = 0; i < W / IN_CHUNK; i++) {
        Chunk x = ((const Chunk*)from)[i];
#pragma unroll
        for (int j = 0; j < IN_CHUNK; j++) {
          if constexpr (sizeof(T) == 4) v[i * IN_CHUNK + j] = bits_float(x.w[j]);
          else v[i * IN_CHUNK + j] = half_of<T>(x.w[j / 2], j % 2);
        }
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < W; i++) v[i] = i < valid ? to_f32(from[i]) : 0.f;
}

template <class T, int W> DEVICE void store_row(T* to, const float (&v)[W], int valid, bool vector) {
  constexpr int IN_CHUNK = 16 / sizeof(T);
  if constexpr (W % IN_CHUNK == 0) {
    if (vector && valid >= W) {
#pragma unroll
      for (int i = 0; i < W / IN_CHUNK; i++) {
        Chunk x;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          if constexpr (sizeof(T) == 4) x.w[j] = float_bits(v[i * IN_CHUNK + j]);
          else x.w[j] = from_f32<T>(v[i * 8 + 2 * j]).bits | (u32)from_f32<T>(v[i * 8 + 2 * j + 1]).bits << 16;
        }
        ((Chunk*)to)[i] = x;
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < W; i++)
    if (i < valid) to[i] = from_f32<T>(v[i]);
}

// Elements `at`… of a matrix that is stored as T, or as f32 when `is_f32`.
template <class T, int W>
DEVICE void load_as(float (&v)[W], const void* from, i64 at, bool is_f32, int valid, bool vector) {
  if (sizeof(T) == 2 && !is_f32) load_row((float(&)[W])v, (const T*)from + at, valid, vector);
  else load_row((float(&)[W])v, (const float*)from + at, valid, vector);
}

// The functions of Activation, numbered as its launcher numbers them.
DEVICE float activate(float x, u32 kind) {
  switch (kind) {
    case 1: return GeluTanh::value(x);
    case 2: return GeluErf::value(x);
    case 3: return Relu::value(x);
    case 4: return Silu::value(x);
    case 5: return Tanh::value(x);
    default: return x;
  }
}

// Completes the sums of W columns of a row and writes them.
template <class T, int W> DEVICE void finish(const Gemm& g, i64 batch, int row, int col, float (&v)[W]) {
  int valid = g.n - col;
  bool vector = g.flags & VECTOR_C, is_f32 = sizeof(T) == 4 || (g.flags & C_F32);
  i64 at = batch * g.step_c + (i64)row * g.ldc + col;
  float x[W];
#pragma unroll
  for (int i = 0; i < W; i++) v[i] *= g.alpha;
  if (g.beta != 0.f) {
    load_as<T>(x, g.c, at, is_f32, valid, vector);
#pragma unroll
    for (int i = 0; i < W; i++) v[i] += g.beta * x[i];
  }
  if (g.bias) {
    load_as<T>(x, g.bias, col, g.flags & BIAS_F32, valid, vector);
#pragma unroll
    for (int i = 0; i < W; i++) v[i] += x[i];
  }
  u32 kind = g.flags & ACTIVATION;
  if (kind) {
    // One copy of the functions' code rather than W: the elements go round through the first place.
#pragma unroll 1
    for (int n = 0; n < W; n++) {
      float y = activate(v[0], kind);
#pragma unroll
      for (int i = 0; i + 1 < W; i++) v[i] = v[i + 1];
      v[W - 1] = y;
    }
  }
  if (g.residual) {
    load_as<T>(x, g.residual, (i64)row * g.ldr + col, is_f32, valid, vector);
#pragma unroll
    for (int i = 0; i < W; i++) v[i] += x[i];
  }
  if (sizeof(T) == 2 && is_f32) store_row((float*)g.c + at, v, valid, vector);
  else store_row((T*)g.c + at, v, valid, vector);
}

// Where the sums of this block's range of k begin, for one row.
DEVICE float* partial_row(const Gemm& g, i64 batch, int split, int splits, int row) {
  return g.partial + ((batch * splits + split) * g.m + row) * partial_ld(g.n);
}

// Completes ROWS × COLS sums in shared memory, whose rows are LD apart: the block's threads take W columns each, so that
// every row of C is written in long runs. Barriers before and after are the caller's.
template <class T, int W, int ROWS, int COLS, int LD, int THREADS>
DEVICE void finish_tile(const Gemm& g, const float* sums, i64 batch, int row, int col) {
#pragma unroll 1
  for (int i = threadIdx.x; i < ROWS * COLS / W; i += THREADS) {
    int r = i / (COLS / W), c = i % (COLS / W) * W;
    if (row + r >= g.m || col + c >= g.n) continue;
    float v[W];
    load_row(v, sums + r * LD + c, W, true);
    if (g.partial) store_row(partial_row(g, batch, blockIdx.y, gridDim.y, row + r) + col + c, v, W, true);
    else finish<T>(g, batch, row + r, col + c, v);
  }
}

// Adds up the partial sums of the ranges of k, always in the same order, and completes them: one thread per W columns.
template <class T> DEVICE void reduce_splits(const Gemm& g, i64 count) {
  constexpr int W = 16 / sizeof(T);
  i64 per_row = (g.n + W - 1) / W, i = (i64)blockIdx.x * 256 + threadIdx.x;
  if (i >= count * per_row * g.m) return;
  i64 line = i / per_row, batch = line / g.m;
  int row = (int)(line % g.m), col = (int)(i % per_row) * W, splits = (g.k - 1) / g.k_split + 1;
  float sum[W], v[W];
#pragma unroll
  for (int j = 0; j < W; j++) sum[j] = 0.f;
#pragma unroll 4
  for (int s = 0; s < splits; s++) {
    load_row(v, partial_row(g, batch, s, splits, row) + col, W, true);
#pragma unroll
    for (int j = 0; j < W; j++) sum[j] += v[j];
  }
  finish<T>(g, batch, row, col, sum);
}
