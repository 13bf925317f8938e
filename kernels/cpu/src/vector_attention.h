// Attention of a tile of queries over a run of keys. Included once for each instruction set (see vector_math.h).
#pragma once

#include "vector_formats.h"
#include "vector_math.h"
#include "vector_ops.h"
#include "vector_product.h"

namespace mixbit {
namespace {

inline void fill(float* p, std::int64_t n, float x) {
  for (std::int64_t i = 0; i < n; ++i) p[i] = x;
}

// Scores of one row become weights 2^(score - peak), in the form that F multiplies; what the row has gathered so far
// is brought to the new peak. n is a multiple of lane_pad.
template <typename F>
inline void weigh(float* scores, std::int64_t n, float* out, std::int64_t out_n, float& peak, float& total) {
  Vec peaks = splat(peak);
  for (std::int64_t i = 0; i < n; i += lanes) peaks = max(peaks, load(scores + i));
  const float new_peak = largest(peaks);
  Vec totals = {};
  for (std::int64_t i = 0; i < n; i += lanes) {
    Vec e = exp2(load(scores + i) - new_peak);
    totals += e;
    F::store_left(scores, i, e);
  }
  if (new_peak != peak) {
    const float keep = exp2(splat(peak - new_peak))[0];
    total *= keep;
    for (std::int64_t i = 0; i < out_n; i += lanes) store(out + i, load(out + i) * keep);
    peak = new_peak;
  }
  total += sum(totals);
}

// Of a block's keys: as many as of its values, or so.
template <typename F>
inline std::int64_t key_bytes(const AttentionTile<typename F::Stored>& t) {
  return (t.head_dim + F::depth - 1) / F::depth * F::depth * t.key_stride * std::int64_t{sizeof *t.keys};
}

// Scores of a pass: t.scores[r, j * key_stride + i] for key i of block j, minus infinity for what r does not see.
template <typename F>
inline void score(const AttentionTile<typename F::Stored>& t, const std::int32_t* pass_blocks, std::int64_t blocks,
                  std::int64_t start, std::int64_t stride, const std::int32_t* end) {
  const std::int64_t steps = (t.head_dim + F::depth - 1) / F::depth;
  for (std::int64_t j = 0; j < blocks; ++j) {
    // Blocks lie anywhere, and processors only look ahead within a page.
    const std::int32_t* block = pass_blocks + j;
    const void* keys = end - block > 2 ? t.keys + block[2] * t.key_block_stride : nullptr;
    multiply(Product<F>{F::left(t.q), t.q_stride * F::lefts / F::depth, 0, t.keys, t.key_stride * F::depth,
                        t.key_block_stride, block, steps, steps, 0, t.scores + j * t.key_stride, stride, t.rows,
                        t.key_stride, {t.values + *block * t.value_block_stride, keys}, key_bytes<F>(t)});
  }
  for (std::int64_t r = 0; r < t.rows; ++r) {
    std::int64_t seen = t.visible + r / t.group - start;
    if (t.key_stride == t.block_size && seen >= blocks * t.block_size) continue;
    for (std::int64_t j = 0; j < blocks; ++j, seen -= t.block_size) {
      const std::int64_t kept = seen < 0 ? 0 : seen < t.block_size ? seen : t.block_size;
      fill(t.scores + r * stride + j * t.key_stride + kept, t.key_stride - kept, -__builtin_inff());
    }
  }
}

// Online softmax (arXiv:1805.02867), a pass of blocks at a time. A row's result depends on its own keys only.
template <typename F>
void attend(const AttentionTile<typename F::Stored>& t) {
  const std::int64_t stride = t.blocks_per_pass * t.key_stride;
  const std::int64_t pass = t.blocks_per_pass * t.block_size;
  const std::int32_t* end = t.blocks + (t.end + t.block_size - 1) / t.block_size;
  fill(t.out, t.rows * t.value_stride, 0.0f);
  fill(t.peak, t.rows, -__builtin_inff());
  fill(t.total, t.rows, 0.0f);
  for (std::int64_t start = t.begin; start < t.end; start += pass) {
    const std::int64_t keys = t.end - start < pass ? t.end - start : pass;
    const std::int64_t blocks = (keys + t.block_size - 1) / t.block_size;
    const std::int32_t* pass_blocks = t.blocks + start / t.block_size;
    score<F>(t, pass_blocks, blocks, start, stride, end);
    for (std::int64_t r = 0; r < t.rows; ++r) {
      if (t.visible + r / t.group <= start) {
        fill(t.scores + r * stride, blocks * t.key_stride, 0.0f);
      } else {
        weigh<F>(t.scores + r * stride, blocks * t.key_stride, t.out + r * t.value_stride, t.value_stride, t.peak[r],
                 t.total[r]);
      }
    }
    const std::int64_t in_block = (t.block_size + F::depth - 1) / F::depth;
    const bool last = start + pass >= t.end;
    const std::int64_t in_last = (keys - (blocks - 1) * t.block_size + F::depth - 1) / F::depth;
    multiply(Product<F>{F::left(t.scores), stride, t.key_stride * F::lefts / F::depth, t.values,
                        t.value_stride * F::depth, t.value_block_stride, pass_blocks, in_block,
                        (blocks - 1) * in_block + in_last, 1, t.out, t.value_stride, t.rows, t.value_stride,
                        {last ? t.next[0] : nullptr, last ? t.next[1] : nullptr}, key_bytes<F>(t)});
  }
}

}  // namespace
}  // namespace mixbit
