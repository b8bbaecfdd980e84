template <class X, class Y> struct Axpby {
  static constexpr int INPUTS = 2;
  const X* x;
  i64 ldx;
  Y* y;
  i64 ldy;
  float alpha, beta;
  template <int N> DEVICE void load(float (&in)[2][N], i64 row, u32 col) const {
    read(in[0], x + row * ldx + col);
    if (beta != 0.f) read(in[1], y + row * ldy + col);
  }
  template <int N> DEVICE void finish(float (&in)[2][N], i64 row, u32 col) const {
    float ax[N];
#pragma unroll
    for (int i = 0; i < N; i++) ax[i] = alpha * in[0][i];
    put(y + row * ldy + col, ax, in[1], beta);
  }
};
#define AXPBY(X, Y, x_name, y_name)                                                                            \
  MAP_KERNEL(4)                                                                                                \
  axpby_##x_name##_##y_name(const X* x, i64 ldx, Y* y, i64 ldy, int rows, int cols, float alpha, float beta) { \
    map<vector_of<X, Y>()>(rows, cols, aligned(x, ldx, rows) && aligned(y, ldy, rows),                         \
                           Axpby<X, Y>{x, ldx, y, ldy, alpha, beta});                                          \
  }
#define AXPBY_FROM(X, name) AXPBY(X, float, name, f32) AXPBY(X, bf16, name, bf16) AXPBY(X, f16, name, f16)
FOR_FLOATS(AXPBY_FROM)

template <class T> struct Scale {
  static constexpr int INPUTS = 1;
  T* y;
  i64 ld;
  float alpha;
  template <int N> DEVICE void load(float (&in)[1][N], i64 row, u32 col) const { read(in[0], y + row * ld + col); }
  template <int N> DEVICE void finish(float (&in)[1][N], i64 row, u32 col) const {
#pragma unroll
    for (int i = 0; i < N; i++) in[0][i] *= alpha;
    write(y + row * ld + col, in[0]);
  }
};
#define SCALE(T, name)                                                                \
  MAP_KERNEL(4) scale_##name(T* y, i64 ld, int rows, int cols, float alpha) {         \
    map<vector_of<T, T>()>(rows, cols, aligned(y, ld, rows), Scale<T>{y, ld, alpha}); \
  }
FOR_FLOATS(SCALE)

// The factor is read on the device: gradient clipping then needs no read-back, and costs nothing where nothing is cut.
#define SCALE_BY(F, T, f_name, name)                                                            \
  MAP_KERNEL(4) scale_by_##f_name##_##name(const F* factor, T* y, i64 ld, int rows, int cols) { \
    float alpha = to_f32(*factor);                                                              \
    if (alpha == 1.f) return;                                                                   \
    map<vector_of<T, T>()>(rows, cols, aligned(y, ld, rows), Scale<T>{y, ld, alpha});           \
  }
#define SCALE_BY_F32(T, name) SCALE_BY(float, T, f32, name)
FOR_FLOATS(SCALE_BY_F32)
SCALE_BY(bf16, bf16, bf16, bf16)
SCALE_BY(f16, f16, f16, f16)

template <class T> struct Fill {
  static constexpr int INPUTS = 1;
  T* y;
  i64 ld;
  float value;
  template <int N> DEVICE void load(float (&)[1][N], i64, u32) const {}
  template <int N> DEVICE void finish(float (&in)[1][N], i64 row, u32 col) const {
#pragma unroll
    for (int i = 0; i < N; i++) in[0][i] = value;
    write(y + row * ld + col, in[0]);
  }
};
#define FILL(T, name)                                                                \
  MAP_KERNEL(4) fill_##name(T* y, i64 ld, int rows, int cols, float value) {         \
    map<vector_of<T, T>()>(rows, cols, aligned(y, ld, rows), Fill<T>{y, ld, value}); \
  }
FOR_FLOATS(FILL)

template <class T> struct AddBias {
  static constexpr int INPUTS = 2;
  const T* bias;
  T* y;
  i64 ld;
  template <int N> DEVICE void load(float (&in)[2][N], i64 row, u32 col) const {
    read(in[0], bias + col);
    read(in[1], y + row * ld + col);
  }
  template <int N> DEVICE void finish(float (&in)[2][N], i64 row, u32 col) const {
#pragma unroll
    for (int i = 0; i < N; i++) in[1][i] += in[0][i];
    write(y + row * ld + col, in[1]);
  }
};
#define ADD_BIAS(T, name)                                                                                     \
  MAP_KERNEL(4) add_bias_##name(const T* bias, T* y, i64 ld, int rows, int cols) {                            \
    map<vector_of<T, T>()>(rows, cols, aligned(bias, 0, 1) && aligned(y, ld, rows), AddBias<T>{bias, y, ld}); \
  }
FOR_FLOATS(ADD_BIAS)

// Sums of columns, first part: block (c, p) adds up the rows from p·step on of 32·V columns. The eight warps take the
// rows in turn, each lane V columns of one; partial [gridDim.y, cols] gets the eight sums, added in order.
template <class T> DEVICE void sum_rows_partial(const T* dy, i64 ld, int rows, int cols, int step, float* partial) {
  constexpr int V = vector_of<T, T>(), WARPS = 8;
  __shared__ float sums[WARPS][32 * V];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int tile = blockIdx.x * (32 * V), first = blockIdx.y * step, end = first + step < rows ? first + step : rows;
  // Where vectors are not possible, a lane's columns lie 32 apart, so that single elements are read side by side.
  bool vectors = aligned(dy, ld, rows) && tile + 32 * V <= cols;
  float acc[V];
#pragma unroll
  for (int i = 0; i < V; i++) acc[i] = 0.f;
  if (vectors) {
    const T* p = dy + tile + lane * V;
#pragma unroll 4
    for (int row = first + warp; row < end; row += WARPS) {
      float x[V];
      read(x, p + row * ld);
#pragma unroll
      for (int i = 0; i < V; i++) acc[i] += x[i];
    }
  } else {
    for (int row = first + warp; row < end; row += WARPS) {
#pragma unroll
      for (int i = 0; i < V; i++) {
        int col = tile + lane + 32 * i;
        if (col < cols) acc[i] += to_f32(dy[row * ld + col]);
      }
    }
  }
  // In shared memory element i of a lane stands at lane + 32·i: no two lanes of a warp share a bank.
#pragma unroll
  for (int i = 0; i < V; i++) sums[warp][lane + 32 * i] = acc[i];
  __syncthreads();
  for (int j = threadIdx.x; j < 32 * V; j += 32 * WARPS) {
    float sum = 0.f;
    for (int w = 0; w < WARPS; w++) sum += sums[w][j];
    int col = tile + (vectors ? (j % 32) * V + j / 32 : j);
    if (col < cols) partial[(i64)blockIdx.y * cols + col] = sum;
  }
}
#define SUM_ROWS(T, name)                                                                          \
  KERNEL(256) sum_rows_##name(const T* dy, i64 ld, int rows, int cols, int step, float* partial) { \
    sum_rows_partial(dy, ld, rows, cols, step, partial);                                           \
  }
FOR_FLOATS(SUM_ROWS)

// Second part: to[j] = Σ_p partial[p, j] + β·to[j]. A block takes 32 columns; its sixteen warps take the parts in turn.
template <class T> DEVICE void add_partial(const float* partial, int parts, int cols, T* to, float beta) {
  constexpr int WARPS = 16;
  __shared__ float sums[WARPS][32];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int col = blockIdx.x * 32 + lane;
  float sum = 0.f;
  if (col < cols) {
#pragma unroll 4
    for (int p = warp; p < parts; p += WARPS) sum += partial[(i64)p * cols + col];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && col < cols) {
    for (int w = 1; w < WARPS; w++) sum += sums[w][lane];
    put(to + col, sum, beta);
  }
}
#define ADD_PARTIAL(T, name)                                                                     \
  KERNEL(512) add_partial_##name(const float* partial, int parts, int cols, T* to, float beta) { \
    add_partial(partial, parts, cols, to, beta);                                                 \
  }
FOR_FLOATS(ADD_PARTIAL)
