#include "slab.cuh"

// Several matrices of any widths on one input x [rows, DIM], in one launch. FORMATS(F) names how they are stored, each
// way once: F(i, BITS, GROUP, GROUPS, SCALE_TYPE, OUT_TYPE). Blocks: x counts those of the first matrix, then of the
// next, each CHUNKS * TILES times sixteen rows; y counts 8 * COLUMNS rows of x. The WARPS of a block share the groups
// of a row, each at most MOST_DEPTH values of it at a time. Code is kept short, by loops and by one text for matrices
// of one format: a step runs each kernel once, so that instructions come from afar.
//   WITH_NORM      x is normed: W (x / sqrt(mean(x^2) + eps) * norm_weight), the root taken out of the product
//   WITH_RESIDUAL  ... + residual [rows, OUT], for a single matrix
//   TOP_K          matrix 0 gives the logits of EXPERTS experts: the last block to end picks the best of them and
//                  their weights (renormalised if NORMALIZE)

struct Matrix {
  const void *codes, *scales, *biases;
  const float* bias;
  void* out;
  int rows, first_block, format, padding;
};

struct Operands {
  Matrix matrices[MATRIX_COUNT];
};

struct Chosen {
  int* experts;    // [rows, TOP_K]
  float* weights;  // [rows, TOP_K]
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
  for (int i = 0; i < EACH; i++) total += power(values[i] - top);
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
    const float weight = power(__uint_as_float(found & 0x80000000 ? found & 0x7fffffff : ~found) - top) / total;
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

template <int BITS, int GROUP, int GROUPS, typename S, typename O>
DEVICE void product(const T* x, const T* norm_weight, float eps, const T* residual, const Matrix& matrix, int rows,
                    float (*partial)[COLUMNS * 4][32], float (*squares)[COLUMNS * 8]) {
  constexpr int EACH = (GROUPS + WARPS - 1) / WARPS, MOST = MOST_DEPTH / GROUP;
  constexpr int COUNT = EACH < MOST ? EACH : MOST, PASSES = (EACH + COUNT - 1) / COUNT;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_token = blockIdx.y * 8 * COLUMNS;
  const int begin = (blockIdx.x - matrix.first_block) * CHUNKS * TILES;
  const int end = min(begin + CHUNKS * TILES, (matrix.rows + 15) / 16);
  Slab<BITS, GROUP, COUNT, S> slab;
  const auto load = [&](int pass, int tile) {
    ulong at[2];
#pragma unroll
    for (int r = 0; r < 2; r++) at[r] = min(tile * 16 + lane / 4 + 8 * r, matrix.rows - 1);
    slab.template load<GROUPS>(slab, matrix.codes, matrix.scales, matrix.biases, at, (pass * WARPS + warp) * COUNT, lane);
  };
  load(0, begin);
  if (threadIdx.x == 0) {  // what this block reads first, of which it has loaded a part
    constexpr uint ROW = GROUPS * GROUP * BITS / 8, SCALES = BITS <= 8 ? GROUPS * sizeof(S) : 0;
    const ulong row = (begin + 1) * 16;
    const uint count = 16 * max(0, min(TILES, (matrix.rows - begin * 16) / 16) - 1);  // whole tiles
    prefetch_run((const uchar*)matrix.codes + row * ROW, count * ROW);
    prefetch_run((const uchar*)matrix.scales + row * SCALES, count * SCALES);
    prefetch_run((const uchar*)matrix.biases + row * SCALES, count * SCALES);
  }
#ifdef WITH_NORM
#pragma unroll
  for (int i = 0; i < COUNT; i++)
    prefetch(norm_weight + min((warp * COUNT + i) * GROUP + lane % 4 * (GROUP / 4), DIM - 1));
#endif
  wait_for_inputs();

  float square[COLUMNS][4] = {};
  Activations<GROUP, COLUMNS> activations[COUNT];
  const auto take = [&](int pass) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const int group = (pass * WARPS + warp) * COUNT + i;
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) {
        const int token = first_token + c * 8 + lane / 4;
        const T* row = token < rows && group < GROUPS ? x + (long long)token * DIM : nullptr;
#ifdef WITH_NORM
        const T* weights = group < GROUPS ? norm_weight : nullptr;
#else
        const T* weights = nullptr;
#endif
        activations[i].template put<BITS, DIM>(activations[i], c, row, weights, group, lane, square[c]);
      }
    }
  };
  if constexpr (PASSES == 1) take(0);
#pragma unroll 1
  for (int first = begin; first < end; first += TILES) {
    const int last = min(first + TILES, end);
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
      if constexpr (PASSES > 1) take(pass);
#pragma unroll 1
      for (int tile = first; tile < last; tile++) {
        const Slab<BITS, GROUP, COUNT, S> now = slab;
        if (tile + 1 < last) load(pass, tile + 1);
        else if (pass + 1 < PASSES) load(pass + 1, first);
        else if (last < end) load(0, last);
        float sums[COLUMNS][4] = {};
#pragma unroll
        for (int i = 0; i < COUNT; i++) slab.multiply(now, i, activations[i], sums, 1.0f);
        float(*kept)[32] = partial[warp * TILES + tile - first];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            kept[c * 4 + i][lane] = PASSES > 1 && pass > 0 ? kept[c * 4 + i][lane] + sums[c][i] : sums[c][i];
      }
    }
#ifdef WITH_NORM
    if (first == begin) {
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) keep(squares[warp] + c * 8, square[c], lane);
    }
#endif
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < TILES * 16 * COLUMNS * 8; i += THREADS) {
      const int r = i % 16, tile = i / 16 % TILES, n = i / (16 * TILES);
      const int row = (first + tile) * 16 + r, token = first_token + n;
      if (first + tile >= last || row >= matrix.rows || token >= rows) continue;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++)
        sum += partial[w * TILES + tile][n / 8 * 4 + result_register(r, n % 8)][result_lane(r, n % 8)];
#ifdef WITH_NORM
      float all = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) all += squares[w][n];
      sum *= rsqrtf(all / DIM + eps);
#endif
      if (matrix.bias != nullptr) sum += matrix.bias[row];
#ifdef WITH_RESIDUAL
      sum += to_float(residual[(long long)token * matrix.rows + row]);
#endif
      ((O*)matrix.out)[(long long)token * matrix.rows + row] = from_float<O>(sum);
    }
    if (last < end) __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS > 0 ? 512 / THREADS : 1)
matvec(const T* x, const T* norm_weight, float eps, const T* residual, const __grid_constant__ Operands operands,
       Chosen chosen, int rows) {
  __shared__ float partial[WARPS * TILES][COLUMNS * 4][32], squares[WARPS][COLUMNS * 8];
  let_next_start();
  int which = 0;
#pragma unroll
  for (int i = 1; i < MATRIX_COUNT; i++)
    if (blockIdx.x >= operands.matrices[i].first_block) which = i;
  const Matrix& matrix = operands.matrices[which];
#define TRY(i, BITS, GROUP, GROUPS, S, O) \
  if (matrix.format == i) product<BITS, GROUP, GROUPS, S, O>(x, norm_weight, eps, residual, matrix, rows, partial, squares);
  FORMATS(TRY)
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
      choose((const float*)operands.matrices[0].out + (long long)token * EXPERTS, chosen.experts + token * TOP_K,
             chosen.weights + token * TOP_K, threadIdx.x % 32);
  }
#endif
}
