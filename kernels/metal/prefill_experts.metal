#include <metal_simdgroup_matrix>
#include "dot.metal"

// Many rows through experts, by matrix products on dequantized tiles. `experts` holds the expert of each pair of a token
// and a choice, ascending; row i of out belongs to pair i. GATED: out = silu(gate x) * (up x), where pair i reads row
// pairs[i] / TOP_K of x; else out = gate x, where it reads row i. Threadgroups: x counts COLUMNS rows of the matrices, y
// counts ROWS pairs. The pairs of a threadgroup are taken expert by expert.

// The codes [PART * 32 / PARTS, ...) of a block of 32 columns of one row, as values.
template <typename T, int BITS, int GROUP, int IN, int PARTS>
inline void expand(const device uint* codes, const device T* scales, const device T* biases, size_t row, uint block,
                   uint part, threadgroup float* out) {
  uint words[BITS];
  load_words<BITS>(codes + row * (IN / 32 * BITS) + block * BITS, words);
  const float scale = float(scales[row * (IN / GROUP) + block * 32 / GROUP]);
  const float bias = float(biases[row * (IN / GROUP) + block * 32 / GROUP]);
  for (int i = 0; i < 32 / PARTS; i++) out[i] = scale * code_at<BITS>(words, part * (32 / PARTS) + i) + bias;
}

// --- kernel ---
constexpr int MATRICES = GATED ? 2 : 1, STRIDE = 36, PARTS = THREADS / (MATRICES * COLUMNS);
const uint me = thread_position_in_threadgroup.x, simdgroup = simdgroup_index_in_threadgroup;
const uint column = threadgroup_position_in_grid.x * COLUMNS, count = experts_shape[0];
const uint top = simdgroup / 2 * 16, left = simdgroup % 2 * (COLUMNS / 2);
SHARED(float, rows, ROWS * STRIDE);
SHARED(float, tile, (GATED ? 2 : 1) * COLUMNS * STRIDE);
uint begin = threadgroup_position_in_grid.y * ROWS;
const uint end = min(begin + uint(ROWS), count);
while (begin < end) {
  const uint expert = experts[begin];
  uint stop = begin + 1;
  while (stop < end && experts[stop] == expert) stop++;
  const uint used = stop - begin;

  simdgroup_float8x8 sums[MATRICES][2][COLUMNS / 16];
  for (int m = 0; m < MATRICES; m++)
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < COLUMNS / 16; j++) sums[m][i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  for (uint block = 0; block < IN / 32; block++) {
    for (uint i = me; i < ROWS * 4; i += THREADS) {
      const uint row = i / 4, eight = i % 4 * 8;
      float values[8];
      for (int k = 0; k < 8; k++) values[k] = 0;
      if (row < used) {
#if GATED
        const uint from = pairs[begin + row] / TOP_K;
#else
        const uint from = begin + row;
#endif
        load8(x + size_t(from) * IN + block * 32 + eight, values);
      }
      for (int k = 0; k < 8; k++) rows[row * STRIDE + eight + k] = values[k];
    }
    const uint part = me % PARTS, which = me / PARTS % COLUMNS;
    const size_t row = size_t(expert) * OUT + min(column + which, uint(OUT - 1));
    threadgroup float* place = tile + me / PARTS * STRIDE + part * (32 / PARTS);
    if (me / PARTS < COLUMNS)
      expand<T, GATE_BITS, GATE_GROUP, IN, PARTS>(gate, gate_scales, gate_biases, row, block, part, place);
#if GATED
    else
      expand<T, UP_BITS, UP_GROUP, IN, PARTS>(up, up_scales, up_biases, row, block, part, place);
#endif
    threadgroup_sync();
    if (top < used) {
      for (int k = 0; k < 32; k += 8) {
        simdgroup_float8x8 a[2], b;
        for (int i = 0; i < 2; i++) simdgroup_load(a[i], rows + (top + 8 * i) * STRIDE + k, STRIDE);
        for (int m = 0; m < MATRICES; m++)
          for (int j = 0; j < COLUMNS / 16; j++) {
            simdgroup_load(b, tile + (m * COLUMNS + left + 8 * j) * STRIDE + k, STRIDE, ulong2(0), true);
            for (int i = 0; i < 2; i++) simdgroup_multiply_accumulate(sums[m][i][j], a[i], b, sums[m][i][j]);
          }
      }
    }
    threadgroup_sync();
  }

  // Sixteen columns of each half at a time, through the memory of the tiles.
  for (int j = 0; j < COLUMNS / 16; j++) {
    if (top < used)
      for (int m = 0; m < MATRICES; m++)
        for (int i = 0; i < 2; i++)
          simdgroup_store(sums[m][i][j], tile + m * ROWS * 16 + (top + 8 * i) * 16 + simdgroup % 2 * 8, 16);
    threadgroup_sync();
    for (uint i = me; i < used * 16; i += THREADS) {
      const uint row = i / 16, at = column + i % 16 / 8 * (COLUMNS / 2) + 8 * j + i % 8;
      float value = tile[i];
#if GATED
      value = value / (1 + exp(-value)) * tile[ROWS * 16 + i];
#endif
      if (at < OUT) out[size_t(begin + row) * OUT + at] = T(value);
    }
    threadgroup_sync();
  }
  begin = stop;
}
