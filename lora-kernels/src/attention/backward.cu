// The backward pass (Dao, FlashAttention-2, 2023, section 3.1.2), deterministic: every gradient has one writer, which
// adds in a fixed order. First dQ, by blocks of queries, which also leave D; then dK and dV, by blocks of keys. P is
// made again from the log-sum-exp in both: 7 products rather than 5, and no atomics, nor a buffer of partial sums.

template <class T, int D> struct Backward {
  // At 256 columns two warps share 16 rows of scores, and each has half the columns of the gradients.
  static constexpr int SPLIT = D <= 128 ? 1 : 2, ROWS = 64 / SPLIT, COLS = D / SPLIT;
  // Rows of the other side in one step.
  static constexpr int STEP = D <= 128 ? 32 : 16;
  // Whether left operands stay in registers.
  static constexpr bool HELD = D == 64;
};

// The block's rows: a tile of the list, or a half of it.
template <int ROWS> DEVICE Tile block_tile(const Tile* tiles, u32 index) {
  constexpr int PARTS = 64 / ROWS;
  Tile t = tiles[index / PARTS];
  t.first += index % PARTS * ROWS;
  return t;
}

// A gradient of T, or of f32 where `single` says so, of which the warp has 8C columns at most.
template <class T, int C>
DEVICE void store(void* y, i64 skip, i64 ld, bool single, float* shared, const float (&acc)[C][4], float factor,
                  int rows, int cols, float beta) {
  float both[2] = {factor, factor};
  cols = min(cols, 8 * C);
  if (sizeof(T) == 4 || single) store((float*)y + skip, ld, shared, acc, both, rows, cols, beta);
  else store((T*)y + skip, ld, shared, acc, both, rows, cols, beta);
}

template <class T, int D>
DEVICE void backward_q(const Tile* tiles, const Shape& a, const T* q, i64 ldq, const T* k, i64 ldk, const T* v, i64 ldv,
                       const T* out, i64 ldo, const float* lse, i64 ldl, const T* dout, i64 lddo, float* delta,
                       void* dq, i64 lddq, float beta, int single) {
  using B = Backward<T, D>;
  constexpr int ROWS = B::ROWS, STEP = B::STEP, P = PITCH<T, D>, E = 16 / sizeof(T);
  static_assert(2 * STEP >= ROWS, "the outputs lie where the second step's keys will");
  DYNAMIC_SHARED(shared);
  T* queries = (T*)shared;
  T* douts = queries + ROWS * P;
  T* stages = douts + ROWS * P;
  Tile t = block_tile<ROWS>(tiles, blockIdx.x);
  int len = t.len, first = t.first, hd = a.head_dim;
  if (first >= len) return;
  int head = blockIdx.y, kv_head = head / (a.heads / a.kv_heads);
  int end = a.causal ? min(len, first + ROWS) : len, steps = (end + STEP - 1) / STEP;
  i64 token = t.start + first;
  q += token * ldq + head * hd;
  out += token * ldo + head * hd;
  dout += token * lddo + head * hd;
  k += (i64)t.start * ldk + kv_head * hd;
  v += (i64)t.start * ldv + kv_head * hd;
  bool wide = aligned(q, ldq, hd, 16) && aligned(k, ldk, hd, 16) && aligned(v, ldv, hd, 16) &&
              aligned(out, ldo, hd, 16) && aligned(dout, lddo, hd, 16);
  load_tile<2 * ROWS, D>(queries, hd, wide, q, [&](int r) {
    int at = r % ROWS;
    return first + at < len ? (r < ROWS ? q + at * ldq : dout + at * lddo) : nullptr;
  });
  load_tile<ROWS, D>(stages + 2 * STEP * P, hd, wide, out,
                     [&](int r) { return first + r < len ? out + r * ldo : nullptr; });

  int top = warp() % (ROWS / 16) * 16, left_col = warp() / (ROWS / 16) * B::COLS, row = top + lane() / 4;
  bool busy = first + top < len;
  Left<T, D, B::HELD> left, left_dout;
  float acc[B::COLS / 8][4], l[2], d[2] = {0.f, 0.f};
  clear(acc);
  int limit[2] = {len, len};
  if (a.causal) limit[0] = min(len, first + row + 1), limit[1] = min(len, first + row + 9);
#pragma unroll
  for (int r = 0; r < 2; r++)
    l[r] = first + row + 8 * r < len ? lse[(token + row + 8 * r) * ldl + head] * LOG2_E : 0.f;
  for (int step = -1; step < steps; step++) {
    if (step >= 0) {
      cp_async_wait<0>();
      __syncthreads();
    }
    if (step == 0) {
      left.set(queries + top * P);
      left_dout.set(douts + top * P);
      // D, the four lanes of a row taking turns.
#pragma unroll
      for (int r = 0; r < 2; r++) {
#pragma unroll 1
        for (int c = lane() % 4 * E; c < D; c += 4 * E)
#pragma unroll
          for (int i = 0; i < E; i++)
            d[r] += to_f32(douts[(row + 8 * r) * P + c + i]) * to_f32(stages[(2 * STEP + row + 8 * r) * P + c + i]);
        d[r] += shfl_xor(d[r], 1);
        d[r] += shfl_xor(d[r], 2);
        if (left_col == 0 && lane() % 4 == 0 && first + row + 8 * r < len)
          delta[(token + row + 8 * r) * a.heads + head] = d[r];
      }
      // The outputs make room.
      __syncthreads();
    }
    if (step + 1 < steps) {
      int key = (step + 1) * STEP;
      load_tile<2 * STEP, D>(stages + (step + 1) % 2 * 2 * STEP * P, hd, wide, k, [&](int r) {
        int at = key + r % STEP;
        return at < end ? (r < STEP ? k + at * ldk : v + at * ldv) : nullptr;
      });
      cp_async_commit();
    }
    int key = step * STEP;
    if (step < 0 || !busy || (a.causal && key > first + top + 15)) continue;
    const T* keys = stages + step % 2 * 2 * STEP * P;
    float s[STEP / 8][4], ds[STEP / 8][4];
    scores(s, left, keys);
    scores(ds, left_dout, keys + STEP * P);
    u32 kept = a.threshold ? kept_by_query<STEP / 8>(a, head, key, t.start + first + top) : ~0u;
    bool edge = key + STEP > (a.causal ? min(len, first + top + 1) : len);
    int col = key + lane() % 4 * 2;
#pragma unroll
    for (int n = 0; n < STEP / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float p = fast_exp2(s[n][i] * (a.scale * LOG2_E) - l[i / 2]);
        if (edge && col + 8 * n + i % 2 >= limit[i / 2]) p = 0.f;
        ds[n][i] = p * ((kept >> (4 * n + i) & 1 ? ds[n][i] * a.kept : 0.f) - d[i / 2]);
      }
    accumulate<D>(acc, ds, keys + left_col);
  }
  __syncthreads();
  if (busy)
    store<T>(dq, (token + top) * lddq + head * hd + left_col, lddq, single,
             (float*)shared + warp() * 16 * (B::COLS + 8), acc, a.scale, len - first - top, hd - left_col, beta);
}

template <class T, int D>
DEVICE void backward_kv(const Tile* tiles, const Shape& a, const T* q, i64 ldq, const T* k, i64 ldk, const T* v,
                        i64 ldv, const float* lse, i64 ldl, const T* dout, i64 lddo, const float* delta, void* dk,
                        i64 lddk, float beta_k, void* dv, i64 lddv, float beta_v, int single) {
  using B = Backward<T, D>;
  constexpr int ROWS = B::ROWS, STEP = B::STEP, P = PITCH<T, D>;
  DYNAMIC_SHARED(shared);
  T* keys = (T*)shared;
  T* stages = keys + 2 * ROWS * P;
  // Log-sum-exp and D of the queries of two steps.
  float* statistics = (float*)(stages + 4 * STEP * P);
  // Tiles with late queries stand first in the list; keys have the more to do the earlier they are.
  Tile t = block_tile<ROWS>(tiles, gridDim.x - 1 - blockIdx.x);
  int len = t.len, first = t.first, hd = a.head_dim;
  if (first >= len) return;
  int kv_head = blockIdx.y, group = a.heads / a.kv_heads;
  i64 start = t.start, token = start + first;
  k += token * ldk + kv_head * hd;
  v += token * ldv + kv_head * hd;
  q += start * ldq;
  dout += start * lddo;
  bool wide = aligned(q, ldq, hd, 16) && aligned(k, ldk, hd, 16) && aligned(v, ldv, hd, 16) &&
              aligned(dout, lddo, hd, 16);
  load_tile<2 * ROWS, D>(keys, hd, wide, k, [&](int r) {
    int at = r % ROWS;
    return first + at < len ? (r < ROWS ? k + at * ldk : v + at * ldv) : nullptr;
  });

  int top = warp() % (ROWS / 16) * 16, left_col = warp() / (ROWS / 16) * B::COLS;
  bool busy = first + top < len;
  Left<T, D, B::HELD> left, left_v;
  float dk_acc[B::COLS / 8][4], dv_acc[B::COLS / 8][4];
  clear(dk_acc);
  clear(dv_acc);
  // All query heads of the group in order, each from the first query on that sees the tile.
  int from = a.causal ? first : 0, per_head = (len - from + STEP - 1) / STEP, steps = group * per_head;
  int head = kv_head * group, query = from, next_head = head, next_query = from;
  for (int step = -1; step < steps; step++) {
    if (step >= 0) {
      cp_async_wait<0>();
      __syncthreads();
    }
    if (step + 1 < steps) {
      int at = (step + 1) % 2;
      i64 col = (i64)next_head * hd;
      load_tile<2 * STEP, D>(stages + at * 2 * STEP * P, hd, wide, q, [&](int r) {
        int row = next_query + r % STEP;
        return row < len ? (r < STEP ? q + row * ldq + col : dout + row * lddo + col) : nullptr;
      });
      if (threadIdx.x < 2 * STEP) {
        i64 row = start + next_query + threadIdx.x % STEP;
        bool there = next_query + (int)threadIdx.x % STEP < len;
        const float* x = threadIdx.x < STEP ? lse + row * ldl + next_head : delta + row * a.heads + next_head;
        cp_async_4(statistics + at * 2 * STEP + threadIdx.x, there ? x : lse, there ? 4 : 0);
      }
      cp_async_commit();
      if ((next_query += STEP) >= len) next_query = from, next_head++;
    }
    if (step < 0) continue;
    if (step == 0) {
      left.set(keys + top * P);
      left_v.set(keys + (ROWS + top) * P);
    }
    // Queries before the warp's first key do not see it.
    if (busy && (!a.causal || query + STEP > first + top)) {
      const T* queries = stages + step % 2 * 2 * STEP * P;
      const float* stats = statistics + step % 2 * 2 * STEP;
      float s[STEP / 8][4], ds[STEP / 8][4];
      scores(s, left, queries);
      scores(ds, left_v, queries + STEP * P);
      u32 kept = a.threshold ? kept_by_key<STEP / 8>(a, head, first + top, t.start + query) : ~0u;
      bool diagonal = a.causal && query < first + top + 15;
      int key = first + top + lane() / 4;
#pragma unroll
      for (int n = 0; n < STEP / 8; n++) {
        int col = 8 * n + lane() % 4 * 2;
        Two<float> l = *(const Two<float>*)(stats + col), d = *(const Two<float>*)(stats + STEP + col);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float p = fast_exp2(s[n][i] * (a.scale * LOG2_E) - l.v[i % 2] * LOG2_E);
          if (diagonal && query + col + i % 2 < key + i / 2 * 8) p = 0.f;
          float factor = kept >> (4 * n + i) & 1 ? a.kept : 0.f;
          s[n][i] = p * factor;
          ds[n][i] = p * (ds[n][i] * factor - d.v[i % 2]);
        }
      }
      accumulate<D>(dv_acc, s, queries + STEP * P + left_col);
      accumulate<D>(dk_acc, ds, queries + left_col);
    }
    if ((query += STEP) >= len) query = from, head++;
  }
  __syncthreads();
  if (!busy) return;
  float* staging = (float*)shared + warp() * 16 * (B::COLS + 8);
  int rows = len - first - top, cols = hd - left_col;
  i64 at = token + top, col = (i64)kv_head * hd + left_col;
  store<T>(dk, at * lddk + col, lddk, single, staging, dk_acc, a.scale, rows, cols, beta_k);
  warp_sync();
  store<T>(dv, at * lddv + col, lddv, single, staging, dv_acc, 1.f, rows, cols, beta_v);
}

#define BACKWARD(T, name, D)                                                                                           \
  KERNEL(BLOCK)                                                                                                        \
  attention_backward_q_##D##_##name(const Tile* tiles, Shape a, const T* q, i64 ldq, const T* k, i64 ldk, const T* v,  \
                                    i64 ldv, const T* out, i64 ldo, const float* lse, i64 ldl, const T* dout,          \
                                    i64 lddo, float* delta, void* dq, i64 lddq, float beta, int single) {              \
    backward_q<T, D>(tiles, a, q, ldq, k, ldk, v, ldv, out, ldo, lse, ldl, dout, lddo, delta, dq, lddq, beta, single); \
  }                                                                                                                    \
  KERNEL(BLOCK)                                                                                                        \
  attention_backward_kv_##D##_##name(const Tile* tiles, Shape a, const T* q, i64 ldq, const T* k, i64 ldk, const T* v, \
                                     i64 ldv, const float* lse, i64 ldl, const T* dout, i64 lddo, const float* delta,  \
                                     void* dk, i64 lddk, float beta_k, void* dv, i64 lddv, float beta_v, int single) { \
    backward_kv<T, D>(tiles, a, q, ldq, k, ldk, v, ldv, lse, ldl, dout, lddo, delta, dk, lddk, beta_k, dv, lddv,       \
                      beta_v, single);                                                                                 \
  }
#define BACKWARDS(T, name) BACKWARD(T, name, 64) BACKWARD(T, name, 128) BACKWARD(T, name, 256)
FOR_FLOATS(BACKWARDS)
