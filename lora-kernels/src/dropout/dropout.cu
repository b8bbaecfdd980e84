template <class T> struct Drop {
  static constexpr int INPUTS = 2;
  const T* x;
  i64 ldx;
  T* y;
  float beta;
  i64 ldy;
  u64 seed;
  u32 step, site, row_offset, threshold;
  float scale;
  template <int N> DEVICE void load(float (&in)[2][N], i64 row, u32 col) const {
    read(in[0], x + row * ldx + col);
    if (beta != 0.f) read(in[1], y + row * ldy + col);
  }
  template <int N> DEVICE void finish(float (&in)[2][N], i64 row, u32 col) const {
    // A run of 4 or 8 columns starts at a multiple of 4 and takes all lanes of its counters; a single one takes its own.
    float factor[N];
#pragma unroll
    for (int i = 0; i < N; i += N < 4 ? N : 4) {
      Random r = philox(seed, col / 4 + i / 4, row_offset + (u32)row, site, step);
      if constexpr (N == 1) {
        u32 lane = col % 4, word = lane < 2 ? (lane == 0 ? r.word[0] : r.word[1]) : (lane == 2 ? r.word[2] : r.word[3]);
        factor[0] = word >= threshold ? scale : 0.f;
      } else {
#pragma unroll
        for (int j = 0; j < 4; j++) factor[i + j] = r.word[j] >= threshold ? scale : 0.f;
      }
    }
#pragma unroll
    for (int i = 0; i < N; i++) in[0][i] *= factor[i];
    put(y + row * ldy + col, in[0], in[1], beta);
  }
};
#define DROPOUT(T, name)                                                                                           \
  MAP_KERNEL(4)                                                                                                    \
  dropout_##name(const T* x, i64 ldx, T* y, float beta, i64 ldy, int rows, int cols, u64 seed, u32 step, u32 site, \
                 u32 row_offset, u32 threshold, float scale) {                                                     \
    map<vector_of<T, T>()>(rows, cols, aligned(x, ldx, rows) && aligned(y, ldy, rows),                             \
                           Drop<T>{x, ldx, y, beta, ldy, seed, step, site, row_offset, threshold, scale});         \
  }
FOR_FLOATS(DROPOUT)
