#include "slab.cuh"

// out[row] = sum over the chosen experts of weight * (down h), WITH_SHARED plus the shared expert's, times
// sigmoid(shared_logit) WITH_SHARED_LOGIT, WITH_RESIDUAL plus residual. Blocks: x counts rows of activations, y
// TILES times sixteen rows of the matrices; each warp takes experts, or SPLIT parts of them. ONE_FORMAT: all are stored alike.

struct Operands {
  const void *codes, *scales, *biases;
};

constexpr int THREADS = WARPS * 32, JOBS = TOP_K + SHARED_JOBS;

// Several parts of one expert go to several warps, so that each warp holds few groups at once.
template <int BITS, int GROUP, int GROUPS, typename S, int IN>
DEVICE void project(const Operands& m, ulong expert, const T* h, float weight, int part, int lane, float (*kept)[16],
                    bool& waited) {
  constexpr int COUNT = GROUPS < 4 ? GROUPS : 4;
  Slab<BITS, GROUP, COUNT, S> slab;
  const auto load = [&](int first, int tile) {
    ulong at[2];
#pragma unroll
    for (int r = 0; r < 2; r++) at[r] = expert * OUT + min((blockIdx.y * TILES + tile) * 16 + lane / 4 + 8 * r, OUT - 1);
    slab.template load<GROUPS>(slab, m.codes, m.scales, m.biases, at, first, lane);
  };
  load(part * COUNT, 0);
  if (!waited) wait_for_inputs();
  waited = true;
#pragma unroll 1
  for (int first = part * COUNT; first < GROUPS; first += SPLIT * COUNT) {
    Activations<GROUP, 1> a[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      float unused[4] = {};
      const T* row = lane < 4 && first + i < GROUPS ? h : nullptr;
      a[i].template put<BITS, IN>(a[i], 0, row, nullptr, first + i, lane, unused);
    }
#pragma unroll 1
    for (int tile = 0; tile < TILES; tile++) {
      const Slab<BITS, GROUP, COUNT, S> now = slab;
      if (tile + 1 < TILES) load(first, tile + 1);
      else if (first + SPLIT * COUNT < GROUPS) load(first + SPLIT * COUNT, 0);
      float sums[1][4] = {};
#pragma unroll
      for (int i = 0; i < COUNT; i++) slab.multiply(now, i, a[i], sums, weight);
      if (lane % 4 == 0) kept[tile][lane / 4] += sums[0][0], kept[tile][lane / 4 + 8] += sums[0][2];
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
experts_project(const T* hidden, const T* shared_hidden, const int* experts, const float* weights,
                const float* shared_logit, const T* residual, const __grid_constant__ Operands routed,
                const __grid_constant__ Operands shared, T* out) {
  __shared__ float partial[WARPS][TILES][16];
  let_next_start();
  bool waited = false;  // the kernel in front has waited for the choice of experts, but their hidden activations come
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long token = blockIdx.x;
  for (int i = lane; i < TILES * 16; i += 32) partial[warp][i / 16][i % 16] = 0;
  __syncwarp();
  for (int unit = warp; unit < JOBS * SPLIT; unit += WARPS) {
    const int job = unit / SPLIT, part = unit % SPLIT;
    const bool chosen = job < TOP_K;
    const long long pair = token * TOP_K + job;
    float weight = chosen ? weights[pair] : 1;  // shared_logit comes from the router too
#ifdef WITH_SHARED_LOGIT
    if (!chosen) weight = sigmoid(shared_logit[token]);
#endif
#ifndef ONE_FORMAT
    if (chosen)
#endif
      project<DOWN_BITS, DOWN_GROUP, DOWN_GROUPS, DOWN_SCALE, HIDDEN>(
          chosen ? routed : shared, chosen ? experts[pair] : 0,
          chosen ? hidden + pair * HIDDEN : shared_hidden + token * HIDDEN, weight, part, lane, partial[warp], waited);
#if defined(WITH_SHARED) && !defined(ONE_FORMAT)
    else
      project<SHARED_DOWN_BITS, SHARED_DOWN_GROUP, SHARED_DOWN_GROUPS, SHARED_DOWN_SCALE, SHARED_HIDDEN>(
          shared, 0, shared_hidden + token * SHARED_HIDDEN, weight, part, lane, partial[warp], waited);
#endif
  }
  if (!waited) wait_for_inputs();
  __syncthreads();
  for (int i = threadIdx.x; i < TILES * 16; i += THREADS) {
    const int row = blockIdx.y * TILES * 16 + i;
    if (row >= OUT) return;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += partial[w][i / 16][i % 16];
#ifdef WITH_RESIDUAL
    sum += to_float(residual[token * OUT + row]);
#endif
    out[token * OUT + row] = from_float<T>(sum);
  }
}
