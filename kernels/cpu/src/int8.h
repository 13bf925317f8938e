// What the int8 kernels of one instruction set offer to matmul.cpp. For their units the rule of kernels.h holds:
// plain data, one constant each, all else in anonymous namespaces.
//
// Activations become x = factor * code, codes in [-127, 127], one factor for each group of columns, so that
//   sum((s * q + b) * x) = s * (factor * sum(q * code)) + b * (factor * sum(code))   for each group,
// with both sums exact in int32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor.h"

namespace mixbit {

// A row of activations is codes, then factors and sums of the groups, as laid out by Int8Layout.
struct Int8Args {
  const std::byte* weight;
  const std::byte* scales;
  const std::byte* biases;
  DType dtype;  // of scales and biases
  int bits;
  std::int64_t group_size;
  std::int64_t groups;
  std::int64_t row_bytes;

  const std::byte* x;
  std::int64_t x_stride;  // bytes, as the two offsets
  std::int64_t factors;
  std::int64_t sums;
  const std::int32_t* index;  // null: rows of x in order
  std::int64_t count;

  std::int64_t row_begin;
  std::int64_t row_end;
  float* y;
  std::int64_t y_stride;
};

// One row to be quantized. Groups beyond the last get zeros, up to a multiple of 16 groups and of 128 codes.
struct QuantizeArgs {
  const float* x;
  std::int64_t cols;
  std::int64_t group_size;
  bool interleaved;  // codes of each 32 columns: even columns, then odd ones
  std::byte* codes;
  float* factors;
  float* sums;  // factor * sum of the group's codes
  float* rest;  // what the rounding leaves of x; null: not wanted
};

struct Int8Kernels {
  void (*matmul)(const Int8Args& args);
  void (*quantize)(const QuantizeArgs& args);
};

extern const Int8Kernels portable_int8;
#if defined(__x86_64__)
extern const Int8Kernels avx2_int8;
extern const Int8Kernels avx512_int8;
#elif defined(__aarch64__)
extern const Int8Kernels neon_int8;
#endif

// Up to 4 bits, 32 columns split into even and odd ones more cheaply than into halves.
constexpr bool interleaved(int bits) { return bits <= 4; }

}  // namespace mixbit
