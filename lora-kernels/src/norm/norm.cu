// LayerNorm and RMSNorm. Both are one kernel: an RMS norm is a layer norm whose mean is 0, whose β is absent, and of
// which the backward pass leaves out the terms of the mean (`centred` is 0).
//
// A row belongs to G threads: a warp for rows of at most 1024 columns, a block of 256 threads for at most 8192. Each
// thread keeps its elements in registers, so that a row is read once. Longer rows, and those that 128-bit words do not
// fit, go element by element and are read again (FITS is false).

// Elements of a row that a thread keeps: at most 32, or where it keeps sums of columns beside them 16 and twice the threads.
template <int G> constexpr int kept() { return G == 512 ? 16 : 32; }

// The part of a row that thread `t` of its G threads works on: runs of V columns, G runs apart.
template <class T, int G, bool FITS> struct Part {
  static constexpr int V = FITS ? vector_of<T, T>() : 1, RUNS = FITS ? kept<G>() / V : 1;
  int t, n;
  // f(k, col) for run k, which starts at column col.
  template <class F> DEVICE void each(const F& f) const {
    if constexpr (FITS) {
#pragma unroll
      for (int k = 0; k < RUNS; k++) {
        int col = (t + k * G) * V;
        if (col < n) f(k, col);
      }
    } else {
#pragma unroll 1
      for (int col = t; col < n; col += G) f(0, col);
    }
  }
};

// A thread's elements of one row, as they are stored.
template <class T, int G, bool FITS> struct Row {
  typedef Part<T, G, FITS> P;
  const T* from;
  uint4 words[P::RUNS];
  DEVICE void load(const P& part, const T* row) {
    from = row;
    if constexpr (FITS) part.each([&](int k, int col) { words[k] = *(const uint4*)(row + col); });
  }
  DEVICE void get(float (&to)[P::V], int k, int col) const {
    if constexpr (FITS) {
      unpack<T>(to, words[k]);
    } else {
      read(to, from + col);
    }
  }
};

// Sums over a row's G threads, in a fixed order. `scratch` holds N·G/32 floats.
template <int G, int N> DEVICE void row_sums(float (&v)[N], float* scratch) {
#pragma unroll
  for (int i = 0; i < N; i++) v[i] = warp_sum(v[i]);
  if constexpr (G > 32) {
    // Before: the last sums may still be being read.
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int i = 0; i < N; i++) scratch[i * (G / 32) + threadIdx.x / 32] = v[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) {
      v[i] = 0.f;
      for (int w = 0; w < G / 32; w++) v[i] += scratch[i * (G / 32) + w];
    }
  }
}

template <class T, int G, bool FITS, int THREADS>
DEVICE void forward(const T* x, i64 ldx, const T* gamma, const T* beta, T* y, i64 ldy, float* stats, i64 ld_stats, int rows,
                    int n, int centred, float eps) {
  typedef Part<T, G, FITS> P;
  __shared__ float scratch[2 * G / 32];
  P part{(int)threadIdx.x % G, n};
  float inv_n = 1.f / (float)n;
  // With G < THREADS rows are not waited for together, so that a warp may leave early.
  i64 r = (i64)blockIdx.x * (THREADS / G) + threadIdx.x / G;
  if (r >= rows) return;
  Row<T, G, FITS> row;
  row.load(part, x + r * ldx);
  float mean[1] = {0.f};
  if (centred) {
    part.each([&](int k, int col) {
      float v[P::V];
      row.get(v, k, col);
#pragma unroll
      for (int i = 0; i < P::V; i++) mean[0] += v[i];
    });
    row_sums<G>(mean, scratch);
    mean[0] *= inv_n;
  }
  // Of the centred row, the mean (what the first one is off) and the variance.
  float moments[2] = {0.f, 0.f};
  part.each([&](int k, int col) {
    float v[P::V];
    row.get(v, k, col);
#pragma unroll
    for (int i = 0; i < P::V; i++) {
      float c = v[i] - mean[0];
      moments[0] += c;
      moments[1] += c * c;
    }
  });
  row_sums<G>(moments, scratch);
  float d = centred ? moments[0] * inv_n : 0.f;
  float rstd = 1.f / sqrtf(fmaxf(moments[1] * inv_n - d * d, 0.f) + eps);
  part.each([&](int k, int col) {
    float v[P::V], g[P::V], b[P::V];
    row.get(v, k, col);
    read(g, gamma + col);
    if (beta) read(b, beta + col);
#pragma unroll
    for (int i = 0; i < P::V; i++) v[i] = fmaf(((v[i] - mean[0]) - d) * rstd, g[i], beta ? b[i] : 0.f);
    write(y + r * ldy + col, v);
  });
  if (part.t == 0) {
    if (centred) stats[r * ld_stats] = mean[0];
    stats[r * ld_stats + centred] = rstd;
  }
}

// dx, and with SUMS the sums dγ and dβ of the rows blockIdx.x·W + w, then every gridDim.x·W-th, W being the rows that a
// block works on at once. They go to partial [2, gridDim.x, n], for add_partial; one that is not asked for is null.
template <class T, int G, bool FITS, int THREADS, bool SUMS>
DEVICE void backward(const T* x, i64 ldx, const T* gamma, const float* stats, i64 ld_stats, const T* dy, i64 lddy, T* dx,
                     float beta, i64 lddx, float* dgamma, float* dbeta, int rows, int n, int centred) {
  typedef Part<T, G, FITS> P;
  constexpr int W = THREADS / G;
  __shared__ float scratch[3 * G / 32];
  P part{(int)threadIdx.x % G, n};
  float inv_n = 1.f / (float)n;
  float sum_gamma[SUMS && FITS ? P::RUNS : 1][P::V], sum_beta[SUMS && FITS ? P::RUNS : 1][P::V];
  if constexpr (SUMS) {
    part.each([&](int k, int col) {
#pragma unroll
      for (int i = 0; i < P::V; i++) {
        if constexpr (FITS) {
          sum_gamma[k][i] = sum_beta[k][i] = 0.f;
        } else {
          if (dgamma) dgamma[(i64)blockIdx.x * n + col + i] = 0.f;
          if (dbeta) dbeta[(i64)blockIdx.x * n + col + i] = 0.f;
        }
      }
    });
  }
  i64 r = (i64)blockIdx.x * W + threadIdx.x / G;
#pragma unroll 1
  for (; r < rows; r += (i64)gridDim.x * W) {
    Row<T, G, FITS> xs, dys;
    xs.load(part, x + r * ldx);
    dys.load(part, dy + r * lddy);
    float mean = centred ? stats[r * ld_stats] : 0.f, rstd = stats[r * ld_stats + centred];
    // Σ (x − μ), Σ g and Σ g·(x − μ), with g = dy·γ.
    float s[3] = {0.f, 0.f, 0.f};
    part.each([&](int k, int col) {
      float v[P::V], g[P::V], w[P::V];
      xs.get(v, k, col);
      dys.get(g, k, col);
      read(w, gamma + col);
#pragma unroll
      for (int i = 0; i < P::V; i++) {
        float c = v[i] - mean, p = g[i] * w[i];
        s[0] += c;
        s[1] += p;
        s[2] += p * c;
      }
    });
    row_sums<G>(s, scratch);
    // d: what the stored mean, rounded to the type, is off.
    float d = centred ? s[0] * inv_n : 0.f, g_mean = centred ? s[1] * inv_n : 0.f;
    // Taken in this order nothing leaves the range of f32 before the result does.
    float k_x = (centred ? s[2] - d * s[1] : s[2]) * rstd * inv_n * rstd;
    part.each([&](int k, int col) {
      float v[P::V], g[P::V];
      xs.get(v, k, col);
      dys.get(g, k, col);
#pragma unroll
      for (int i = 0; i < P::V; i++) {
        v[i] = (v[i] - mean) - d;
        if constexpr (SUMS && FITS) {
          sum_gamma[k][i] += g[i] * (v[i] * rstd);
          sum_beta[k][i] += g[i];
        } else if constexpr (SUMS) {
          if (dgamma) dgamma[(i64)blockIdx.x * n + col + i] += g[i] * (v[i] * rstd);
          if (dbeta) dbeta[(i64)blockIdx.x * n + col + i] += g[i];
        }
      }
      if (dx) {
        float w[P::V];
        read(w, gamma + col);
#pragma unroll
        for (int i = 0; i < P::V; i++) v[i] = (g[i] * w[i] - g_mean - v[i] * k_x) * rstd;
        float old[P::V];
        if (beta != 0.f) read(old, dx + r * lddx + col);
        put(dx + r * lddx + col, v, old, beta);
      }
    });
  }
  if constexpr (SUMS && FITS) {
    if constexpr (W == 1) {
      part.each([&](int k, int col) {
#pragma unroll
        for (int i = 0; i < P::V; i++) {
          if (dgamma) dgamma[(i64)blockIdx.x * n + col + i] = sum_gamma[k][i];
          if (dbeta) dbeta[(i64)blockIdx.x * n + col + i] = sum_beta[k][i];
        }
      });
    } else {
      // The warps' sums, added in their order. Element i of a run stands G·i apart from its neighbour, and the threads
      // side by side: no bank conflicts.
      __shared__ float sums[2][kept<G>() * G];
      for (int turn = 0; turn < W; turn++) {
        if ((int)threadIdx.x / G == turn) {
#pragma unroll
          for (int k = 0; k < P::RUNS; k++) {
#pragma unroll
            for (int i = 0; i < P::V; i++) {
              int at = (k * P::V + i) * G + part.t;
              if ((part.t + k * G) * P::V < n) {
                sums[0][at] = turn == 0 ? sum_gamma[k][i] : sums[0][at] + sum_gamma[k][i];
                sums[1][at] = turn == 0 ? sum_beta[k][i] : sums[1][at] + sum_beta[k][i];
              }
            }
          }
        }
        __syncthreads();
      }
      for (int col = threadIdx.x; col < n; col += THREADS) {
        int run = col / P::V, at = (run / G * P::V + col % P::V) * G + run % G;
        if (dgamma) dgamma[(i64)blockIdx.x * n + col] = sums[0][at];
        if (dbeta) dbeta[(i64)blockIdx.x * n + col] = sums[1][at];
      }
    }
  }
}

#define FORWARD(T, name, size, G, FITS, THREADS)                                                           \
  KERNEL(THREADS)                                                                                          \
  norm_##size##_##name(const T* x, i64 ldx, const T* gamma, const T* beta, T* y, i64 ldy, float* stats,    \
                       i64 ld_stats, int rows, int n, int centred, float eps) {                            \
    forward<T, G, FITS, THREADS>(x, ldx, gamma, beta, y, ldy, stats, ld_stats, rows, n, centred, eps);     \
  }
// With as many blocks on a processor, some read while others wait for their sums.
#define BACKWARD(T, name, size, G, FITS, THREADS, function, SUMS)                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS, THREADS == 512 ? 1 : (SUMS ? 256 : 512) / THREADS)           \
  function##_##size##_##name(const T* x, i64 ldx, const T* gamma, const float* stats, i64 ld_stats, const T* dy,     \
                             i64 lddy, T* dx, float beta, i64 lddx, float* dgamma, float* dbeta, int rows, int n,    \
                             int centred) {                                                                          \
    backward<T, G, FITS, THREADS, SUMS>(x, ldx, gamma, stats, ld_stats, dy, lddy, dx, beta, lddx, dgamma, dbeta,     \
                                        rows, n, centred);                                                           \
  }
#define NORMS(T, name)                                                       \
  FORWARD(T, name, short, 32, true, 128)                                     \
  FORWARD(T, name, long, 256, true, 256)                                     \
  FORWARD(T, name, any, 256, false, 256)                                     \
  BACKWARD(T, name, short, 32, true, 128, norm_dx, false)                    \
  BACKWARD(T, name, long, 256, true, 256, norm_dx, false)                    \
  BACKWARD(T, name, short, 32, true, 128, norm_backward, true)               \
  BACKWARD(T, name, long, 512, true, 512, norm_backward, true)               \
  BACKWARD(T, name, any, 256, false, 256, norm_backward, true)
FOR_FLOATS(NORMS)
