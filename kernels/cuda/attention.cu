#include "columns.cuh"

// Causal grouped-query attention over the paged KV cache, [blocks, BLOCK, KV_HEADS, HEAD_DIM] for keys and values.

constexpr int COUNT = (HEAD_DIM + 31) / 32;  // values of a head in a lane

// Norm (WITH_NORM) and rotate (WITH_ROPE) the heads of q and k; keep k and v; give q, times SCALE. One warp for each
// head of q, of k and of v (x), and row (y).
extern "C" __global__ void __launch_bounds__(32)
attention_write(Columns q, Columns k, Columns v, const float* q_weight, const float* k_weight, float q_eps, float k_eps,
                const float* inv_freq, float rope_scale, float scale, T* queries, T* keys, T* cached, Step step) {
  __shared__ float row[COUNT * 32];
  let_next_start();
  wait_for_inputs();
  const int lane = threadIdx.x, token = blockIdx.y, unit = blockIdx.x;
  const int part = unit < HEADS ? 0 : unit < HEADS + KV_HEADS ? 1 : 2;
  const int head = part == 0 ? unit : part == 1 ? unit - HEADS : unit - HEADS - KV_HEADS;
  float x[COUNT], square = 0;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    const int at = i * 32 + lane;
    x[i] = at < HEAD_DIM ? column(part == 0 ? q : part == 1 ? k : v, token, head, at) : 0;
    square += x[i] * x[i];
  }
  const float* weight = part == 0 ? q_weight : part == 1 ? k_weight : nullptr;
  if (weight != nullptr) {
    const float factor = rsqrtf(warp_sum(square) / HEAD_DIM + (part == 0 ? q_eps : k_eps));
#pragma unroll
    for (int i = 0; i < COUNT; i++) x[i] *= factor * (i * 32 + lane < HEAD_DIM ? weight[i * 32 + lane] : 0);
  }
  const int position = step.positions[token];
#if HALF > 0
#pragma unroll
  for (int i = 0; i < COUNT; i++) row[i * 32 + lane] = x[i];
  __syncwarp();
  if (part < 2) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const int at = i * 32 + lane;
      if (at < 2 * HALF) {
        const float angle = position * inv_freq[at % HALF];
        const float other = at < HALF ? -row[at + HALF] : row[at - HALF];
        // The functions of the hardware are right near zero alone.
        const float turn = (float)(angle - 6.283185307179586 * rint(angle * 0.15915494309189535));
        x[i] = (x[i] * __cosf(turn) + other * __sinf(turn)) * rope_scale;
      }
    }
  }
#endif
  const long long block = step.tables[(long long)step.sequences[token] * *step.width + position / BLOCK];
  const long long cell = ((block * BLOCK + position % BLOCK) * KV_HEADS + head) * HEAD_DIM;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    const int at = i * 32 + lane;
    if (at >= HEAD_DIM) continue;
    if (part == 0) queries[((long long)token * HEADS + head) * HEAD_DIM + at] = from_float<T>(x[i] * scale);
    else if (part == 1) keys[cell + at] = from_float<T>(x[i]);
    else cached[cell + at] = from_float<T>(x[i]);
  }
}

// Attention of each row over what its sequence holds up to its position. Blocks: x counts SHARE query heads of one KV
// head, y rows, z parts of the context; a warp takes a run of positions. Parts are joined by the last block to end.
constexpr int WARPS = 8, SHARERS = HEADS / KV_HEADS, RUN = 8, AT_ONCE = 4;
constexpr int SHARE = SHARERS < 4 ? SHARERS : 4, SETS = (SHARERS + SHARE - 1) / SHARE;
constexpr int SCORES = 4 * AT_ONCE;
constexpr float LOWEST = -1e30f;

DEVICE void load_lane(const T* p, int lane, float* out) {
  if constexpr (HEAD_DIM % 32 == 0) {
    load_values<COUNT>(p + lane * COUNT, out);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i++) out[i] = lane * COUNT + i < HEAD_DIM ? to_float(p[lane * COUNT + i]) : 0;
  }
}

// All of the sixteen sums over the warp: halves change sides, so that each step adds twice as many lanes' values.
DEVICE void sum_all(float* x, int lane) {
#pragma unroll
  for (int count = SCORES / 2, step = 16; count > 0; count /= 2, step /= 2) {
    const bool high = lane & step;
#pragma unroll
    for (int i = 0; i < count; i++) {
      const float kept = high ? x[i + count] : x[i], given = high ? x[i] : x[i + count];
      x[i] = kept + __shfl_xor_sync(~0u, given, step);
    }
  }
  const float sum = x[0] + __shfl_xor_sync(~0u, x[0], 1);
#pragma unroll
  for (int i = 0; i < SCORES; i++) x[i] = __shfl_sync(~0u, sum, 2 * i);
}

// What each of COUNT_OF parts, in neighbouring lanes, weighs: exp(most - highest); with the sum of totals so weighed.
template <int COUNT_OF>
DEVICE float weigh(float total, float& most, float& all) {
  const float own = most;
#pragma unroll
  for (int step = COUNT_OF / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
  const float factor = power(own - most);
  all = total * factor;
#pragma unroll
  for (int step = COUNT_OF / 2; step > 0; step /= 2) all += __shfl_xor_sync(~0u, all, step);
  return factor;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
attention(const T* queries, const T* keys, const T* cached, Columns gate, float* part_sums, float* part_totals,
          uint* arrived, T* out, Step step) {
  __shared__ float sums_of[WARPS][SHARE][COUNT * 32];
  __shared__ float totals_of[WARPS][SHARE], most_of[WARPS][SHARE], factors[4][PARTS > WARPS ? PARTS : WARPS];
  __shared__ float block_total[4], block_most[4];
  __shared__ bool last;
  let_next_start();
  wait_for_inputs();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, token = blockIdx.y;
  const int kv_head = blockIdx.x / SETS, first_head = kv_head * SHARERS + blockIdx.x % SETS * SHARE;
  const int last_head = kv_head * SHARERS + SHARERS - 1;
  const int context = step.positions[token] + 1, splits = gridDim.z * WARPS;
  const int span = max(RUN, (context + splits - 1) / splits);
  const int parts = (context + span * WARPS - 1) / (span * WARPS);
  if (blockIdx.z >= parts) return;
  const int* table = step.tables + (long long)step.sequences[token] * *step.width;
  const int begin = (blockIdx.z * WARPS + warp) * span, end = min(begin + span, context);

  float query[SHARE][COUNT], sums[SHARE][COUNT], total[SHARE], most[SHARE];
#pragma unroll
  for (int h = 0; h < SHARE; h++) {
    load_lane(queries + ((long long)token * HEADS + min(first_head + h, last_head)) * HEAD_DIM, lane, query[h]);
    total[h] = 0, most[h] = LOWEST;
#pragma unroll
    for (int i = 0; i < COUNT; i++) sums[h][i] = 0;
  }
  for (int first = begin; first < end; first += AT_ONCE) {
    float scores[SCORES] = {}, values[AT_ONCE][COUNT];
#pragma unroll
    for (int p = 0; p < AT_ONCE; p++) {
      const int position = min(first + p, end - 1);
      const long long place = (long long)table[position / BLOCK] * BLOCK + position % BLOCK;
      float key[COUNT];
      load_lane(keys + (place * KV_HEADS + kv_head) * HEAD_DIM, lane, key);
      load_lane(cached + (place * KV_HEADS + kv_head) * HEAD_DIM, lane, values[p]);
#pragma unroll
      for (int h = 0; h < SHARE; h++)
#pragma unroll
        for (int i = 0; i < COUNT; i++) scores[h * AT_ONCE + p] += query[h][i] * key[i];
    }
    sum_all(scores, lane);
#pragma unroll
    for (int h = 0; h < SHARE; h++) {
      float highest = most[h];
#pragma unroll
      for (int p = 0; p < AT_ONCE; p++) {
        if (first + p >= end) scores[h * AT_ONCE + p] = LOWEST;
        highest = fmaxf(highest, scores[h * AT_ONCE + p]);
      }
      const float kept = power(most[h] - highest);
      most[h] = highest;
      total[h] *= kept;
#pragma unroll
      for (int i = 0; i < COUNT; i++) sums[h][i] *= kept;
#pragma unroll
      for (int p = 0; p < AT_ONCE; p++) {
        const float weight = first + p < end ? power(scores[h * AT_ONCE + p] - highest) : 0;
        total[h] += weight;
#pragma unroll
        for (int i = 0; i < COUNT; i++) sums[h][i] += weight * values[p][i];
      }
    }
  }
#pragma unroll
  for (int h = 0; h < SHARE; h++) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) sums_of[warp][h][lane * COUNT + i] = sums[h][i];
    if (lane == 0) totals_of[warp][h] = total[h], most_of[warp][h] = most[h];
  }
  __syncthreads();
  if (warp == 0) {
    const int h = min(lane / WARPS, SHARE - 1);
    float highest = most_of[lane % WARPS][h], all;
    factors[lane / WARPS][lane % WARPS] = weigh<WARPS>(totals_of[lane % WARPS][h], highest, all);
    block_total[lane / WARPS] = all, block_most[lane / WARPS] = highest;
  }
  __syncthreads();

  const long long base = ((long long)token * gridDim.x + blockIdx.x) * gridDim.z;
  for (int e = threadIdx.x; e < SHARE * HEAD_DIM; e += WARPS * 32) {
    const int h = e / HEAD_DIM, i = e % HEAD_DIM, head = first_head + h;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += sums_of[w][h][i] * factors[h][w];
    if (parts > 1) {
      part_sums[(base + blockIdx.z) * SHARE * HEAD_DIM + e] = sum;
      if (i == 0) {
        float* kept = part_totals + 2 * ((base + blockIdx.z) * SHARE + h);
        kept[0] = block_total[h], kept[1] = block_most[h];
      }
    } else if (head <= last_head) {
      sum /= block_total[h];
      if (gate.values != nullptr) sum *= sigmoid(column(gate, token, head, i));
      out[((long long)token * HEADS + head) * HEAD_DIM + i] = from_float<T>(sum);
    }
  }
  if (parts == 1) return;

  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    uint* counter = arrived + (long long)token * gridDim.x + blockIdx.x;
    last = atomicAdd(counter, 1) == parts - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  if (warp < 2) {
    const int which = threadIdx.x / PARTS, h = min(which, SHARE - 1), p = threadIdx.x % PARTS;
    const float* kept = part_totals + 2 * ((base + min(p, parts - 1)) * SHARE + h);
    float highest = p < parts ? __ldcg(kept + 1) : LOWEST, all;
    const float factor = weigh<PARTS>(p < parts ? __ldcg(kept) : 0, highest, all);
    factors[which][p] = factor / all;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < SHARE * HEAD_DIM; e += WARPS * 32) {
    const int h = e / HEAD_DIM, i = e % HEAD_DIM, head = first_head + h;
    float sum = 0;
#pragma unroll 4
    for (int p = 0; p < parts; p++) sum += __ldcg(part_sums + (base + p) * SHARE * HEAD_DIM + e) * factors[h][p];
    if (head > last_head) continue;
    if (gate.values != nullptr) sum *= sigmoid(column(gate, token, head, i));
    out[((long long)token * HEADS + head) * HEAD_DIM + i] = from_float<T>(sum);
  }
}
