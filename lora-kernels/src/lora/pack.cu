// The parts' matrices as the one that the term of a product takes: blocks of it, with zeros where no part is.

// `from` is the element for the block's first column and first rank; `step_*` elements lead to the next.
struct Block { const void* from; i64 step_col, step_rank; int col, end, rank, rank_end; };
constexpr int BLOCKS = 3;
struct Pack { Block blocks[BLOCKS]; void* to; i64 ld; int rows, cols, by_rank; };

// One thread per element of `to` [rows, cols]: [ranks, columns] when it lies `by_rank`, else [columns, ranks]. These
// matrices are small and stay in L2; what counts is that it is one launch.
template <class T> DEVICE void pack_blocks(const Pack& p) {
  i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
  if (i >= (i64)p.rows * p.cols) return;
  int y = (int)(i / p.cols), x = (int)(i % p.cols), col = p.by_rank ? x : y, rank = p.by_rank ? y : x;
  T v = {};
#pragma unroll
  for (int b = 0; b < BLOCKS; b++) {
    const Block& k = p.blocks[b];
    if (col >= k.col && col < k.end && rank >= k.rank && rank < k.rank_end)
      v = ((const T*)k.from)[(col - k.col) * k.step_col + (rank - k.rank) * k.step_rank];
  }
  ((T*)p.to)[y * p.ld + x] = v;
}
#define LORA_PACK(T, name) KERNEL(256) lora_pack_##name(Pack p) { pack_blocks<T>(p); }
