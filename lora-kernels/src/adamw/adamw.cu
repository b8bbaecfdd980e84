// AdamW over flat buffers, and the numbers of a step that stay on the device: the sum of the gradient's squares and the
// factor by which it is clipped.

constexpr int THREADS = 256;

struct Rule {
  float keep, new1, beta2, new2, step, root, eps;
};

// One element. Each operation is rounded by itself, in the order of the CPU's kernel: the same bits.
DEVICE void update(const Rule& r, float factor, float& p, float g, float& m, float& v) {
  g = __fmul_rn(g, factor);
  m = __fmaf_rn(__fadd_rn(g, -m), r.new1, m);
  v = __fadd_rn(__fmul_rn(v, r.beta2), __fmul_rn(__fmul_rn(r.new2, g), g));
  const float root = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), r.root), r.eps);
  p = __fadd_rn(__fmul_rn(p, r.keep), __fdiv_rn(__fmul_rn(r.step, m), root));
}

// Each thread takes 16 bytes of each array: seven accesses of 512 bytes per warp, 2048 threads on a multiprocessor.
// A factor that is no finite number leaves everything as it is.
KERNEL(THREADS) adamw_f32(float* p, i64 p_ld, const float* g, i64 g_ld, float* m, i64 m_ld, float* v, i64 v_ld, i64 rows,
                          i64 cols, Rule rule, const float* factor) {
  const float f = factor ? *factor : 1.f;
  if (f - f != 0.f) return;
  for (i64 row = blockIdx.y; row < rows; row += gridDim.y) {
    float *pr = p + row * p_ld, *mr = m + row * m_ld, *vr = v + row * v_ld;
    const float* gr = g + row * g_ld;
    // Parts of parameters begin anywhere, but at the same place in all four arrays: windows of four elements are those
    // that lie at multiples of 16 bytes, the first and the last one cut off.
    const int skew = (int)((u64)pr % 16 / 4);
    const bool aligned = (((u64)pr ^ (u64)gr) | ((u64)pr ^ (u64)mr) | ((u64)pr ^ (u64)vr)) % 16 == 0;
    const i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * 4 - skew;
    if (aligned && i >= 0 && i + 4 <= cols) {
      float4 p4 = *(const float4*)(pr + i), m4 = *(const float4*)(mr + i), v4 = *(const float4*)(vr + i);
      const float4 g4 = *(const float4*)(gr + i);
      update(rule, f, p4.x, g4.x, m4.x, v4.x);
      update(rule, f, p4.y, g4.y, m4.y, v4.y);
      update(rule, f, p4.z, g4.z, m4.z, v4.z);
      update(rule, f, p4.w, g4.w, m4.w, v4.w);
      *(float4*)(pr + i) = p4;
      *(float4*)(mr + i) = m4;
      *(float4*)(vr + i) = v4;
    } else {
      for (i64 j = max(i, (i64)0); j < min(i + 4, cols); j++) update(rule, f, pr[j], gr[j], mr[j], vr[j]);
    }
  }
}

DEVICE void unpack(float (&x)[4], uint4 w, float) {
  x[0] = bits_float(w.x), x[1] = bits_float(w.y), x[2] = bits_float(w.z), x[3] = bits_float(w.w);
}
template <class T> DEVICE void unpack(float (&x)[8], uint4 w, T) {
  const u32 pairs[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = to_f32(T{(u16)pairs[i]});
    x[2 * i + 1] = to_f32(T{(u16)(pairs[i] >> 16)});
  }
}

// The square of an f32 is exact in f64.
DEVICE double square(float x) { return (double)x * (double)x; }

// Sum over the block, by a tree; thread 0 gets it.
DEVICE double tree(double v) {
  __shared__ double sums[THREADS];
  sums[threadIdx.x] = v;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

// Vectors of 16 bytes of one thread in one segment of a row.
constexpr int VECTORS = 4;

// partial[b] = the sum of squares of the segments b, b + gridDim, …; a row has `per_row` of them, each beginning at a
// multiple of 16 bytes, the first one before the row when the row does not.
template <class T> DEVICE void sum_squares(const T* x, i64 ld, i64 rows, i64 cols, i64 per_row, double* partial) {
  constexpr int N = 16 / sizeof(T), SEGMENT = THREADS * VECTORS * N;
  double sum = 0.;
  for (i64 s = blockIdx.x; s < rows * per_row; s += gridDim.x) {
    const T* row = x + s / per_row * ld;
    const i64 first = s % per_row * SEGMENT - (i64)((u64)row % 16 / sizeof(T));
    if (first >= 0 && first + SEGMENT <= cols) {
      const uint4* vectors = (const uint4*)(row + first) + threadIdx.x;
      uint4 w[VECTORS];
#pragma unroll
      for (int u = 0; u < VECTORS; u++) w[u] = vectors[u * THREADS];
#pragma unroll
      for (int u = 0; u < VECTORS; u++) {
        float v[N];
        unpack(v, w[u], T{});
#pragma unroll
        for (int j = 0; j < N; j++) sum += square(v[j]);
      }
    } else {
      const i64 begin = max(first, (i64)0), end = min(first + SEGMENT, cols);
      for (i64 i = begin + threadIdx.x; i < end; i += THREADS) sum += square(to_f32(row[i]));
    }
  }
  sum = tree(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
#define SUM_SQUARES(T, suffix)                                                                                \
  KERNEL(THREADS) sum_squares_##suffix(const T* x, i64 ld, i64 rows, i64 cols, i64 per_row, double* partial) { \
    sum_squares(x, ld, rows, cols, per_row, partial);                                                         \
  }
FOR_FLOATS(SUM_SQUARES)

// The partial sums added up by one block, in a fixed order.
KERNEL(THREADS) sum_partials(const double* partial, int n, double* out) {
  double sum = 0.;
  for (int i = threadIdx.x; i < n; i += THREADS) sum += partial[i];
  sum = tree(sum);
  if (threadIdx.x == 0) *out = sum;
}

// See clip_factor in adamw.rs. f32's largest number is where AdamW's mean of squares would overflow.
KERNEL(32) clip_factor(const float* loss, const double* sum_squares, double limit, float* factor) {
  if (threadIdx.x != 0) return;
  const double norm = sqrt(*sum_squares);
  const bool fine = *factor - *factor == 0.f && *loss - *loss == 0.f && *sum_squares < 3.4028234663852886e38;
  if (!fine) {
    *factor = bits_float(0x7fc00000u);
  } else {
    *factor = limit > 0. && norm > limit ? (float)(limit / (norm + 1e-6)) : 1.f;
  }
}
