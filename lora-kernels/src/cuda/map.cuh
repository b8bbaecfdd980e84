// Elements in vectors, and maps over all elements of matrices: what the element-wise and row-wise modules share. Stands
// between common.cuh and such a module.

// Elements that fill 128 bits of the smaller of two types.
template <class X, class Y> constexpr int vector_of() { return 16 / (sizeof(X) < sizeof(Y) ? sizeof(X) : sizeof(Y)); }

// The elements inside a 32-bit word, in the order of memory.
DEVICE void unpack(float* to, u32 w, float) { *to = bits_float(w); }
DEVICE void unpack(float* to, u32 w, bf16) { to[0] = bits_float(w << 16), to[1] = bits_float(w & 0xffff0000u); }
DEVICE void unpack(float* to, u32 w, f16) { to[0] = half_to_float((u16)w), to[1] = half_to_float((u16)(w >> 16)); }
DEVICE u32 pack(const float* x, float) { return float_bits(*x); }
DEVICE u32 pack(const float* x, bf16) { return float_to_bfloat(x[0]) | (u32)float_to_bfloat(x[1]) << 16; }
DEVICE u32 pack(const float* x, f16) { return float_to_half(x[0]) | (u32)float_to_half(x[1]) << 16; }

// The elements of a 128-bit word.
template <class T> DEVICE void unpack(float* to, const uint4& w) {
  constexpr int E = 4 / sizeof(T);  // elements of 32 bits
  unpack(to, w.x, T{}), unpack(to + E, w.y, T{}), unpack(to + 2 * E, w.z, T{}), unpack(to + 3 * E, w.w, T{});
}

// N consecutive elements: one, or as many as fill 128-bit words, which then start at multiples of 16.
template <class T, int N> DEVICE void read(float (&to)[N], const T* from) {
  if constexpr (N == 1) {
    to[0] = to_f32(*from);
  } else {
    static_assert(N * sizeof(T) % 16 == 0, "whole 128-bit words");
#pragma unroll
    for (int i = 0; i < N; i += 16 / sizeof(T)) unpack<T>(to + i, *(const uint4*)(from + i));
  }
}
template <class T, int N> DEVICE void write(T* to, const float (&from)[N]) {
  constexpr int E = 4 / sizeof(T);
  if constexpr (N == 1) {
    *to = from_f32<T>(from[0]);
  } else {
    static_assert(N * sizeof(T) % 16 == 0, "whole 128-bit words");
#pragma unroll
    for (int i = 0; i < N; i += 4 * E) {
      uint4 w;
      w.x = pack(from + i, T{}), w.y = pack(from + i + E, T{});
      w.z = pack(from + i + 2 * E, T{}), w.w = pack(from + i + 3 * E, T{});
      *(uint4*)(to + i) = w;
    }
  }
}

// Whether all rows of a matrix start at addresses where 128-bit words may be read.
template <class T> DEVICE bool aligned(const T* p, i64 ld, int rows) {
  return (((u64)p | (rows > 1 ? (u64)ld * sizeof(T) : 0)) & 15) == 0;
}

// A kernel that is a map, of which `blocks` fit on a processor: 4 with up to two inputs, 3 with more, which have as many
// bytes in flight. Asked for by number they also keep the assembler from spilling a register to fit in one more.
#define MAP_THREADS 256
#define MAP_KERNEL(blocks) extern "C" __global__ void __launch_bounds__(MAP_THREADS, blocks)

// Calls f.load and then f.finish for every run of N columns of every row; runs that a row's end cuts off, and all where
// the matrices do not allow vectors, go element by element. A block covers a rectangle of 2^w runs times 256 / 2^w rows,
// 2^w being as many as a row has, so that neighbouring threads read neighbouring words, no thread divides, and short rows
// fill the block too. Where there are few inputs a thread loads two runs before it finishes the first: twice the bytes
// in flight.
template <int N, class F> DEVICE void map(int rows, int cols, bool vectors, const F& f) {
  u32 length = vectors ? N : 1, runs = (cols + length - 1) / length, whole = vectors ? (u32)cols / N : 0;
  int w = 0;
  while (w < 8 && (1u << w) < runs) w++;
  u32 row_step = gridDim.y * (MAP_THREADS >> w), step = gridDim.x << w;
  u32 first = (blockIdx.x << w) + (threadIdx.x & ((1 << w) - 1));
  // Unrolled loops would multiply the code, which there is enough of, and win nothing.
#pragma unroll 1
  for (u32 row = blockIdx.y * (MAP_THREADS >> w) + (threadIdx.x >> w); row < (u32)rows; row += row_step) {
    u32 run = first;
#pragma unroll 1
    for (; F::INPUTS <= 2 && run + step < whole; run += 2 * step) {
      float a[F::INPUTS][N], b[F::INPUTS][N];
      f.load(a, row, run * N);
      f.load(b, row, (run + step) * N);
      f.finish(a, row, run * N);
      f.finish(b, row, (run + step) * N);
    }
#pragma unroll 1
    for (; run < whole; run += step) {
      float a[F::INPUTS][N];
      f.load(a, row, run * N);
      f.finish(a, row, run * N);
    }
#pragma unroll 1
    for (; run < runs; run += step) {
      u32 end = (run + 1) * length < (u32)cols ? (run + 1) * length : cols;
#pragma unroll 1
      for (u32 col = run * length; col < end; col++) {
        float a[F::INPUTS][1];
        f.load(a, row, col);
        f.finish(a, row, col);
      }
    }
  }
}

// to = result + β·old for N elements, where β = 0 does not use old.
template <class T, int N> DEVICE void put(T* to, const float (&result)[N], const float (&old)[N], float beta) {
  float y[N];
#pragma unroll
  for (int i = 0; i < N; i++) y[i] = beta == 0.f ? result[i] : result[i] + beta * old[i];
  write(to, y);
}
