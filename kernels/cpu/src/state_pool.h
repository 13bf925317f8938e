// The recurrent state of one gated delta layer, in slots.
#pragma once

#include <cstdint>

#include "buffer.h"
#include "pieces.h"
#include "vector_ops.h"

namespace mixbit {

// conv: [slots, kernel - 1, channels], the last inputs of the convolution.
// memory: [slots, value_heads, key_dim, value_stride]; value_stride is value_dim, padded.
class StatePool {
 public:
  StatePool(std::int64_t slots, std::int64_t history, std::int64_t channels, std::int64_t value_heads,
            std::int64_t key_dim, std::int64_t value_dim)
      : channels(channels),
        value_stride(padded(value_dim)),
        head_size(key_dim * value_stride),
        history_(history),
        value_heads_(value_heads),
        conv_(slots * history * channels),
        memory_(slots * value_heads * head_size) {}

  float* conv(std::int64_t slot, std::int64_t i) const { return conv_.data() + (slot * history_ + i) * channels; }
  float* memory(std::int64_t slot, std::int64_t head) const {
    return memory_.data() + (slot * value_heads_ + head) * head_size;
  }
  std::int64_t bytes() const { return (conv_.size() + memory_.size()) * std::int64_t{sizeof(float)}; }

  void list(Pieces& slots) const {
    slots.add(conv_.data(), history_ * channels * std::int64_t{sizeof(float)});
    slots.add(memory_.data(), value_heads_ * head_size * std::int64_t{sizeof(float)});
  }

  const std::int64_t channels, value_stride, head_size;

 private:
  std::int64_t history_, value_heads_;
  Buffer<float> conv_, memory_;
};

}  // namespace mixbit
