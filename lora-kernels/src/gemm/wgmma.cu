// C = act(α·(A·B + A'·B') + β·C + bias) + residual with bf16 operands, on Hopper's tensor cores (sm_90a): wgmma fed by TMA.
// A'·B' is a term of few steps of k, as the update of a low-rank adapter, or nothing.
//
// A block of three warpgroups stays on its multiprocessor and computes one 128×BN tile of C after another. The first
// warpgroup is the producer: one of its threads has TMA copy panels of 64 steps of k of A and B into a ring of STAGES
// stages. The other two are the consumers: each multiplies 64 rows of A by the whole panel of B, adding up in registers,
// and writes its 64×BN half of the tile while the producer already loads the next one.
//
// With CLUSTER = 2 two blocks work on tiles one below the other. They need the same panel of B: each fetches half of it
// and TMA writes that half into both, so that B crosses L2 once for both.
//
// The term costs its own steps and nothing else: after the panels of A and B the producer sends those of A' and B', stored
// the same way, through the same ring, and the consumers multiply them into the same registers.
//
// Two barriers per stage (mbarrier) order everything, and each is used in turns ("phases") whose parity the waits name:
//   full[s]   completes when the producer has announced the stage (one arrival, with the number of bytes to come) and all
//             bytes of it have arrived. TMA writes, and counts, whole boxes; what lies outside of a matrix is zero.
//   empty[s]  completes when every consumer warp of every block of the cluster has finished reading the stage.
// The r-th use of a stage (r = 0, 1, …) has parity r % 2 in both. A consumer waits for full[s] with parity r % 2; the
// producer waits for the previous use, empty[s] with parity (r + 1) % 2, which a fresh barrier counts as complete.
// Everyone walks the ring in the same order, by the same number of steps, so nobody can be a whole turn ahead.

// A_MN and B_MN are defined before: whether an operand's contiguous direction is m (or n) rather than k. TMA takes A and
// B from its maps, not from the parameters that the kernels share.

constexpr int BM = 128, BK = 64, CONSUMERS = 2, THREADS = 128 * (CONSUMERS + 1);
// Bytes of a box: 64 elements (128 bytes, the span of the swizzle) by 64 rows.
constexpr u32 BOX = 8192;
// Consumer warps stage 16 rows of 128 bytes each on their way to C.
constexpr u32 STAGING = 16 * 128, WARPS = 4 * CONSUMERS;

template <int BN> struct Layout {
  static constexpr u32 A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, STAGE = A_BYTES + B_BYTES;
  static constexpr int STAGES = BN == 256 ? 4 : BN == 192 ? 5 : 6;
  // From the first multiple of 1024 in dynamic shared memory: the ring, the staging rows, the barriers.
  static constexpr u32 STAGED = STAGES * STAGE, FULL = STAGED + WARPS * STAGING, EMPTY = FULL + 8 * STAGES;
  static constexpr u32 BYTES = 1024 + EMPTY + 8 * STAGES;
};

// A CUtensorMap.
struct alignas(64) TensorMap { u64 opaque[16]; };
// Those of A, B, A' and B'. Without a term the last two are not used.
struct Maps { TensorMap a, b, term_a, term_b; };

// ---- one function per instruction ----

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the cluster and to TMA.
DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}
// Arrives at the barrier at the same offset in block `rank` of the cluster.
DEVICE void barrier_arrive_at(u32 barrier, u32 rank) {
  asm volatile("{.reg .b32 there;\n\t"
               "mapa.shared::cluster.u32 there, %0, %1;\n\t"
               "mbarrier.arrive.shared::cluster.b64 _, [there];}" :: "r"(barrier), "r"(rank) : "memory");
}
DEVICE void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}
// Arrives, and has the phase wait for `bytes` more bytes.
DEVICE void barrier_arrive_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
// Waits (for a while, in hardware) until the phase of that parity is complete.
DEVICE bool barrier_try_wait(u32 barrier, u32 parity) {
  u32 done;
  asm volatile("{.reg .pred p;\n\t"
               "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
               "selp.u32 %0, 1, 0, p;}" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  return done;
}
DEVICE void barrier_wait(u32 barrier, u32 parity) {
  while (!barrier_try_wait(barrier, parity)) {}
}
// All threads of all blocks of the cluster.
DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}
DEVICE u32 cluster_rank() {
  u32 r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
// Copies the box whose first element is `inner`, `outer` into shared memory; its bytes count at `barrier`.
DEVICE void tma_load(u32 to, const TensorMap* map, int inner, int outer, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               :: "r"(to), "l"(map), "r"(inner), "r"(outer), "r"(barrier) : "memory");
}
// The same into every block of `mask`, at the same offset; the bytes count at each block's own barrier.
DEVICE void tma_load_multicast(u32 to, const TensorMap* map, int inner, int outer, u32 barrier, u16 mask) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
               " [%0], [%1, {%2, %3}], [%4], %5;"
               :: "r"(to), "l"(map), "r"(inner), "r"(outer), "r"(barrier), "h"(mask) : "memory");
}
DEVICE void tma_prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory"); }

// Orders a warpgroup's accesses to its accumulators before the wgmmas that follow.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N of this warp's groups are under way.
template <int N> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory"); }
// Keeps the compiler from moving uses of the accumulators across: it does not know that wgmma writes them later.
template <int R> DEVICE void pin(float (&d)[R]) {
#pragma unroll
  for (int i = 0; i < R; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}
// Takes or gives back registers: a warpgroup's threads have N from here on.
template <int N> DEVICE void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N)); }
template <int N> DEVICE void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N)); }

// D = A·B, plus D where `accumulate`, on a warpgroup: A 64×16 and B 16×BN in shared memory, D in 2·BN/4 registers.
// Register i of thread t holds row 16·(t/32) + t%32/4 + 8·(i/2%2), column 8·(i/4) + 2·(t%4) + i%2.
#define REGISTERS_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_96 \
  REGISTERS_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define REGISTERS_128 \
  REGISTERS_96 ", " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FLOATS_64(d) \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define FLOATS_96(d) \
  FLOATS_64(d), \
  "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
  "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
  "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
  "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define FLOATS_128(d) \
  FLOATS_96(d), \
  "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), \
  "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), \
  "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
  "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
#define WGMMA(N, R, D, PREDICATE, A, B, TA, TB)                                                        \
  template <int T_A, int T_B> DEVICE void wgmma(float (&d)[R], u64 a, u64 b, u32 accumulate) {         \
    asm volatile("{.reg .pred p;\n\t"                                                                  \
                 "setp.ne.b32 p, " PREDICATE ", 0;\n\t"                                                \
                 "wgmma.mma_async.sync.aligned.m64n" N "k16.f32.bf16.bf16 {" REGISTERS_##R "}, " A     \
                 ", " B ", p, 1, 1, " TA ", " TB ";}"                                                  \
                 : FLOATS_##R(d) : "l"(a), "l"(b), "r"(accumulate), "n"(T_A), "n"(T_B));               \
  }
WGMMA("128", 64, d, "%66", "%64", "%65", "%67", "%68")
WGMMA("192", 96, d, "%98", "%96", "%97", "%99", "%100")
WGMMA("256", 128, d, "%130", "%128", "%129", "%131", "%132")

// ---- shared memory as wgmma reads it ----

// The matrix descriptor (PTX ISA, "Matrix Descriptor Format"): start address, leading and stride byte offset, each in
// units of 16 bytes, at bits 0, 16 and 32; base offset 0 at 49, as every tile starts at a multiple of 1024; 1 at 62, the
// 128-byte swizzle, by which TMA too exchanges the 16-byte units of row r of 128 bytes: unit u stands at u ^ r % 8.
//
// K-major (k contiguous): a box holds rows m (or n) of 64 k, one row per 128 bytes. 8 rows make a swizzle atom of 1024
//   bytes, and the atoms follow each other down the rows: stride offset 1024. The leading offset is not used (1 by
//   convention). 16 steps of k are 32 bytes inside a row; the swizzle is applied to the address that comes out, so the
//   start address simply moves on by 32.
// MN-major (m or n contiguous): a box holds rows k of 64 m (or n). 8 rows of k make an atom; the next 8 k lie 1024 bytes
//   on, the stride offset; the next 64 m (or n) are the next box: leading offset 8192. 16 steps of k are 16 rows: 2048.
DEVICE u64 descriptor(u32 address, bool mn_major) {
  u64 leading = mn_major ? BOX : 16, stride = 1024;
  return (u64)((address & 0x3ffff) >> 4) | leading >> 4 << 16 | stride >> 4 << 32 | 1ull << 62;
}
// What one step of 16 k adds to a descriptor. The address field cannot overflow into its neighbour.
DEVICE constexpr u64 k_step(bool mn_major) { return (mn_major ? 2048 : 32) >> 4; }

// ---- the walk ----

// Position in the ring and parity of the current turn.
struct Ring {
  u32 stage, parity;
  template <int STAGES> DEVICE void next() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Unit `id` of rows × cols units: eight rows at a time, column by column, so that the units that are computed together
// form a square whose panels of A and B stay in L2.
DEVICE void unit_at(u32 id, u32 rows, u32 cols, u32& row, u32& col) {
  u32 band = id / (8 * cols), in_band = id % (8 * cols), height = rows - 8 * band < 8 ? rows - 8 * band : 8;
  row = 8 * band + in_band % height;
  col = in_band / height;
}

// The tiles of one block: units of CLUSTER tiles, one per block of the cluster.
template <int BN, int CLUSTER> struct Walk {
  u32 id, step, rows, cols, rank;
  DEVICE Walk(const Gemm& g, u32 rank)
      : id(blockIdx.x / CLUSTER), step(gridDim.x / CLUSTER), rows((g.m + BM * CLUSTER - 1) / (BM * CLUSTER)),
        cols((g.n + BN - 1) / BN), rank(rank) {}
  DEVICE bool next(int& row, int& col) {
    if (id >= rows * cols) return false;
    u32 r, c;
    unit_at(id, rows, cols, r, c);
    row = (int)((r * CLUSTER + rank) * BM);
    col = (int)(c * BN);
    id += step;
    return true;
  }
};

// ---- the roles ----

// One thread. A block whose tile lies below the last row (an odd number of tiles) goes through the same motions: its A is
// all zeros, and its half of B is needed by its neighbour.
template <int BN, int CLUSTER> DEVICE void produce(const Maps& maps, const Gemm& g, int term_k, u32 base) {
  using L = Layout<BN>;
  u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
  Walk<BN, CLUSTER> walk(g, rank);
  Ring ring = {0, 0};
  int row, col;
  while (walk.next(row, col)) {
#pragma unroll 1
    for (int phase = 0; phase < 2; phase++) {
      const TensorMap* map_a = phase == 0 ? &maps.a : &maps.term_a;
      const TensorMap* map_b = phase == 0 ? &maps.b : &maps.term_b;
      int end = phase == 0 ? g.k : term_k;
      for (int k = 0; k < end; k += BK) {
        u32 a = base + ring.stage * L::STAGE, b = a + L::A_BYTES, full = base + L::FULL + 8 * ring.stage;
        barrier_wait(base + L::EMPTY + 8 * ring.stage, ring.parity ^ 1);
        barrier_arrive_expect(full, L::STAGE);
        if (A_MN) {
          tma_load(a, map_a, row, k, full);
          tma_load(a + BOX, map_a, row + 64, k, full);
        } else {
          tma_load(a, map_a, k, row, full);
        }
        if (B_MN) {
#pragma unroll
          for (int i = 0; i < BN / 64; i++) {
            if (CLUSTER == 1) tma_load(b + i * BOX, map_b, col + 64 * i, k, full);
            else if (i % CLUSTER == rank) tma_load_multicast(b + i * BOX, map_b, col + 64 * i, k, full, (1 << CLUSTER) - 1);
          }
        } else if (CLUSTER == 1) {
          tma_load(b, map_b, k, col, full);
        } else {
          u32 skip = rank * (BN / CLUSTER);
          tma_load_multicast(b + skip * 128, map_b, k, col + (int)skip, full, (1 << CLUSTER) - 1);
        }
        ring.next<L::STAGES>();
      }
    }
  }
}

// Staged rows hold 128 bytes in units of 16. Unit u of row r stands at u ^ spread(r): with eight different values, laid
// out so that the eight rows that a warp's fragments touch at once, and the eight units of one row, fall into different
// banks for each of the accesses below.
DEVICE u32 spread(u32 row) { return (row & 3) << 1 | (row >> 2 & 1); }

// bf16 without β, activation or residual, at addresses that are multiples of 16: rounded in registers, turned in shared
// memory 64 columns at a time into 16 bytes per thread, 128 per row.
template <int BN> DEVICE void write_plain(const float (&d)[BN / 2], u8* staged, const Gemm& g, int row, int col, u32 lane) {
  u32 of = lane / 4, pair = lane % 4;
#pragma unroll
  for (int part = 0; part < BN / 64; part++) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float* v = d + part * 32 + 4 * j;
      int at = col + part * 64 + 8 * j + 2 * pair;
      float bias[2] = {0.f, 0.f};
      if (g.bias) load_as<bf16>(bias, g.bias, at, g.flags & BIAS_F32, g.n - at, false);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        u32 r = of + 8 * half;
        u32 low = from_f32<bf16>(g.alpha * v[2 * half] + bias[0]).bits;
        u32 high = from_f32<bf16>(g.alpha * v[2 * half + 1] + bias[1]).bits;
        *(u32*)(staged + r * 128 + (j ^ spread(r)) * 16 + pair * 4) = low | high << 16;
      }
    }
    warp_sync();
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u32 r = lane / 8 + 4 * i, unit = lane % 8;
      int at = col + part * 64 + 8 * unit;
      Chunk x = *(const Chunk*)(staged + r * 128 + (unit ^ spread(r)) * 16);
      if (row + (int)r < g.m && at < g.n) {
        bf16* to = (bf16*)g.c + (row + (int)r) * g.ldc + at;
        if (at + 8 <= g.n) {
          *(Chunk*)to = x;
        } else {
#pragma unroll
          for (int e = 0; e < 8; e++)
            if (at + e < g.n) to[e] = {(u16)(x.w[e / 2] >> 16 * (e % 2))};
        }
      }
    }
    warp_sync();
  }
}

// Every other case: the sums, in f32, go through shared memory 32 columns at a time. One loop over the parts, so that the
// code that completes elements stands here once; only the stores from registers, whose numbers are fixed, are repeated.
template <int BN> DEVICE void write_any(const float (&d)[BN / 2], u8* staged, const Gemm& g, int row, int col, u32 lane) {
  u32 of = lane / 4, pair = lane % 4;
#pragma unroll 1
  for (int part = 0; part < BN / 32; part++) {
#pragma unroll
    for (int p = 0; p < BN / 32; p++) {
      if (p == part) {
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            u32 r = of + 8 * half, unit = 2 * j + pair / 2;
            float2* to = (float2*)(staged + r * 128 + (unit ^ spread(r)) * 16 + pair % 2 * 8);
            *to = {d[p * 16 + 4 * j + 2 * half], d[p * 16 + 4 * j + 2 * half + 1]};
          }
      }
    }
    warp_sync();
    int first = col + part * 32;
    if (g.flags & VECTOR_C) {
      // Four threads to a row, eight columns each.
#pragma unroll 1
      for (u32 r = lane / 4; r < 16; r += 8) {
        float v[8];
        load_row((float(&)[4])v[0], (const float*)(staged + r * 128 + ((2 * pair) ^ spread(r)) * 16), 4, true);
        load_row((float(&)[4])v[4], (const float*)(staged + r * 128 + ((2 * pair + 1) ^ spread(r)) * 16), 4, true);
        int at = first + 8 * pair;
        if (row + (int)r < g.m && at < g.n) finish<bf16>(g, 0, row + r, at, v);
      }
    } else {
      // A thread to a column: neighbouring threads write neighbouring elements, whatever the alignment.
#pragma unroll 1
      for (u32 r = 0; r < 16; r++) {
        float v[1] = {*(const float*)(staged + r * 128 + (lane / 4 ^ spread(r)) * 16 + pair * 4)};
        int at = first + lane;
        if (row + (int)r < g.m && at < g.n) finish<bf16>(g, 0, row + r, at, v);
      }
    }
    warp_sync();
  }
}

// A warpgroup: rows 64·half… of the tile.
template <int BN, int CLUSTER> DEVICE void consume(const Gemm& g, int steps, u32 base, u8* staging, u32 half) {
  using L = Layout<BN>;
  u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  u8* staged = staging + (half * 4 + warp) * STAGING;
  bool plain = !(g.flags & (C_F32 | ACTIVATION)) && (g.flags & VECTOR_C) && g.beta == 0.f && !g.residual;
  Walk<BN, CLUSTER> walk(g, CLUSTER > 1 ? cluster_rank() : 0);
  Ring ring = {0, 0};
  float d[BN / 2];
  int row, col;
  // Tells every producer that writes to this stage that this warp has read it.
  auto release = [&](u32 stage) {
    u32 empty = base + L::EMPTY + 8 * stage;
    if (CLUSTER > 1) {
      if (lane < CLUSTER) barrier_arrive_at(empty, lane);
    } else if (lane == 0) {
      barrier_arrive(empty);
    }
  };
  while (walk.next(row, col)) {
    u32 previous = 0;
    for (int step = 0; step < steps; step++) {
      barrier_wait(base + L::FULL + 8 * ring.stage, ring.parity);
      u32 a = base + ring.stage * L::STAGE + half * BOX, b = base + ring.stage * L::STAGE + L::A_BYTES;
      u64 of_a = descriptor(a, A_MN), of_b = descriptor(b, B_MN);
      pin(d);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < BK / 16; i++)
        wgmma<A_MN, B_MN>(d, of_a + i * k_step(A_MN), of_b + i * k_step(B_MN), i > 0 || step > 0);
      wgmma_commit();
      // The tensor cores stay busy with this stage while the one before it is handed back.
      if (step > 0) {
        wgmma_wait<1>();
        release(previous);
      }
      previous = ring.stage;
      ring.next<L::STAGES>();
    }
    wgmma_wait<0>();
    pin(d);
    release(previous);
    int first = row + 64 * (int)half + 16 * (int)warp;
    if (first < g.m) {
      if (plain) write_plain<BN>(d, staged, g, first, col, lane);
      else write_any<BN>(d, staged, g, first, col, lane);
    }
  }
}

template <int BN, int CLUSTER> DEVICE void gemm(const Maps& maps, const Gemm& g, int term_k) {
  using L = Layout<BN>;
  DYNAMIC_SHARED(dynamic);
  u32 start = shared_address(dynamic), base = (start + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    tma_prefetch(&maps.a);
    tma_prefetch(&maps.b);
    for (int s = 0; s < L::STAGES; s++) {
      barrier_init(base + L::FULL + 8 * s, 1);
      barrier_init(base + L::EMPTY + 8 * s, WARPS * CLUSTER);
    }
    barrier_init_fence();
  }
  // No block may write to its neighbour before the neighbour's barriers exist…
  if (CLUSTER > 1) cluster_barrier();
  else __syncthreads();
  // 40·128 + 232·256 = 64512 registers: what 384 threads of 168 were launched with.
  if (threadIdx.x < 128) {
    registers_down<40>();
    if (threadIdx.x == 0) produce<BN, CLUSTER>(maps, g, term_k, base);
  } else {
    registers_up<232>();
    int steps = (g.k + BK - 1) / BK + (term_k + BK - 1) / BK;
    consume<BN, CLUSTER>(g, steps, base, dynamic + (base - start) + L::STAGED, threadIdx.x / 128 - 1);
  }
  // …nor leave while the neighbour may still write to it or arrive at its barriers.
  if (CLUSTER > 1) cluster_barrier();
}

// The kernels: wgmma_{columns of a tile}x{blocks of a cluster}.
#define WGMMA_KERNEL(BN, CLUSTER)                                                          \
  extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) \
      wgmma_##BN##x##CLUSTER(const __grid_constant__ Maps maps, Gemm g, int term_k) {       \
    gemm<BN, CLUSTER>(maps, g, term_k);                                                    \
  }
WGMMA_KERNEL(128, 1)
WGMMA_KERNEL(128, 2)
WGMMA_KERNEL(192, 2)
WGMMA_KERNEL(256, 1)
WGMMA_KERNEL(256, 2)
