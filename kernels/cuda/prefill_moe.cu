// Around the experts: choose them, group the (token, choice) pairs by expert, and sum what they gave.

#include "prefill_common.cuh"

#ifdef EXPERTS
constexpr int EACH = (EXPERTS + 31) / 32;  // experts of a lane: lane, lane + 32, ...

// Softmax over all logits [tokens, EXPERTS], then the top_k largest (equal logits: the lower expert), best first;
// renormalised if `normalize`. One warp a token.
extern "C" __global__ void __launch_bounds__(128)
    prefill_route(const float* logits, int* experts, float* weights, int tokens, int top_k, int normalize) {
  const int token = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (token >= tokens) return;
  float score[EACH];
  float most = -__int_as_float(0x7f800000);
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int expert = i * 32 + lane;
    const float x = expert < EXPERTS ? logits[(u64)token * EXPERTS + expert] : -__int_as_float(0x7f800000);
    score[i] = x == x ? x : -__int_as_float(0x7f800000);
    most = fmaxf(most, score[i]);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
  float total = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) total += __expf(score[i] - most);
  total = warp_sum(total);
  if (normalize) total = 0;

  u32 taken[(EACH + 31) / 32] = {};
  float kept = 0;
  int chosen = 0;  // lane j keeps the j-th choice of each 32
  for (int choice = 0; choice < top_k; choice++) {
    float best = 0;
    int expert = EXPERTS;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const bool free = !(taken[i / 32] >> (i % 32) & 1) && i * 32 + lane < EXPERTS;
      if (free && (expert == EXPERTS || score[i] > best)) best = score[i], expert = i * 32 + lane;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, best, step);
      const int other_expert = __shfl_xor_sync(0xffffffffu, expert, step);
      if (other_expert != EXPERTS && (expert == EXPERTS || other > best || (other == best && other_expert < expert)))
        best = other, expert = other_expert;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++)
      if (expert == i * 32 + lane) taken[i / 32] |= 1u << (i % 32);
    const float power = __expf(best - most);
    if (normalize) total += power;
    if (choice % 32 == lane) kept = power, chosen = expert;
    if (choice % 32 == 31 || choice + 1 == top_k) {
      const int at = choice / 32 * 32 + lane;
      if (at <= choice) experts[(u64)token * top_k + at] = chosen, weights[(u64)token * top_k + at] = kept;
    }
  }
  __syncwarp();
  for (int at = lane; at < top_k; at += 32) weights[(u64)token * top_k + at] /= total;
}

// Counting sort of the pairs by expert, in one block. order[row] = pair, row_of[pair] = row; tiles of at most BM rows:
// (expert, first row, rows, 0). Which of an expert's rows a pair gets has no effect on its result.
extern "C" __global__ void __launch_bounds__(1024)
    prefill_group(const int* experts, int* order, int* row_of, int4* tiles, int* tile_count, int pairs) {
  __shared__ int counts[EXPERTS], totals[32], tile_totals[32];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  for (int e = thread; e < EXPERTS; e += 1024) counts[e] = 0;
  __syncthreads();
#pragma unroll 4
  for (int pair = thread; pair < pairs; pair += 1024) atomicAdd(&counts[__ldg(experts + pair)], 1);
  __syncthreads();
  // Each thread scans a run of experts, then runs are scanned within and across warps.
  constexpr int RUN = (EXPERTS + 1023) / 1024;
  int rows = 0, blocks = 0;
  for (int e = thread * RUN; e < min(thread * RUN + RUN, EXPERTS); e++) rows += counts[e], blocks += (counts[e] + BM - 1) / BM;
  int row = rows, block = blocks;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int r = __shfl_up_sync(0xffffffffu, row, step), b = __shfl_up_sync(0xffffffffu, block, step);
    if (lane >= step) row += r, block += b;
  }
  if (lane == 31) totals[warp] = row, tile_totals[warp] = block;
  __syncthreads();
  row -= rows, block -= blocks;
  for (int w = 0; w < warp; w++) row += totals[w], block += tile_totals[w];
  for (int e = thread * RUN; e < min(thread * RUN + RUN, EXPERTS); e++) {
    const int count = counts[e];
    counts[e] = row;
    for (int done = 0; done < count; done += BM) tiles[block++] = make_int4(e, row + done, min(BM, count - done), 0);
    row += count;
  }
  if (thread == 1023) *tile_count = block;
  __syncthreads();
#pragma unroll 4
  for (int pair = thread; pair < pairs; pair += 1024) {
    const int at = atomicAdd(&counts[__ldg(experts + pair)], 1);
    order[at] = pair, row_of[pair] = at;
  }
}
#endif

// out[t] = sum over choices of weight * results[row_of[t, choice]], plus the shared expert's output, times
// sigmoid(shared_gate[t]) if there is one. Sums in float32, always in the same order. One block a token.
extern "C" __global__ void __launch_bounds__(256)
    prefill_combine(const u16* results, const int* row_of, const float* weights, const u16* shared, const float* shared_gate,
                    u16* out, int top_k, int dim) {
  const int token = blockIdx.x;
  const float factor = shared != nullptr && shared_gate != nullptr ? sigmoid(shared_gate[token]) : 1.0f;
  for (int at = threadIdx.x * 8; at < dim; at += 256 * 8) {
    float sum[8] = {};
    auto add = [&](const u16* from, float weight) {
      const uint4 words = __ldg((const uint4*)from);
      const u32 pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        sum[2 * i] = fmaf(weight, low_bf16(pairs[i]), sum[2 * i]);
        sum[2 * i + 1] = fmaf(weight, high_bf16(pairs[i]), sum[2 * i + 1]);
      }
    };
#pragma unroll 5
    for (int choice = 0; choice < top_k; choice++) {
      const u64 pair = (u64)token * top_k + choice;
      add(results + (u64)__ldg(row_of + pair) * dim + at, __ldg(weights + pair));
    }
    if (shared != nullptr) add(shared + (u64)token * dim + at, factor);
    *(uint4*)(out + (u64)token * dim + at) = make_uint4(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]),
                                                        pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7]));
  }
}
