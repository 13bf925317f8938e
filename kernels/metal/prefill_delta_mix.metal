#include "platform.metal"
#include "gates.metal"

// Gated delta net over many tokens, first of four kernels: convolution and SiLU, q and k over their norms, and the inputs
// that the next tokens will need. A simdgroup does RUN tokens (x) of one head (y: heads of q, of k, of v) of a sequence (z).
// queries, keys: [sequences, KEY_HEADS, padded, KEY_DIM], values alike: padded to whole chunks of CHUNK rows with zeros.

// A channel's input at a token of this step, or of those before it, which the state has.
template <typename T, int KERNEL, int CHANNELS>
inline T input_at(const device T* from, uint row, const device T* before, int token) {
  return token < 0 ? before[(KERNEL - 1 + token) * CHANNELS] : from[token * row];
}

// --- kernel ---
constexpr int KEYS = KEY_HEADS * KEY_DIM, RATIO = VALUE_HEADS / KEY_HEADS;
constexpr int CHANNELS = 2 * KEYS + VALUE_HEADS * VALUE_DIM;
constexpr int PIECES = ((KEY_DIM > VALUE_DIM ? KEY_DIM : VALUE_DIM) + 31) / 32;
const uint lane = thread_index_in_simdgroup, sequence = threadgroup_position_in_grid.z;
const int count = q_shape[0] / threadgroups_per_grid.z, padded = (count + CHUNK - 1) / CHUNK * CHUNK;
const uint part = min(threadgroup_position_in_grid.y / KEY_HEADS, 2u);
const uint head = threadgroup_position_in_grid.y - part * KEY_HEADS;
const uint dim = part == 2 ? VALUE_DIM : KEY_DIM, channel = part * KEYS + head * dim;
const device T* from = v + V_OFFSET + head / RATIO * V_STRIDE + head % RATIO * VALUE_DIM;
device float* to = values + (sequence * VALUE_HEADS + head) * padded * VALUE_DIM;
uint row = V_ROW;
if (part < 2) {
  from = part == 0 ? q + Q_OFFSET + head * Q_STRIDE : k + K_OFFSET + head * K_STRIDE;
  to = (part == 0 ? queries : keys) + (sequence * KEY_HEADS + head) * padded * KEY_DIM;
  row = part == 0 ? Q_ROW : K_ROW;
}
from += sequence * count * row;
const device T* before = conv + sequence * (KERNEL - 1) * CHANNELS + channel;

const int first = thread_position_in_grid.x / 32 * RUN;
for (int token = first; token < first + RUN; token++) {
  float mixed[PIECES], squares = 0;
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    const uint at = i * 32 + lane;
    float sum = 0;
    if (token < count && at < dim)
      for (int tap = 0; tap < KERNEL; tap++)
        sum += taps[tap * CHANNELS + channel + at] *
               float(input_at<T, KERNEL, CHANNELS>(from + at, row, before + at, token + tap - (KERNEL - 1)));
    mixed[i] = sum * sigmoid(sum);
    squares += mixed[i] * mixed[i];
  }
  float factor = 1;
  if (part < 2) factor = rsqrt(simd_sum(squares) + as_type<float>(QK_EPS));
  if (part == 0) factor *= rsqrt(float(KEY_DIM));
#pragma unroll
  for (int i = 0; i < PIECES; i++)
    if (i * 32 + lane < dim) to[token * dim + i * 32 + lane] = mixed[i] * factor;
}
if (first == 0)
  for (int tap = 0; tap < KERNEL - 1; tap++)
    for (uint at = lane; at < dim; at += 32)
      new_conv[(sequence * (KERNEL - 1) + tap) * CHANNELS + channel + at] =
          input_at<T, KERNEL, CHANNELS>(from + at, row, before + at, count + tap - (KERNEL - 1));
