// y = f(x) and dx = dy·f′(x), by the functions in functions.cuh.

template <class A, class T> struct Forward {
  static constexpr int INPUTS = 1;
  const T* x;
  i64 ldx;
  T* y;
  i64 ldy;
  template <int N> DEVICE void load(float (&in)[1][N], i64 row, u32 col) const { read(in[0], x + row * ldx + col); }
  template <int N> DEVICE void finish(float (&in)[1][N], i64 row, u32 col) const {
#pragma unroll
    for (int i = 0; i < N; i++) in[0][i] = A::value(in[0][i]);
    write(y + row * ldy + col, in[0]);
  }
};

template <class A, class T> struct Backward {
  static constexpr int INPUTS = 3;
  const T* x;
  i64 ldx;
  const T* dy;
  i64 lddy;
  T* dx;
  float beta;
  i64 lddx;
  template <int N> DEVICE void load(float (&in)[3][N], i64 row, u32 col) const {
    read(in[0], x + row * ldx + col);
    read(in[1], dy + row * lddy + col);
    if (beta != 0.f) read(in[2], dx + row * lddx + col);
  }
  template <int N> DEVICE void finish(float (&in)[3][N], i64 row, u32 col) const {
#pragma unroll
    for (int i = 0; i < N; i++) in[0][i] = in[1][i] * A::slope(in[0][i]);
    put(dx + row * lddx + col, in[0], in[2], beta);
  }
};

// One kernel per function and type: nothing is decided in the loop, and each is given only the registers it needs.
#define ACTIVATION(A, function, T, name)                                                                            \
  MAP_KERNEL(4) function##_##name(const T* x, i64 ldx, T* y, i64 ldy, int rows, int cols) {                         \
    map<vector_of<T, T>()>(rows, cols, aligned(x, ldx, rows) && aligned(y, ldy, rows),                              \
                           Forward<A, T>{x, ldx, y, ldy});                                                          \
  }                                                                                                                 \
  MAP_KERNEL(4)                                                                                                     \
  function##_backward_##name(const T* x, i64 ldx, const T* dy, i64 lddy, T* dx, float beta, i64 lddx, int rows,     \
                             int cols) {                                                                            \
    map<vector_of<T, T>()>(rows, cols, aligned(x, ldx, rows) && aligned(dy, lddy, rows) && aligned(dx, lddx, rows), \
                           Backward<A, T>{x, ldx, dy, lddy, dx, beta, lddx});                                       \
  }
#define ACTIVATIONS(T, name)               \
  ACTIVATION(GeluTanh, gelu_tanh, T, name) \
  ACTIVATION(GeluErf, gelu_erf, T, name)   \
  ACTIVATION(Relu, relu, T, name)          \
  ACTIVATION(Silu, silu, T, name)          \
  ACTIVATION(Tanh, tanh, T, name)
FOR_FLOATS(ACTIVATIONS)

template <class T> struct SiluGate {
  static constexpr int INPUTS = 2;
  const T* gate;
  i64 ldg;
  const T* up;
  i64 ldu;
  T* y;
  i64 ldy;
  template <int N> DEVICE void load(float (&in)[2][N], i64 row, u32 col) const {
    read(in[0], gate + row * ldg + col);
    read(in[1], up + row * ldu + col);
  }
  template <int N> DEVICE void finish(float (&in)[2][N], i64 row, u32 col) const {
#pragma unroll
    for (int i = 0; i < N; i++) in[0][i] = Silu::value(in[0][i]) * in[1][i];
    write(y + row * ldy + col, in[0]);
  }
};

// Both gradients in one pass over gate, up and dy; a null one is not computed.
template <class T> struct SiluGateBackward {
  static constexpr int INPUTS = 5;
  const T* gate;
  i64 ldg;
  const T* up;
  i64 ldu;
  const T* dy;
  i64 lddy;
  T* dgate;
  float beta_gate;
  i64 lddg;
  T* dup;
  float beta_up;
  i64 lddu;
  template <int N> DEVICE void load(float (&in)[5][N], i64 row, u32 col) const {
    read(in[0], gate + row * ldg + col);
    if (dgate) read(in[1], up + row * ldu + col);
    read(in[2], dy + row * lddy + col);
    if (beta_gate != 0.f) read(in[3], dgate + row * lddg + col);
    if (beta_up != 0.f) read(in[4], dup + row * lddu + col);
  }
  template <int N> DEVICE void finish(float (&in)[5][N], i64 row, u32 col) const {
    float to_up[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
      float x = in[0][i];
      Sigmoid g = sigmoid(x);
      to_up[i] = in[2][i] * (x * g.s);
      in[1][i] = in[2][i] * in[1][i] * (g.s * fmaf(x, g.rest, 1.f));
    }
    if (dgate) put(dgate + row * lddg + col, in[1], in[3], beta_gate);
    if (dup) put(dup + row * lddu + col, to_up, in[4], beta_up);
  }
};
#define SILU_GATE(T, name)                                                                                          \
  MAP_KERNEL(4)                                                                                                     \
  silu_gate_##name(const T* gate, i64 ldg, const T* up, i64 ldu, T* y, i64 ldy, int rows, int cols) {               \
    map<vector_of<T, T>()>(rows, cols, aligned(gate, ldg, rows) && aligned(up, ldu, rows) && aligned(y, ldy, rows), \
                           SiluGate<T>{gate, ldg, up, ldu, y, ldy});                                                \
  }                                                                                                                 \
  MAP_KERNEL(3)                                                                                                     \
  silu_gate_backward_##name(const T* gate, i64 ldg, const T* up, i64 ldu, const T* dy, i64 lddy, T* dgate,          \
                            float beta_gate, i64 lddg, T* dup, float beta_up, i64 lddu, int rows, int cols) {       \
    bool vectors = aligned(gate, ldg, rows) && aligned(up, ldu, rows) && aligned(dy, lddy, rows) &&                 \
                   aligned(dgate, lddg, rows) && aligned(dup, lddu, rows);                                          \
    map<vector_of<T, T>()>(rows, cols, vectors, SiluGateBackward<T>{gate, ldg, up, ldu, dy, lddy, dgate, beta_gate, \
                                                                    lddg, dup, beta_up, lddu});                     \
  }
FOR_FLOATS(SILU_GATE)
