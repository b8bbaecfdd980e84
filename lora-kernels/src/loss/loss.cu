// Cross-entropy over rows of logits: one block per row, whatever its length, alignment and stride.
//
// A row is read from memory once: as much of it as fits is kept in shared memory between the pass that finds its maximum
// and sum and the pass that writes the gradient; the rest is read again, most likely from the L2 cache.

constexpr int THREADS = 512;
// 16-byte loads that each thread has under way: with two blocks on a multiprocessor 64 KiB, enough to hide the latency.
constexpr int AHEAD = 4;
constexpr float LOG2E = 1.44269504088896340736f;
// Below every logit but −∞; finite, so that (−∞) − LOWEST is −∞ and not NaN.
constexpr float LOWEST = -3.402823466e38f;

DEVICE void unpack(float (&x)[4], uint4 w, float) {
  x[0] = bits_float(w.x), x[1] = bits_float(w.y), x[2] = bits_float(w.z), x[3] = bits_float(w.w);
}
template <class T> DEVICE void unpack(float (&x)[8], uint4 w, T) {
  u32 pairs[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = to_f32(T{(u16)pairs[i]});
    x[2 * i + 1] = to_f32(T{(u16)(pairs[i] >> 16)});
  }
}

// N elements side by side; in one instruction where the address allows it.
DEVICE void store(float* y, const float (&x)[4], bool aligned) {
  if (aligned) {
    *(uint4*)y = uint4{float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3])};
  } else {
    for (int i = 0; i < 4; i++) y[i] = x[i];
  }
}
template <class T> DEVICE void store(T* y, const float (&x)[4], bool aligned) {
  if (aligned) {
    *(uint2*)y = uint2{pack(x[0], x[1], T{}), pack(x[2], x[3], T{})};
  } else {
    for (int i = 0; i < 4; i++) y[i] = from_f32<T>(x[i]);
  }
}
template <class T> DEVICE void store(T* y, const float (&x)[8], bool aligned) {
  if (aligned) {
    *(uint4*)y = uint4{pack(x[0], x[1], T{}), pack(x[2], x[3], T{}), pack(x[4], x[5], T{}), pack(x[6], x[7], T{})};
  } else {
    for (int i = 0; i < 8; i++) y[i] = from_f32<T>(x[i]);
  }
}

// The maximum so far, Σ e^(z − max) relative to it, and Σ (z − first), which label smoothing needs.
struct Running {
  float max, sum, shifted;
};

template <int N> DEVICE void take(Running& r, const float (&x)[N], bool smooth, float first) {
  float m = x[0];
#pragma unroll
  for (int i = 1; i < N; i++) m = fmaxf(m, x[i]);
  // fmaxf passes over NaN; the sum below does not.
  if (m > r.max) {
    r.sum *= fast_exp2((r.max - m) * LOG2E);
    r.max = m;
  }
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < N; i++) sum += fast_exp2((x[i] - r.max) * LOG2E);
  r.sum += sum;
  if (smooth) {
    float shifted = 0.f;
#pragma unroll
    for (int i = 0; i < N; i++) shifted += x[i] - first;
    r.shifted += shifted;
  }
}

// The gradient's numbers that all elements of a row share: z ← e^(z − max)·k + uniform, and at the target + hot.
struct Scales {
  float k, uniform, hot;
};

// One row: its loss and, with GRADIENT, dz = scale·(softmax(z) − (1 − ε)·onehot(target) − ε/cols). dz may be z.
// `cached` vectors of 16 bytes fit into shared memory. A target that is no class makes loss and gradient NaN.
template <bool GRADIENT, class T, class U>
DEVICE void row(const T* z, U* dz, int cols, u32 target, float smoothing, float scale, float* loss, int cached, uint4* cache) {
  __shared__ float scratch[2][THREADS / 32];
  constexpr int N = 16 / sizeof(T);
  const int t = threadIdx.x;
  // Elements before the first multiple of 16 bytes, whole vectors, and what is left behind them: together with the head
  // at most 14 edge elements, one per thread.
  const int head = min((int)((16 - (u64)z % 16) % 16 / sizeof(T)), cols);
  const int vectors = (cols - head) / N;
  const int edges = cols - vectors * N;
  const uint4* body = (const uint4*)(z + head);
  const int edge = t < head ? t : t + vectors * N;

  const bool valid = target < (u32)cols, smooth = smoothing != 0.f;
  const float at_target = valid ? to_f32(z[target]) : bits_float(0x7fc00000u);
  // Any number of the size of the logits will do: it keeps the terms of Σ (z − first) small.
  float first = valid && smooth ? to_f32(z[0]) : 0.f;
  if (first - first != 0.f) first = 0.f;

  Running r = {LOWEST, 0.f, 0.f};
  if (t < edges) {
    float x[1] = {to_f32(z[edge])};
    take(r, x, smooth, first);
  }
  for (int v = t; v < vectors; v += THREADS * AHEAD) {
    uint4 w[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; u++)
      if (v + u * THREADS < vectors) w[u] = body[v + u * THREADS];
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      const int i = v + u * THREADS;
      if (i < vectors) {
        // Each thread gets back what it put there itself: no barrier. Lanes are 16 bytes apart: no bank conflict.
        if (GRADIENT && i < cached) cache[i] = w[u];
        float x[N];
        unpack(x, w[u], T{});
        take(r, x, smooth, first);
      }
    }
  }
  const float top = block_max<THREADS>(r.max, scratch[0]);
  const float total = block_sum<THREADS>(r.sum * fast_exp2((r.max - top) * LOG2E), scratch[1]);
  // `smooth` is the same for the whole block. block_sum starts with a barrier: scratch is free again.
  const float shifted = smooth ? block_sum<THREADS>(r.shifted, scratch[0]) : 0.f;
  if (t == 0) {
    float l = logf(total) - (1.f - smoothing) * (at_target - top);
    if (smooth) l -= smoothing * (shifted / (float)cols + (first - top));
    *loss = l;
  }
  if (!GRADIENT) return;

  const Scales s = {valid ? scale / total : at_target, -scale * smoothing / (float)cols, -scale * (1.f - smoothing)};
  auto gradient = [&](float x) { return fmaf(fast_exp2((x - top) * LOG2E), s.k, s.uniform); };
  U* out = dz + head;
  const bool aligned = (u64)out % (N * sizeof(U)) == 0;
  if (t < edges) dz[edge] = from_f32<U>(gradient(to_f32(z[edge])));
  for (int v = t; v < vectors; v += THREADS * AHEAD) {
    // All loads before the first store: dz may be z, so the compiler cannot move them there.
    uint4 w[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      const int i = v + u * THREADS;
      if (i < vectors) w[u] = i < cached ? cache[i] : body[i];
    }
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      const int i = v + u * THREADS;
      if (i < vectors) {
        float x[N];
        unpack(x, w[u], T{});
#pragma unroll
        for (int j = 0; j < N; j++) x[j] = gradient(x[j]);
        store(out + (i64)i * N, x, aligned);
      }
    }
  }
  // The element of the target once more, in full: after whoever wrote it.
  __syncthreads();
  if (t == 0 && valid) dz[target] = from_f32<U>(gradient(at_target) + s.hot);
}

template <class T, class U>
DEVICE void cross_entropy(const T* z, i64 z_ld, U* dz, i64 dz_ld, const u32* targets, float* losses, i64 losses_ld, int cols,
                          float smoothing, float scale, int cached) {
  DYNAMIC_SHARED(cache);
  const i64 i = blockIdx.x;
  row<true>(z + i * z_ld, dz + i * dz_ld, cols, targets[i], smoothing, scale, losses + i * losses_ld, cached, (uint4*)cache);
}

template <class T>
DEVICE void nll(const T* z, i64 z_ld, const u32* targets, float* losses, i64 losses_ld, int cols, float smoothing) {
  const i64 i = blockIdx.x;
  row<false, T, T>(z + i * z_ld, nullptr, cols, targets[i], smoothing, 0.f, losses + i * losses_ld, 0, nullptr);
}

// From logits of the first type to gradients of the second.
#define CROSS_ENTROPY(T, U, suffix)                                                                                       \
  KERNEL(THREADS) cross_entropy_##suffix(const T* z, i64 z_ld, U* dz, i64 dz_ld, const u32* targets,           \
                                           float* losses, i64 losses_ld, int cols, float smoothing, float scale,          \
                                           int cached) {                                                                  \
    cross_entropy(z, z_ld, dz, dz_ld, targets, losses, losses_ld, cols, smoothing, scale, cached);                        \
  }
CROSS_ENTROPY(float, float, f32)
CROSS_ENTROPY(bf16, bf16, bf16)
CROSS_ENTROPY(f16, f16, f16)
CROSS_ENTROPY(float, bf16, f32_bf16)
CROSS_ENTROPY(float, f16, f32_f16)

#define NLL(T, suffix)                                                                                                    \
  KERNEL(THREADS) nll_##suffix(const T* z, i64 z_ld, const u32* targets, float* losses, i64 losses_ld, int cols,          \
                               float smoothing) {                                                                         \
    nll(z, z_ld, targets, losses, losses_ld, cols, smoothing);                                                            \
  }
FOR_FLOATS(NLL)
