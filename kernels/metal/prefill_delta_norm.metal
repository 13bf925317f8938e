#include "platform.metal"
#include "gates.metal"

// Gated delta net over many tokens, last of four kernels: out = rms_norm(read) weight silu(z). A simdgroup for each value
// head (x), token (y) and sequence (z). read: [sequences, VALUE_HEADS, padded, VALUE_DIM].

// --- kernel ---
const uint head = thread_position_in_grid.x / 32, lane = thread_index_in_simdgroup;
const uint token = threadgroup_position_in_grid.y, sequence = threadgroup_position_in_grid.z;
const uint row = sequence * threadgroups_per_grid.y + token;
const device float* from = read + ((sequence * VALUE_HEADS + head) * read_shape[2] + token) * VALUE_DIM;
float squares = 0;
for (uint i = lane; i < VALUE_DIM; i += 32) squares += from[i] * from[i];
const float factor = rsqrt(simd_sum(squares) / VALUE_DIM + as_type<float>(NORM_EPS));
constexpr int RATIO = VALUE_HEADS / KEY_HEADS;
for (uint i = lane; i < VALUE_DIM; i += 32) {
  const float gate = float(z[row * Z_ROW + Z_OFFSET + head / RATIO * Z_STRIDE + head % RATIO * VALUE_DIM + i]);
  out[(row * VALUE_HEADS + head) * VALUE_DIM + i] = T(from[i] * factor * weight[i] * gate * sigmoid(gate));
}
