// y[i] = table[ids[i]] + β·y[i]; NaN where there is no such row.
template <class T> struct Gather {
  static constexpr int INPUTS = 2;
  const T* table;
  i64 ldt;
  u32 known;
  const u32* ids;
  T* y;
  float beta;
  i64 ldy;
  template <int N> DEVICE void load(float (&in)[2][N], i64 row, u32 col) const {
    u32 id = ids[row];
    if (id < known) {
      read(in[0], table + id * ldt + col);
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) in[0][i] = bits_float(0x7fffffffu);
    }
    if (beta != 0.f) read(in[1], y + row * ldy + col);
  }
  template <int N> DEVICE void finish(float (&in)[2][N], i64 row, u32 col) const {
    put(y + row * ldy + col, in[0], in[1], beta);
  }
};
#define GATHER(T, name)                                                                                              \
  MAP_KERNEL(4)                                                                                                      \
  gather_##name(const T* table, i64 ldt, int known, const u32* ids, T* y, float beta, i64 ldy, int rows, int cols) { \
    map<vector_of<T, T>()>(rows, cols, aligned(table, ldt, known) && aligned(y, ldy, rows),                          \
                           Gather<T>{table, ldt, (u32)known, ids, y, beta, ldy});                                    \
  }
FOR_FLOATS(GATHER)

// table[ids[i]] = x[i]; a row of an id outside of the table goes nowhere.
template <class T> struct PutRows {
  static constexpr int INPUTS = 1;
  const T* x;
  i64 ldx;
  u32 known;
  const u32* ids;
  T* table;
  i64 ldt;
  template <int N> DEVICE void load(float (&in)[1][N], i64 row, u32 col) const { read(in[0], x + row * ldx + col); }
  template <int N> DEVICE void finish(float (&in)[1][N], i64 row, u32 col) const {
    u32 id = ids[row];
    if (id < known) write(table + id * ldt + col, in[0]);
  }
};
#define PUT_ROWS(T, name)                                                                                       \
  MAP_KERNEL(4)                                                                                                 \
  put_rows_##name(const T* x, i64 ldx, const u32* ids, T* table, i64 ldt, int known, int rows, int cols) {      \
    map<vector_of<T, T>()>(rows, cols, aligned(x, ldx, rows) && aligned(table, ldt, known),                     \
                           PutRows<T>{x, ldx, (u32)known, ids, table, ldt});                                    \
  }
FOR_FLOATS(PUT_ROWS)

// The first half of scatter: the order of 0 … n − 1 by (id, number), that is, each i at the place that counts the pairs
// before its own. n² comparisons, but no atomics and one launch: for the thousands of ids of a batch that is little. A
// block places 32 of them, one per lane, and its eight warps share the others out. sorted[p] is the id at place p,
// order[p] its i.
constexpr int SORT_WARPS = 8, SORT_TILE = 32 * SORT_WARPS;
KERNEL(SORT_TILE) sort_ids(const u32* ids, int n, u32* sorted, u32* order) {
  __shared__ uint4 tile[SORT_TILE / 4];
  __shared__ int before[SORT_WARPS][32];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * 32, i = first + lane;
  u32 id = i < n ? ids[i] : 0;
  int count = 0;
  for (int base = 0; base < n; base += SORT_TILE) {
    __syncthreads();
    int j = base + (int)threadIdx.x;
    // Beyond the end stands what comes before nothing.
    ((u32*)tile)[threadIdx.x] = j < n ? ids[j] : 0xffffffffu;
    __syncthreads();
    // Each warp counts in its own 32 numbers of the tile. All lanes read the same words: a broadcast.
#pragma unroll
    for (int k = 0; k < 8; k++) {
      uint4 w = tile[warp * 8 + k];
      u32 others[4] = {w.x, w.y, w.z, w.w};
      int from = base + warp * 32 + k * 4;
#pragma unroll
      for (int e = 0; e < 4; e++) count += others[e] < id || (others[e] == id && from + e < i);
    }
  }
  before[warp][lane] = count;
  __syncthreads();
  if (warp == 0 && i < n) {
    for (int w = 1; w < SORT_WARPS; w++) count += before[w][lane];
    sorted[count] = id;
    order[count] = (u32)i;
  }
}

// Sums of the rows dy[order[s + k]] for k < length in 32·V columns, by one warp: every `stride`-th, in order.
template <class T, int V> DEVICE void sum_segment(float (&acc)[V], const T* dy, i64 ld, const u32* order, int length, int first,
                                                  int stride, int cols, int tile, bool vectors) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < V; i++) acc[i] = 0.f;
  if (vectors) {
    // Several rows on their way at once.
#pragma unroll 4
    for (int k = first; k < length; k += stride) {
      float x[V];
      read(x, dy + order[k] * ld + tile + lane * V);
#pragma unroll
      for (int i = 0; i < V; i++) acc[i] += x[i];
    }
  } else {
    for (int k = first; k < length; k += stride) {
#pragma unroll
      for (int i = 0; i < V; i++) {
        int col = tile + lane + 32 * i;
        if (col < cols) acc[i] += to_f32(dy[order[k] * ld + col]);
      }
    }
  }
}

template <class O, int V> DEVICE void add_segment(O* to, const float (&acc)[V], int cols, int tile, bool vectors) {
  int lane = threadIdx.x % 32;
  if (vectors) {
    float old[V];
    read(old, to + tile + lane * V);
    put(to + tile + lane * V, acc, old, 1.f);
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) {
      int col = tile + lane + 32 * i;
      if (col < cols) put(to + col, acc[i], 1.f);
    }
  }
}

// The second half: dtable[id] += the sum of the rows of dy with that id, in the order of their numbers. A warp looks at
// one place of the order; where an id begins, it sums the id's rows. Ids with 32 rows or more (a padding token) are
// left to the whole block, whose warps take the rows in turn; their eight sums are added in the warps' order.
template <class T, class O>
DEVICE void scatter(const T* dy, i64 lddy, const u32* sorted, const u32* order, int n, int known, O* to, i64 ldt, int cols) {
  constexpr int V = vector_of<T, O>(), WARPS = 8;
  __shared__ int lengths[WARPS];
  __shared__ float sums[WARPS][32 * V];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int tile = blockIdx.y * (32 * V);
  bool vectors = aligned(dy, lddy, n) && aligned(to, ldt, known) && tile + 32 * V <= cols;
  int s = blockIdx.x * WARPS + warp, length = 0;
  u32 id = s < n ? sorted[s] : 0xffffffffu;
  if (s < n && id < (u32)known && (s == 0 || sorted[s - 1] != id)) {
    // The number of places with this id, up to 32: the first lane whose place has another one.
    u32 other = s + lane < n && sorted[s + lane] == id ? 32 : lane;
    for (int m = 16; m > 0; m >>= 1) {
      u32 o = shfl_xor(other, m);
      other = o < other ? o : other;
    }
    length = (int)other;
    if (length < 32) {
      float acc[V];
      sum_segment(acc, dy, lddy, order + s, length, 0, 1, cols, tile, vectors);
      add_segment(to + id * ldt, acc, cols, tile, vectors);
    }
  }
  if (lane == 0) lengths[warp] = length;
  __syncthreads();
  // At most one such id begins in eight places, so `sums` is used once.
  for (int w = 0; w < WARPS; w++) {
    if (lengths[w] < 32) continue;
    int start = blockIdx.x * WARPS + w;
    u32 row = sorted[start];
    // The end, by bisection between a place known to have the id and one known not to.
    int low = start + 31, high = n;
    while (high - low > 1) {
      int mid = low + (high - low) / 2;
      if (sorted[mid] == row) {
        low = mid;
      } else {
        high = mid;
      }
    }
    float acc[V];
    sum_segment(acc, dy, lddy, order + start, high - start, warp, WARPS, cols, tile, vectors);
    // Element i of a lane stands at lane + 32·i: no two lanes of a warp share a bank.
#pragma unroll
    for (int i = 0; i < V; i++) sums[warp][lane + 32 * i] = acc[i];
    __syncthreads();
    if (warp == 0) {
#pragma unroll
      for (int i = 0; i < V; i++) {
        for (int v = 1; v < WARPS; v++) acc[i] += sums[v][lane + 32 * i];
      }
      add_segment(to + row * ldt, acc, cols, tile, vectors);
    }
  }
}
#define SCATTER(T, O, name, to_name)                                                                              \
  MAP_KERNEL(3)                                                                                                   \
  scatter_##name##_##to_name(const T* dy, i64 lddy, const u32* sorted, const u32* order, int n, int known, O* to, \
                             i64 ldt, int cols) {                                                                 \
    scatter(dy, lddy, sorted, order, n, known, to, ldt, cols);                                                    \
  }
SCATTER(float, float, f32, f32)
SCATTER(bf16, float, bf16, f32)
SCATTER(f16, float, f16, f32)
SCATTER(bf16, bf16, bf16, bf16)
SCATTER(f16, f16, f16, f16)
