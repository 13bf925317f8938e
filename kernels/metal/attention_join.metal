#include "platform.metal"

// Puts the parts of attention_decode.metal together, times sigmoid(gate) if WITH_GATE. One threadgroup for each
// head (x) and sequence (y).

// --- kernel ---
const uint head = threadgroup_position_in_grid.x, sequence = threadgroup_position_in_grid.y;
const uint parts = part_sums_shape[2], base = (sequence * HEADS + head) * parts;
float most = -1e30f, total = 0;
for (uint part = 0; part < parts; part++) most = max(most, part_totals[2 * (base + part) + 1]);
for (uint part = 0; part < parts; part++)
  total += part_totals[2 * (base + part)] * exp(part_totals[2 * (base + part) + 1] - most);
for (uint i = thread_position_in_threadgroup.x; i < HEAD_DIM; i += THREADS) {
  float sum = 0;
  for (uint part = 0; part < parts; part++)
    sum += part_sums[(base + part) * HEAD_DIM + i] * exp(part_totals[2 * (base + part) + 1] - most);
  sum /= total;
#ifdef WITH_GATE
  sum /= 1 + exp(-float(gate[sequence * GATE_ROW + GATE_OFFSET + head * GATE_STRIDE + i]));
#endif
  out[(sequence * HEADS + head) * HEAD_DIM + i] = T(sum);
}
