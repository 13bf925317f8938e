#include "experts.metal"

// Hidden activations of the chosen experts, hidden [tokens * TOP_K, HIDDEN], and, if WITH_SHARED is defined, of the
// shared expert: shared_hidden [tokens, SHARED_HIDDEN]. Threadgroups: x counts rows of a matrix, y the pairs of a
// token and a choice, then the tokens for the shared expert.

// --- kernel ---
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup;
const uint job = threadgroup_position_in_grid.y;
const uint pairs = experts_shape[0] * TOP_K;
if (job < pairs) {
  hidden_rows<T, GATE_BITS, GATE_GROUP, UP_BITS, UP_GROUP, IN, HIDDEN, ROWS, LANES>(
      gate, gate_scales, gate_biases, up, up_scales, up_biases, experts[job], x + job / TOP_K * IN,
      hidden + job * HIDDEN, simdgroup, lane);
}
#ifdef WITH_SHARED
else {
  hidden_rows<T, SHARED_GATE_BITS, SHARED_GATE_GROUP, SHARED_UP_BITS, SHARED_UP_GROUP, IN, SHARED_HIDDEN, ROWS, LANES>(
      shared_gate, shared_gate_scales, shared_gate_biases, shared_up, shared_up_scales, shared_up_biases, 0,
      x + (job - pairs) * IN, shared_hidden + (job - pairs) * SHARED_HIDDEN, simdgroup, lane);
}
#endif
