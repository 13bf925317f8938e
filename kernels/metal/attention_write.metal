#include "platform.metal"

// For new tokens: norm (WITH_NORM) and rotate (WITH_ROPE) the heads of q and k, put k and v into the KV pools at
// places[token], in place, and return q. One simdgroup for each head of q, of k and of v (x), and token (y).
// MLX does not know that the pools change: who reads them afterwards must take `queries` as an input.

// --- kernel ---
const uint lane = thread_index_in_simdgroup, token = threadgroup_position_in_grid.y;
const uint unit = threadgroup_position_in_grid.x;
const uint part = unit < HEADS ? 0 : unit < HEADS + KV_HEADS ? 1 : 2;
const uint head = part == 0 ? unit : part == 1 ? unit - HEADS : unit - HEADS - KV_HEADS;
constexpr int COUNT = HEAD_DIM / 32;
float x[COUNT];
float square = 0;
#pragma unroll
for (int i = 0; i < COUNT; i++) {
  const uint at = i * 32 + lane;
  if (part == 0) x[i] = float(q[token * Q_ROW + Q_OFFSET + head * Q_STRIDE + at]);
  else if (part == 1) x[i] = float(k[token * K_ROW + K_OFFSET + head * K_STRIDE + at]);
  else x[i] = float(v[token * V_ROW + V_OFFSET + head * V_STRIDE + at]);
  square += x[i] * x[i];
}
#ifdef WITH_NORM
const float mean = simd_sum(square) / HEAD_DIM;
#pragma unroll
for (int i = 0; i < COUNT; i++) {
  const uint at = i * 32 + lane;
  if (part == 0) x[i] *= rsqrt(mean + as_type<float>(Q_EPS)) * float(q_weight[at]);
  if (part == 1) x[i] *= rsqrt(mean + as_type<float>(K_EPS)) * float(k_weight[at]);
}
#endif
#ifdef WITH_ROPE
SHARED(float, row, HEAD_DIM);
#pragma unroll
for (int i = 0; i < COUNT; i++) row[i * 32 + lane] = x[i];
threadgroup_sync();
if (part < 2) {
  const float position = float(positions[token]), scale = as_type<float>(ROPE_SCALE);
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    const uint at = i * 32 + lane;
    if (at < 2 * HALF) {
      const bool first = at < HALF;
      const float angle = position * inv_freq[first ? at : at - HALF];
      const float other = first ? -row[at + HALF] : row[at - HALF];
      x[i] = (x[i] * cos(angle) + other * sin(angle)) * scale;
    }
  }
}
#endif
#pragma unroll
for (int i = 0; i < COUNT; i++) {
  const uint at = i * 32 + lane;
  const uint cell = (places[token] * KV_HEADS + head) * HEAD_DIM + at;
  if (part == 0) queries[(token * HEADS + head) * HEAD_DIM + at] = T(x[i]);
  else if (part == 1) ((device T*)keys)[cell] = T(x[i]);
  else ((device T*)cached)[cell] = T(x[i]);
}
