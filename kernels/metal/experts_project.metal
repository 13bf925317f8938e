#include "experts.metal"

// out[token] = sum over choices of weight * (down h), plus the shared expert times sigmoid(shared_logit), or times one
// without WITH_SHARED_LOGIT. Threadgroups: x counts rows of out, y tokens. The simdgroups of a threadgroup share
// its rows and divide the choices among themselves.

// --- kernel ---
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint token = threadgroup_position_in_grid.y;
uint rows[ROWS];
const uint first = pick_rows<ROWS, LANES, OUT>(threadgroup_position_in_grid.x, lane, rows);
float sums[ROWS];
for (int r = 0; r < ROWS; r++) sums[r] = 0;
for (uint choice = simdgroup; choice < TOP_K; choice += SIMDGROUPS) {
  const uint job = token * TOP_K + choice;
  project_rows<T, BITS, GROUP, HIDDEN, OUT, ROWS, LANES>(down, scales, biases, experts[job], hidden + job * HIDDEN,
                                                         weights[job], rows, lane, sums);
}
#ifdef WITH_SHARED
if (simdgroup == TOP_K % SIMDGROUPS) {
  float weight = 1;
#ifdef WITH_SHARED_LOGIT
  weight = 1 / (1 + exp(-float(shared_logit[token])));
#endif
  project_rows<T, SHARED_BITS, SHARED_GROUP, SHARED_HIDDEN, OUT, ROWS, LANES>(
      shared_down, shared_scales, shared_biases, 0, shared_hidden + token * SHARED_HIDDEN, weight, rows, lane, sums);
}
#endif
SHARED(float, partial, SIMDGROUPS * 32 * ROWS);
for (int r = 0; r < ROWS; r++) {
  const float sum = lanes_sum<LANES>(sums[r]);
  if (lane % LANES == 0) partial[(simdgroup * 32 + lane) * ROWS + r] = sum;
}
threadgroup_sync();
if (simdgroup != 0 || lane % LANES != 0) return;
for (int r = 0; r < ROWS; r++) {
  float sum = 0;
  for (int s = 0; s < SIMDGROUPS; s++) sum += partial[(s * 32 + lane) * ROWS + r];
  if (first + r < OUT) out[token * OUT + first + r] = T(sum);
}
