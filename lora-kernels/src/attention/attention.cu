// The forward pass (Dao, FlashAttention-2, 2023): a block holds 64 queries of one head and goes through the keys they
// see, two tiles of keys and values in flight; nothing but the output and the log-sum-exp leaves the chip.

template <class T, int D> struct Forward {
  static constexpr int ROWS = 64;
  // As many bytes of keys for each type; 16 accumulators per 8 columns of D leave no room for more at 256.
  static constexpr int KEYS = (D <= 128 ? 128 : 64) / sizeof(T);
};

template <class T, int D>
DEVICE void forward(const Tile* tiles, const Shape& a, const T* q, i64 ldq, const T* k, i64 ldk, const T* v, i64 ldv,
                    T* out, i64 ldo, float* lse, i64 ldl) {
  constexpr int ROWS = Forward<T, D>::ROWS, KEYS = Forward<T, D>::KEYS, P = PITCH<T, D>;
  DYNAMIC_SHARED(shared);
  T* queries = (T*)shared;
  T* stages = queries + ROWS * P;
  Tile t = tiles[blockIdx.x];
  int head = blockIdx.y, kv_head = head / (a.heads / a.kv_heads), hd = a.head_dim, len = t.len, first = t.first;
  int end = a.causal ? min(len, first + ROWS) : len, steps = (end + KEYS - 1) / KEYS;
  q += (i64)(t.start + first) * ldq + head * hd;
  k += (i64)t.start * ldk + kv_head * hd;
  v += (i64)t.start * ldv + kv_head * hd;
  bool wide = aligned(q, ldq, hd, 16) && aligned(k, ldk, hd, 16) && aligned(v, ldv, hd, 16);

  load_tile<ROWS, D>(queries, hd, wide, q, [&](int r) { return first + r < len ? q + r * ldq : nullptr; });
  int top = warp() * 16, row = top + lane() / 4;
  bool busy = first + top < len;
  Left<T, D, (D <= 128)> left;
  Softmax softmax;
  softmax.start();
  float o[D / 8][4];
  clear(o);
  int limit[2] = {len, len};
  if (a.causal) limit[0] = min(len, first + row + 1), limit[1] = min(len, first + row + 9);
  for (int step = -1; step < steps; step++) {
    if (step >= 0) {
      // This step's tiles are there, and everyone is done with those of the step before, which the next ones replace.
      cp_async_wait<0>();
      __syncthreads();
    }
    if (step + 1 < steps) {
      int key = (step + 1) * KEYS;
      load_tile<2 * KEYS, D>(stages + (step + 1) % 2 * 2 * KEYS * P, hd, wide, k, [&](int r) {
        int at = key + r % KEYS;
        return at < end ? (r < KEYS ? k + at * ldk : v + at * ldv) : nullptr;
      });
      cp_async_commit();
    }
    if (step < 0) continue;
    if (step == 0) left.set(queries + top * P);
    int key = step * KEYS;
    if (!busy || (a.causal && key > first + top + 15)) continue;
    const T* keys = stages + step % 2 * 2 * KEYS * P;
    float s[KEYS / 8][4];
    scores(s, left, keys);
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) s[n][i] *= a.scale * LOG2_E;
    if (key + KEYS > (a.causal ? min(len, first + top + 1) : len)) hide(s, key, limit);
    softmax.step(s, o);
    if (a.threshold) {
u32 kept = kept_by_query<KEYS / 8>(a, head, key, t.start + first + top);
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (!(kept >> (4 * n + i) & 1)) s[n][i] = 0.f;
    }
    accumulate<D>(o, s, keys + KEYS * P);
  }

  // The tiles' memory becomes the outputs'.
  __syncthreads();
  if (!busy) return;
  softmax.finish();
  float factor[2] = {a.kept / softmax.sum[0], a.kept / softmax.sum[1]};
  i64 token = t.start + first + top;
  store(out + token * ldo + head * hd, ldo, (float*)shared + warp() * 16 * (D + 8), o, factor, len - first - top, hd,
        0.f);
#pragma unroll
  for (int r = 0; r < 2; r++)
    if (lane() % 4 == 0 && first + row + 8 * r < len)
      lse[(token + lane() / 4 + 8 * r) * ldl + head] = (softmax.max[r] + log2f(softmax.sum[r])) * LN_2;
}

#define FORWARD(T, name, D)                                                                                            \
  KERNEL(BLOCK)                                                                                                        \
  attention_##D##_##name(const Tile* tiles, Shape a, const T* q, i64 ldq, const T* k, i64 ldk, const T* v, i64 ldv,    \
                         T* out, i64 ldo, float* lse, i64 ldl) {                                                       \
    forward<T, D>(tiles, a, q, ldq, k, ldk, v, ldv, out, ldo, lse, ldl);                                               \
  }
#define FORWARDS(T, name) FORWARD(T, name, 64) FORWARD(T, name, 128) FORWARD(T, name, 256)
FOR_FLOATS(FORWARDS)
