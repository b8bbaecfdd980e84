// C = act(α·A·B + β·C + bias) + residual on tensor cores, summed in f32: bf16 and f16 (m16n8k16), and f32 rounded to tf32
// (m16n8k8).
//
// A block computes a BM×BN tile; its warps lie over it in WARPS_M rows, and each adds up its part in registers. Panels of
// BK steps of k stream through STAGES buffers of shared memory by cp.async: while one is multiplied, STAGES - 1 are under
// way. Per panel one wait and one barrier: behind the barrier everybody's copies of the panel have arrived, and everybody
// is done with the panel before it, whose buffer the next copies may fill.

// How a panel of R rows (of A, or columns of B) by BK steps of k lies in shared memory: as lines that are contiguous in
// global memory, along k (K_MAJOR) or across.
template <class T, int R, int BK, bool K_MAJOR> struct Layout {
  static constexpr int IN_CHUNK = 16 / sizeof(T), LINES = K_MAJOR ? R : BK, CHUNKS = (K_MAJOR ? BK : R) / IN_CHUNK;
  static constexpr int LINE = CHUNKS * IN_CHUNK, ELEMENTS = LINES * LINE;
  // Where a chunk of 16 bytes lies, in elements. ldmatrix reads the same chunk of 8 consecutive lines: exchanging chunks
  // by an XOR with the line's number puts the 8 into different banks (with lines of 64 bytes two make up a row of banks).
  static DEVICE int at(int line, int chunk) {
    return line * LINE + (CHUNKS == 4 ? chunk ^ line / 2 % 4 : chunk ^ line % 8) * IN_CHUNK;
  }
};
// tf32 is read element by element, 8 lines across by 4 along (or the reverse): lines 4 (8) banks apart keep all 32 lanes
// in different banks.
template <int R, int BK, bool K_MAJOR> struct Layout<float, R, BK, K_MAJOR> {
  static constexpr int IN_CHUNK = 4, LINES = K_MAJOR ? R : BK, CHUNKS = (K_MAJOR ? BK : R) / 4;
  static constexpr int LINE = K_MAJOR ? BK + 4 : R + 8, ELEMENTS = LINES * LINE;
  static DEVICE int at(int line, int chunk) { return line * LINE + chunk * 4; }
};

// Copies panels of one operand, one after the other. Each thread has the same chunks of every panel: N of them, STEP lines
// apart. STEP being a multiple of 8, they all lie at the same place of their lines.
template <class T, int R, int BK, bool K_MAJOR, int THREADS> struct Loader {
  using L = Layout<T, R, BK, K_MAJOR>;
  static constexpr int STEP = THREADS / L::CHUNKS, N = L::LINES / STEP;
  static_assert(STEP % 8 == 0 && N * STEP == L::LINES, "whole chunks for every thread");
  const T* source;  // this thread's first chunk of the next panel
  i64 ld;
  int line, first, place;  // of that chunk: its line, its first element in the line, and where it goes
  int rows, k, k_end;      // rows from the tile's first on; the panel's first step
  bool vector;

  // `operand` is its first element, `row` the tile's first row, and [k, k_end) the range of steps.
  DEVICE Loader(const T* operand, i64 ld, int row, int rows, int k, int k_end, bool vector)
      : ld(ld), line(threadIdx.x / L::CHUNKS), first(threadIdx.x % L::CHUNKS * L::IN_CHUNK),
        place(L::at(threadIdx.x / L::CHUNKS, threadIdx.x % L::CHUNKS)), rows(rows - row), k(k), k_end(k_end),
        vector(vector) {
    source = K_MAJOR ? operand + (row + line) * ld + k + first : operand + (k + line) * ld + row + first;
  }

  // Starts the next panel; what lies beyond k_end or the last row is 0.
  DEVICE void start(T* panel) {
    int in_line = clamp(K_MAJOR ? k_end - k - first : rows - first, 0, L::IN_CHUNK), lines = K_MAJOR ? rows : k_end - k;
#pragma unroll
    for (int i = 0; i < N; i++) {
      int valid = line + i * STEP < lines ? in_line : 0;
      const T* from = source + i * (STEP * ld);
      T* to = panel + place + i * (STEP * L::LINE);
      if (vector) cp_async_16(to, from, valid * sizeof(T));
      else gather(to, from, valid);
    }
    k += BK;
    source += K_MAJOR ? BK : BK * ld;
  }

  // The same for rows that do not start at multiples of 16 bytes.
  static DEVICE void gather(T* to, const T* source, int valid) {
    Chunk x;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if constexpr (sizeof(T) == 4) {
        x.w[j] = j < valid ? float_bits(source[j]) : 0;
      } else {
        u32 low = 2 * j < valid ? source[2 * j].bits : 0, high = 2 * j + 1 < valid ? source[2 * j + 1].bits : 0;
        x.w[j] = low | high << 16;
      }
    }
    *(Chunk*)to = x;
  }
};

// The products of one warp: MI×NI pieces of 16×8, in the fragments of mma.
template <class T, int BM, int BN, int BK, bool TA, bool TB, int MI, int NI> struct Multiply {
  using A = Layout<T, BM, BK, !TA>;
  using B = Layout<T, BN, BK, TB>;
  // ldmatrix takes the address of row l % 8 of matrix l / 8 from lane l. The four matrices of a 16×16 piece of A are
  // rows 0–7 and 8–15 at steps 0–7, then both at steps 8–15; of B, steps 0–7 and 8–15 of columns 0–7, then of 8–15. Where
  // k is not the contiguous direction the matrices lie transposed, and are transposed on the way.
  static DEVICE void panel(float (&acc)[MI][NI][4], const T* pa, const T* pb, int row, int col, int lane) {
    int l8 = lane % 8, low = lane / 8 % 2, high = lane / 16;
#pragma unroll
    for (int k = 0; k < BK; k += 16) {
      u32 a[MI][4], b[NI / 2][4];
#pragma unroll
      for (int i = 0; i < MI; i++) {
        int r = row + i * 16;
        if (TA) ldmatrix_x4_trans(a[i], pa + A::at(k + l8 + 8 * high, r / 8 + low));
        else ldmatrix_x4(a[i], pa + A::at(r + l8 + 8 * low, k / 8 + high));
      }
#pragma unroll
      for (int j = 0; j < NI / 2; j++) {
        int c = col + j * 16;
        if (TB) ldmatrix_x4(b[j], pb + B::at(c + l8 + 8 * high, k / 8 + low));
        else ldmatrix_x4_trans(b[j], pb + B::at(k + l8 + 8 * low, c / 8 + high));
      }
#pragma unroll
      for (int i = 0; i < MI; i++)
#pragma unroll
        for (int j = 0; j < NI; j++) {
          u32 bj[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          mma_m16n8k16(acc[i][j], a[i], bj, T{});
        }
    }
  }
};
template <int BM, int BN, int BK, bool TA, bool TB, int MI, int NI> struct Multiply<float, BM, BN, BK, TA, TB, MI, NI> {
  using A = Layout<float, BM, BK, !TA>;
  using B = Layout<float, BN, BK, TB>;
  static DEVICE u32 a_at(const float* p, int r, int k) { return to_tf32(TA ? p[k * A::LINE + r] : p[r * A::LINE + k]); }
  static DEVICE u32 b_at(const float* p, int k, int c) { return to_tf32(TB ? p[c * B::LINE + k] : p[k * B::LINE + c]); }
  static DEVICE void panel(float (&acc)[MI][NI][4], const float* pa, const float* pb, int row, int col, int lane) {
    int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int k = 0; k < BK; k += 8) {
      u32 a[MI][4], b[NI][2];
#pragma unroll
      for (int i = 0; i < MI; i++)
#pragma unroll
        for (int x = 0; x < 4; x++) a[i][x] = a_at(pa, row + i * 16 + g + x % 2 * 8, k + t + x / 2 * 4);
#pragma unroll
      for (int j = 0; j < NI; j++)
#pragma unroll
        for (int x = 0; x < 2; x++) b[j][x] = b_at(pb, k + t + x * 4, col + j * 8 + g);
#pragma unroll
      for (int i = 0; i < MI; i++)
#pragma unroll
        for (int j = 0; j < NI; j++) mma_m16n8k8_tf32(acc[i][j], a[i], b[j]);
    }
  }
};

template <class T, int BM, int BN, int BK, int STAGES, int WARPS_M, int WARPS_N, bool TA, bool TB>
DEVICE void tensor(const Gemm& g) {
  constexpr int THREADS = WARPS_M * WARPS_N * 32, WM = BM / WARPS_M, WN = BN / WARPS_N, MI = WM / 16, NI = WN / 8;
  using A = Layout<T, BM, BK, !TA>;
  using B = Layout<T, BN, BK, TB>;
  constexpr int STAGE = A::ELEMENTS + B::ELEMENTS;
  // A lane puts pairs of columns 2·(l % 4) of row l / 4 down: rows 8 banks apart make half a warp's pairs fill all banks.
  constexpr int LD = BN + 8;
  static_assert(WM * LD * sizeof(float) <= STAGES * STAGE * sizeof(T), "the sums fit where the panels were");
  DYNAMIC_SHARED(shared);
  T* stages = (T*)shared;

  Tile tile = tile_of_block<BM, BN>(g);
  int begin = blockIdx.y * g.k_split, end = imin(g.k, begin + g.k_split);
  Loader<T, BM, BK, !TA, THREADS> load_a(
      (const T*)g.a + tile.batch * g.step_a, g.lda, tile.row, g.m, begin, end, g.flags & VECTOR_A);
  Loader<T, BN, BK, TB, THREADS> load_b(
      (const T*)g.b + tile.batch * g.step_b, g.ldb, tile.col, g.n, begin, end, g.flags & VECTOR_B);
  int panels = (end - begin + BK - 1) / BK;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_row = warp / WARPS_N, warp_col = warp % WARPS_N;

  float acc[MI][NI][4];
#pragma unroll
  for (int i = 0; i < MI; i++)
#pragma unroll
    for (int j = 0; j < NI; j++)
#pragma unroll
      for (int x = 0; x < 4; x++) acc[i][j][x] = 0.f;

  // Groups are committed even when there is nothing to copy, so that the number of groups under way tells the panel.
#pragma unroll
  for (int p = 0; p < STAGES - 1; p++) {
    if (p < panels) {
      load_a.start(stages + p * STAGE);
      load_b.start(stages + p * STAGE + A::ELEMENTS);
    }
    cp_async_commit();
  }
  int now = 0, free = STAGES - 1;
#pragma unroll 1
  for (int p = 0; p < panels; p++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    if (p + STAGES - 1 < panels) {
      load_a.start(stages + free * STAGE);
      load_b.start(stages + free * STAGE + A::ELEMENTS);
    }
    cp_async_commit();
    const T* panel = stages + now * STAGE;
    Multiply<T, BM, BN, BK, TA, TB, MI, NI>::panel(acc, panel, panel + A::ELEMENTS, warp_row * WM, warp_col * WN, lane);
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
    finish_tile<T, 16 / sizeof(T), WM, BN, LD, THREADS>(g, sums, tile.batch, tile.row + turn * WM, tile.col);
  }
}

// Large tiles for products that fill the device with them; small ones, with deeper panels, for the others. Two blocks of
// large tiles to a multiprocessor: at most 128 registers, which TT does not keep to, so that it has small tiles only.
#define TENSOR_LARGE(layout, TA, TB, T, name, BK)                                            \
  extern "C" __global__ void __launch_bounds__(256, 2) mma_large_##layout##_##name(Gemm g) { \
    tensor<T, 128, 128, BK, 4, 2, 4, TA, TB>(g);                                             \
  }
#define TENSOR_SMALL(layout, TA, TB, T, name, BK) \
  KERNEL(128) mma_small_##layout##_##name(Gemm g) { tensor<T, 64, 64, 2 * BK, 4, 2, 2, TA, TB>(g); }
// All kernels of one type. BK: steps of k in a panel of the large tiles, 64 bytes.
#define TENSOR(T, name, BK)                   \
  TENSOR_LARGE(nn, false, false, T, name, BK) \
  TENSOR_LARGE(nt, false, true, T, name, BK)  \
  TENSOR_LARGE(tn, true, false, T, name, BK)  \
  TENSOR_SMALL(nn, false, false, T, name, BK) \
  TENSOR_SMALL(nt, false, true, T, name, BK)  \
  TENSOR_SMALL(tn, true, false, T, name, BK)  \
  TENSOR_SMALL(tt, true, true, T, name, BK)   \
  KERNEL(256) mma_reduce_##name(Gemm g, i64 count) { reduce_splits<T>(g, count); }
