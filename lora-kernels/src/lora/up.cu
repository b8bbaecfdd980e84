// The backward pass of y += h·Bᵀ: g = s·dy·B and dB = dyᵀ·h, which read dy together.
//
// A block has a rectangle of dy: UP_WIDTH columns and `rows` rows, tile by tile of 64×64. Every tile is multiplied with B's
// rows for g, whose sums stay in registers along the row of tiles, and transposed with h's rows for dB, whose sums wait in
// shared memory from one row of tiles to the next. Other blocks have the other columns (of g) and rows (of dB): what each
// has goes to memory, and up_reduce adds it up, always in the same order.

// A part of a fused projection. Flags: VECTOR_A for dy, VECTOR_B for B, VECTOR_C for h, C_F32 for dB. Without dB only g.
struct UpPart {
  const void* dy; const void* h; const void* b; float* g_sums; float* db_sums; void* g; void* db;
  i64 ldb, lddb;
  int cols, rank;
  float beta;
  u32 flags;
};
// `padded` is the rank that the sums have room for.
struct Up { i64 ld_dy, ld_h, ld_g; int n, rows, padded; float scale; UpPart parts[3]; };
constexpr int UP_WIDTH = 256, UP_THREADS = 128;

// Panels of 64 steps by 16 columns have two chunks a line, too few to exchange: lines 48 bytes apart put the eight that
// ldmatrix reads into different banks.
struct Narrow {
  static constexpr int IN_CHUNK = 8, LINES = 64, CHUNKS = 2, LINE = 24, ELEMENTS = LINES * LINE;
  static DEVICE int at(int line, int chunk) { return line * LINE + chunk * IN_CHUNK; }
};
template <> struct Layout<bf16, 16, 64, false> : Narrow {};
template <> struct Layout<f16, 16, 64, false> : Narrow {};

// A tile (TRANSPOSED or not) times 64×RANK numbers, by 128 threads, each of which has RANK / 2 of the sums: number e is
// that of `row(e)` and `col(e)`.
template <class T, int RANK> struct Thin {
  template <bool TRANSPOSED> static DEVICE void multiply(float (&acc)[1][RANK / 8][4], const T* tile, const T* thin) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Multiply<T, 64, RANK, 64, TRANSPOSED, false, 1, RANK / 8>::panel(acc, tile, thin, warp * 16, 0, lane);
  }
  static DEVICE int row(int e) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + e % 4 / 2 * 8; }
  static DEVICE int col(int e) { return e / 4 * 8 + threadIdx.x % 4 * 2 + e % 2; }
};
// Rows 8 apart for each thread: the two that a warp reads at a time are neighbours, in different banks.
template <int RANK> struct Thin<float, RANK> {
  template <bool TRANSPOSED> static DEVICE void multiply(float (&acc)[1][RANK / 8][4], const float* tile, const float* thin) {
    constexpr int LT = Layout<float, 64, 64, true>::LINE, LS = Layout<float, RANK, 64, false>::LINE, N = RANK / 16;
    int y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll 4
    for (int k = 0; k < 64; k++) {
      float a[8], b[N];
#pragma unroll
      for (int i = 0; i < 8; i++) a[i] = TRANSPOSED ? tile[k * LT + y + i * 8] : tile[(y + i * 8) * LT + k];
#pragma unroll
      for (int j = 0; j < N; j++) b[j] = thin[k * LS + x + j * 16];
#pragma unroll
      for (int e = 0; e < 8 * N; e++) acc[0][e / 4][e % 4] = fmaf(a[e / N], b[e % N], acc[0][e / 4][e % 4]);
    }
  }
  static DEVICE int row(int e) { return threadIdx.x / 16 + e / (RANK / 16) * 8; }
  static DEVICE int col(int e) { return threadIdx.x % 16 + e % (RANK / 16) * 16; }
};

template <class T, int RANK, int STAGES> DEVICE void up_backward(const Up& u) {
  const UpPart& part = u.parts[blockIdx.z];
  int first = blockIdx.y * UP_WIDTH, top = blockIdx.x * u.rows, bottom = imin(u.n, top + u.rows);
  if (first >= part.cols) return;
  constexpr int TILE = Layout<T, 64, 64, true>::ELEMENTS, THIN = Layout<T, RANK, 64, false>::ELEMENTS, STAGE = TILE + THIN;
  constexpr int N = RANK / 2;
  int right = imin(part.cols, first + UP_WIDTH), across = (right - first + 63) / 64, tiles = across * ((bottom - top + 63) / 64);
  DYNAMIC_SHARED(shared);
  T* b = (T*)shared;
  T* stages = b + UP_WIDTH / 64 * THIN;
  float* db = (float*)(stages + STAGES * STAGE);
  bool wanted = part.db != nullptr;

  using LoadTile = Loader<T, 64, 64, true, UP_THREADS>;
  using LoadThin = Loader<T, RANK, 64, false, UP_THREADS>;
  auto start = [&](int t, T* stage) {
    int row = top + t / across * 64, col = first + t % across * 64;
    LoadTile((const T*)part.dy, u.ld_dy, row, bottom, col, right, part.flags & VECTOR_A).start(stage);
    if (wanted) LoadThin((const T*)part.h, u.ld_h, 0, part.rank, row, bottom, part.flags & VECTOR_C).start(stage + TILE);
  };
  LoadThin load_b((const T*)part.b, part.ldb, 0, part.rank, first, right, part.flags & VECTOR_B);
#pragma unroll 1
  for (int i = 0; i < across; i++) load_b.start(b + i * THIN);
#pragma unroll 1
  for (int t = 0; t < STAGES - 1; t++) {
    if (t < tiles) start(t, stages + t * STAGE);
    cp_async_commit();
  }

  float g[1][RANK / 8][4];
  int now = 0, free = STAGES - 1;
#pragma unroll 1
  for (int t = 0; t < tiles; t++) {
    int down = t / across, right_of = t % across;
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    if (t + STAGES - 1 < tiles) start(t + STAGES - 1, stages + free * STAGE);
    cp_async_commit();
    const T* tile = stages + now * STAGE;
    if (right_of == 0) {
#pragma unroll
      for (int e = 0; e < N; e++) g[0][e / 4][e % 4] = 0.f;
    }
    Thin<T, RANK>::template multiply<false>(g, tile, b + right_of * THIN);
    if (wanted) {
      // A thread's own sums: no barrier, and neighbouring threads' lie side by side.
      float* mine = db + right_of * N * UP_THREADS + threadIdx.x;
      float sums[1][RANK / 8][4];
#pragma unroll
      for (int e = 0; e < N; e++) sums[0][e / 4][e % 4] = down == 0 ? 0.f : mine[e * UP_THREADS];
      Thin<T, RANK>::template multiply<true>(sums, tile, tile + TILE);
#pragma unroll
      for (int e = 0; e < N; e++) mine[e * UP_THREADS] = sums[0][e / 4][e % 4];
    }
    if (right_of == across - 1) {
#pragma unroll
      for (int e = 0; e < N; e++) {
        int row = top + down * 64 + Thin<T, RANK>::row(e);
        if (row < bottom) part.g_sums[((i64)blockIdx.y * u.n + row) * RANK + Thin<T, RANK>::col(e)] = g[0][e / 4][e % 4];
      }
    }
    free = now;
    now = now + 1 == STAGES ? 0 : now + 1;
  }

  if (!wanted) return;
#pragma unroll 1
  for (int i = 0; i < across; i++) {
#pragma unroll
    for (int e = 0; e < N; e++) {
      int line = first + i * 64 + Thin<T, RANK>::row(e);
      float sum = db[(i * N + e) * UP_THREADS + threadIdx.x];
      if (line < right) part.db_sums[((i64)blockIdx.x * part.cols + line) * RANK + Thin<T, RANK>::col(e)] = sum;
    }
  }
}

// Adds up what the blocks have: for part y / 2 g (even y) or dB (odd), one thread per element.
template <class T> DEVICE void up_reduce(const Up& u) {
  const UpPart& part = u.parts[blockIdx.y / 2];
  bool of_b = blockIdx.y % 2;
  i64 i = (i64)blockIdx.x * 256 + threadIdx.x, line = i / u.padded, lines = of_b ? part.cols : u.n;
  int col = i % u.padded, count = of_b ? (u.n + u.rows - 1) / u.rows : (part.cols + UP_WIDTH - 1) / UP_WIDTH;
  if (line >= lines || col >= part.rank || (of_b && part.db == nullptr)) return;
  const float* from = (of_b ? part.db_sums : part.g_sums) + i;
  float sum = 0.f;
#pragma unroll 4
  for (int s = 0; s < count; s++) sum += from[s * lines * u.padded];
  if (!of_b) ((T*)part.g)[line * u.ld_g + col] = from_f32<T>(u.scale * sum);
  else if (part.flags & C_F32) put((float*)part.db + line * part.lddb + col, sum, part.beta);
  else put((T*)part.db + line * part.lddb + col, sum, part.beta);
}

// Two blocks to a multiprocessor, as many as shared memory has room for.
#define LORA_UP(T, name, rank, stages) \
  extern "C" __global__ void __launch_bounds__(128, 2) lora_up_##rank##_##name(Up u) { up_backward<T, rank, stages>(u); }
#define LORA_UP_REDUCE(T, name) \
  KERNEL(256) lora_up_reduce_##name(Up u) { up_reduce<T>(u); }
