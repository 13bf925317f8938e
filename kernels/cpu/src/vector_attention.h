// Attention of a tile of queries over a run of keys. Included once for each instruction set (see vector_math.h).
#pragma once

#include "vector_math.h"
#include "vector_ops.h"

namespace mixbit {
namespace {

inline Vec load_stored(const float* p) { return load(p); }

// c[rows, width * lanes] += a[rows, depth] * b[depth, width * lanes], each element summed in order of depth.
template <int rows, int width, typename Storage>
inline void multiply_block(const float* a, std::int64_t a_stride, const Storage* b, std::int64_t b_stride,
                           std::int64_t depth, float* c, std::int64_t c_stride) {
  Vec total[rows][width];
  for (int r = 0; r < rows; ++r) {
    for (int w = 0; w < width; ++w) total[r][w] = load(c + r * c_stride + w * lanes);
  }
  for (std::int64_t d = 0; d < depth; ++d) {
    Vec right[width];
    for (int w = 0; w < width; ++w) right[w] = load_stored(b + d * b_stride + w * lanes);
    for (int r = 0; r < rows; ++r) {
      const Vec left = splat(a[r * a_stride + d]);
      for (int w = 0; w < width; ++w) total[r][w] += left * right[w];
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int w = 0; w < width; ++w) store(c + r * c_stride + w * lanes, total[r][w]);
  }
}

// The last `rows` < most rows of a.
template <int most, int width, typename Storage>
inline void multiply_rest(const float* a, std::int64_t a_stride, const Storage* b, std::int64_t b_stride,
                          std::int64_t depth, float* c, std::int64_t c_stride, std::int64_t rows) {
  if constexpr (most > 1) {
    if (rows == most - 1) return multiply_block<most - 1, width>(a, a_stride, b, b_stride, depth, c, c_stride);
    multiply_rest<most - 1, width>(a, a_stride, b, b_stride, depth, c, c_stride, rows);
  }
}

template <int width, typename Storage>
inline void multiply_columns(const float* a, std::int64_t a_stride, const Storage* b, std::int64_t b_stride,
                             std::int64_t depth, float* c, std::int64_t c_stride, std::int64_t rows) {
  constexpr int most = 6;  // with width 2: 12 sums, two operands and a broadcast in 16 registers
  for (; rows >= most; rows -= most, a += most * a_stride, c += most * c_stride) {
    multiply_block<most, width>(a, a_stride, b, b_stride, depth, c, c_stride);
  }
  if (rows > 0) multiply_rest<most, width>(a, a_stride, b, b_stride, depth, c, c_stride, rows);
}

// c[rows, columns] += a[rows, depth] * b[depth, columns]; columns are a multiple of lane_pad. Few rows take wide
// steps, so that there are sums enough to hide the latency of an fma; each sum has one order whatever the step.
template <typename Storage>
inline void multiply(const float* a, std::int64_t a_stride, const Storage* b, std::int64_t b_stride,
                     std::int64_t depth, float* c, std::int64_t c_stride, std::int64_t rows, std::int64_t columns) {
  std::int64_t i = 0;
  if (rows <= 3) {
    for (; i + 4 * lanes <= columns; i += 4 * lanes) {
      multiply_rest<4, 4>(a, a_stride, b + i, b_stride, depth, c + i, c_stride, rows);
    }
  }
  for (; i + 2 * lanes <= columns; i += 2 * lanes) {
    multiply_columns<2>(a, a_stride, b + i, b_stride, depth, c + i, c_stride, rows);
  }
  for (; i < columns; i += lanes) {
    multiply_columns<1>(a, a_stride, b + i, b_stride, depth, c + i, c_stride, rows);
  }
}

inline void fill(float* p, std::int64_t n, float x) {
  for (std::int64_t i = 0; i < n; ++i) p[i] = x;
}

// Scores of one row become weights e^(score - peak); what the row has gathered so far is brought to the new peak.
inline void weigh(float* scores, std::int64_t n, float* out, std::int64_t out_n, float& peak, float& total) {
  Vec peaks = splat(peak);
  for (std::int64_t i = 0; i < n; i += lanes) peaks = max(peaks, load(scores + i));
  const float new_peak = largest(peaks);
  Vec totals = {};
  for (std::int64_t i = 0; i < n; i += lanes) {
    Vec e = exp(load(scores + i) - new_peak);
    totals += e;
    store(scores + i, e);
  }
  if (new_peak != peak) {
    const float keep = exp1(peak - new_peak);
    total *= keep;
    for (std::int64_t i = 0; i < out_n; i += lanes) store(out + i, load(out + i) * keep);
    peak = new_peak;
  }
  total += sum(totals);
}

// Scores of a pass: t.scores[r, j * key_stride + i] for key i of block j, minus infinity for what r does not see.
template <typename Storage>
inline void score(const AttentionTile<Storage>& t, const std::int32_t* pass_blocks, std::int64_t blocks,
                  std::int64_t start) {
  const std::int64_t stride = t.blocks_per_pass * t.key_stride;
  for (std::int64_t r = 0; r < t.rows; ++r) fill(t.scores + r * stride, blocks * t.key_stride, 0.0f);
  for (std::int64_t j = 0; j < blocks; ++j) {
    multiply(t.q, t.head_dim, t.keys + pass_blocks[j] * t.key_block_stride, t.key_stride, t.head_dim,
             t.scores + j * t.key_stride, stride, t.rows, t.key_stride);
  }
  for (std::int64_t r = 0; r < t.rows; ++r) {
    std::int64_t seen = t.visible + r / t.group - start;
    for (std::int64_t j = 0; j < blocks; ++j, seen -= t.block_size) {
      const std::int64_t kept = seen < 0 ? 0 : seen < t.block_size ? seen : t.block_size;
      fill(t.scores + r * stride + j * t.key_stride + kept, t.key_stride - kept, -__builtin_inff());
    }
  }
}

// Online softmax (arXiv:1805.02867), a pass of blocks at a time. A row's result depends on its own keys only.
template <typename Storage>
void attend(const AttentionTile<Storage>& t) {
  const std::int64_t stride = t.blocks_per_pass * t.key_stride;
  const std::int64_t pass = t.blocks_per_pass * t.block_size;
  fill(t.out, t.rows * t.value_stride, 0.0f);
  fill(t.peak, t.rows, -__builtin_inff());
  fill(t.total, t.rows, 0.0f);
  for (std::int64_t start = t.begin; start < t.end; start += pass) {
    const std::int64_t keys = t.end - start < pass ? t.end - start : pass;
    const std::int64_t blocks = (keys + t.block_size - 1) / t.block_size;
    const std::int32_t* pass_blocks = t.blocks + start / t.block_size;
    score(t, pass_blocks, blocks, start);
    for (std::int64_t r = 0; r < t.rows; ++r) {
      if (t.visible + r / t.group <= start) {
        fill(t.scores + r * stride, blocks * t.key_stride, 0.0f);
      } else {
        weigh(t.scores + r * stride, blocks * t.key_stride, t.out + r * t.value_stride, t.value_stride, t.peak[r],
              t.total[r]);
      }
    }
    for (std::int64_t j = 0; j < blocks; ++j) {
      const std::int64_t left = keys - j * t.block_size;
      multiply(t.scores + j * t.key_stride, stride, t.values + pass_blocks[j] * t.value_block_stride, t.value_stride,
               left < t.block_size ? left : t.block_size, t.out, t.value_stride, t.rows, t.value_stride);
    }
  }
}

}  // namespace
}  // namespace mixbit
