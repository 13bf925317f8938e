// The float32 work between the matrices, as one table of functions for each instruction set.
#pragma once

#include <cstdint>

#include "isa.h"

namespace mixbit {

// Rows of padded buffers are multiples of this many floats, the widest vector of any instruction set.
constexpr std::int64_t lane_pad = 16;
constexpr std::int64_t padded(std::int64_t n) { return (n + lane_pad - 1) / lane_pad * lane_pad; }

// The upper half of a float32.
using Bfloat16 = std::uint16_t;

// A run of keys for a tile of queries of one KV head. Keys and values within a block: see KvPool. What has a row for each
// query has room for whole tiles of 16.
template <typename Storage>
struct AttentionTile {
  const float* q;  // [rows, q_stride], times scale / ln 2; rows are (token, query head of the group); see pack_lefts
  std::int64_t rows, head_dim, q_stride, value_stride;
  std::int64_t group;    // query heads of a KV head
  std::int64_t visible;  // keys that the first token sees, counted from position 0; the next one sees one more
  const Storage* keys;   // of this KV head; block b starts at b * key_block_stride
  const Storage* values;
  std::int64_t key_block_stride, value_block_stride;
  const std::int32_t* blocks;  // of the sequence, from position 0
  std::int64_t block_size, key_stride, blocks_per_pass;
  std::int64_t begin, end;  // positions of the run; begin is a multiple of block_size
  float* scores;            // scratch [rows, blocks_per_pass * key_stride]
  float* out;               // [rows, value_stride]: sum of 2^(score - peak) * value
  float* peak;              // [rows]: largest score
  float* total;             // [rows]: sum of 2^(score - peak); 0 where a row sees none of these keys
  const Storage* next[2] = {};  // the first two blocks of keys that are read after these, or null: fetched ahead
};

// One head of the gated delta rule over `tokens` tokens, from 1 to delta_chunk_most. From delta_chunk_least on they
// are taken together.
struct DeltaRun {
  float* state;  // [key_dim, value_stride], updated; value_stride is padded
  const float* q;  // [tokens, key_dim]
  const float* k;
  std::int64_t key_dim;
  const float* v;  // [tokens, v_stride]
  std::int64_t value_stride, v_stride;
  const float* decay;  // [tokens]
  const float* beta;
  std::int64_t tokens;
  float* out;      // [tokens, value_stride]
  float* scratch;  // delta_scratch(key_dim, value_stride) floats
};

constexpr std::int64_t delta_chunk_least = 8, delta_chunk_most = 32;

constexpr std::int64_t delta_scratch(std::int64_t key_dim, std::int64_t value_stride) {
  return delta_chunk_most * (2 * key_dim + 4 * padded(delta_chunk_most) + value_stride);
}

// Nothing is aligned beyond 4 bytes, and n is any number, unless said otherwise.
struct VectorOps {
  // y = x / sqrt(mean(x^2) + eps) * factor, times weight unless it is null. y may be x.
  void (*rms_norm)(const float* x, const float* weight, float eps, float factor, std::int64_t n, float* y);
  void (*add)(const float* a, const float* b, std::int64_t n, float* y);
  // y += a * x
  void (*axpy)(float a, const float* x, std::int64_t n, float* y);
  void (*scale)(float a, std::int64_t n, float* y);
  // y = silu(gate) * up. y may be either.
  void (*silu_mul)(const float* gate, const float* up, std::int64_t n, float* y);
  // y = x * factor * sigmoid(gate)
  void (*sigmoid_mul)(const float* gate, const float* x, float factor, std::int64_t n, float* y);
  // y = e^(x - max x); returns the sum. y may be x.
  float (*softmax)(const float* x, std::int64_t n, float* y);
  // y = silu(sum of weights[j * stride + i] * inputs[j][i] over taps j)
  void (*conv_silu)(const float* const* inputs, const float* weights, std::int64_t stride, std::int64_t taps,
                    std::int64_t n, float* y);
  // Rotates the pairs (i, i + half) of x in place.
  void (*rotate)(const float* cos, const float* sin, std::int64_t half, float* x);
  // y = x rounded to the nearest bfloat16
  void (*narrow)(const float* x, std::int64_t n, Bfloat16* y);
  void (*attend)(const AttentionTile<float>& tile);
  // Over keys and values in bfloat16. pack_lefts brings q, n values with an even q_stride, into the form that it takes.
  void (*pack_lefts)(float* q, std::int64_t n);
  void (*attend_bfloat16)(const AttentionTile<Bfloat16>& tile);
  // delta_keys makes what the runs of all value heads of a key head share, in their scratch: k, q and tokens are theirs.
  void (*delta_keys)(const DeltaRun& run);
  void (*delta)(const DeltaRun& run);
};

extern const VectorOps portable_vector_ops;
#if defined(__x86_64__)
extern const VectorOps avx2_vector_ops;
extern const VectorOps avx512_vector_ops;
extern const VectorOps avx512_bf16_vector_ops;  // with the dot product of bfloat16
extern const VectorOps amx_vector_ops;
#elif defined(__aarch64__)
extern const VectorOps neon_vector_ops;
#endif

// The table of a supported instruction set.
const VectorOps& vector_ops(Isa isa);

}  // namespace mixbit
