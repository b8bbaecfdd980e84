// Every row by the same numbers: y = x·g + β·y.
template <class T> struct ScaleColumns {
  static constexpr int INPUTS = 3;
  const T* x;
  i64 ldx;
  const T* g;
  T* y;
  i64 ldy;
  float beta;
  template <int N> DEVICE void load(float (&in)[3][N], i64 row, u32 col) const {
    read(in[0], x + row * ldx + col);
    read(in[1], g + col);
    if (beta != 0.f) read(in[2], y + row * ldy + col);
  }
  template <int N> DEVICE void finish(float (&in)[3][N], i64 row, u32 col) const {
#pragma unroll
    for (int i = 0; i < N; i++) in[0][i] *= in[1][i];
    put(y + row * ldy + col, in[0], in[2], beta);
  }
};
#define SCALE_COLUMNS(T, name)                                                                                        \
  MAP_KERNEL(3)                                                                                                       \
  scale_columns_##name(const T* x, i64 ldx, const T* g, T* y, float beta, i64 ldy, int rows, int cols) {              \
    map<vector_of<T, T>()>(rows, cols, aligned(x, ldx, rows) && aligned(g, 0, 1) && aligned(y, ldy, rows),            \
                           ScaleColumns<T>{x, ldx, g, y, ldy, beta});                                                 \
  }
FOR_FLOATS(SCALE_COLUMNS)

// Products of columns, first part: block (c, p) adds up the rows from p·step on of 32 columns. The eight warps take the rows
// in turn, a lane one column; partial [gridDim.y, cols] gets the eight sums, added in order.
template <class T>
DEVICE void dot_columns_partial(const T* a, i64 lda, const T* b, i64 ldb, int rows, int cols, int step, float* partial) {
  constexpr int WARPS = 8;
  __shared__ float sums[WARPS][32];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, col = blockIdx.x * 32 + lane;
  int first = blockIdx.y * step, end = first + step < rows ? first + step : rows;
  float sum = 0.f;
  if (col < cols) {
#pragma unroll 4
    for (int row = first + warp; row < end; row += WARPS) sum += to_f32(a[row * lda + col]) * to_f32(b[row * ldb + col]);
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && col < cols) {
    for (int w = 1; w < WARPS; w++) sum += sums[w][lane];
    partial[(i64)blockIdx.y * cols + col] = sum;
  }
}
#define DOT_COLUMNS(T, name)                                                                                          \
  KERNEL(256)                                                                                                         \
  dot_columns_##name(const T* a, i64 lda, const T* b, i64 ldb, int rows, int cols, int step, float* partial) {        \
    dot_columns_partial(a, lda, b, ldb, rows, cols, step, partial);                                                   \
  }
FOR_FLOATS(DOT_COLUMNS)

// f = 1/√(n + Σₖ a·b) of each row: a warp takes a row.
template <class T>
DEVICE void reciprocal_norms_rows(const float* n, const T* a, i64 lda, const T* b, i64 ldb, float* f, int rows, int cols) {
  int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  float sum = 0.f;
  for (int k = lane; k < cols; k += 32) sum += to_f32(a[row * lda + k]) * to_f32(b[row * ldb + k]);
  sum = warp_sum(sum);
  if (lane == 0) f[row] = 1.f / sqrtf(n[row] + sum);
}
#define RECIPROCAL_NORMS(T, name)                                                                                     \
  KERNEL(256)                                                                                                         \
  reciprocal_norms_##name(const float* n, const T* a, i64 lda, const T* b, i64 ldb, float* f, int rows, int cols) {   \
    reciprocal_norms_rows(n, a, lda, b, ldb, f, rows, cols);                                                          \
  }
FOR_FLOATS(RECIPROCAL_NORMS)
