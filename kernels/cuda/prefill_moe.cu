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

// A counting sort of the pairs by expert begins: places[e] = first row of expert e, and tiles of at most BM rows:
// (expert, first row, rows, 0). One block.
extern "C" __global__ void __launch_bounds__(1024)
    prefill_scan(const int* experts, int* places, int4* tiles, int* tile_count, int pairs) {
  __shared__ int counts[EXPERTS], row_totals[32], tile_totals[32];
  constexpr int RUN = (EXPERTS + 1023) / 1024;  // experts of a thread
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  for (int e = thread; e < EXPERTS; e += 1024) counts[e] = 0;
  __syncthreads();
#pragma unroll 8
  for (int four = thread; four < pairs / 4; four += 1024) {
    const int4 chosen = __ldg((const int4*)experts + four);
    atomicAdd(counts + chosen.x, 1), atomicAdd(counts + chosen.y, 1), atomicAdd(counts + chosen.z, 1), atomicAdd(counts + chosen.w, 1);
  }
  if (thread < pairs % 4) atomicAdd(counts + experts[pairs - 1 - thread], 1);
  __syncthreads();
  int count[RUN], rows = 0, blocks = 0;
#pragma unroll
  for (int i = 0; i < RUN; i++) {
    const int expert = thread * RUN + i;
    count[i] = expert < EXPERTS ? counts[expert] : 0;
    rows += count[i], blocks += (count[i] + BM - 1) / BM;
  }
  int row = rows, block = blocks;
  auto scan = [&](int& a, int& b) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before_a = __shfl_up_sync(0xffffffffu, a, step), before_b = __shfl_up_sync(0xffffffffu, b, step);
      if (lane >= step) a += before_a, b += before_b;
    }
  };
  scan(row, block);
  if (lane == 31) row_totals[warp] = row, tile_totals[warp] = block;
  __syncthreads();
  if (warp == 0) {
    int a = row_totals[lane], b = tile_totals[lane];
    scan(a, b);
    row_totals[lane] = a, tile_totals[lane] = b;
  }
  __syncthreads();
  row += (warp > 0 ? row_totals[warp - 1] : 0) - rows, block += (warp > 0 ? tile_totals[warp - 1] : 0) - blocks;
#pragma unroll
  for (int i = 0; i < RUN; i++) {
    const int expert = thread * RUN + i;
    if (expert >= EXPERTS) break;
    places[expert] = row;
    for (int done = 0; done < count[i]; done += BM) tiles[block++] = make_int4(expert, row + done, min(BM, count[i] - done), 0);
    row += count[i];
  }
  if (thread == 1023) *tile_count = tile_totals[31];
}

// It ends: order[row] = pair and row_of[pair] = row. Which of its expert's rows a pair gets has no effect on its result.
extern "C" __global__ void __launch_bounds__(256) prefill_scatter(const int* experts, int* places, int* order, int* row_of, int pairs) {
  const int pair = blockIdx.x * 256 + threadIdx.x;
  if (pair >= pairs) return;
  const int row = atomicAdd(places + experts[pair], 1);
  order[row] = pair, row_of[pair] = row;
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
