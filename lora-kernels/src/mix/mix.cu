// Attention of each row over a few candidates of its own. Row i of candidate c is row c·rows + i of z.

// s_c = a·z_c for the candidates of one row, a warp's; then lane 0 makes of them their softmax, or where probabilities p
// are given the slopes p·(s − Σ p·s).
template <class T>
DEVICE void scores(const T* a, i64 lda, const T* z, i64 ldz, const float* p, i64 ldp, float* to, i64 ldt, int rows,
                   int cols, int many) {
  int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  a += row * lda, to += row * ldt;
  for (int c = 0; c < many; c++) {
    const T* zc = z + ((i64)c * rows + row) * ldz;
    float s = 0.f;
#pragma unroll 4
    for (int col = lane; col < cols; col += 32) s += to_f32(a[col]) * to_f32(zc[col]);
    s = warp_sum(s);
    if (lane == 0) to[c] = s;
  }
  if (lane != 0) return;
  if (p) {
    p += row * ldp;
    float mean = 0.f;
    for (int c = 0; c < many; c++) mean += p[c] * to[c];
    for (int c = 0; c < many; c++) to[c] = p[c] * (to[c] - mean);
  } else {
    float top = to[0], total = 0.f;
    for (int c = 1; c < many; c++) top = fmaxf(top, to[c]);
    for (int c = 0; c < many; c++) total += to[c] = expf(to[c] - top);
    for (int c = 0; c < many; c++) to[c] /= total;
  }
}
#define SCORES(T, name)                                                                                            \
  KERNEL(256) mix_scores_##name(const T* a, i64 lda, const T* z, i64 ldz, const float* p, i64 ldp, float* to,      \
                                i64 ldt, int rows, int cols, int many) {                                           \
    scores(a, lda, z, ldz, p, ldp, to, ldt, rows, cols, many);                                                     \
  }
FOR_FLOATS(SCORES)

// y = Σ_c w_c·z_c + β·y.
template <class T> struct Weighted {
  // Two are used. A third keeps `map` from loading two runs at a time: the candidates are enough bytes in flight.
  static constexpr int INPUTS = 3;
  const float* w;
  i64 ldw;
  const T* z;
  i64 ldz;
  T* y;
  float beta;
  i64 ldy;
  int rows, many;
  template <int N> DEVICE void load(float (&in)[3][N], i64 row, u32 col) const {
#pragma unroll
    for (int i = 0; i < N; i++) in[0][i] = 0.f;
    for (int c = 0; c < many; c++) {
      float zc[N], wc = w[row * ldw + c];
      read(zc, z + ((i64)c * rows + row) * ldz + col);
#pragma unroll
      for (int i = 0; i < N; i++) in[0][i] += wc * zc[i];
    }
    if (beta != 0.f) read(in[1], y + row * ldy + col);
  }
  template <int N> DEVICE void finish(float (&in)[3][N], i64 row, u32 col) const {
    put(y + row * ldy + col, in[0], in[1], beta);
  }
};
#define WEIGHTED(T, name)                                                                                              \
  MAP_KERNEL(4) mix_weighted_##name(const float* w, i64 ldw, const T* z, i64 ldz, int many, T* y, float beta, i64 ldy, \
                                    int rows, int cols) {                                                              \
    map<vector_of<T, T>()>(rows, cols, aligned(z, ldz, 2) && aligned(y, ldy, rows),                                    \
                           Weighted<T>{w, ldw, z, ldz, y, beta, ldy, rows, many});                                     \
  }
FOR_FLOATS(WEIGHTED)

// dz_c = p_c·dy + g_c·q + β·dz_c, for all rows of all candidates.
template <class T> struct Spread {
  static constexpr int INPUTS = 3;
  const float* p;
  i64 ldp;
  const float* g;
  const T* q;
  i64 ldq;
  const T* dy;
  i64 lddy;
  T* dz;
  float beta;
  i64 lddz;
  u32 rows, many;
  template <int N> DEVICE void load(float (&in)[3][N], i64 row, u32 col) const {
    u32 i = (u32)row % rows;
    read(in[0], dy + i * lddy + col);
    read(in[1], q + i * ldq + col);
    if (beta != 0.f) read(in[2], dz + row * lddz + col);
  }
  template <int N> DEVICE void finish(float (&in)[3][N], i64 row, u32 col) const {
    u32 i = (u32)row % rows, c = (u32)row / rows;
    float pc = p[i * ldp + c], gc = g[(i64)i * many + c];
#pragma unroll
    for (int k = 0; k < N; k++) in[0][k] = pc * in[0][k] + gc * in[1][k];
    put(dz + row * lddz + col, in[0], in[2], beta);
  }
};
#define SPREAD(T, name)                                                                                               \
  MAP_KERNEL(3) mix_spread_##name(const float* p, i64 ldp, const float* g, const T* q, i64 ldq, const T* dy, i64 lddy, \
                                  int many, T* dz, float beta, i64 lddz, int rows, int cols) {                        \
    map<vector_of<T, T>()>(rows * many, cols, aligned(q, ldq, rows) && aligned(dy, lddy, rows) && aligned(dz, lddz, 2), \
                           Spread<T>{p, ldp, g, q, ldq, dy, lddy, dz, beta, lddz, (u32)rows, (u32)many});             \
  }
FOR_FLOATS(SPREAD)
