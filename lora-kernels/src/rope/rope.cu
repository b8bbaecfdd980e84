// Columns of the map are pairs: number h·half + i is element i of both halves of head h.
template <class T, class C> struct Rope {
  static constexpr int INPUTS = 6;
  const T* x;
  i64 ldx;
  const u32* positions;
  const C* cos;
  i64 ldc;
  const C* sin;
  i64 lds;
  u32 known, half;
  float sign;
  T* y;
  float beta;
  i64 ldy;
  template <int N> DEVICE void load(float (&in)[6][N], i64 row, u32 pair) const {
    u32 head = pair / half, i = pair % half;
    i64 col = (i64)head * (2 * half) + i;
    read(in[0], x + row * ldx + col);
    read(in[1], x + row * ldx + col + half);
    u32 p = positions[row];
    if (p < known) {
      read(in[2], cos + p * ldc + i);
      read(in[3], sin + p * lds + i);
    } else {
#pragma unroll
      for (int k = 0; k < N; k++) in[2][k] = in[3][k] = bits_float(0x7fffffffu);
    }
    if (beta != 0.f) {
      read(in[4], y + row * ldy + col);
      read(in[5], y + row * ldy + col + half);
    }
  }
  template <int N> DEVICE void finish(float (&in)[6][N], i64 row, u32 pair) const {
    u32 head = pair / half, i = pair % half;
    i64 col = (i64)head * (2 * half) + i;
#pragma unroll
    for (int k = 0; k < N; k++) {
      float x1 = in[0][k], x2 = in[1][k], c = in[2][k], s = sign * in[3][k];
      in[0][k] = x1 * c - x2 * s;
      in[1][k] = x2 * c + x1 * s;
    }
    put(y + row * ldy + col, in[0], in[4], beta);
    put(y + row * ldy + col + half, in[1], in[5], beta);
  }
};
#define ROPE(T, C, name, table)                                                                                    \
  MAP_KERNEL(3)                                                                                                    \
  rope_##name##_##table(const T* x, i64 ldx, const u32* positions, const C* cos, i64 ldc, const C* sin, i64 lds,   \
                        int known, int half, float sign, T* y, float beta, i64 ldy, int rows, int pairs) {         \
    constexpr int V = vector_of<T, T>();                                                                           \
    bool vectors = half % V == 0 && aligned(x, ldx, rows) && aligned(y, ldy, rows) && aligned(cos, ldc, known) &&  \
                   aligned(sin, lds, known);                                                                       \
    map<V>(rows, pairs, vectors, Rope<T, C>{x, ldx, positions, cos, ldc, sin, lds, (u32)known, (u32)half, sign, y, \
                                            beta, ldy});                                                           \
  }
ROPE(float, float, f32, f32)
ROPE(bf16, float, bf16, f32)
ROPE(f16, float, f16, f32)
ROPE(bf16, bf16, bf16, bf16)
ROPE(f16, f16, f16, f16)
