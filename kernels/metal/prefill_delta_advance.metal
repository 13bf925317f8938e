#include <metal_simdgroup_matrix>
#include "platform.metal"

// Gated delta net over many tokens, third of four kernels: chunk after chunk through the memory. A simdgroup (x) keeps
// ROWS rows of the memory of a head (y) of a sequence (z) in its registers, all columns of them; none needs another.
// Per chunk, all transposed: U = solved V + recall K S^T, out = diag(e^G) Q S^T + within U, and
// S = e^G_end S + U^T diag(e^(G_end - G)) K; the letters as in prefill_delta_solve.metal.

// --- kernel ---
constexpr int TILES = CHUNK / 8, COLUMNS = KEY_DIM / 8, TALL = ROWS / 8, RATIO = VALUE_HEADS / KEY_HEADS;
const uint head = threadgroup_position_in_grid.y, sequence = threadgroup_position_in_grid.z;
const uint first = thread_position_in_grid.x / 32 * ROWS, chunks = keys_shape[2] / CHUNK;
const uint states = ((sequence * VALUE_HEADS + head) * VALUE_DIM + first) * KEY_DIM;
const device float* query = queries + (sequence * KEY_HEADS + head / RATIO) * chunks * CHUNK * KEY_DIM;
const device float* key = keys + (sequence * KEY_HEADS + head / RATIO) * chunks * CHUNK * KEY_DIM;

simdgroup_float8x8 state[TALL][COLUMNS], right, scale;
for (int r = 0; r < TALL; r++)
#pragma unroll
  for (int c = 0; c < COLUMNS; c++) simdgroup_load(state[r][c], memory + states + r * 8 * KEY_DIM + c * 8, KEY_DIM);

for (uint n = 0; n < chunks; n++) {
  const uint piece = (sequence * VALUE_HEADS + head) * chunks + n, square = piece * CHUNK * CHUNK;
  const uint row = piece * CHUNK * VALUE_DIM + first;
  const device float* diagonals = factors + piece * (2 * CHUNK + 8) * 8;

  simdgroup_float8x8 recalled[TALL][TILES], update[TALL][TILES];
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    for (int r = 0; r < TALL; r++)
      recalled[r][t] = update[r][t] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      simdgroup_load(right, key + t * 8 * KEY_DIM + c * 8, KEY_DIM, ulong2(0), true);
      for (int r = 0; r < TALL; r++) simdgroup_multiply_accumulate(recalled[r][t], state[r][c], right, recalled[r][t]);
    }
  }
#pragma unroll
  for (int s = 0; s < TILES; s++) {
    simdgroup_float8x8 value[TALL];
    for (int r = 0; r < TALL; r++)
      simdgroup_load(value[r], values + row + s * 8 * VALUE_DIM + r * 8, VALUE_DIM, ulong2(0), true);
#pragma unroll
    for (int t = s; t < TILES; t++) {
      simdgroup_load(right, solved + square + t * 8 * CHUNK + s * 8, CHUNK, ulong2(0), true);
      for (int r = 0; r < TALL; r++) simdgroup_multiply_accumulate(update[r][t], value[r], right, update[r][t]);
      simdgroup_load(right, recall + square + t * 8 * CHUNK + s * 8, CHUNK, ulong2(0), true);
      for (int r = 0; r < TALL; r++) simdgroup_multiply_accumulate(update[r][t], recalled[r][s], right, update[r][t]);
    }
  }

#pragma unroll
  for (int t = 0; t < TILES; t++) {
    simdgroup_float8x8 read[TALL];
    for (int r = 0; r < TALL; r++) read[r] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      simdgroup_load(right, query + t * 8 * KEY_DIM + c * 8, KEY_DIM, ulong2(0), true);
      for (int r = 0; r < TALL; r++) simdgroup_multiply_accumulate(read[r], state[r][c], right, read[r]);
    }
    simdgroup_load(scale, diagonals + t * 64);
    for (int r = 0; r < TALL; r++) simdgroup_multiply(read[r], read[r], scale);
#pragma unroll
    for (int s = 0; s <= t; s++) {
      simdgroup_load(right, within + square + t * 8 * CHUNK + s * 8, CHUNK, ulong2(0), true);
      for (int r = 0; r < TALL; r++) simdgroup_multiply_accumulate(read[r], update[r][s], right, read[r]);
    }
    for (int r = 0; r < TALL; r++)
      simdgroup_store(read[r], out + row + t * 8 * VALUE_DIM + r * 8, VALUE_DIM, ulong2(0), true);
  }

#pragma unroll
  for (int t = 0; t < TILES; t++) {
    simdgroup_load(scale, diagonals + (TILES + t) * 64);
    for (int r = 0; r < TALL; r++) simdgroup_multiply(update[r][t], update[r][t], scale);
  }
  simdgroup_load(scale, diagonals + 2 * TILES * 64);
#pragma unroll
  for (int c = 0; c < COLUMNS; c++) {
    for (int r = 0; r < TALL; r++) simdgroup_multiply(state[r][c], state[r][c], scale);
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      simdgroup_load(right, key + t * 8 * KEY_DIM + c * 8, KEY_DIM);
      for (int r = 0; r < TALL; r++) simdgroup_multiply_accumulate(state[r][c], update[r][t], right, state[r][c]);
    }
  }
  query += CHUNK * KEY_DIM;
  key += CHUNK * KEY_DIM;
}
for (int r = 0; r < TALL; r++)
#pragma unroll
  for (int c = 0; c < COLUMNS; c++) simdgroup_store(state[r][c], new_memory + states + r * 8 * KEY_DIM + c * 8, KEY_DIM);
