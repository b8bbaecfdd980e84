// Attention of a few new queries over rows of a pool. The new queries of a sequence, each with all heads that share the
// key head, stand in one tile of 64 rows, so that every key is read once; a block goes through one range of the keys,
// and where there are several ranges, a second kernel joins their results. Neither the tiles nor the ranges depend on
// the other sequences of the batch.

// As `CachedTile` of the launchers: row i of the tile is query (row + i) / group of the sequence, and head (row + i) %
// group of those that share the key head. `rows`: where the sequence's rows of the pool stand in the list; query j is
// token + j and sees the first seen + j + 1 of them. `chunk`: keys of one range, a multiple of 64.
struct alignas(16) CachedTile { u32 rows, seen, queries, token, row, chunk, unused[2]; };

// Keys that the tile's last row sees.
DEVICE int keys_of(const CachedTile& t, int group) {
  int last = min((int)t.row + 63, (int)t.queries * group - 1);
  return t.seen + last / group + 1;
}

template <class T, int D>
DEVICE void cached(const CachedTile* tiles, const u32* lists, const Shape& a, const T* q, i64 ldq, const T* k, i64 ldk,
                   const T* v, i64 ldv, T* out, i64 ldo, float* part, Two<float>* part_sums, int tokens) {
  constexpr int ROWS = 64, KEYS = (D <= 128 ? 128 : 64) / sizeof(T), P = PITCH<T, D>;
  DYNAMIC_SHARED(shared);
  T* queries = (T*)shared;
  T* stages = queries + ROWS * P;
  CachedTile t = tiles[blockIdx.x];
  int kv_head = blockIdx.y, group = a.heads / a.kv_heads, hd = a.head_dim, rows = (int)t.queries * group - (int)t.row;
  int keys = keys_of(t, group), begin = blockIdx.z * (int)t.chunk, end = min(begin + (int)t.chunk, keys);
  if (begin >= keys) return;
  int steps = (end - begin + KEYS - 1) / KEYS;
  const u32* list = lists + t.rows;
  // Rows of the tile in q and out: the heads of a query lie side by side.
  auto place = [&](int r, i64 ld) {
    int at = t.row + r;
    return (i64)(t.token + at / group) * ld + (kv_head * group + at % group) * hd;
  };
  k += kv_head * hd;
  v += kv_head * hd;
  bool wide = aligned(q, ldq, hd, 16) && aligned(k, ldk, hd, 16) && aligned(v, ldv, hd, 16);
  load_tile<ROWS, D>(queries, hd, wide, q, [&](int r) { return r < rows ? q + place(r, ldq) : nullptr; });

  int top = warp() * 16, row = top + lane() / 4;
  bool busy = top < rows;
  Left<T, D, (D <= 128)> left;
  Softmax softmax;
  softmax.start();
  float o[D / 8][4];
  clear(o);
  int limit[2];
#pragma unroll
  for (int r = 0; r < 2; r++) limit[r] = min(end, (int)t.seen + ((int)t.row + row + 8 * r) / group + 1);
  for (int step = -1; step < steps; step++) {
    if (step >= 0) {
      cp_async_wait<0>();
      __syncthreads();
    }
    if (step + 1 < steps) {
      int key = begin + (step + 1) * KEYS;
      load_tile<2 * KEYS, D>(stages + (step + 1) % 2 * 2 * KEYS * P, hd, wide, k, [&](int r) {
        int at = key + r % KEYS;
        if (at >= end) return (const T*)nullptr;
        return r < KEYS ? k + list[at] * ldk : v + list[at] * ldv;
      });
      cp_async_commit();
    }
    if (step < 0 || !busy) continue;
    if (step == 0) left.set(queries + top * P);
    int key = begin + step * KEYS;
    const T* tile = stages + step % 2 * 2 * KEYS * P;
    float s[KEYS / 8][4];
    scores(s, left, tile);
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) s[n][i] *= a.scale * LOG2_E;
    if (key + KEYS > min(end, (int)t.seen + 1)) hide(s, key, limit);
    softmax.step(s, o);
    accumulate<D>(o, s, tile + KEYS * P);
  }

  __syncthreads();
  if (!busy) return;
  softmax.finish();
  bool whole = keys <= (int)t.chunk;
  float factor[2] = {whole ? 1.f / softmax.sum[0] : 1.f, whole ? 1.f / softmax.sum[1] : 1.f};
  float* staging = (float*)shared + warp() * 16 * (D + 8);
  keep(staging, o, factor);
  warp_sync();
  for (int r = 0; r < 16 && top + r < rows; r++) {
    i64 at = place(top + r, ldo), part_at = ((i64)blockIdx.z * tokens * a.heads) * hd + place(top + r, a.heads * hd);
#pragma unroll 1
    for (int c = lane(); c < hd; c += 32) {
      float x = staging[r * (D + 8) + c];
      if (whole) out[at + c] = from_f32<T>(x);
      else part[part_at + c] = x;
    }
  }
  if (whole || lane() % 4 != 0) return;
#pragma unroll
  for (int r = 0; r < 2; r++)
    if (row + 8 * r < rows)
      part_sums[(i64)blockIdx.z * tokens * a.heads + place(row + 8 * r, a.heads * hd) / hd] = {
          {softmax.max[r], softmax.sum[r]}};
}

// O = Σ wᵢ Oᵢ / Σ wᵢ sumᵢ over the ranges, wᵢ = 2^(maxᵢ − max).
template <class T>
DEVICE void join(const CachedTile* tiles, const Shape& a, const float* part, const Two<float>* part_sums, int tokens,
                 T* out, i64 ldo) {
  CachedTile t = tiles[blockIdx.x];
  int group = a.heads / a.kv_heads, rows = (int)t.queries * group - (int)t.row, keys = keys_of(t, group);
  int ranges = (keys + (int)t.chunk - 1) / (int)t.chunk, hd = a.head_dim;
  if (ranges == 1) return;
  i64 range = (i64)tokens * a.heads;
  for (int r = threadIdx.x / 32; r < min(rows, 64); r += THREADS / 32) {
    int at = t.row + r, head = blockIdx.y * group + at % group;
    i64 token = t.token + at / group, x = token * a.heads + head;
    float max = -infinity(), sum = 0.f;
    for (int i = 0; i < ranges; i++) max = fmaxf(max, part_sums[i * range + x].v[0]);
    for (int i = 0; i < ranges; i++)
      sum += fast_exp2(part_sums[i * range + x].v[0] - max) * part_sums[i * range + x].v[1];
    for (int c = lane(); c < hd; c += 32) {
      float o = 0.f;
      for (int i = 0; i < ranges; i++)
        o += fast_exp2(part_sums[i * range + x].v[0] - max) * part[(i * range + x) * hd + c];
      out[token * ldo + (i64)head * hd + c] = from_f32<T>(o / sum);
    }
  }
}

#define CACHED(T, name, D)                                                                                             \
  KERNEL(BLOCK)                                                                                                        \
  attention_cached_##D##_##name(const CachedTile* tiles, const u32* lists, Shape a, const T* q, i64 ldq, const T* k,   \
                                i64 ldk, const T* v, i64 ldv, T* out, i64 ldo, float* part, Two<float>* part_sums,     \
                                int tokens) {                                                                          \
    cached<T, D>(tiles, lists, a, q, ldq, k, ldk, v, ldv, out, ldo, part, part_sums, tokens);                          \
  }
#define CACHEDS(T, name)                                                                                               \
  CACHED(T, name, 64) CACHED(T, name, 128) CACHED(T, name, 256)                                                        \
  KERNEL(BLOCK)                                                                                                        \
  attention_join_##name(const CachedTile* tiles, Shape a, const float* part, const Two<float>* part_sums, int tokens,  \
                        T* out, i64 ldo) {                                                                             \
    join<T>(tiles, a, part, part_sums, tokens, out, ldo);                                                              \
  }
FOR_FLOATS(CACHEDS)
