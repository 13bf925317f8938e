#include <metal_simdgroup_matrix>
#include "platform.metal"
#include "gates.metal"

// Gated delta net over many tokens, second of four kernels: what all chunks of CHUNK = 32 tokens, one a lane, need and
// what no memory takes part in. With decays g in a chunk, G_t the sum of log g up to t, and S the memory before it, the
// updates u_t of the memory obey (arXiv:2412.06464, section 3.3)
//   u_t = beta_t (v_t - e^G_t S k_t - sum_{i<t} e^(G_t - G_i) (k_t . k_i) u_i),
// a unit lower triangular system (I + L) u = rhs. Handed on, for each chunk:
//   solved = (I + L)^-1 diag(beta) and recall = -solved diag(e^G), so that U = solved V + recall K S^T;
//   within: what a token reads of the updates, e^(G_t - G_i) (q_t . k_i) up to its own;
//   factors: diagonals of 8 x 8 tiles, of e^G, of e^(G_end - G), and one tile of e^G_end.
// One threadgroup for each value head (x), chunk (y) and sequence (z), of a simdgroup for each eight tokens.

// --- kernel ---
constexpr int RATIO = VALUE_HEADS / KEY_HEADS, STRIDE = CHUNK + 4, TILES = CHUNK / 8;
const uint me = thread_position_in_threadgroup.x, lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup, head = threadgroup_position_in_grid.x;
const uint chunk = threadgroup_position_in_grid.y, chunks = threadgroups_per_grid.y;
const uint sequence = threadgroup_position_in_grid.z, key_head = head / RATIO, place = head % RATIO;
const uint piece = (sequence * VALUE_HEADS + head) * chunks + chunk;
SHARED(float, lower, CHUNK * STRIDE);
SHARED(float, seen, CHUNK * STRIDE);
SHARED(float, total, CHUNK);
SHARED(float, beta, CHUNK);

if (simdgroup == 0) {  // rows past the end: no decay, beta 0
  const uint count = a_shape[0] / threadgroups_per_grid.z, token = chunk * CHUNK + lane, row = sequence * count + token;
  float sum = 0, strength = 0;
  if (token < count) {
    sum = rate[head] * softplus(float(a[row * A_ROW + A_OFFSET + key_head * A_STRIDE + place]) + dt_bias[head]);
    strength = sigmoid(float(b[row * B_ROW + B_OFFSET + key_head * B_STRIDE + place]));
  }
  for (uint step = 1; step < CHUNK; step *= 2) {
    const float other = simd_shuffle(sum, ushort(lane < step ? lane : lane - step));
    if (lane >= step) sum += other;
  }
  total[lane] = sum;
  beta[lane] = strength;
}

const uint start = ((sequence * KEY_HEADS + key_head) * chunks + chunk) * CHUNK * KEY_DIM, top = simdgroup * 8;
simdgroup_float8x8 kk[TILES], qk[TILES];
for (int j = 0; j < TILES; j++)
  kk[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f), qk[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
for (int column = 0; column < KEY_DIM; column += 8) {
  simdgroup_float8x8 key, query, other;
  simdgroup_load(key, keys + start + top * KEY_DIM + column, KEY_DIM);
  simdgroup_load(query, queries + start + top * KEY_DIM + column, KEY_DIM);
  for (int j = 0; j < TILES; j++) {
    simdgroup_load(other, keys + start + j * 8 * KEY_DIM + column, KEY_DIM, ulong2(0), true);
    simdgroup_multiply_accumulate(kk[j], key, other, kk[j]);
    simdgroup_multiply_accumulate(qk[j], query, other, qk[j]);
  }
}
for (int j = 0; j < TILES; j++) {
  simdgroup_store(kk[j], lower + top * STRIDE + j * 8, STRIDE);
  simdgroup_store(qk[j], seen + top * STRIDE + j * 8, STRIDE);
}
threadgroup_sync();

for (uint i = me; i < CHUNK * CHUNK; i += THREADS) {
  const uint t = i / CHUNK, s = i % CHUNK;
  const float kept = t < s ? 0 : exp(total[t] - total[s]);
  within[piece * CHUNK * CHUNK + i] = kept * seen[t * STRIDE + s];
  lower[t * STRIDE + s] *= t == s ? 0 : beta[t] * kept;
}
for (uint i = me; i < (2 * CHUNK + 8) * 8; i += THREADS) {
  const uint t = i / 8;
  const float sum = t < CHUNK ? total[t] : total[CHUNK - 1] - (t < 2 * CHUNK ? total[t - CHUNK] : 0);
  factors[piece * (2 * CHUNK + 8) * 8 + i] = t % 8 == i % 8 ? exp(sum) : 0;
}
threadgroup_sync();

// Each lane substitutes a column of the inverse.
if (simdgroup == 0) {
  const float strength = beta[lane], decayed = -strength * exp(total[lane]);
  float inverse[CHUNK];
#pragma unroll
  for (int t = 0; t < CHUNK; t++) {
    float sum = t == int(lane) ? 1 : 0;
#pragma unroll
    for (int s = 0; s < t; s++) sum -= lower[t * STRIDE + s] * inverse[s];
    inverse[t] = sum;
    solved[(piece * CHUNK + t) * CHUNK + lane] = sum * strength;
    recall[(piece * CHUNK + t) * CHUNK + lane] = sum * decayed;
  }
}
