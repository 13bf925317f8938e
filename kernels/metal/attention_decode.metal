#include "platform.metal"

// Attention of one new token a sequence over the paged KV cache, in parts of `span` positions: one simdgroup for each
// KV head (x), sequence (y) and part (z), for all query heads that share the KV head. A part leaves the sum of
// exp(score - most) * value, the sum of exp(score - most), and most; attention_join.metal puts them together.

template <typename T, int COUNT>
inline void load_run(const device T* p, thread float* out) {
  if (COUNT % 8 == 0) {
    for (int i = 0; i < COUNT; i += 8) load8(p + i, out + i);
  } else {
    for (int i = 0; i < COUNT; i++) out[i] = float(p[i]);
  }
}

// --- kernel ---
constexpr int COUNT = HEAD_DIM / 32, SHARERS = HEADS / KV_HEADS, AT_ONCE = 4;
const uint lane = thread_index_in_simdgroup, kv_head = threadgroup_position_in_grid.x;
const uint sequence = threadgroup_position_in_grid.y, part = threadgroup_position_in_grid.z;
const uint parts = threadgroups_per_grid.z, table = sequence * tables_shape[1];
const uint context = positions[sequence] + 1;
const uint begin = part * span[0], end = min(begin + uint(span[0]), context);

float query[SHARERS][COUNT], sums[SHARERS][COUNT], total[SHARERS], most[SHARERS];
#pragma unroll
for (int h = 0; h < SHARERS; h++) {
  load_run<T, COUNT>(queries + (sequence * HEADS + kv_head * SHARERS + h) * HEAD_DIM + lane * COUNT, query[h]);
  total[h] = 0;
  most[h] = -1e30f;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    query[h][i] *= as_type<float>(SCALE);
    sums[h][i] = 0;
  }
}
for (uint first = begin; first < end; first += AT_ONCE) {
  float scores[SHARERS][AT_ONCE], values[AT_ONCE][COUNT];
#pragma unroll
  for (int p = 0; p < AT_ONCE; p++) {
    const uint position = min(first + p, end - 1);
    const uint place = tables[table + position / BLOCK] * BLOCK + position % BLOCK;
    const uint cell = (place * KV_HEADS + kv_head) * HEAD_DIM + lane * COUNT;
    float key[COUNT];
    load_run<T, COUNT>(keys + cell, key);
    load_run<T, COUNT>(cached + cell, values[p]);
#pragma unroll
    for (int h = 0; h < SHARERS; h++) {
      float score = 0;
#pragma unroll
      for (int i = 0; i < COUNT; i++) score += query[h][i] * key[i];
      score = simd_sum(score);
      scores[h][p] = first + p < end ? score : -1e30f;
    }
  }
#pragma unroll
  for (int h = 0; h < SHARERS; h++) {
    float highest = most[h];
#pragma unroll
    for (int p = 0; p < AT_ONCE; p++) highest = max(highest, scores[h][p]);
    const float kept = exp(most[h] - highest);
    most[h] = highest;
    total[h] *= kept;
#pragma unroll
    for (int i = 0; i < COUNT; i++) sums[h][i] *= kept;
#pragma unroll
    for (int p = 0; p < AT_ONCE; p++) {
      const float weight = first + p < end ? exp(scores[h][p] - highest) : 0;
      total[h] += weight;
#pragma unroll
      for (int i = 0; i < COUNT; i++) sums[h][i] += weight * values[p][i];
    }
  }
}
#pragma unroll
for (int h = 0; h < SHARERS; h++) {
  const uint at = (sequence * HEADS + kv_head * SHARERS + h) * parts + part;
#pragma unroll
  for (int i = 0; i < COUNT; i++) part_sums[at * HEAD_DIM + lane * COUNT + i] = sums[h][i];
  if (lane == 0) {
    part_totals[2 * at] = total[h];
    part_totals[2 * at + 1] = most[h];
  }
}
