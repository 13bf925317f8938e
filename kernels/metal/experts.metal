#include "dot.metal"

// A SwiGLU feed-forward of a few rows, in two launches: hidden() and project(). A "job" is a row of x with the
// expert it goes through, or with a matrix that every row goes through (expert 0 of a stack of one).

inline float silu(float x) { return x / (1 + exp(-x)); }

// The rows of a simdgroup: ROWS for each of its 32 / LANES parts.
template <int ROWS, int LANES, int OUT>
inline uint pick_rows(uint simdgroup, uint lane, thread uint* rows) {
  const uint first = (simdgroup * (32 / LANES) + lane / LANES) * ROWS;
  for (int r = 0; r < ROWS; r++) rows[r] = min(first + r, uint(OUT - 1));
  return first;
}

// out[row] = silu(gate[row] x) * (up[row] x) for the rows of one simdgroup. HIDDEN rows of IN values an expert.
template <typename T, int GATE_BITS, int GATE_GROUP, int UP_BITS, int UP_GROUP, int IN, int HIDDEN, int ROWS, int LANES>
inline void hidden_rows(const device uint* gate, const device T* gate_scales, const device T* gate_biases,
                        const device uint* up, const device T* up_scales, const device T* up_biases, uint expert,
                        const device T* x, device T* out, uint simdgroup, uint lane) {
  uint rows[ROWS];
  const uint first = pick_rows<ROWS, LANES, HIDDEN>(simdgroup, lane, rows);
  const device T* inputs[1] = {x};
  float gates[ROWS], ups[ROWS];
  for (int r = 0; r < ROWS; r++) gates[r] = ups[r] = 0;
  const size_t row = size_t(expert) * HIDDEN;
  dot_rows<T, GATE_BITS, GATE_GROUP, IN, ROWS, 1, LANES>(
      gate + row * (IN / 32 * GATE_BITS), gate_scales + row * (IN / GATE_GROUP),
      gate_biases + row * (IN / GATE_GROUP), rows, inputs, lane % LANES, gates);
  dot_rows<T, UP_BITS, UP_GROUP, IN, ROWS, 1, LANES>(up + row * (IN / 32 * UP_BITS), up_scales + row * (IN / UP_GROUP),
                                                     up_biases + row * (IN / UP_GROUP), rows, inputs, lane % LANES, ups);
  for (int r = 0; r < ROWS; r++) {
    const float g = lanes_sum<LANES>(gates[r]), u = lanes_sum<LANES>(ups[r]);
    if (lane % LANES == 0 && first + r < HIDDEN) out[first + r] = T(silu(g) * u);
  }
}

// sums[r] += weight * (down[rows[r]] h), this lane's columns of it.
template <typename T, int BITS, int GROUP, int HIDDEN, int OUT, int ROWS, int LANES>
inline void project_rows(const device uint* down, const device T* scales, const device T* biases, uint expert,
                         const device T* h, float weight, const thread uint* rows, uint lane, thread float* sums) {
  const device T* inputs[1] = {h};
  float products[ROWS];
  for (int r = 0; r < ROWS; r++) products[r] = 0;
  const size_t row = size_t(expert) * OUT;
  dot_rows<T, BITS, GROUP, HIDDEN, ROWS, 1, LANES>(down + row * (HIDDEN / 32 * BITS), scales + row * (HIDDEN / GROUP),
                                                   biases + row * (HIDDEN / GROUP), rows, inputs, lane % LANES, products);
  for (int r = 0; r < ROWS; r++) sums[r] += weight * products[r];
}
