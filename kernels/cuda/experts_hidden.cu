#include "slab.cuh"

// Hidden activations silu(gate x) * (up x) of the chosen experts, hidden [rows * TOP_K, HIDDEN], and WITH_SHARED of
// the expert that every row goes through, shared_hidden [rows, SHARED_HIDDEN]. Blocks: x counts the pairs of a row
// and a choice, then eights of rows for the shared expert; y counts TILES times sixteen rows of the matrices. Neighbouring blocks
// share rows of an expert, which so come from memory once. ONE_FORMAT: all are stored alike. WITH_NORM x is normed as in matvec.cu. TOP_K 0: only the shared one, a plain feed-forward.

struct Operands {
  const void *gate, *gate_scales, *gate_biases, *up, *up_scales, *up_biases;
};

constexpr int THREADS = WARPS * 32;

template <int GB, int GG, int GGS, typename GS, int UB, int UG, int UGS,
          typename US>
DEVICE void hidden_tile(const Operands& m, int OUT, ulong expert, bool waited, const T* x, const T* norm_weight, float eps,
                        int columns, T* out, float (*partial)[2][4][32], float (*squares)[8]) {
  constexpr int GATE_COUNT = (GGS + WARPS - 1) / WARPS, UP_COUNT = (UGS + WARPS - 1) / WARPS;
  constexpr bool ALIKE = GB == UB && GG == UG;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
  const int begin = blockIdx.y * TILES, end = min(begin + TILES, (OUT + 15) / 16);
  Slab<GB, GG, GATE_COUNT, GS> gate;
  Slab<UB, UG, UP_COUNT, US> up;
  const auto load = [&](int tile) {
    ulong at[2];
#pragma unroll
    for (int r = 0; r < 2; r++) at[r] = expert * OUT + min(tile * 16 + g + 8 * r, OUT - 1);
    gate.template load<GGS>(gate, m.gate, m.gate_scales, m.gate_biases, at, warp * GATE_COUNT, lane);
    up.template load<UGS>(up, m.up, m.up_scales, m.up_biases, at, warp * UP_COUNT, lane);
  };
  load(begin);
  if (!waited) {
    wait_for_inputs();
    let_next_start();
  }
  const T* row = g < columns ? x + (long long)g * DIM : nullptr;
#ifndef WITH_NORM
  norm_weight = nullptr;
#endif
  float square[4] = {}, unused[4] = {};
  if constexpr (TILES == 1 && ALIKE) {  // each group's activations are used at once, and take few registers
    float sums[2][1][4] = {};
#pragma unroll
    for (int i = 0; i < GATE_COUNT; i++) {
      const int group = warp * GATE_COUNT + i;
      const bool there = group < GGS;
      Activations<GG, 1> a;
      a.template put<GB, DIM>(a, 0, there ? row : nullptr, there ? norm_weight : nullptr, group, lane, square);
      gate.multiply(gate, i, a, sums[0], 1.0f);
      up.multiply(up, i, a, sums[1], 1.0f);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) partial[warp][0][i][lane] = sums[0][0][i], partial[warp][1][i][lane] = sums[1][0][i];
  } else {
    Activations<GG, 1> a[GATE_COUNT];
    Activations<UG, 1> b[ALIKE ? 1 : UP_COUNT];
#pragma unroll
    for (int i = 0; i < GATE_COUNT; i++) {
      const int group = warp * GATE_COUNT + i;
      const bool there = group < GGS;
      a[i].template put<GB, DIM>(a[i], 0, there ? row : nullptr, there ? norm_weight : nullptr, group, lane, square);
    }
    if constexpr (!ALIKE) {
#pragma unroll
      for (int i = 0; i < UP_COUNT; i++) {
        const int group = warp * UP_COUNT + i;
        const bool there = group < UGS;
        b[i].template put<UB, DIM>(b[i], 0, there ? row : nullptr, there ? norm_weight : nullptr, group, lane, unused);
      }
    }
#pragma unroll 1
    for (int tile = begin; tile < end; tile++) {
      if (tile > begin) load(tile);
      float sums[2][1][4] = {};
#pragma unroll
      for (int i = 0; i < GATE_COUNT; i++) gate.multiply(gate, i, a[i], sums[0], 1.0f);
#pragma unroll
      for (int i = 0; i < UP_COUNT; i++) {
        if constexpr (ALIKE) up.multiply(up, i, a[i], sums[1], 1.0f);
        else up.multiply(up, i, b[i], sums[1], 1.0f);
      }
#pragma unroll
      for (int i = 0; i < 4; i++)
        partial[warp * TILES + tile - begin][0][i][lane] = sums[0][0][i], partial[warp * TILES + tile - begin][1][i][lane] = sums[1][0][i];
    }
  }
#ifdef WITH_NORM
  keep(squares[warp], square, lane);
#endif
  __syncthreads();
  for (int i = threadIdx.x; i < TILES * 16 * columns; i += THREADS) {
    const int r = i % 16, tile = i / 16 % TILES, n = i / (16 * TILES), row = (begin + tile) * 16 + r;
    if (begin + tile >= end || row >= OUT) continue;
    float both[2] = {};
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      both[0] += partial[w * TILES + tile][0][result_register(r, n)][result_lane(r, n)];
      both[1] += partial[w * TILES + tile][1][result_register(r, n)][result_lane(r, n)];
    }
#ifdef WITH_NORM
    float all = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) all += squares[w][n];
    const float factor = rsqrtf(all / DIM + eps);
    both[0] *= factor, both[1] *= factor;
#endif
    out[(long long)n * OUT + row] = from_float<T>(silu(both[0]) * both[1]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, THREADS > 256 ? 1 : TILES == 1 ? 768 / THREADS : 512 / THREADS)
experts_hidden(const T* x, const T* norm_weight, float eps, const int* experts, const __grid_constant__ Operands routed,
               const __grid_constant__ Operands shared, T* hidden, T* shared_hidden, int rows) {
  __shared__ float partial[WARPS * TILES][2][4][32], squares[WARPS][8];
  const int pairs = rows * TOP_K, job = blockIdx.x, first = (job - pairs) * 8;
  const bool chosen = job < pairs;
  const int out_dim = chosen ? HIDDEN : SHARED_HIDDEN;
  // The next kernel starts when the choice of experts is known, which it reads at once.
  if (chosen || blockIdx.y * TILES * 16 >= out_dim) {
    wait_for_inputs();
    let_next_start();
  }
  if (blockIdx.y * TILES * 16 >= out_dim) return;
  const ulong expert = chosen ? experts[job] : 0;
  const T* input = x + (long long)(chosen ? job / max(1, TOP_K) : first) * DIM;
  const int columns = chosen ? 1 : min(8, rows - first);
  T* out = chosen ? hidden + (long long)job * HIDDEN : shared_hidden + (long long)first * SHARED_HIDDEN;
#ifdef ROUTED
#ifndef ONE_FORMAT
  if (chosen)
#endif
    hidden_tile<GATE_BITS, GATE_GROUP, GATE_GROUPS, GATE_SCALE, UP_BITS, UP_GROUP, UP_GROUPS, UP_SCALE>(
#ifdef ONE_FORMAT
        chosen ? routed : shared,
#else
        routed,
#endif
        out_dim, expert, chosen, input, norm_weight, eps, columns, out, partial, squares);
#endif
#if defined(WITH_SHARED) && !defined(ONE_FORMAT)
  if (!chosen)
    hidden_tile<SHARED_GATE_BITS, SHARED_GATE_GROUP, SHARED_GATE_GROUPS, SHARED_GATE_SCALE, SHARED_UP_BITS,
                SHARED_UP_GROUP, SHARED_UP_GROUPS, SHARED_UP_SCALE>(shared, out_dim, expert, false, input, norm_weight,
                                                                    eps, columns, out, partial, squares);
#endif
}
