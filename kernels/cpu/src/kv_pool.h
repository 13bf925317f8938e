// The KV cache of one attention layer, in blocks.
#pragma once

#include <cstdint>
#include <type_traits>

#include "buffer.h"
#include "pieces.h"
#include "vector_ops.h"

namespace mixbit {

// The summed dimension of both products lies in steps of `depth` neighbours (see vector_formats.h):
// keys: [blocks, kv_heads, steps of head_dim, key_stride, depth], so that one vector holds neighbouring positions;
// values: [blocks, kv_heads, steps of block_size, value_stride, depth]. Strides are block_size and head_dim, padded.
template <typename Storage>
class KvPool {
 public:
  static constexpr std::int64_t depth = std::is_same_v<Storage, float> ? 1 : 2;

  KvPool(std::int64_t blocks, std::int64_t block_size, std::int64_t kv_heads, std::int64_t head_dim)
      : key_stride(padded(block_size)),
        value_stride(padded(head_dim)),
        key_head_stride(steps(head_dim) * depth * key_stride),
        value_head_stride(steps(block_size) * depth * value_stride),
        key_block_stride(kv_heads * key_head_stride),
        value_block_stride(kv_heads * value_head_stride),
        head_dim_(head_dim),
        keys_(blocks * key_block_stride),
        values_(blocks * value_block_stride) {}

  static constexpr std::int64_t steps(std::int64_t n) { return (n + depth - 1) / depth; }

  const Storage* keys(std::int64_t head) const { return keys_.data() + head * key_head_stride; }
  const Storage* values(std::int64_t head) const { return values_.data() + head * value_head_stride; }
  std::int64_t bytes() const { return (keys_.size() + values_.size()) * static_cast<std::int64_t>(sizeof(Storage)); }

  void list(Pieces& blocks) const {
    blocks.add(keys_.data(), key_block_stride * std::int64_t{sizeof(Storage)});
    blocks.add(values_.data(), value_block_stride * std::int64_t{sizeof(Storage)});
  }

  // k, v: [head_dim, padded to steps with zeros] of the token at `place` of `block`. last: no later token of the
  // block is written with it. What lies beside the last value in its step meets zero, and so must be finite.
  void write(std::int64_t block, std::int64_t place, std::int64_t head, const Storage* k, const Storage* v, bool last) {
    Storage* keys = keys_.data() + block * key_block_stride + head * key_head_stride + place * depth;
    for (std::int64_t s = 0; s < steps(head_dim_); ++s) {
      for (std::int64_t i = 0; i < depth; ++i) keys[s * key_stride * depth + i] = k[s * depth + i];
    }
    Storage* values = values_.data() + block * value_block_stride + head * value_head_stride +
                      place / depth * depth * value_stride + place % depth;
    for (std::int64_t d = 0; d < head_dim_; ++d) values[d * depth] = v[d];
    if (depth == 1 || place % depth != 0 || !last) return;
    for (std::int64_t d = 0; d < head_dim_; ++d) values[d * depth + 1] = Storage{};
  }

  const std::int64_t key_stride, value_stride;
  const std::int64_t key_head_stride, value_head_stride;
  const std::int64_t key_block_stride, value_block_stride;

 private:
  std::int64_t head_dim_;
  Buffer<Storage> keys_, values_;
};

}  // namespace mixbit
