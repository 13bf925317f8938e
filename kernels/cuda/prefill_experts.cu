// A stack of experts applied to tokens that are grouped by expert. Grid: blocks of columns, tiles of BM rows.
//   GATED 1: out = silu(gate x) * (up x), BN / 2 columns a block; row r of x is token order[r] / top_k.
//   GATED 0: out = W x, BN columns a block; row r of x is r.
// Row r of the result belongs to the r-th entry of `order`. Without tiles (null) there is one matrix, and `rows` rows.

#include "prefill_matmul.cuh"

typedef Format<FORMAT> Stored;

// Matrix `expert` of a stack.
DEVICE Weights pick(const u32* codes, const void* scales, const void* biases, int expert, int rows, int depth) {
  const u64 values = (u64)expert * rows * depth, groups = values / Stored::GROUP;
  const int width = Stored::DTYPE == F32 ? 4 : 2;
  return {codes + values / 32 * Stored::BITS, (const char*)scales + groups * width, (const char*)biases + groups * width, rows};
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    prefill_experts(const u32* codes, const void* scales, const void* biases, const u32* up_codes, const void* up_scales,
                    const void* up_biases, const u16* x, u16* out, const int4* tiles, const int* tile_count, const int* order,
                    int top_k, int rows, int columns, int depth) {
  extern __shared__ __align__(1024) unsigned char memory[];
  int expert = 0, start = blockIdx.y * BM, count = min(BM, rows - start);
  if (tiles != nullptr) {
    if ((int)blockIdx.y >= *tile_count) return;
    const int4 tile = tiles[blockIdx.y];
    expert = tile.x, start = tile.y, count = tile.z;
  }
  constexpr int WIDTH = GATED ? BN / 2 : BN, STEP = GATED ? 2 : 1;
  const int first = blockIdx.x * WIDTH;
  const Weights matrix = pick(codes, scales, biases, expert, columns, depth);
  const Weights pair = GATED ? pick(up_codes, up_scales, up_biases, expert, columns, depth) : matrix;
  float acc[M_TILES][N_TILES][4];
  multiply<Stored, GATED>(acc, memory, matrix, pair, first, x, count, depth, [&](int row) {
    return GATED && order != nullptr ? __ldg(order + start + row) / top_k : start + row;
  });
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int j = 0; j < N_TILES; j += STEP) {
    const int column = first + (warp / WARPS_M * N_TILES + j) / STEP * 8 + lane % 4 * 2;
    if (column >= columns) continue;
#pragma unroll
    for (int i = 0; i < M_TILES * 2; i++) {
      const int row = (warp % WARPS_M * M_TILES + i / 2) * 16 + i % 2 * 8 + lane / 4;
      if (row >= count) continue;
      float low = acc[i / 2][j][i % 2 * 2], high = acc[i / 2][j][i % 2 * 2 + 1];
      if (GATED) {
        low = silu(low) * acc[i / 2][j + STEP - 1][i % 2 * 2];
        high = silu(high) * acc[i / 2][j + STEP - 1][i % 2 * 2 + 1];
      }
      *(u32*)(out + (u64)(start + row) * columns + column) = pack_bf16(low, high);
    }
  }
}
