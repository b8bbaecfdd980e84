// C = act(α·A·B + β·C + bias) + residual for up to 8 rows of A: a step of decoding. B is read once, which is all the time
// it takes, so everything here is about having many reads of 16 bytes under way. ROWS is 1, or 8 with zeros for the rows
// that A has not.

// B stored as [n, k]: a warp takes COLS columns and walks along k; its lanes' sums are added up at the end.
constexpr int COLS = 2;
template <class T, int ROWS> DEVICE void gemv_nt(const Gemm& g) {
  constexpr int P = 16 / sizeof(T);
  const T *a = (const T*)g.a, *b = (const T*)g.b;
  bool vector = (g.flags & VECTOR_A) && (g.flags & VECTOR_B);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int col = (int)(blockIdx.x * 4 + warp) * COLS;
  float acc[ROWS][COLS];
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int c = 0; c < COLS; c++) acc[r][c] = 0.f;

#pragma unroll 2
  for (int k = lane * P; k < g.k; k += 32 * P) {
    float y[COLS][P];
#pragma unroll
    for (int c = 0; c < COLS; c++) load_row(y[c], b + (col + c) * g.ldb + k, col + c < g.n ? g.k - k : 0, vector);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float x[P];
      load_row(x, a + r * g.lda + k, r < g.m ? g.k - k : 0, vector);
#pragma unroll
      for (int c = 0; c < COLS; c++)
#pragma unroll
        for (int i = 0; i < P; i++) acc[r][c] = fmaf(x[i], y[c][i], acc[r][c]);
    }
  }

  // Lane r·COLS + c completes element (r, c).
  float mine[1] = {0.f};
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int c = 0; c < COLS; c++) {
      float sum = warp_sum(acc[r][c]);
      if (lane == r * COLS + c) mine[0] = sum;
    }
  int row = lane / COLS;
  col += lane % COLS;
  if (row < g.m && col < g.n) finish<T>(g, 0, row, col, mine);
}

// B stored as [k, n]: 8 lanes take 16 bytes of a row each; the block's other lanes and warps take other steps of k, and
// their sums are added up through shared memory. Block y has the y-th range of k.
template <class T, int ROWS> DEVICE void gemv_nn(const Gemm& g) {
  constexpr int P = 16 / sizeof(T), WIDTH = 8 * P;
  __shared__ float sums[8][ROWS][WIDTH];
  const T *a = (const T*)g.a, *b = (const T*)g.b;
  bool vector = g.flags & VECTOR_B;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, across = lane % 8 * P;
  int first = (int)blockIdx.x * WIDTH, col = first + across;
  int begin = blockIdx.y * g.k_split, end = imin(g.k, begin + g.k_split);
  float acc[ROWS][P];
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int i = 0; i < P; i++) acc[r][i] = 0.f;

#pragma unroll 4
  for (int k = begin + warp * 4 + lane / 8; k < end; k += 32) {
    float y[P];
    load_row(y, b + k * g.ldb + col, g.n - col, vector);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float x = r < g.m ? to_f32(a[r * g.lda + k]) : 0.f;
#pragma unroll
      for (int i = 0; i < P; i++) acc[r][i] = fmaf(x, y[i], acc[r][i]);
    }
  }

#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int i = 0; i < P; i++) {
      float v = acc[r][i];
      v += shfl_xor(v, 8);
      v += shfl_xor(v, 16);
      if (lane < 8) sums[warp][r][across + i] = v;
    }
  __syncthreads();
  for (int i = threadIdx.x; i < g.m * WIDTH; i += 256) {
    int row = i / WIDTH, c = i % WIDTH;
    if (first + c >= g.n) continue;
    float v[1] = {0.f};
#pragma unroll
    for (int w = 0; w < 8; w++) v[0] += sums[w][row][c];
    if (g.partial) partial_row(g, 0, blockIdx.y, gridDim.y, row)[first + c] = v[0];
    else finish<T>(g, 0, row, first + c, v);
  }
}

// Two blocks on a multiprocessor: while one waits for memory the other adds.
#define TWO_BLOCKS extern "C" __global__ void __launch_bounds__(256, 2)
#define GEMV(T, name)                                           \
  KERNEL(128) gemv_nt_1_##name(Gemm g) { gemv_nt<T, 1>(g); }    \
  KERNEL(128) gemv_nt_8_##name(Gemm g) { gemv_nt<T, 8>(g); }    \
  KERNEL(256) gemv_nn_1_##name(Gemm g) { gemv_nn<T, 1>(g); }    \
  TWO_BLOCKS  gemv_nn_8_##name(Gemm g) { gemv_nn<T, 8>(g); }    \
  KERNEL(256) gemv_reduce_##name(Gemm g, i64 count) { reduce_splits<T>(g, count); }
FOR_FLOATS(GEMV)
