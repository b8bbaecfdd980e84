// Runs CUDA kernels on the CPU, to find their errors on machines without a GPU. Force-included before common.cuh and
// one .cu file, which are compiled unchanged by g++ into a shared object; emulator.rs builds, loads and calls it.
//
// How it runs. Blocks run one after the other, in a random order. Each thread of a block is a fiber with its own stack;
// it runs until it reaches a barrier (__syncthreads), a warp collective (shuffle, mma, ldmatrix, __syncwarp) or its end.
// The order in which the fibers run is adversarial, and a function of the launch's seed:
//   bit 0 clear: each warp, in random order, runs as far ahead as the barriers let it; set: all warps in lockstep;
//   bit 1 clear: cp.async copies as late as it may (at the wait for its group); set: at once.
// The lanes of a warp run in random order. So a missing barrier shows as a wrong value under some seeds: use several.
//
// What is an error, returned as text with the block and the thread: an access outside a buffer or outside the dynamic
// shared memory (both lie against a guard page), a misaligned access, an index outside a local or shared array, a
// __syncthreads or a warp collective that only some threads reach, a shift by the type's width or more, an integer
// division by zero, a launch that CUDA would refuse. Shared memory, buffers and the target of a copy under way hold
// poison: bytes 0xFF, which is NaN in every floating-point type.
//
// What it cannot see: bank conflicts, fences between proxies, the rounding inside mma, and races that no schedule of
// whole steps between two collectives brings out. Threads that wait for each other by spinning never end. Variables of
// the module without an initial value (__device__ int x;) are poisoned like shared memory. x86-64 Linux only.
#pragma once

#ifdef LORA_EMU_SCAN
// The pass that finds the kernels: emulator.rs reads LORA_EMU_BOUNDS(threads) name( in the preprocessed text.
#define __global__
#define __launch_bounds__(threads, ...) LORA_EMU_BOUNDS(threads)
#define __cluster_dims__(...)
#else

#if !defined(__x86_64__) || !defined(__linux__)
#error "the CUDA emulator runs on x86-64 Linux only"
#endif

#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <type_traits>
#include <utility>

// ---- The language -----------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __constant__ static
// One block runs at a time, so a variable of the module is shared by the block. Nothing else in the module lies in .bss
// (the emulator keeps its own state elsewhere), so that poisoning .bss poisons exactly the static shared memory; a
// section attribute would not do, since g++ refuses it for variables of templates.
#define __shared__ static
#define DYNAMIC_SHARED(name) unsigned char* name = emu::state.shared.data

#define threadIdx (*(const uint3*)&emu::state.current->index)
#define blockIdx (*(const uint3*)&emu::state.block)
#define blockDim (*(const dim3*)&emu::state.block_size)
#define gridDim (*(const dim3*)&emu::state.grid)
#define warpSize 32

#define EMU_VECTOR(T, name, align)                                                                \
  struct alignas(2 * align) name##2 { T x, y; };                                                  \
  struct name##3 { T x, y, z; };                                                                  \
  struct alignas(4 * align > 16 ? 16 : 4 * align) name##4 { T x, y, z, w; };                      \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                      \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                              \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTOR(signed char, char, 1)
EMU_VECTOR(unsigned char, uchar, 1)
EMU_VECTOR(short, short, 2)
EMU_VECTOR(unsigned short, ushort, 2)
EMU_VECTOR(int, int, 4)
EMU_VECTOR(unsigned, uint, 4)
EMU_VECTOR(float, float, 4)
EMU_VECTOR(long long, longlong, 8)
EMU_VECTOR(unsigned long long, ulonglong, 8)
EMU_VECTOR(double, double, 8)
#undef EMU_VECTOR

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Defined by common.cuh; here only to tell them apart.
struct bf16;
struct f16;

// Saves the callee-saved registers and the stack pointer, and goes on where `to` was saved. The jump is an indirect one
// rather than a return, since the fibers resume at the same few places and a return would be mispredicted every time.
extern "C" __attribute__((visibility("hidden"))) void emu_switch(void** save, void* to);
asm(R"(
.text
.p2align 4
.type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size emu_switch, .-emu_switch
)");

namespace emu {

// ---- State ------------------------------------------------------------------------------------------------------

constexpr unsigned MAX_THREADS = 1024, MAX_SHARED = 227 << 10, COPIES = 256, PERMUTATIONS = 64;
// An odd number of cache lines, so that the tops of the stacks do not compete for the same lines of the cache.
constexpr size_t STACK = (64 << 10) + 64;
constexpr unsigned char POISON = 0xFF;
// Around allocations: NaN in every floating-point type like the poison, but written by no computation.
constexpr uint16_t CANARY = 0x7FFD;

// A cp.async that has not been waited for.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  unsigned valid, size, group;
};

enum Where : unsigned char { RUNNING, AT_BARRIER, AT_COLLECTIVE, FINISHED };

struct alignas(64) Fiber {
  void* stack_pointer;
  uint3 index;
  Where where;
  unsigned char parity;   // which of the two slots the next collective uses
  const char* site;       // the barrier or the collective it waits at
  unsigned group;         // the number of cp.async groups committed
  unsigned first, last;   // its copies under way: [first, last) modulo COPIES
  Copy* copies;
  // What this lane contributes to a collective. Two, since one lane may reach the next collective before the others have
  // read what it gave to this one; it cannot be further ahead.
  alignas(16) uint32_t slot[2][4];
};

// The operands of an mma, in f32.
struct Fragments {
  alignas(16) float a[16][16], b[8][16];
};

// A mapping that ends at an inaccessible page; `data` is as close to it as a multiple of 16 can be.
struct Guarded {
  unsigned char *base, *data;
  size_t bytes, mapped;
};

struct Kernel {
  const char* name;
  unsigned bounds, parameters;
  const unsigned char* sizes;
  void (*call)(void** parameters);
};

struct State {
  Fiber* current;
  Fiber** queue;              // the fiber that runs and those after it in this step; ends with null
  void* scheduler;            // the scheduler's stack pointer while fibers run
  Fiber* fibers;
  Fragments (*fragments)[2];  // per warp
  unsigned char* stacks;
  uint3 block;
  unsigned block_size[3], grid[3];
  unsigned threads;
  unsigned seed;
  uint64_t random;
  Guarded shared;
  const Kernel* kernel;
  void** parameters;
  pthread_t thread;
  const void* fault;          // the address of an access that faulted
  char* error;
  size_t error_len;
  bool failed;
  Fiber* order[33];
  unsigned char permutations[PERMUTATIONS][32];
};
__attribute__((section("emu_state"))) static State state = {};

extern "C" __attribute__((visibility("hidden"))) char __bss_start[], _end[];

inline uint32_t random(uint32_t below) {
  state.random = state.random * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)((state.random >> 32) * below >> 32);
}

// ---- Errors -----------------------------------------------------------------------------------------------------

__attribute__((format(printf, 1, 2))) inline void report(const char* format, ...) {
  if (state.failed) return;
  state.failed = true;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(state.error, state.error_len, format, arguments);
  va_end(arguments);
}

// Adds where it happened and abandons the block. Called on a fiber; does not return.
[[noreturn]] inline void abandon() {
  size_t n = strlen(state.error);
  Fiber* me = state.current;
  snprintf(state.error + n, state.error_len - n, ", in block (%u, %u, %u), thread %u", state.block.x, state.block.y,
           state.block.z, me->index.x);
  emu_switch(&me->stack_pointer, state.scheduler);
  __builtin_unreachable();
}

#define EMU_FAIL(...) (emu::report(__VA_ARGS__), emu::abandon())

// ---- Memory -----------------------------------------------------------------------------------------------------

constexpr size_t PAGE = 4096;
inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

inline void fill_canary(unsigned char* from, unsigned char* to) {
  for (; from < to; from++) *from = (unsigned char)(CANARY >> 8 * ((uintptr_t)from & 1));
}
inline bool canary_holds(const unsigned char* from, const unsigned char* to) {
  for (; from < to; from++)
    if (*from != (unsigned char)(CANARY >> 8 * ((uintptr_t)from & 1))) return false;
  return true;
}

// Null data when there is no memory.
inline Guarded guard(size_t bytes) {
  Guarded g = {};
  size_t pages = round_up(bytes ? bytes : 1, PAGE);
  g.bytes = bytes;
  g.mapped = pages + 2 * PAGE;
  void* p = mmap(nullptr, g.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return g;
  g.base = (unsigned char*)p;
  unsigned char *start = g.base + PAGE, *end = start + pages;
  if (mprotect(start, pages, PROT_READ | PROT_WRITE)) {
    munmap(p, g.mapped);
    return g;
  }
  g.data = end - round_up(bytes, 16);
  fill_canary(start, g.data);
  memset(g.data, POISON, bytes);
  fill_canary(g.data + bytes, end);
  return g;
}
inline Guarded guarded_at(unsigned char* data, size_t bytes) {
  unsigned char* end = data + round_up(bytes, 16);
  size_t pages = round_up(bytes ? bytes : 1, PAGE);
  return {end - pages - PAGE, data, bytes, pages + 2 * PAGE};
}
// Whether nothing wrote around the data.
inline bool intact(const Guarded& g) {
  return canary_holds(g.base + PAGE, g.data) && canary_holds(g.data + g.bytes, g.base + g.mapped - PAGE);
}
inline void release(const Guarded& g) { munmap(g.base, g.mapped); }

inline bool is_shared(const void* p, size_t bytes) {
  auto* c = (const char*)p;
  auto* dynamic = (const char*)state.shared.data;
  return (c >= dynamic && c + bytes <= dynamic + state.shared.bytes) || (c >= __bss_start && c + bytes <= _end);
}

// ---- Fibers and their schedule ----------------------------------------------------------------------------------

// Goes on with the next fiber of this step, or with the scheduler.
inline void leave(Fiber* me) {
  Fiber* next = *++state.queue;
  if (next) state.current = next;
  emu_switch(&me->stack_pointer, next ? next->stack_pointer : state.scheduler);
}

inline void barrier(const char* site) {
  Fiber* me = state.current;
  me->where = AT_BARRIER;
  me->site = site;
  leave(me);
}

// Waits for all lanes of the warp; returns which slot holds what they gave. Fill slot [parity] first.
inline unsigned collective(Fiber* me, const char* name) {
  me->where = AT_COLLECTIVE;
  me->site = name;
  leave(me);
  unsigned parity = me->parity;
  me->parity = parity ^ 1;
  return parity;
}

inline unsigned lane(const Fiber* f) { return f->index.x % 32; }
inline Fiber* warp_of(const Fiber* f) { return state.fibers + f->index.x / 32 * 32; }
inline unsigned lanes_of(unsigned first) { return state.threads - first < 32 ? state.threads - first : 32; }

inline void finish(const Copy& c) {
  if (c.valid) memcpy(c.to, c.from, c.valid);
  memset(c.to + c.valid, 0, c.size - c.valid);
}

// The first function of a fiber.
inline void run_thread() {
  state.kernel->call(state.parameters);
  Fiber* me = state.current;
  for (; me->first != me->last; me->first++) finish(me->copies[me->first % COPIES]);
  me->where = FINISHED;
  leave(me);
  __builtin_unreachable();
}

inline unsigned char* stack_of(unsigned i) { return state.stacks + i * STACK; }

inline void start_fibers() {
  for (unsigned i = 0; i < state.threads; i++) {
    Fiber& f = state.fibers[i];
    // The registers that emu_switch pops, the address it jumps to, and a place for a return address, which also gives the
    // stack the alignment that a function expects at its start.
    void** top = (void**)(stack_of(i) + STACK);
    top[-1] = nullptr;
    top[-2] = (void*)run_thread;
    for (int r = 3; r <= 8; r++) top[-r] = nullptr;
    f.stack_pointer = top - 8;
    f.where = RUNNING;
    f.parity = 0;
    f.group = f.first = f.last = 0;
  }
}

// Runs the lanes of a warp, in random order, each up to its next barrier or collective.
inline void step(unsigned first) {
  unsigned lanes = lanes_of(first), n = 0;
  const unsigned char* permutation = state.permutations[random(PERMUTATIONS)];
  for (unsigned k = 0; k < 32; k++) {
    unsigned l = permutation[k];
    if (l < lanes && state.fibers[first + l].where == RUNNING) state.order[n++] = &state.fibers[first + l];
  }
  state.order[n] = nullptr;
  if (n == 0) return;
  state.queue = state.order;
  state.current = state.order[0];
  emu_switch(&state.scheduler, state.current->stack_pointer);
}

// Lets a warp go on if all its lanes are at the same collective. It is an error if only some are.
inline bool pass_collective(unsigned first) {
  unsigned lanes = lanes_of(first);
  Fiber* w = state.fibers + first;
  Fiber *at = nullptr, *elsewhere = nullptr;
  for (unsigned l = 0; l < lanes; l++) (w[l].where == AT_COLLECTIVE ? at : elsewhere) = &w[l];
  if (!at) return false;
  if (elsewhere) {
    report("%s reached by only part of a warp: thread %u is there, thread %u %s%s, in block (%u, %u, %u)", at->site,
           at->index.x, elsewhere->index.x, elsewhere->where == FINISHED ? "has ended" : "waits at __syncthreads in ",
           elsewhere->where == FINISHED ? "" : elsewhere->site, state.block.x, state.block.y, state.block.z);
    return false;
  }
  for (unsigned l = 0; l < lanes; l++)
    if (w[l].site != w[0].site && strcmp(w[l].site, w[0].site)) {
      report("lanes of a warp at different collectives: thread %u at %s, thread %u at %s, in block (%u, %u, %u)",
             w[0].index.x, w[0].site, w[l].index.x, w[l].site, state.block.x, state.block.y, state.block.z);
      return false;
    }
  for (unsigned l = 0; l < lanes; l++) w[l].where = RUNNING;
  return true;
}

// When all threads are at a barrier or have ended: whether the block goes on.
inline bool pass_barrier() {
  Fiber *at = nullptr, *ended = nullptr;
  for (unsigned i = 0; i < state.threads; i++) (state.fibers[i].where == AT_BARRIER ? at : ended) = &state.fibers[i];
  if (!at) return false;
  if (ended) {
    report("__syncthreads in %s reached by only part of the block: thread %u is there, thread %u has ended, in block "
           "(%u, %u, %u)", at->site, at->index.x, ended->index.x, state.block.x, state.block.y, state.block.z);
    return false;
  }
  for (unsigned i = 0; i < state.threads; i++) {
    Fiber& f = state.fibers[i];
    if (f.site != at->site && strcmp(f.site, at->site)) {
      report("threads of a block at different barriers: thread %u in %s, thread %u in %s, in block (%u, %u, %u)",
             at->index.x, at->site, f.index.x, f.site, state.block.x, state.block.y, state.block.z);
      return false;
    }
  }
  for (unsigned i = 0; i < state.threads; i++) state.fibers[i].where = RUNNING;
  return true;
}

inline void run_block() {
  unsigned warps = (state.threads + 31) / 32;
  unsigned char order[MAX_THREADS / 32];
  for (unsigned w = 0; w < warps; w++) order[w] = (unsigned char)w;
  bool ahead = !(state.seed & 1);
  memset(__bss_start, POISON, (size_t)(_end - __bss_start));
  memset(state.shared.data, POISON, state.shared.bytes);
  start_fibers();
  do {
    for (unsigned w = warps; w > 1; w--) std::swap(order[w - 1], order[random(w)]);
    bool more;
    do {
      more = false;
      for (unsigned w = 0; w < warps; w++) {
        bool again;
        do {
          step(order[w] * 32u);
          if (state.failed) return;
          again = pass_collective(order[w] * 32u);
          if (state.failed) return;
          more |= again;
        } while (again && ahead);
      }
    } while (more && !ahead);
  } while (pass_barrier());
  // Below the deepest stack there is a word that nothing may have written to.
  for (unsigned i = 0; i < state.threads && !state.failed; i++)
    if (*(uint64_t*)stack_of(i)) report("the local memory of thread %u is too large for the emulator", i);
  if (!state.failed && !intact(state.shared))
    report("out-of-bounds write beside the dynamic shared memory (%zu bytes), in block (%u, %u, %u)",
           state.shared.bytes, state.block.x, state.block.y, state.block.z);
}

inline uint64_t gcd(uint64_t a, uint64_t b) { return b ? gcd(b, a % b) : a; }

inline void run_grid() {
  for (auto& p : state.permutations) {
    for (unsigned l = 0; l < 32; l++) p[l] = (unsigned char)l;
    for (unsigned l = 32; l > 1; l--) std::swap(p[l - 1], p[random(l)]);
  }
  unsigned* g = state.grid;
  uint64_t n = (uint64_t)g[0] * g[1] * g[2], stride = 1 + random(n > 0xFFFFFFFF ? 0xFFFFFFFF : (uint32_t)n);
  while (gcd(stride, n) != 1) stride++;
  uint64_t b = random((uint32_t)(n > 0xFFFFFFFF ? 0xFFFFFFFF : n));
  for (uint64_t i = 0; i < n && !state.failed; i++) {
    state.block = {(unsigned)(b % g[0]), (unsigned)(b / g[0] % g[1]), (unsigned)(b / g[0] / g[1])};
    run_block();
    b = (b + stride) % n;
  }
}

// ---- Faults -----------------------------------------------------------------------------------------------------

struct sigaction_of {
  int signal;
  struct sigaction before;
};
__attribute__((section("emu_state"))) static sigaction_of handlers[] = {{SIGSEGV, {}}, {SIGBUS, {}}, {SIGFPE, {}}};

inline void on_fault(int signal, siginfo_t* info, void* context) {
  if (!pthread_equal(pthread_self(), state.thread) || !state.current) {
    // Not a kernel's: let it happen again under the handler that was there before.
    for (auto& h : handlers)
      if (h.signal == signal) sigaction(signal, &h.before, nullptr);
    return;
  }
  auto& registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  if (signal == SIGFPE) {
    report("integer division by zero, or of the least integer by -1");
  } else {
    auto* at = (const unsigned char*)info->si_addr;
    const char* what = registers[REG_ERR] & 2 ? "write" : "read";
    const Guarded& s = state.shared;
    if (at >= s.data && at < s.base + s.mapped)
      report("out-of-bounds access: %s %zu bytes past the end of %zu bytes of dynamic shared memory", what,
             (size_t)(at - s.data - s.bytes), s.bytes);
    else if (at >= s.base && at < s.data)
      report("out-of-bounds access: %s %zu bytes before the dynamic shared memory", what, (size_t)(s.data - at));
    else {
      report("out-of-bounds access: %s at address %p", what, (const void*)at);
      state.fault = at;
    }
  }
  // Returns from the handler into abandon, on the fiber's stack from its top: what it did no longer matters, and there is
  // room even if the stack is what overflowed.
  registers[REG_RSP] = (greg_t)(stack_of(state.current->index.x) + STACK - 8);
  registers[REG_RIP] = (greg_t)(void (*)())abandon;
}

// The fibers with all that is theirs are one mapping, touched only where it is used.
constexpr size_t fibers = sizeof(Fiber) * MAX_THREADS, fragments = sizeof(Fragments) * 2 * (MAX_THREADS / 32);
constexpr size_t copies = sizeof(Copy) * COPIES * MAX_THREADS, stacks = STACK * MAX_THREADS;

inline bool map_fibers() {
  if (state.fibers) return true;
  void* p = mmap(nullptr, fibers + fragments + copies + stacks, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return false;
  auto* at = (unsigned char*)p;
  state.fibers = (Fiber*)at;
  state.fragments = (Fragments(*)[2])(at + fibers);
  auto* copy = (Copy*)(at + fibers + fragments);
  state.stacks = at + fibers + fragments + copies;
  for (unsigned i = 0; i < MAX_THREADS; i++) {
    state.fibers[i].copies = copy + (size_t)i * COPIES;
    state.fibers[i].index = {i, 0, 0};
  }
  return true;
}

// When the module is unloaded.
__attribute__((destructor)) static void unmap_fibers() {
  if (state.fibers) munmap(state.fibers, fibers + fragments + copies + stacks);
}

// ---- Kernels ----------------------------------------------------------------------------------------------------

template <class... A, size_t... I> void unpack(void (*kernel)(A...), void** p, std::index_sequence<I...>) {
  kernel(*(std::remove_cv_t<A>*)p[I]...);
}
template <auto K> struct Entry;
template <class... A, void (*K)(A...)> struct Entry<K> {
  static constexpr unsigned count = sizeof...(A);
  static constexpr unsigned char sizes[] = {(unsigned char)sizeof(A)..., 0};
  static void call(void** p) { unpack(K, p, std::index_sequence_for<A...>()); }
};

// The table that emulator.rs puts at the end of the module.
#define EMU_KERNELS_BEGIN static const emu::Kernel emu_kernels[] = {
#define EMU_KERNEL(name, bounds) {#name, bounds, emu::Entry<name>::count, emu::Entry<name>::sizes, emu::Entry<name>::call},
#define EMU_KERNELS_END               \
  {nullptr, 0, 0, nullptr, nullptr}}; \
  static const emu::Kernel* emu_kernel_table() { return emu_kernels; }

// ---- Collectives ------------------------------------------------------------------------------------------------

template <class T> inline T exchange(T value, unsigned mask, unsigned from, const char* name) {
  static_assert(sizeof(T) <= 16, "at most 16 bytes");
  Fiber* me = state.current;
  if (mask != 0xFFFFFFFF) EMU_FAIL("%s: the emulator knows only the full mask", name);
  memcpy(me->slot[me->parity], &value, sizeof(T));
  unsigned p = collective(me, name);
  Fiber* w = warp_of(me);
  T result;
  // A lane that does not exist, at the end of a block that is not a multiple of 32 threads, gives poison.
  if (from >= lanes_of((unsigned)(w - state.fibers))) memset(&result, POISON, sizeof(T));
  else memcpy(&result, w[from].slot[p], sizeof(T));
  return result;
}

inline unsigned ballot(unsigned mask, bool value, const char* name) {
  Fiber* me = state.current;
  if (mask != 0xFFFFFFFF) EMU_FAIL("%s: the emulator knows only the full mask", name);
  me->slot[me->parity][0] = value;
  unsigned p = collective(me, name), bits = 0;
  Fiber* w = warp_of(me);
  for (unsigned l = 0; l < lanes_of((unsigned)(w - state.fibers)); l++) bits |= w[l].slot[p][0] << l;
  return bits;
}

// How many threads of the block have a true value.
inline int count(bool value, const char* site) {
  Fiber* me = state.current;
  me->slot[0][0] = value;
  barrier(site);
  int n = 0;
  for (unsigned i = 0; i < state.threads; i++) n += (int)state.fibers[i].slot[0][0];
  barrier(site);
  return n;
}

inline float bits_to_float(uint32_t b) { float f; memcpy(&f, &b, 4); return f; }
inline uint32_t float_to_bits(float f) { uint32_t b; memcpy(&b, &f, 4); return b; }
inline float bfloat(uint32_t h) { return bits_to_float(h << 16); }
inline float half(uint32_t h) {
  uint32_t sign = (h & 0x8000) << 16, rest = (h & 0x7FFF) << 13;
  if (rest >= 0x7C00u << 13) return bits_to_float(sign | rest | 0x7F800000);
  return bits_to_float(sign | float_to_bits(bits_to_float(rest) * 0x1p112f));
}

inline void whole_warp(const Fiber* me, const char* name) {
  if (lanes_of(me->index.x / 32 * 32) != 32) EMU_FAIL("%s in a warp of fewer than 32 lanes", name);
}

typedef float Four __attribute__((vector_size(16)));
template <int K> inline float dot(const float* a, const float* b) {
  Four s = *(const Four*)a * *(const Four*)b;
  for (int k = 4; k < K; k += 4) s += *(const Four*)(a + k) * *(const Four*)(b + k);
  return (s[0] + s[1]) + (s[2] + s[3]);
}

// D += A·B over K columns of A, once this lane's operands are in `f`. Lane l has rows l / 4 and l / 4 + 8 of D, columns
// 2·(l % 4) and the next.
template <int K> inline void multiply(float (&c)[4], Fiber* me, const char* name) {
  unsigned warp = me->index.x / 32, g = lane(me) / 4, t = lane(me) % 4;
  const Fragments& f = state.fragments[warp][collective(me, name)];
  for (unsigned i = 0; i < 4; i++) c[i] += dot<K>(f.a[g + 8 * (i / 2)], f.b[2 * t + i % 2]);
}
inline Fragments& fragments_of(Fiber* me) { return state.fragments[me->index.x / 32][me->parity]; }

template <bool TRANSPOSED> inline void ldmatrix(uint32_t (&r)[4], const void* row, const char* name) {
  Fiber* me = state.current;
  whole_warp(me, name);
  if ((uintptr_t)row % 16) EMU_FAIL("%s: the address of a row is not a multiple of 16", name);
  if (!is_shared(row, 16)) EMU_FAIL("%s: a row is not in shared memory", name);
  // Read before the warp meets: none of its lanes may write to the rows before all of them are read.
  memcpy(me->slot[me->parity], row, 16);
  unsigned p = collective(me, name), l = lane(me);
  Fiber* w = warp_of(me);
  for (unsigned m = 0; m < 4; m++) {
    if (!TRANSPOSED) {
      r[m] = w[8 * m + l / 4].slot[p][l % 4];
    } else {
      auto at = [&](unsigned i) { return w[8 * m + i].slot[p][l / 8] >> 16 * (l / 4 % 2) & 0xFFFF; };
      r[m] = at(2 * (l % 4)) | at(2 * (l % 4) + 1) << 16;
    }
  }
}

// ---- cp.async ---------------------------------------------------------------------------------------------------

inline void copy_async(void* to, const void* from, unsigned valid, unsigned size, const char* name) {
  Fiber* me = state.current;
  if ((uintptr_t)to % size || (uintptr_t)from % size) EMU_FAIL("%s: an address is not a multiple of %u", name, size);
  if (!is_shared(to, size)) EMU_FAIL("%s: the target is not in shared memory", name);
  if (valid > size) EMU_FAIL("%s of %u bytes, more than %u", name, valid, size);
  Copy c = {(unsigned char*)to, (const unsigned char*)from, valid, size, me->group};
  if (state.seed & 2) return finish(c);
  if (me->last - me->first == COPIES) EMU_FAIL("%s: more than %u copies of a thread under way", name, COPIES);
  memset(c.to, POISON, size);
  me->copies[me->last++ % COPIES] = c;
}

inline void wait_async(unsigned pending) {
  Fiber* me = state.current;
  while (me->first != me->last && me->copies[me->first % COPIES].group + pending < me->group)
    finish(me->copies[me->first++ % COPIES]);
}

}  // namespace emu

// ---- Twins of the functions of common.cuh -------------------------------------------------------------------------

inline unsigned float_bits(float x) { return emu::float_to_bits(x); }
inline float bits_float(unsigned x) { return emu::bits_to_float(x); }
inline float half_to_float(unsigned short h) { return emu::half(h); }
inline unsigned short float_to_half(float f) {
  uint32_t u = emu::float_to_bits(f), sign = u >> 16 & 0x8000, a = u & 0x7FFFFFFF;
  if (a > 0x7F800000) return 0x7FFF;
  if (a >= 0x477FF000) return (unsigned short)(sign | 0x7C00);  // 65520 and more round to infinity
  // Below the normal range, adding 0.5 leaves the wanted bits, rounded, at the end of the sum's.
  if (a < 0x38800000)
    return (unsigned short)(sign | (emu::float_to_bits(emu::bits_to_float(a) + 0.5f) - 0x3F000000));
  return (unsigned short)(sign | (a + 0xC8000FFF + (a >> 13 & 1)) >> 13);
}
inline unsigned short float_to_bfloat(float f) {
  uint32_t u = emu::float_to_bits(f);
  if ((u & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
  return (unsigned short)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

template <class T> inline unsigned pack(float lo, float hi, T) {
  auto round = [](float x) -> unsigned { return std::is_same<T, bf16>::value ? float_to_bfloat(x) : float_to_half(x); };
  return round(lo) | round(hi) << 16;
}
template <class T> inline void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], T) {
  using namespace emu;
  static_assert(std::is_same<T, bf16>::value || std::is_same<T, f16>::value, "bf16 or f16");
  Fiber* me = state.current;
  whole_warp(me, "mma");
  Fragments& f = fragments_of(me);
  unsigned g = lane(me) / 4, t = lane(me) % 4;
  auto value = [](unsigned h) { return std::is_same<T, bf16>::value ? bfloat(h) : half(h); };
  for (unsigned i = 0; i < 4; i++)
    for (unsigned j = 0; j < 2; j++) f.a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + j] = value(a[i] >> 16 * j & 0xFFFF);
  for (unsigned i = 0; i < 2; i++)
    for (unsigned j = 0; j < 2; j++) f.b[g][2 * t + 8 * i + j] = value(b[i] >> 16 * j & 0xFFFF);
  multiply<16>(c, me, "mma");
}
inline void mma_m16n8k8_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  using namespace emu;
  Fiber* me = state.current;
  whole_warp(me, "mma");
  Fragments& f = fragments_of(me);
  unsigned g = lane(me) / 4, t = lane(me) % 4;
  auto value = [](unsigned x) { return bits_to_float(x & ~0x1FFFu); };
  for (unsigned i = 0; i < 4; i++) f.a[g + 8 * (i % 2)][t + 4 * (i / 2)] = value(a[i]);
  for (unsigned i = 0; i < 2; i++) f.b[g][t + 4 * i] = value(b[i]);
  multiply<8>(c, me, "mma");
}
// Ties go away from zero.
inline unsigned to_tf32(float x) {
  uint32_t u = emu::float_to_bits(x);
  return (u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FFFFFFF : (u + 0x1000) & ~0x1FFFu;
}

inline void ldmatrix_x4(unsigned (&r)[4], const void* row) { emu::ldmatrix<false>(r, row, "ldmatrix"); }
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) { emu::ldmatrix<true>(r, row, "ldmatrix.trans"); }

inline void cp_async_16(void* to, const void* from, unsigned valid) { emu::copy_async(to, from, valid, 16, "cp.async"); }
inline void cp_async_4(void* to, const void* from, unsigned valid) { emu::copy_async(to, from, valid, 4, "cp.async"); }
inline void cp_async_commit() { emu::state.current->group++; }
template <int N> inline void cp_async_wait() { emu::wait_async(N); }

// ---- CUDA's own functions -------------------------------------------------------------------------------------------

#define EMU_TEXT_(x) #x
#define EMU_TEXT(x) EMU_TEXT_(x)
#define EMU_SITE __FILE__ ":" EMU_TEXT(__LINE__)
#define __syncthreads() emu::barrier(EMU_SITE)
#define __syncthreads_count(x) emu::count((x) != 0, EMU_SITE)
#define __syncthreads_or(x) (emu::count((x) != 0, EMU_SITE) != 0)
#define __syncthreads_and(x) (emu::count((x) != 0, EMU_SITE) == (int)emu::state.threads)

inline void __syncwarp(unsigned mask = 0xFFFFFFFF) { emu::exchange(0, mask, 0, "__syncwarp"); }
template <class T> inline T __shfl_sync(unsigned mask, T v, int from) {
  return emu::exchange(v, mask, (unsigned)from % 32, "__shfl_sync");
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T v, int bits) {
  return emu::exchange(v, mask, emu::lane(emu::state.current) ^ ((unsigned)bits % 32), "__shfl_xor_sync");
}
template <class T> inline T __shfl_down_sync(unsigned mask, T v, unsigned by) {
  unsigned l = emu::lane(emu::state.current);
  return emu::exchange(v, mask, l + by < 32 ? l + by : l, "__shfl_down_sync");
}
template <class T> inline T __shfl_up_sync(unsigned mask, T v, unsigned by) {
  unsigned l = emu::lane(emu::state.current);
  return emu::exchange(v, mask, l >= by ? l - by : l, "__shfl_up_sync");
}
inline unsigned __ballot_sync(unsigned mask, int x) { return emu::ballot(mask, x != 0, "__ballot_sync"); }
inline int __any_sync(unsigned mask, int x) { return emu::ballot(mask, x != 0, "__any_sync") != 0; }
inline int __all_sync(unsigned mask, int x) { return emu::ballot(mask, x == 0, "__all_sync") == 0; }
inline unsigned __activemask() { EMU_FAIL("__activemask is not emulated"); }

inline float shfl_xor(float v, int mask) { return __shfl_xor_sync(0xFFFFFFFF, v, mask); }
inline unsigned shfl_xor(unsigned v, int mask) { return __shfl_xor_sync(0xFFFFFFFF, v, mask); }
inline float shfl(float v, int from) { return __shfl_sync(0xFFFFFFFF, v, from); }
inline unsigned shfl(unsigned v, int from) { return __shfl_sync(0xFFFFFFFF, v, from); }
inline void warp_sync() { __syncwarp(); }
inline unsigned mul_hi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline float fast_reciprocal(float x) { return 1.f / x; }
inline float fast_exp2(float x) {
  float y = exp2f(x);
  return y < 0x1p-126f ? 0.f : y;
}

[[noreturn]] inline void __trap() { EMU_FAIL("__trap"); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline void __stcg(T* p, T v) { *p = v; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }

inline unsigned __float_as_uint(float x) { return emu::float_to_bits(x); }
inline int __float_as_int(float x) { return (int)emu::float_to_bits(x); }
inline float __uint_as_float(unsigned x) { return emu::bits_to_float(x); }
inline float __int_as_float(int x) { return emu::bits_to_float((unsigned)x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return mul_hi(a, b); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }

#define EMU_MIN_MAX(T)                                  \
  inline T min(T a, T b) { return b < a ? b : a; }      \
  inline T max(T a, T b) { return a < b ? b : a; }
EMU_MIN_MAX(int)
EMU_MIN_MAX(unsigned)
EMU_MIN_MAX(long)
EMU_MIN_MAX(unsigned long)
EMU_MIN_MAX(long long)
EMU_MIN_MAX(unsigned long long)
#undef EMU_MIN_MAX
inline unsigned min(int a, unsigned b) { return min((unsigned)a, b); }
inline unsigned min(unsigned a, int b) { return min(a, (unsigned)b); }
inline unsigned max(int a, unsigned b) { return max((unsigned)a, b); }
inline unsigned max(unsigned a, int b) { return max(a, (unsigned)b); }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

// One thread runs at a time, so these are atomic.
template <class T> inline T atomicAdd(T* p, T v) { T old = *p; *p = old + v; return old; }
template <class T> inline T atomicMin(T* p, T v) { T old = *p; if (v < old) *p = v; return old; }
template <class T> inline T atomicMax(T* p, T v) { T old = *p; if (old < v) *p = v; return old; }
template <class T> inline T atomicExch(T* p, T v) { T old = *p; *p = v; return old; }
template <class T> inline T atomicCAS(T* p, T expected, T v) { T old = *p; if (old == expected) *p = v; return old; }

// ---- What g++ calls when its checks (-fsanitize) find an error; the data begin with where it is ----------------------

namespace emu {
struct Source {
  const char* file;
  unsigned line, column;
};
struct Mismatch {
  Source at;
  const struct { uint16_t kind, info; char name[1]; }* type;
  unsigned char log_alignment, access;
};
}  // namespace emu

extern "C" {
inline __attribute__((used)) void __ubsan_handle_type_mismatch_v1(emu::Mismatch* m, uintptr_t address) {
  EMU_FAIL("misaligned access: %s at %s:%u needs a multiple of %u, the address ends in 0x%x", m->type->name, m->at.file,
           m->at.line, 1u << m->log_alignment, (unsigned)(address % 64));
}
inline __attribute__((used)) void __ubsan_handle_out_of_bounds(emu::Source* at, uintptr_t index) {
  EMU_FAIL("out-of-bounds access: index %lld of an array at %s:%u", (long long)index, at->file, at->line);
}
inline __attribute__((used)) void __ubsan_handle_shift_out_of_bounds(emu::Source* at, uintptr_t, uintptr_t) {
  EMU_FAIL("shift by a negative number or by the type's width or more at %s:%u", at->file, at->line);
}
inline __attribute__((used)) void __ubsan_handle_divrem_overflow(emu::Source* at, uintptr_t, uintptr_t) {
  EMU_FAIL("integer division by zero, or of the least integer by -1, at %s:%u", at->file, at->line);
}
}

// ---- What emulator.rs calls -------------------------------------------------------------------------------------------

#define EMU_EXPORT extern "C" __attribute__((visibility("default"), used)) inline

static const emu::Kernel* emu_kernel_table();

inline const emu::Kernel* emu_find(const char* name) {
  for (const emu::Kernel* k = emu_kernel_table(); k->name; k++)
    if (!strcmp(k->name, name)) return k;
  return nullptr;
}

// The number of a kernel's parameters, and their sizes in bytes; -1 for an unknown kernel.
EMU_EXPORT int emu_parameters(const char* kernel, const unsigned char** sizes) {
  const emu::Kernel* k = emu_find(kernel);
  if (!k) return -1;
  *sizes = k->sizes;
  return (int)k->parameters;
}

// Runs a kernel. Not reentrant, and one thread at a time. Returns 0, or 1 and the error's text; `fault` is then the
// address of the access that faulted, or null.
EMU_EXPORT int emu_launch(const char* kernel, const unsigned grid[3], unsigned threads, unsigned shared_bytes,
                          void** parameters, unsigned seed, char* error, size_t error_len, const void** fault) {
  using namespace emu;
  state.error = error;
  state.error_len = error_len;
  state.failed = false;
  state.fault = *fault = nullptr;
  state.kernel = emu_find(kernel);
  const Kernel* k = state.kernel;
  if (!k) report("no kernel %s", kernel);
  else if (!threads || threads > MAX_THREADS) report("%s: %u threads; 1 to %u are possible", kernel, threads, MAX_THREADS);
  else if (k->bounds && threads > k->bounds) report("%s: %u threads, but it is bounded to %u", kernel, threads, k->bounds);
  else if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7FFFFFFF || grid[1] > 65535 || grid[2] > 65535)
    report("%s: a grid of (%u, %u, %u); 1 to (2147483647, 65535, 65535) are possible", kernel, grid[0], grid[1], grid[2]);
  else if (shared_bytes > MAX_SHARED)
    report("%s: %u bytes of dynamic shared memory; at most %u are possible", kernel, shared_bytes, MAX_SHARED);
  else if (!map_fibers()) report("%s: no memory for the threads' stacks", kernel);
  if (state.failed) return 1;
  state.shared = guard(shared_bytes);
  if (!state.shared.data) report("%s: no memory for %u bytes of shared memory", kernel, shared_bytes);
  if (state.failed) return 1;
  for (unsigned i = 0; i < threads; i++) *(uint64_t*)stack_of(i) = 0;

  memcpy(state.grid, grid, sizeof state.grid);
  state.block_size[0] = threads;
  state.block_size[1] = state.block_size[2] = 1;
  state.threads = threads;
  state.seed = seed;
  state.random = seed * 0x9E3779B97F4A7C15u + 1;
  random(1);
  state.parameters = parameters;
  state.thread = pthread_self();

  alignas(16) char alternate[64 << 10];
  stack_t stack = {}, stack_before = {};
  stack.ss_sp = alternate;
  stack.ss_size = sizeof alternate;
  sigaltstack(&stack, &stack_before);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (auto& h : handlers) sigaction(h.signal, &action, &h.before);
  run_grid();
  state.current = nullptr;
  for (auto& h : handlers) sigaction(h.signal, &h.before, nullptr);
  sigaltstack(&stack_before, nullptr);

  release(state.shared);
  *fault = state.fault;
  return state.failed;
}

// Poisoned memory between inaccessible pages, its end as close to one as a multiple of 16 can be; null when there is none.
EMU_EXPORT void* emu_alloc(size_t bytes) { return emu::guard(bytes).data; }

// Nonzero when something wrote outside the allocation, too near to it to fault.
EMU_EXPORT int emu_free(void* p, size_t bytes) {
  emu::Guarded g = emu::guarded_at((unsigned char*)p, bytes);
  int overwritten = !emu::intact(g);
  emu::release(g);
  return overwritten;
}

#endif
