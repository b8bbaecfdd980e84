// y = xᵀ: a block takes 64×64 elements of x through shared memory, so that rows of x are read and rows of y are written
// side by side: 32 elements of a row by each warp at a time.
template <class T> DEVICE void transpose_tile(const T* x, i64 ldx, T* y, i64 ldy, int rows, int cols) {
  // Rows of an odd number of words. A warp puts down neighbours in a row: one word each, or two halves of a word. It takes
  // up neighbours in a column: one row further on is one bank further on.
  constexpr int SIZE = 64, LD = sizeof(T) == 4 ? 65 : 66, WARPS = 8, N = SIZE * SIZE / 256;
  __shared__ T tile[SIZE * LD];
  i64 across = ((i64)cols + SIZE - 1) / SIZE;
  int row = (int)(blockIdx.x / across) * SIZE, col = (int)(blockIdx.x % across) * SIZE;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T v[N];
#pragma unroll
  for (int i = 0; i < N; i++) {
    int r = row + warp + i / 2 * WARPS, c = col + lane + i % 2 * 32;
    v[i] = r < rows && c < cols ? x[r * ldx + c] : T{};
  }
#pragma unroll
  for (int i = 0; i < N; i++) tile[(warp + i / 2 * WARPS) * LD + lane + i % 2 * 32] = v[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; i++) {
    int c = warp + i / 2 * WARPS, r = lane + i % 2 * 32;
    if (col + c < cols && row + r < rows) y[(col + c) * ldy + row + r] = tile[r * LD + c];
  }
}
#define TRANSPOSE(T, name)                                                                           \
  KERNEL(256) transpose_##name(const T* x, i64 ldx, T* y, i64 ldy, int rows, int cols) {             \
    transpose_tile(x, ldx, y, ldy, rows, cols);                                                      \
  }
FOR_FLOATS(TRANSPOSE)
