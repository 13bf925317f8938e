// What the kernels of one instruction set offer to matmul.cpp.
//
// Each isa_*.cpp is compiled with flags of its own. Whatever inline function or template it emitted
// could be the copy that the linker keeps for every other file, and crash on a lesser processor. So
// these units see plain data only, define one constant each, and keep all else in anonymous namespaces.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor.h"

namespace mixbit {

struct MatmulArgs {
  const std::byte* weight;
  const std::byte* scales;
  const std::byte* biases;
  DType dtype;  // of scales and biases, or of a dense weight
  int bits;     // 0: dense
  std::int64_t group_size;
  std::int64_t groups;
  std::int64_t cols;
  std::int64_t row_bytes;

  const float* x;  // zero from cols up to the next multiple of 32
  std::int64_t x_stride;
  const float* sums;  // of x over each group, zero up to the next multiple of 16
  std::int64_t sum_stride;
  const std::int32_t* index;  // null: rows of x in order
  std::int64_t count;

  std::int64_t row_begin;
  std::int64_t row_end;
  float* y;
  std::int64_t y_stride;
};

struct Kernels {
  void (*matmul)(const MatmulArgs& args);
  void (*unpack_row)(const MatmulArgs& args, std::int64_t row, float* out);
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#elif defined(__aarch64__)
extern const Kernels neon_kernels;
#endif

}  // namespace mixbit
