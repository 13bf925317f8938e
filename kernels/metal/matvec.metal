#include "dot.metal"

// One threadgroup's share of one matrix of a batch: `tile` counts threadgroups within the matrix. A simdgroup
// takes ROWS rows in each of its 32 / LANES parts, and TOKENS rows of x.
template <typename T, int BITS, int GROUP, int IN, int OUT, int ROWS, int TOKENS, int LANES>
inline void matvec_tile(const device uint* codes, const device T* scales, const device T* biases, const device T* x,
                        device T* out, uint tile, uint first_token, uint tokens, uint simdgroup, uint simdgroups,
                        uint lane) {
  const uint first = ((tile * simdgroups + simdgroup) * (32 / LANES) + lane / LANES) * ROWS;
  uint rows[ROWS];
  const device T* inputs[TOKENS];
  float sums[ROWS * TOKENS];
  for (int r = 0; r < ROWS; r++) rows[r] = min(first + r, uint(OUT - 1));
  for (int t = 0; t < TOKENS; t++) inputs[t] = x + min(first_token + t, tokens - 1) * IN;
  for (int i = 0; i < ROWS * TOKENS; i++) sums[i] = 0;
  dot_rows<T, BITS, GROUP, IN, ROWS, TOKENS, LANES>(codes, scales, biases, rows, inputs, lane % LANES, sums);
  for (int i = 0; i < ROWS * TOKENS; i++) sums[i] = lanes_sum<LANES>(sums[i]);
  if (lane % LANES != 0) return;
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < TOKENS; t++)
      if (first + r < OUT && first_token + t < tokens) out[(first_token + t) * OUT + first + r] = T(sums[r * TOKENS + t]);
}

// Several matrices on one input in one launch. MATRICES(F) names them: F(0) F(1) ... Threadgroups: x counts the
// threadgroups of the first matrix, then of the next; y counts TOKENS rows of x.

// --- kernel ---
uint tile = threadgroup_position_in_grid.x;
#define TRY(i) \
  if (tile < TILES_##i) { \
    matvec_tile<T, BITS_##i, GROUP_##i, IN, OUT_##i, ROWS, TOKENS, LANES>( \
        codes_##i, scales_##i, biases_##i, x, out_##i, tile, threadgroup_position_in_grid.y * TOKENS, x_shape[0], \
        simdgroup_index_in_threadgroup, SIMDGROUPS, thread_index_in_simdgroup); \
    return; \
  } \
  tile -= TILES_##i;
MATRICES(TRY)
#undef TRY
