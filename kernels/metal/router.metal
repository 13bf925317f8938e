#include "platform.metal"

// Softmax over EXPERTS logits in float, the TOP_K largest (equal ones: the lower expert first), and their weights,
// renormalised if NORMALIZE. One simdgroup for each token; expert i * 32 + lane is the i-th of its lane.

// --- kernel ---

const uint lane = thread_index_in_simdgroup;
const uint token = threadgroup_position_in_grid.x;
constexpr int COUNT = (EXPERTS + 31) / 32;
const float lowest = -1e30f, taken = -2e30f;  // finite, so that fast math may be on

float values[COUNT];
float most = lowest;
#pragma unroll
for (int i = 0; i < COUNT; i++) {
  const uint expert = i * 32 + lane;
  values[i] = expert < EXPERTS ? max(float(logits[token * EXPERTS + expert]), lowest) : taken;
  most = max(most, values[i]);
}
most = simd_max(most);
float total = 0;
#pragma unroll
for (int i = 0; i < COUNT; i++) total += exp(values[i] - most);
total = simd_sum(total);

float mine = 0;  // lane k keeps the weight of the k-th choice
float chosen = 0;
for (uint k = 0; k < TOP_K; k++) {
  float best = 2 * taken;
  uint expert = 0;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    if (values[i] > best) best = values[i], expert = i * 32 + lane;
  }
  for (ushort step = 16; step > 0; step /= 2) {
    const float other = simd_shuffle_xor(best, step);
    const uint other_expert = simd_shuffle_xor(expert, step);
    if (other > best || (other == best && other_expert < expert)) best = other, expert = other_expert;
  }
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    if (i * 32 + lane == expert) values[i] = taken;
  }
  const float weight = exp(best - most) / total;
  chosen += weight;
  if (lane == k % 32) {
    mine = weight;
    experts[token * TOP_K + k] = expert;
    if (!NORMALIZE) weights[token * TOP_K + k] = weight;
  }
}
if (NORMALIZE && lane < TOP_K) weights[token * TOP_K + lane] = mine / chosen;
