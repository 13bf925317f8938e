// Rows of a matrix times rows of activations, as the kernels of an instruction set see them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor.h"

namespace mixbit {

struct ProductArgs {
  const std::byte* weight;
  const std::byte* scales;
  const std::byte* biases;
  DType dtype;  // of scales and biases, or of a dense weight
  int bits;     // 0: dense
  std::int64_t group_size;
  std::int64_t groups;
  std::int64_t cols;
  std::int64_t row_bytes;

  const std::byte* x;         // in the kernels' own form
  std::int64_t x_stride;      // bytes
  const std::int32_t* index;  // null: rows of x in order
  std::int64_t count;

  std::int64_t row_begin;
  std::int64_t row_end;
  float* y;
  std::int64_t y_stride;
  const std::byte* next;  // the codes that the thread reads after these rows, which it fetches near their end
};

}  // namespace mixbit
