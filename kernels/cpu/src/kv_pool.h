// The KV cache of one attention layer, in blocks.
#pragma once

#include <cstdint>

#include "buffer.h"
#include "pieces.h"
#include "vector_ops.h"

namespace mixbit {

// keys: [blocks, kv_heads, head_dim, key_stride], so that one vector holds neighbouring positions;
// values: [blocks, kv_heads, block_size, value_stride]. Strides are block_size and head_dim, padded.
template <typename Storage>
class KvPool {
 public:
  KvPool(std::int64_t blocks, std::int64_t block_size, std::int64_t kv_heads, std::int64_t head_dim)
      : key_stride(padded(block_size)),
        value_stride(padded(head_dim)),
        key_head_stride(head_dim * key_stride),
        value_head_stride(block_size * value_stride),
        key_block_stride(kv_heads * key_head_stride),
        value_block_stride(kv_heads * value_head_stride),
        keys_(blocks * key_block_stride),
        values_(blocks * value_block_stride) {}

  const Storage* keys(std::int64_t head) const { return keys_.data() + head * key_head_stride; }
  const Storage* values(std::int64_t head) const { return values_.data() + head * value_head_stride; }
  std::int64_t bytes() const { return (keys_.size() + values_.size()) * static_cast<std::int64_t>(sizeof(Storage)); }

  void list(Pieces& blocks) const {
    blocks.add(keys_.data(), key_block_stride * std::int64_t{sizeof(Storage)});
    blocks.add(values_.data(), value_block_stride * std::int64_t{sizeof(Storage)});
  }

  // k, v: [head_dim] of the token at `place` of `block`.
  void write(std::int64_t block, std::int64_t place, std::int64_t head, const float* k, const float* v,
             std::int64_t head_dim) {
    Storage* keys = keys_.data() + block * key_block_stride + head * key_head_stride + place;
    Storage* values = values_.data() + block * value_block_stride + head * value_head_stride + place * value_stride;
    for (std::int64_t d = 0; d < head_dim; ++d) keys[d * key_stride] = static_cast<Storage>(k[d]);
    for (std::int64_t d = 0; d < head_dim; ++d) values[d] = static_cast<Storage>(v[d]);
  }

  const std::int64_t key_stride, value_stride;
  const std::int64_t key_head_stride, value_head_stride;
  const std::int64_t key_block_stride, value_block_stride;

 private:
  Buffer<Storage> keys_, values_;
};

}  // namespace mixbit
