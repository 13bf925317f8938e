#include "platform.metal"
#include "gates.metal"

// One token of the gated delta net for each sequence: convolution, gates, recurrence, gated norm. One threadgroup
// for each value head (x) and sequence (y). KEY_DIM and VALUE_DIM are multiples of four.

// --- kernel ---
constexpr int RATIO = VALUE_HEADS / KEY_HEADS, KEYS = KEY_HEADS * KEY_DIM;
constexpr int CHANNELS = 2 * KEYS + VALUE_HEADS * VALUE_DIM;
constexpr int SIMDGROUPS = THREADS / 32, CHUNKS = (KEY_DIM + 127) / 128;
const uint head = threadgroup_position_in_grid.x, sequence = threadgroup_position_in_grid.y;
const uint key_head = head / RATIO, place = head % RATIO;
const uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
const uint me = thread_position_in_threadgroup.x;

// The channels of this head, through the convolution. Of the heads that share a key head the first keeps its state.
SHARED(float, mixed, 2 * KEY_DIM + VALUE_DIM);
for (uint i = me; i < 2 * KEY_DIM + VALUE_DIM; i += THREADS) {
  const uint part = i < KEY_DIM ? 0 : i < 2 * KEY_DIM ? 1 : 2;
  const uint at = i - part * KEY_DIM;
  const uint channel = part * KEYS + (part == 2 ? head * VALUE_DIM : key_head * KEY_DIM) + at;
  T newest;
  if (part == 0) newest = q[sequence * Q_ROW + Q_OFFSET + key_head * Q_STRIDE + at];
  else if (part == 1) newest = k[sequence * K_ROW + K_OFFSET + key_head * K_STRIDE + at];
  else newest = v[sequence * V_ROW + V_OFFSET + key_head * V_STRIDE + place * VALUE_DIM + at];
  const bool keeps = part == 2 || place == 0;
  const uint state = sequence * (KERNEL - 1) * CHANNELS + channel;
  float sum = float(newest) * taps[(KERNEL - 1) * CHANNELS + channel];
  for (uint tap = 0; tap < KERNEL - 1; tap++) {
    const T past = conv[state + tap * CHANNELS];
    sum += float(past) * taps[tap * CHANNELS + channel];
    if (keeps && tap > 0) new_conv[state + (tap - 1) * CHANNELS] = past;
  }
  if (keeps) new_conv[state + (KERNEL - 2) * CHANNELS] = newest;
  mixed[i] = sum * sigmoid(sum);
}
threadgroup_sync();

// q and k over their norms; each lane holds four neighbouring values out of every 128.
float query[4 * CHUNKS], key[4 * CHUNKS];
float q_square = 0, k_square = 0;
#pragma unroll
for (int i = 0; i < 4 * CHUNKS; i++) {
  const uint at = i / 4 * 128 + lane * 4 + i % 4;
  query[i] = at < KEY_DIM ? mixed[at] : 0;
  key[i] = at < KEY_DIM ? mixed[KEY_DIM + at] : 0;
  q_square += query[i] * query[i];
  k_square += key[i] * key[i];
}
const float eps = as_type<float>(QK_EPS);
const float q_factor = rsqrt(simd_sum(q_square) + eps) * rsqrt(float(KEY_DIM));
const float k_factor = rsqrt(simd_sum(k_square) + eps);
#pragma unroll
for (int i = 0; i < 4 * CHUNKS; i++) query[i] *= q_factor, key[i] *= k_factor;
const float decay = exp(rate[head] * softplus(float(a[sequence * A_ROW + A_OFFSET + key_head * A_STRIDE + place]) + dt_bias[head]));
const float beta = sigmoid(float(b[sequence * B_ROW + B_OFFSET + key_head * B_STRIDE + place]));

// The recurrence, row by row of the memory; ROWS of them at once, so that their loads overlap.
SHARED(float, reads, VALUE_DIM);
const uint base = (sequence * VALUE_HEADS + head) * VALUE_DIM;
for (uint first = simdgroup; first < VALUE_DIM; first += SIMDGROUPS * ROWS) {
  float cells[ROWS][4 * CHUNKS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const uint row = min(first + r * SIMDGROUPS, uint(VALUE_DIM - 1));
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      const uint at = c * 128 + lane * 4;
      if (at < KEY_DIM) load4(memory + (base + row) * KEY_DIM + at, cells[r] + 4 * c);
      else for (int i = 0; i < 4; i++) cells[r][4 * c + i] = 0;
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const uint row = first + r * SIMDGROUPS;
    float recalled = 0, read = 0;
#pragma unroll
    for (int i = 0; i < 4 * CHUNKS; i++) {
      cells[r][i] *= decay;
      recalled += cells[r][i] * key[i];
    }
    const float delta = beta * (mixed[2 * KEY_DIM + min(row, uint(VALUE_DIM - 1))] - simd_sum(recalled));
#pragma unroll
    for (int i = 0; i < 4 * CHUNKS; i++) {
      cells[r][i] += delta * key[i];
      read += cells[r][i] * query[i];
    }
    read = simd_sum(read);
    if (row < VALUE_DIM) {
      if (lane == 0) reads[row] = read;
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        const uint at = c * 128 + lane * 4;
        if (at < KEY_DIM) store4(new_memory + (base + row) * KEY_DIM + at, cells[r] + 4 * c);
      }
    }
  }
}
threadgroup_sync();

float square = 0;
for (uint i = lane; i < VALUE_DIM; i += 32) square += reads[i] * reads[i];
const float factor = rsqrt(simd_sum(square) / VALUE_DIM + as_type<float>(NORM_EPS));
for (uint i = me; i < VALUE_DIM; i += THREADS) {
  const float gate = float(z[sequence * Z_ROW + Z_OFFSET + key_head * Z_STRIDE + place * VALUE_DIM + i]);
  out[base + i] = T(reads[i] * factor * weight[i] * gate * sigmoid(gate));
}
