// The functions of `Activation` and their slopes, for the activation kernels and for the epilogues of matrix products.
// The formulas are those of the CPU's kernels, for the same reasons.

struct Sigmoid { float s, rest; };
// σ(z) and 1 − σ(z), both to full relative precision.
DEVICE Sigmoid sigmoid(float z) {
  // Beyond 80 σ is as good as 0, and e^(−z) stays finite, which its product with σ needs. NaN goes through.
  float e = expf(-z > 80.f ? 80.f : -z);
  float s = fast_reciprocal(1.f + e);
  return {s, e * s};
}

// Φ(x), the normal distribution.
DEVICE float normal(float x) { return fmaf(erff(x * 0.70710678118654752f), 0.5f, 0.5f); }

constexpr float GELU_C = 1.5957691216057308f, GELU_K = 0.044715f;  // 2·√(2/π)

struct GeluTanh {
  static DEVICE float value(float x) { return x * sigmoid(GELU_C * x * fmaf(x * x, GELU_K, 1.f)).s; }
  static DEVICE float slope(float x) {
    float x2 = x * x, dz = GELU_C * fmaf(x2, 3.f * GELU_K, 1.f);
    Sigmoid g = sigmoid(GELU_C * x * fmaf(x2, GELU_K, 1.f));
    return g.s * fmaf(x * dz, g.rest, 1.f);
  }
};
struct GeluErf {
  static DEVICE float value(float x) { return x * normal(x); }
  // With √(1/2π), the density's peak.
  static DEVICE float slope(float x) { return fmaf(x * 0.3989422804014327f, expf(x * x * -0.5f), normal(x)); }
};
// Comparisons that are false for NaN let it through.
struct Relu {
  static DEVICE float value(float x) { return x <= 0.f ? 0.f : x; }
  static DEVICE float slope(float x) { return x <= 0.f ? 0.f : 1.f; }
};
struct Silu {
  static DEVICE float value(float x) { return x * sigmoid(x).s; }
  static DEVICE float slope(float x) {
    Sigmoid g = sigmoid(x);
    return g.s * fmaf(x, g.rest, 1.f);
  }
};
struct Tanh {
  static DEVICE float value(float x) { return tanhf(x); }
  static DEVICE float slope(float x) {
    // 1 − tanh² = 4·σ(2x)·(1 − σ(2x)).
    Sigmoid g = sigmoid(x + x);
    return g.s * (4.f * g.rest);
  }
};
