#include "platform.metal"

// Rows of a quantized matrix times activations. Thirty-two codes of any width fill BITS words and lie in one
// group, so they are the unit of work at every width: sum_i (s q_i + b) x_i = s sum q_i x_i + b sum x_i, where
// the sum of x serves every row.

template <int BITS>
inline void load_words(const device uint* p, thread uint* words) {
  if (BITS % 4 == 0) {
    for (int i = 0; i < BITS / 4; i++) {
      const uint4 w = ((const device uint4*)p)[i];
      words[4 * i] = w.x, words[4 * i + 1] = w.y, words[4 * i + 2] = w.z, words[4 * i + 3] = w.w;
    }
  } else if (BITS % 2 == 0) {
    for (int i = 0; i < BITS / 2; i++) {
      const uint2 w = ((const device uint2*)p)[i];
      words[2 * i] = w.x, words[2 * i + 1] = w.y;
    }
  } else {
    for (int i = 0; i < BITS; i++) words[i] = p[i];
  }
}

// Code `index` of the thirty-two in `words`.
template <int BITS>
inline float code_at(const thread uint* words, int index) {
  const int word = index * BITS / 32, shift = index * BITS % 32;
  if (shift + BITS <= 32) return code<BITS>(words[word], shift);
  return code<BITS>(funnel(words[word], words[word + 1], shift), 0);
}

// sums[r][t] += row rows[r] of the matrix times x[t], over the columns of this lane: lane `part` of LANES has
// every LANES-th block of 32 columns. rows: [ROWS] indices; x: [TOKENS] pointers to IN values.
template <typename T, int BITS, int GROUP, int IN, int ROWS, int TOKENS, int LANES>
inline void dot_rows(const device uint* codes, const device T* scales, const device T* biases,
                     const thread uint* rows, const device T* const thread* x, uint part, thread float* sums) {
  for (uint block = part; block < IN / 32; block += LANES) {
    uint words[ROWS][BITS];
    float scale[ROWS], bias[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      load_words<BITS>(codes + rows[r] * (IN / 32 * BITS) + block * BITS, words[r]);
      scale[r] = float(scales[rows[r] * (IN / GROUP) + block * 32 / GROUP]);
      bias[r] = float(biases[rows[r] * (IN / GROUP) + block * 32 / GROUP]);
    }
    float products[ROWS][TOKENS], sum_of_x[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      sum_of_x[t] = 0;
#pragma unroll
      for (int r = 0; r < ROWS; r++) products[r][t] = 0;
    }
#pragma unroll
    for (int eighth = 0; eighth < 4; eighth++) {
      float q[ROWS][8];
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int i = 0; i < 8; i++) q[r][i] = code_at<BITS>(words[r], 8 * eighth + i);
      }
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        float values[8];
        load8(x[t] + block * 32 + eighth * 8, values);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          sum_of_x[t] += values[i];
#pragma unroll
          for (int r = 0; r < ROWS; r++) products[r][t] += q[r][i] * values[i];
        }
      }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        sums[r * TOKENS + t] += scale[r] * sum_of_codes<BITS>(products[r][t], sum_of_x[t]) + bias[r] * sum_of_x[t];
    }
  }
}
