// The tiles of terms.cu in true f32 on CUDA cores.

// The products of one pair of panels: `sa` and `sb` are where this thread's rows and columns begin.
template <int LA, int LB, int DEPTH, int M, int N> DEVICE void simt_panel(float (&acc)[M][N], const float* sa, const float* sb) {
#pragma unroll
  for (int p = 0; p < DEPTH; p++) {
    float x[M / 4][4], y[N / 4][4];
#pragma unroll
    for (int q = 0; q < M / 4; q++) load_row(x[q], sa + p * LA + q * 32, 4, true);
#pragma unroll
    for (int q = 0; q < N / 4; q++) load_row(y[q], sb + p * LB + q * 16, 4, true);
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int j = 0; j < N; j++) acc[i][j] = fmaf(x[i / 4][i % 4], y[j / 4][j % 4], acc[i][j]);
  }
}

// Adds the products of one pair of operands to a tile's sums, as `simt` does it. `cols` counts B's columns from `col` on.
template <int BM, int BN, int DEPTH, bool TB, int M, int N>
DEVICE void simt_add(float (&acc)[M][N], float* buffers, const float* a, i64 lda, bool vector_a, int row, int rows,
                     const float* b, i64 ldb, bool vector_b, int col, int cols, int k_end) {
  using PanelA = Panel<BM, DEPTH, true>;
  using PanelB = Panel<BN, DEPTH, TB>;
  constexpr int LA = PanelA::LD, LB = PanelB::LD, BUFFER = DEPTH * (LA + LB);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int in_a = warp / 4 * (BM / 2) + lane / 4 * 4, in_b = warp % 4 * (BN / 4) + lane % 4 * 4;
  PanelA pa;
  PanelB pb;
  pa.fetch(a, lda, row, rows, 0, k_end, vector_a);
  pb.fetch(b, ldb, col, cols, 0, k_end, vector_b);
  pa.put_down(buffers);
  pb.put_down(buffers + DEPTH * LA);
  __syncthreads();
  int now = 0;
#pragma unroll 1
  for (int k = 0; k < k_end; k += DEPTH) {
    bool more = k + DEPTH < k_end;
    if (more) {
      pa.fetch(a, lda, row, rows, k + DEPTH, k_end, vector_a);
      pb.fetch(b, ldb, col, cols, k + DEPTH, k_end, vector_b);
    }
    const float* panel = buffers + now * BUFFER;
    simt_panel<LA, LB, DEPTH>(acc, panel + in_a, panel + DEPTH * LA + in_b);
    now ^= 1;
    if (more) {
      pa.put_down(buffers + now * BUFFER);
      pb.put_down(buffers + now * BUFFER + DEPTH * LA);
    }
    __syncthreads();
  }
}

// The same for a term: few steps, one panel after the other, in fewer registers.
template <int BM, int BN, int DEPTH, bool TB, int M, int N>
DEVICE void simt_add(float (&acc)[M][N], float* buffers, const Term& t, int row, int rows, int col, int cols) {
  using PanelA = Panel<BM, DEPTH, true>;
  using PanelB = Panel<BN, DEPTH, TB>;
  constexpr int LA = PanelA::LD, LB = PanelB::LD;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int in_a = warp / 4 * (BM / 2) + lane / 4 * 4, in_b = warp % 4 * (BN / 4) + lane % 4 * 4;
#pragma unroll 1
  for (int k = 0; k < t.k; k += DEPTH) {
    {
      PanelA pa;
      pa.fetch((const float*)t.a, t.lda, row, rows, k, t.k, t.flags & VECTOR_A);
      pa.put_down(buffers);
    }
    {
      PanelB pb;
      pb.fetch((const float*)t.b, t.ldb, col, cols, k, t.k, t.flags & VECTOR_B);
      pb.put_down(buffers + DEPTH * LA);
    }
    __syncthreads();
    simt_panel<LA, LB, DEPTH>(acc, buffers + in_a, buffers + DEPTH * LA + in_b);
    __syncthreads();
  }
}

template <bool LARGE> struct Tiles<float, LARGE> {
  static constexpr int SIZE = LARGE ? 128 : 64, THREADS = 256, DEPTH = LARGE ? 8 : 16;
  template <bool TB, bool TB2> static DEVICE void compute(Gemm& g, const Term* terms, const Place& place) {
    constexpr int LD = SIZE + 4, WM = SIZE / 2, WN = SIZE / 4, M = WM / 8, N = WN / 4;
    constexpr int PANELS = 2 * DEPTH * 2 * LD, SUMS = WM * LD, FLOATS = PANELS > SUMS ? PANELS : SUMS;
    __shared__ Chunk shared[FLOATS / 4];
    float* buffers = (float*)shared;
    // What is not needed while panels are multiplied waits here: the sums take all registers.
    __shared__ Place at;
    __shared__ int end;
    __shared__ u32 flags;
    __shared__ Term term;
    if (threadIdx.x == 0) at = place, end = g.n, flags = g.flags;
    float acc[M][N];
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int j = 0; j < N; j++) acc[i][j] = 0.f;
    simt_add<SIZE, SIZE, DEPTH, TB>(acc, buffers, (const float*)g.a, g.lda, g.flags & VECTOR_A, place.row, g.m,
                                    (const float*)g.b, g.ldb, g.flags & VECTOR_B, place.col, g.n, g.k);
#pragma unroll 1
    for (int i = at.from; i < at.to; i++) {
      __syncthreads();  // everybody is done with the term before
      if (threadIdx.x == 0) term = terms[i];
      __syncthreads();
      simt_add<SIZE, SIZE, DEPTH, TB2>(acc, buffers, term, at.row, g.m, at.col - term.first, end - term.first);
    }

    g.n = end, g.flags = flags;
    // The two rows of warps hand over their sums in turn: half a tile fits where the panels were.
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4 * 4, col = warp % 4 * WN + lane % 4 * 4;
#pragma unroll 1
    for (int turn = 0; turn < 2; turn++) {
      if (warp / 4 == turn) {
#pragma unroll
        for (int i = 0; i < M; i++)
#pragma unroll
          for (int q = 0; q < N / 4; q++) {
            float part[4] = {acc[i][q * 4], acc[i][q * 4 + 1], acc[i][q * 4 + 2], acc[i][q * 4 + 3]};
            store_row(buffers + (i / 4 * 32 + row + i % 4) * LD + col + q * 16, part, 4, true);
          }
      }
      __syncthreads();
      finish_tile<float, 4, WM, SIZE, LD, 256>(g, buffers, 0, at.row + turn * WM, at.col);
      __syncthreads();
    }
  }
};
