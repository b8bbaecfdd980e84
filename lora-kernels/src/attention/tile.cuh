// What the attention kernels share. A block of four warps holds tiles of rows (queries, keys) in shared memory; a warp
// computes on 16 rows of the left operand. All products and everything between them stay in the registers, in the
// fragment layout of mma.m16n8k16 for every type: of an n-th 16×8 block, lane l holds x[n][2i + e], row l / 4 + 8i,
// column 8n + 2 (l % 4) + e. In f32, the exact reference, the same layout is computed by plain multiply-adds.
#define THREADS 128
// Bounds of a kernel; the 1 keeps the assembler from spilling registers for more blocks than shared memory has room
// for.
#define BLOCK THREADS, 1

// As `Shape` of the launchers.
struct Shape {
  u64 seed;
  u32 step, site, row_offset;
  // Random words from here on are kept; 0 without dropout.
  u32 threshold;
  // 1 / (1 − p).
  float kept;
  float scale;
  int heads, kv_heads, head_dim, causal;
};
// As `Tile` of the launchers: some rows of a sequence from position `first` on; the sequence has `len` tokens from
// token `start` on.
struct alignas(16) Tile { u32 start, len, first, unused; };

struct alignas(16) Quad { float v[4]; };
template <class T> struct alignas(2 * sizeof(T)) Two { T v[2]; };

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// Elements from one row of a tile to the next. An odd multiple of 16 bytes: eight rows one below the other lie in eight
// different groups of four banks, so that neither ldmatrix nor 128-bit reads of them conflict.
template <class T, int D> constexpr int PITCH = D + 16 / (int)sizeof(T);

DEVICE float infinity() { return bits_float(0x7F800000u); }
DEVICE int lane() { return threadIdx.x % 32; }
// The warp's number, which the compiler is told to be the same in all lanes.
DEVICE int warp() { return (int)shfl(threadIdx.x / 32, 0); }

// Whether rows of so many elements begin and end at multiples of `bytes`.
template <class T> DEVICE bool aligned(const T* p, i64 ld, int cols, u32 bytes) {
  return (((u64)p | (u64)ld * sizeof(T) | (u64)cols * sizeof(T)) & (bytes - 1)) == 0;
}

// Starts copying ROWS rows of `cols` elements to a tile: row r from row(r), null for a row of zeros. Columns from
// `cols` to D become 0 as well. Without `wide` nothing but single elements is aligned, and the copy is done at once.
// `any` is some address that the matrix's rows have the alignment of.
template <int ROWS, int D, class T, class Row>
DEVICE void load_tile(T* to, int cols, bool wide, const T* any, Row row) {
  constexpr int E = 16 / sizeof(T), CHUNKS = D / E, P = PITCH<T, D>;
  if (wide) {
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
      int r = i / CHUNKS, c = i % CHUNKS * E;
      const T* from = c < cols ? row(r) : nullptr;
      cp_async_16(to + r * P + c, from ? from + c : any, from ? 16 : 0);
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * D; i += THREADS) {
      int r = i / D, c = i % D;
      const T* from = c < cols ? row(r) : nullptr;
      to[r * P + c] = from ? from[c] : from_f32<T>(0.f);
    }
  }
}

// 16 rows of a tile as left operand; HELD: kept in registers.
template <class T, int D, bool HELD> struct Left {
  const T* row;
  u32 held[HELD ? D / 16 : 1][4];
  DEVICE void set(const T* rows) {
    row = rows + lane() % 16 * PITCH<T, D> + lane() / 16 * 8;
    if constexpr (HELD) {
#pragma unroll
      for (int k = 0; k < D / 16; k++) ldmatrix_x4(held[k], row + 16 * k);
    }
  }
  DEVICE void get(u32 (&a)[4], int k) const {
    if constexpr (HELD) {
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = held[k][i];
    } else {
      ldmatrix_x4(a, row + 16 * k);
    }
  }
};
template <int D, bool HELD> struct Left<float, D, HELD> {
  const float* row;
  DEVICE void set(const float* rows) { row = rows + lane() / 4 * PITCH<float, D>; }
};

// s = A·Bᵀ over D columns: B is a tile of 8N rows.
template <class T, int D, bool HELD, int N>
DEVICE void scores(float (&s)[N][4], const Left<T, D, HELD>& a, const T* b) {
  constexpr int P = PITCH<T, D>;
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) s[n][i] = 0.f;
  // Matrices of a load: rows 0–7 and columns 0–7, then columns 8–15, then rows 8–15.
  b += (lane() % 8 + lane() / 16 * 8) * P + lane() / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    u32 x[4];
    a.get(x, k);
#pragma unroll
    for (int n = 0; n < N / 2; n++) {
      u32 y[4];
      ldmatrix_x4(y, b + n * 16 * P + 16 * k);
      u32 left[2] = {y[0], y[1]}, right[2] = {y[2], y[3]};
      mma_m16n8k16(s[2 * n], x, left, T{});
      mma_m16n8k16(s[2 * n + 1], x, right, T{});
    }
  }
}
template <int D, bool HELD, int N>
DEVICE void scores(float (&s)[N][4], const Left<float, D, HELD>& a, const float* b) {
  constexpr int P = PITCH<float, D>;
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) s[n][i] = 0.f;
  b += lane() % 4 * 2 * P;
#pragma unroll 1
  for (int k = 0; k < D; k += 4) {
    Quad x = *(const Quad*)(a.row + k), y = *(const Quad*)(a.row + 8 * P + k);
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        Quad z = *(const Quad*)(b + (8 * n + e) * P + k);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          s[n][e] = fmaf(x.v[i], z.v[i], s[n][e]);
          s[n][2 + e] = fmaf(y.v[i], z.v[i], s[n][2 + e]);
        }
      }
    }
  }
}

// acc += P·B over the 8N rows of the tile B, of which 8C columns from `b` on: P, a result of `scores`, is the left
// operand without leaving the registers.
template <int D, class T, int N, int C> DEVICE void accumulate(float (&acc)[C][4], const float (&p)[N][4], const T* b) {
  constexpr int P = PITCH<T, D>;
  b += lane() % 16 * P + lane() / 16 * 8;
#pragma unroll
  for (int k = 0; k < N / 2; k++) {
    const float(&x)[4] = p[2 * k];
    const float(&y)[4] = p[2 * k + 1];
    u32 a[4] = {pack(x[0], x[1], T{}), pack(x[2], x[3], T{}), pack(y[0], y[1], T{}), pack(y[2], y[3], T{})};
#pragma unroll
    for (int c = 0; c < C / 2; c++) {
      u32 z[4];
      ldmatrix_x4_trans(z, b + k * 16 * P + 16 * c);
      u32 left[2] = {z[0], z[1]}, right[2] = {z[2], z[3]};
      mma_m16n8k16(acc[2 * c], a, left, T{});
      mma_m16n8k16(acc[2 * c + 1], a, right, T{});
    }
  }
}
template <int D, int N, int C> DEVICE void accumulate(float (&acc)[C][4], const float (&p)[N][4], const float* b) {
  constexpr int P = PITCH<float, D>;
  b += lane() % 4 * 2;
#pragma unroll 1
  for (int j = 0; j < 4; j++) {
    // Columns 8n + 2j + e of P are held by lane j of the four that share the rows.
    int holder = (lane() & ~3) + j;
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float x = shfl(p[n][e], holder), y = shfl(p[n][2 + e], holder);
        const float* row = b + (8 * n + 2 * j + e) * P;
#pragma unroll
        for (int c = 0; c < C; c++) {
          Two<float> z = *(const Two<float>*)(row + 8 * c);
          acc[c][0] = fmaf(x, z.v[0], acc[c][0]);
          acc[c][1] = fmaf(x, z.v[1], acc[c][1]);
          acc[c][2] = fmaf(y, z.v[0], acc[c][2]);
          acc[c][3] = fmaf(y, z.v[1], acc[c][3]);
        }
      }
    }
  }
}

template <int N> DEVICE void clear(float (&x)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) x[n][i] = 0.f;
}

// Scores of the keys from `key` on become −∞ from each row's `limit` on.
template <int N> DEVICE void hide(float (&s)[N][4], int key, const int (&limit)[2]) {
  key += lane() % 4 * 2;
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (key + 8 * n + i % 2 >= limit[i / 2]) s[n][i] = -infinity();
}

// The online softmax of a lane's two rows (Milakov and Gimelshein 2018): the largest score so far, in units of log₂,
// and this lane's part of Σ 2^(score − largest).
struct Softmax {
  float max[2], sum[2];
  DEVICE void start() {
    max[0] = max[1] = -infinity();
    sum[0] = sum[1] = 0.f;
  }
  // Scores, in units of log₂, become exponentials; `o`, weighted so far by the old maximum, follows to the new one.
  template <int N, int C> DEVICE void step(float (&s)[N][4], float (&o)[C][4]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top = max[r];
#pragma unroll
      for (int n = 0; n < N; n++) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      top = fmaxf(top, shfl_xor(top, 1));
      top = fmaxf(top, shfl_xor(top, 2));
      // A row that sees no key yet: any finite number serves.
      float base = top == -infinity() ? 0.f : top, shrink = fast_exp2(max[r] - base), total = 0.f;
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) total += s[n][2 * r + e] = fast_exp2(s[n][2 * r + e] - base);
      max[r] = top;
      sum[r] = sum[r] * shrink + total;
#pragma unroll
      for (int c = 0; c < C; c++)
#pragma unroll
        for (int e = 0; e < 2; e++) o[c][2 * r + e] *= shrink;
    }
  }
  // Adds the parts of the four lanes of a row.
  DEVICE void finish() {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      sum[r] += shfl_xor(sum[r], 1);
      sum[r] += shfl_xor(sum[r], 2);
    }
  }
};

// Bit j: whether the probability of key 4 · quad + j is kept for the query of this row of the mask.
DEVICE u32 kept_of(const Shape& a, int head, u32 quad, u32 token) {
  Random r = philox(a.seed, quad, a.row_offset + token, a.site + ((u32)head << 16), a.step);
  u32 bits = 0;
#pragma unroll
  for (int j = 0; j < 4; j++) bits |= (u32)(r.word[j] >= a.threshold) << j;
  return bits;
}
// Bit 4n + i: whether element i of the n-th 16×8 block of P is kept. Its rows are the queries from `token` on, its
// columns the keys from `key` on. Two lanes share a counter's four keys in two rows: each draws for one row, and both
// exchange. Rolled up, since the unrolled generators would be most of the kernel's code.
template <int N> DEVICE u32 kept_by_query(const Shape& a, int head, u32 key, u32 token) {
  int odd = lane() % 2;
  u32 all = 0;
#pragma unroll 1
  for (int n = 0; n < N; n++) {
    u32 own = kept_of(a, head, key / 4 + 2 * n + lane() % 4 / 2, token + lane() / 4 + 8 * odd);
    u32 other = shfl_xor(own, 1);
    u32 upper = odd ? other : own, lower = odd ? own : other;
    all |= ((upper >> 2 * odd & 3) | (lower >> 2 * odd & 3) << 2) << 4 * n;
  }
  return all;
}
// The same with the keys as rows and the queries as columns: four lanes share the four keys of four counters (two
// blocks of eight rows, two columns), and each draws one.
template <int N> DEVICE u32 kept_by_key(const Shape& a, int head, u32 key, u32 token) {
  int t = lane() / 4 % 4;
  u32 all = 0;
#pragma unroll 1
  for (int n = 0; n < N; n++) {
    u32 quad = key / 4 + t / 2 * 2 + lane() / 16;
    u32 four = kept_of(a, head, quad, token + 8 * n + lane() % 4 * 2 + t % 2) << 4 * t;
    four |= shfl_xor(four, 4);
    four |= shfl_xor(four, 8);
    four >>= t;
    all |= ((four & 1) | (four >> 3 & 2) | (four >> 6 & 4) | (four >> 9 & 8)) << 4 * n;
  }
  return all;
}

// A warp's 16 rows of accumulators, times the rows' factors, to 16 · (8C + 8) floats of shared memory, from where they
// are written row by row; the 8 more put the rows that are stored together into different banks.
template <int C> DEVICE void keep(float* shared, const float (&acc)[C][4], const float (&factor)[2]) {
#pragma unroll
  for (int c = 0; c < C; c++)
#pragma unroll
    for (int r = 0; r < 2; r++)
      *(Two<float>*)(shared + (lane() / 4 + 8 * r) * (8 * C + 8) + 8 * c + lane() % 4 * 2) =
          {{factor[r] * acc[c][2 * r], factor[r] * acc[c][2 * r + 1]}};
}

// The same on to a matrix: y = factor · acc + β · y for the first `rows` rows and `cols` columns.
template <class T, int C>
DEVICE void store(T* y, i64 ld, float* shared, const float (&acc)[C][4], const float (&factor)[2], int rows, int cols,
                  float beta) {
  constexpr int P = 8 * C + 8;
  bool pairs = aligned(y, ld, cols, 2 * sizeof(T));
  keep(shared, acc, factor);
  warp_sync();
  rows = min(rows, 16);
#pragma unroll 2
  for (int r = 0; r < rows; r++) {
    if (pairs) {
#pragma unroll 1
      for (int col = 2 * lane(); col < cols; col += 64) {
        Two<T> to = {};
        if (beta != 0.f) to = *(const Two<T>*)(y + r * ld + col);
        put(&to.v[0], shared[r * P + col], beta);
        put(&to.v[1], shared[r * P + col + 1], beta);
        *(Two<T>*)(y + r * ld + col) = to;
      }
    } else {
#pragma unroll 1
      for (int col = lane(); col < cols; col += 32) put(y + r * ld + col, shared[r * P + col], beta);
    }
  }
}
