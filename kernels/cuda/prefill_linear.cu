// y = W x (+ bias) for several matrices of any formats that share x [tokens, depth], in one launch.
// Grid: blocks of BN columns of all matrices, blocks of BM tokens. FORMATS(X) lists X(index, bits, group, dtype).

#include "prefill_matmul.cuh"

// As kernels/cuda/prefill_linear.py writes it.
struct Matrix {
  Weights weights;
  int format, first_block, out_dtype, bias_dtype;
  const void* bias;
  void* out;
};

template <class F>
DEVICE void run(const Matrix& matrix, const u16* x, int tokens, int depth, unsigned char* memory) {
  const int first = (blockIdx.x - matrix.first_block) * BN, token = blockIdx.y * BM, rows = matrix.weights.rows;
  float acc[M_TILES][N_TILES][4];
  multiply<F, false>(acc, memory, matrix.weights, matrix.weights, first, x, min(BM, tokens - token), depth,
                     [&](int row) { return token + row; });
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int j = 0; j < N_TILES; j++) {
    const int column = first + warp / WARPS_M * N_TILES * 8 + j * 8 + lane % 4 * 2;
    if (column >= rows) continue;
    const bool both = column + 1 < rows;
    float bias[2] = {0, 0};
    if (matrix.bias != nullptr) {
      bias[0] = load_float(matrix.bias, column, matrix.bias_dtype);
      if (both) bias[1] = load_float(matrix.bias, column + 1, matrix.bias_dtype);
    }
#pragma unroll
    for (int i = 0; i < M_TILES * 2; i++) {
      const int row = token + (warp % WARPS_M * M_TILES + i / 2) * 16 + i % 2 * 8 + lane / 4;
      if (row >= tokens) continue;
      const float low = acc[i / 2][j][i % 2 * 2] + bias[0], high = acc[i / 2][j][i % 2 * 2 + 1] + bias[1];
      const u64 at = (u64)row * rows + column;
      if (matrix.out_dtype == F32) {
        ((float*)matrix.out)[at] = low;
        if (both) ((float*)matrix.out)[at + 1] = high;
      } else if (rows % 2 == 0) {
        *(u32*)((u16*)matrix.out + at) = pack_bf16(low, high);
      } else {
        ((u16*)matrix.out)[at] = to_bf16(low);
        if (both) ((u16*)matrix.out)[at + 1] = to_bf16(high);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    prefill_linear(const Matrix* table, int matrices, const u16* x, int tokens, int depth) {
  extern __shared__ __align__(1024) unsigned char memory[];
  int index = 0;
  while (index + 1 < matrices && (int)blockIdx.x >= table[index + 1].first_block) index++;
  const Matrix matrix = table[index];
  switch (matrix.format) {
#define RUN(index, bits, group, dtype) \
  case index: run<Format<bits, group, dtype>>(matrix, x, tokens, depth, memory); break;
    FORMATS(RUN)
  }
}
