#include "slab.cuh"

// Several matrices of any widths on one input x [rows, DIM], in one launch. MATRICES(F) names them:
// F(i, BITS, GROUP, GROUPS, OUT, BLOCKS, TILES, SCALE_TYPE, OUT_TYPE). Blocks: x counts those of the first matrix,
// then of the next, each TILES times sixteen rows; y counts 8 * COLUMNS rows of x. The WARPS of a block share the
// groups of a row, each at most MOST_DEPTH values of it at a time.
//   WITH_NORM      x is first normed: x / sqrt(mean(x^2) + eps) * norm_weight
//   WITH_RESIDUAL  ... + residual [rows, OUT], for a single matrix
//   TOP_K          matrix 0 gives the logits of EXPERTS experts: the last block to end picks the best of them and
//                  their weights (renormalised if NORMALIZE), and the first one keeps the normed x

struct Operands {
  const void* codes[MATRIX_COUNT];
  const void* scales[MATRIX_COUNT];
  const void* biases[MATRIX_COUNT];
  const float* bias[MATRIX_COUNT];
  void* out[MATRIX_COUNT];
};

struct Chosen {
  int* experts;    // [rows, TOP_K]
  float* weights;  // [rows, TOP_K]
  T* normed;       // [rows, DIM]
  uint* arrived;   // [blocks of rows], zero between launches
};

constexpr int THREADS = WARPS * 32;

#ifdef TOP_K
// Monotone in x, for integer reductions.
DEVICE uint ordered(float x) {
  const uint bits = __float_as_uint(x);
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

DEVICE void choose(const float* logits, int* experts, float* weights, int lane) {
  constexpr int EACH = (EXPERTS + 31) / 32;
  float values[EACH];
  float most = -1e30f;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    values[i] = i * 32 + lane < EXPERTS ? fmaxf(__ldcg(logits + i * 32 + lane), -1e30f) : -2e30f;
    most = fmaxf(most, values[i]);
  }
  uint best = ordered(most);
  const uint highest = __reduce_max_sync(~0u, best);
  const float top = __uint_as_float(highest & 0x80000000 ? highest & 0x7fffffff : ~highest);
  float total = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) total += __expf(values[i] - top);
  total = warp_sum(total);
  float mine[(TOP_K + 31) / 32] = {}, sum = 0;
  for (int k = 0; k < TOP_K; k++) {
    float largest = -3e30f;
    int at = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++)
      if (values[i] > largest) largest = values[i], at = i;
    const uint found = __reduce_max_sync(~0u, ordered(largest));
    const uint expert = __reduce_min_sync(~0u, ordered(largest) == found ? at * 32 + lane : ~0u);
    const float weight = __expf(__uint_as_float(found & 0x80000000 ? found & 0x7fffffff : ~found) - top) / total;
    sum += weight;
#pragma unroll
    for (int i = 0; i < EACH; i++)
      if (i * 32 + lane == expert) values[i] = -2e30f;
    if (lane == k % 32) {
      mine[k / 32] = weight;
      experts[k] = expert;
    }
  }
#pragma unroll
  for (int i = 0; i < (TOP_K + 31) / 32; i++)
    if (i * 32 + lane < TOP_K) weights[i * 32 + lane] = NORMALIZE ? mine[i] / sum : mine[i];
}
#endif

template <int BITS, int GROUP, int GROUPS, int OUT, int TILES, typename S, typename O>
DEVICE void tiles(const T* x, const float* norm_weight, float eps, const T* residual, const void* codes,
                  const void* scales, const void* biases, const float* bias, O* out, T* normed, int block, int rows,
                  float (*partial)[COLUMNS * 4][32], float (*squares)[COLUMNS * 8]) {
  constexpr int EACH = (GROUPS + WARPS - 1) / WARPS, MOST = MOST_DEPTH / GROUP;
  constexpr int COUNT = EACH < MOST ? EACH : MOST, PASSES = (EACH + COUNT - 1) / COUNT;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_token = blockIdx.y * 8 * COLUMNS;
  Slab<BITS, GROUP, COUNT, S> slab;
  const auto load = [&](int pass, int tile) {
    ulong at[2];
#pragma unroll
    for (int r = 0; r < 2; r++) at[r] = min((block * TILES + tile) * 16 + lane / 4 + 8 * r, OUT - 1);
    slab.template load<GROUPS>(slab, codes, scales, biases, at, (pass * WARPS + warp) * COUNT, lane);
  };
  load(0, 0);
  wait_for_inputs();

  float factors[COLUMNS];
#pragma unroll
  for (int c = 0; c < COLUMNS; c++) factors[c] = 1;
#ifdef WITH_NORM
#pragma unroll
  for (int c = 0; c < COLUMNS; c++) {
    const int token = first_token + c * 8 + lane / 4;
    float square = 0;
    for (int pass = 0; pass < PASSES; pass++) {
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        const int group = (pass * WARPS + warp) * COUNT + i;
        float values[GROUP / 4];
        load_quarter<GROUP, DIM>(x + (long long)token * DIM, group, token < rows && group < GROUPS, lane, values);
#pragma unroll
        for (int j = 0; j < GROUP / 4; j++) square += values[j] * values[j];
      }
    }
    square += __shfl_xor_sync(~0u, square, 1);
    square += __shfl_xor_sync(~0u, square, 2);
    if (lane % 4 == 0) squares[warp][c * 8 + lane / 4] = square;
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < COLUMNS; c++) {
    float square = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) square += squares[w][c * 8 + lane / 4];
    factors[c] = rsqrtf(square / DIM + eps);
  }
#endif
  float sums[TILES][COLUMNS][4] = {};
  for (int pass = 0; pass < PASSES; pass++) {
    Activations<GROUP, COLUMNS> activations[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const int group = (pass * WARPS + warp) * COUNT + i;
#ifdef WITH_NORM
      float weight[GROUP / 4];
      load_quarter<GROUP, DIM>(norm_weight, group, group < GROUPS, lane, weight);
#endif
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) {
        const int token = first_token + c * 8 + lane / 4;
        float values[GROUP / 4];
        load_quarter<GROUP, DIM>(x + (long long)token * DIM, group, token < rows && group < GROUPS, lane, values);
#ifdef WITH_NORM
#pragma unroll
        for (int j = 0; j < GROUP / 4; j++) values[j] *= factors[c] * weight[j];
#ifdef TOP_K
        if (normed != nullptr && token < rows && group < GROUPS) {
          const int at = group * GROUP + lane % 4 * (GROUP / 4);
#pragma unroll
          for (int j = 0; j < GROUP / 4; j++)
            if (at + j < DIM) normed[(long long)token * DIM + at + j] = from_float<T>(values[j]);
        }
#endif
#endif
        activations[i].template put<BITS>(activations[i], c, values, lane);
      }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      Slab<BITS, GROUP, COUNT, S> now = slab;
      if (tile + 1 < TILES) load(pass, tile + 1);
      else if (pass + 1 < PASSES) load(pass + 1, 0);
      now.multiply(now, activations, sums[tile], 1.0f);
    }
  }
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
#pragma unroll
      for (int i = 0; i < 4; i++) partial[warp * TILES + tile][c * 4 + i][lane] = sums[tile][c][i];
  __syncthreads();
  for (int i = threadIdx.x; i < TILES * 16 * COLUMNS * 8; i += THREADS) {
    const int r = i % 16, tile = i / 16 % TILES, n = i / (16 * TILES);
    const int row = (block * TILES + tile) * 16 + r, token = first_token + n;
    if (row >= OUT || token >= rows) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += partial[w * TILES + tile][n / 8 * 4 + result_register(r, n % 8)][result_lane(r, n % 8)];
    if (bias != nullptr) sum += bias[row];
#ifdef WITH_RESIDUAL
    sum += to_float(residual[(long long)token * OUT + row]);
#endif
    out[(long long)token * OUT + row] = from_float<O>(sum);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
matvec(const T* x, const float* norm_weight, float eps, const T* residual, Operands operands, Chosen chosen, int rows) {
  __shared__ float partial[WARPS * MOST_TILES][COLUMNS * 4][32], squares[WARPS][COLUMNS * 8];
  let_next_start();
  int block = blockIdx.x;
#define TRY(i, BITS, GROUP, GROUPS, OUT, BLOCKS, TILES, S, O)                                                       \
  if (block >= 0 && block < BLOCKS)                                                                                 \
    tiles<BITS, GROUP, GROUPS, OUT, TILES, S, O>(x, norm_weight, eps, residual, operands.codes[i],                  \
                                                 operands.scales[i], operands.biases[i], operands.bias[i],          \
                                                 (O*)operands.out[i], i == 0 && block == 0 ? chosen.normed : nullptr, \
                                                 block, rows, partial, squares);                                                      \
  block -= BLOCKS;
  MATRICES(TRY)
#undef TRY
#ifdef TOP_K
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(chosen.arrived + blockIdx.y, 1) == gridDim.x - 1;
    if (last) chosen.arrived[blockIdx.y] = 0;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int n = threadIdx.x / 32; n < 8 * COLUMNS; n += WARPS) {
    const int token = blockIdx.y * 8 * COLUMNS + n;
    if (token < rows)
      choose((const float*)operands.out[0] + (long long)token * EXPERTS, chosen.experts + token * TOP_K,
             chosen.weights + token * TOP_K, threadIdx.x % 32);
  }
#endif
}
