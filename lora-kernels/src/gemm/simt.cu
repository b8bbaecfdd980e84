// C = α·A·B + β·C in true f32: the exact reference, and the path of f32 models.
//
// A block of 256 threads computes a BM×BN tile. Its 8 warps lie 2×4 over the tile; a warp's 32 threads lie 8×4 over
// quads of 4×4 elements, which repeat every 32 rows and 16 columns. Panels of DEPTH steps of k go from global memory
// through registers into two buffers in turn: while one is multiplied, the next is under way, and one barrier per panel
// suffices.

// A panel of R rows (of A, or columns of B) by DEPTH steps of k: fetched to registers, then laid into shared memory as
// [k][R + 4]. K_MAJOR: k is contiguous in global memory.
template <int R, int DEPTH, bool K_MAJOR> struct Panel {
  static constexpr int LD = R + 4, N = R * DEPTH / 4 / 256;
  float v[N][4];

  // Vector i of this thread: its place across (0..R) and along k. With k contiguous a warp takes 16 rows by 2 vectors:
  // whole sectors of 32 bytes, and stores whose banks (4·k + row, 16 apart for the two) are all different.
  static DEVICE int across(int i) {
    int at = threadIdx.x + i * 256;
    return K_MAJOR ? at % (2 * R) / 2 : at % (R / 4) * 4;
  }
  static DEVICE int along(int i) {
    int at = threadIdx.x + i * 256;
    return K_MAJOR ? (at % 2 + at / (2 * R) * 2) * 4 : at / (R / 4);
  }

  // `from` is the operand's first element, `first` the tile's first row in it, `rows` how many exist.
  DEVICE void fetch(const float* from, i64 ld, int first, int rows, int k, int k_end, bool vector) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      int r = first + across(i), p = k + along(i);
      int valid = K_MAJOR ? (r < rows ? k_end - p : 0) : (p < k_end ? rows - r : 0);
      load_row(v[i], K_MAJOR ? from + r * ld + p : from + p * ld + r, valid, vector);
    }
  }

  DEVICE void put_down(float* panel) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      float* to = panel + along(i) * LD + across(i);
      if (K_MAJOR) {
#pragma unroll
        for (int j = 0; j < 4; j++) to[j * LD] = v[i][j];
      } else {
        store_row(to, v[i], 4, true);
      }
    }
  }
};

template <int BM, int BN, int DEPTH, bool TA, bool TB> DEVICE void simt(const Gemm& g) {
  using PanelA = Panel<BM, DEPTH, !TA>;
  using PanelB = Panel<BN, DEPTH, TB>;
  constexpr int LA = PanelA::LD, LB = PanelB::LD, WM = BM / 2, WN = BN / 4, QM = WM / 32, QN = WN / 16;
  constexpr int BUFFER = DEPTH * (LA + LB), SUMS = WM * (BN + 4), FLOATS = 2 * BUFFER > SUMS ? 2 * BUFFER : SUMS;
  __shared__ Chunk shared[FLOATS / 4];
  float* buffers = (float*)shared;

  // Where the tile is waits here while panels are multiplied: the sums take all registers.
  __shared__ Tile place;
  if (threadIdx.x == 0) place = tile_of_block<BM, BN>(g);
  __syncthreads();
  Tile tile = place;
  const float* a = (const float*)g.a + tile.batch * g.step_a;
  const float* b = (const float*)g.b + tile.batch * g.step_b;
  bool vector_a = g.flags & VECTOR_A, vector_b = g.flags & VECTOR_B;
  int begin = blockIdx.y * g.k_split, end = imin(g.k, begin + g.k_split);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int warp_row = warp / 4, row = lane / 4 * 4, col = warp % 4 * WN + lane % 4 * 4;

  float acc[QM * 4][QN * 4];
#pragma unroll
  for (int i = 0; i < QM * 4; i++)
#pragma unroll
    for (int j = 0; j < QN * 4; j++) acc[i][j] = 0.f;

  PanelA pa;
  PanelB pb;
  pa.fetch(a, g.lda, tile.row, g.m, begin, end, vector_a);
  pb.fetch(b, g.ldb, tile.col, g.n, begin, end, vector_b);
  pa.put_down(buffers);
  pb.put_down(buffers + DEPTH * LA);
  __syncthreads();
  int now = 0;
#pragma unroll 1
  for (int k = begin; k < end; k += DEPTH) {
    bool more = k + DEPTH < end;
    if (more) {
      pa.fetch(a, g.lda, tile.row, g.m, k + DEPTH, end, vector_a);
      pb.fetch(b, g.ldb, tile.col, g.n, k + DEPTH, end, vector_b);
    }
    const float* sa = buffers + now * BUFFER + warp_row * WM + row;
    const float* sb = buffers + now * BUFFER + DEPTH * LA + col;
#pragma unroll
    for (int p = 0; p < DEPTH; p++) {
      float x[QM][4], y[QN][4];
#pragma unroll
      for (int q = 0; q < QM; q++) load_row(x[q], sa + p * LA + q * 32, 4, true);
#pragma unroll
      for (int q = 0; q < QN; q++) load_row(y[q], sb + p * LB + q * 16, 4, true);
#pragma unroll
      for (int i = 0; i < QM * 4; i++)
#pragma unroll
        for (int j = 0; j < QN * 4; j++) acc[i][j] = fmaf(x[i / 4][i % 4], y[j / 4][j % 4], acc[i][j]);
    }
    now ^= 1;
    if (more) {
      pa.put_down(buffers + now * BUFFER);
      pb.put_down(buffers + now * BUFFER + DEPTH * LA);
    }
    __syncthreads();
  }

  // The two rows of warps hand over their sums in turn: half a tile fits where the panels were.
#pragma unroll 1
  for (int turn = 0; turn < 2; turn++) {
    if (warp_row == turn) {
#pragma unroll
      for (int i = 0; i < QM * 4; i++)
#pragma unroll
        for (int q = 0; q < QN; q++) {
          float* to = buffers + (i / 4 * 32 + row + i % 4) * (BN + 4) + col + q * 16;
          float part[4] = {acc[i][q * 4], acc[i][q * 4 + 1], acc[i][q * 4 + 2], acc[i][q * 4 + 3]};
          store_row(to, part, 4, true);
        }
    }
    __syncthreads();
    finish_tile<float, 4, WM, BN, BN + 4, 256>(g, buffers, place.batch, place.row + turn * WM, place.col);
    __syncthreads();
  }
}

// All kernels. Two blocks to a multiprocessor, which hide each other's barriers: at most 128 registers.
#define SIMT(layout, TA, TB)                                                                                           \
  extern "C" __global__ void __launch_bounds__(256, 2) simt_large_##layout(Gemm g) { simt<128, 128, 8, TA, TB>(g); } \
  extern "C" __global__ void __launch_bounds__(256, 2) simt_small_##layout(Gemm g) { simt<64, 64, 16, TA, TB>(g); }
#define SIMT_KERNELS     \
  SIMT(nn, false, false) \
  SIMT(nt, false, true)  \
  SIMT(tn, true, false)  \
  SIMT(tt, true, true)   \
  KERNEL(256) simt_reduce(Gemm g, i64 count) { reduce_splits<float>(g, count); }
