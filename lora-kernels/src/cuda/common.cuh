// Types, conversions and the instructions every kernel uses; prepended to each module. No headers: the same text goes
// through NVRTC and, on a machine without a GPU, through g++ under cuda/emulator/emulator.h (LORA_EMU).
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// The 16-bit floating-point types, as stored. All arithmetic is done in f32.
struct bf16 { u16 bits; };
struct f16 { u16 bits; };

#define DEVICE __device__ __forceinline__
// A kernel, by the name under which its launcher finds it.
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)

#ifndef LORA_EMU
// The block's dynamic shared memory.
#define DYNAMIC_SHARED(name)                 \
  extern __shared__ uint4 dynamic_shared_[]; \
  u8* name = (u8*)dynamic_shared_
DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
DEVICE float bits_float(u32 x) { return __uint_as_float(x); }
DEVICE float half_to_float(u16 h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
DEVICE u16 float_to_half(float f) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }
DEVICE u16 float_to_bfloat(float f) { u16 h; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }

// D += A·B on one warp: A 16×16 row-major, B 16×8 column-major, in the fragment layout of PTX (m16n8k16).
DEVICE void mma_m16n8k16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], bf16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_m16n8k16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], f16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// D += A·B on one warp in tf32: A 16×8, B 8×8 (m16n8k8). The operands are f32 bits rounded by to_tf32.
DEVICE void mma_m16n8k8_tf32(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Two numbers rounded and put into one word, the first in its lower half.
DEVICE u32 pack(float lo, float hi, bf16) { u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)); return r; }
DEVICE u32 pack(float lo, float hi, f16) { u32 r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)); return r; }
DEVICE u32 to_tf32(float x) { u32 r; asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x)); return r; }

// Four 8×8 matrices of 16-bit elements from shared memory; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) {
  u32 p = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p));
}
// The same, each matrix transposed.
DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
  u32 p = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p));
}

// Starts copying 16 bytes to shared memory, of which `valid` come from `from` and the rest are zero. Both addresses are
// multiples of 16, also when `valid` is 0 (then nothing is read).
DEVICE void cp_async_16(void* to, const void* from, u32 valid) {
  u32 p = (u32)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(p), "l"(from), "r"(valid) : "memory");
}
// The same with 4 bytes, for rows that do not start at multiples of 16.
DEVICE void cp_async_4(void* to, const void* from, u32 valid) {
  u32 p = (u32)__cvta_generic_to_shared(to);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(p), "l"(from), "r"(valid) : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are under way. Other threads' copies need a barrier as well.
template <int N> DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }

DEVICE float shfl_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEVICE u32 shfl_xor(u32 v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEVICE float shfl(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
DEVICE u32 shfl(u32 v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
DEVICE void warp_sync() { __syncwarp(); }
// The high half of a 64-bit product.
DEVICE u32 mul_hi(u32 a, u32 b) { return __umulhi(a, b); }
// 2ˣ to about 2⁻²², for softmax; elementary functions elsewhere are the accurate ones (expf, tanhf, erff).
DEVICE float fast_exp2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// 1/x to one unit in the last place, at a fifth of the instructions of a division.
DEVICE float fast_reciprocal(float x) { float y; asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
#endif

DEVICE float to_f32(float x) { return x; }
DEVICE float to_f32(bf16 x) { return bits_float((u32)x.bits << 16); }
DEVICE float to_f32(f16 x) { return half_to_float(x.bits); }
// Rounds to nearest, ties to even.
template <class T> DEVICE T from_f32(float x);
template <> DEVICE float from_f32<float>(float x) { return x; }
template <> DEVICE bf16 from_f32<bf16>(float x) { return {float_to_bfloat(x)}; }
template <> DEVICE f16 from_f32<f16>(float x) { return {float_to_half(x)}; }

// Sums and maxima over the lanes of a warp, in a fixed order; every lane gets the result.
DEVICE float warp_sum(float v) {
  for (int m = 16; m > 0; m >>= 1) v += shfl_xor(v, m);
  return v;
}
DEVICE float warp_max(float v) {
  for (int m = 16; m > 0; m >>= 1) v = fmaxf(v, shfl_xor(v, m));
  return v;
}
// Sum over a block of THREADS threads, in a fixed order; every thread gets it. `scratch` holds THREADS / 32 floats and may
// be used again after the next barrier.
template <int THREADS> DEVICE float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  if (THREADS == 32) return v;
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  float s = 0.f;
  for (int w = 0; w < THREADS / 32; w++) s += scratch[w];
  return s;
}
template <int THREADS> DEVICE float block_max(float v, float* scratch) {
  v = warp_max(v);
  if (THREADS == 32) return v;
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  float s = scratch[0];
  for (int w = 1; w < THREADS / 32; w++) s = fmaxf(s, scratch[w]);
  return s;
}

// y = result + β·y, where β = 0 does not read y.
template <class T> DEVICE void put(T* y, float result, float beta) {
  *y = from_f32<T>(beta == 0.f ? result : result + beta * to_f32(*y));
}

// Defines BODY once per floating-point type: FOR_FLOATS(K) expands K(float, f32) K(bf16, bf16) K(f16, f16).
#define FOR_FLOATS(K) K(float, f32) K(bf16, bf16) K(f16, f16)
