// What the int8 kernels of one instruction set offer to matmul.cpp. For their units the rule of kernels.h holds:
// plain data, one constant each, all else in anonymous namespaces.
//
// Activations become x = factor * code, codes in [-127, 127], one factor for each group of columns, so that
//   sum((s * q + b) * x) = s * (factor * sum(q * code)) + b * (factor * sum(code))   for each group,
// with both sums exact in int32. The error of a group grows with its peak, and few groups have large ones: what the
// rounding leaves of those is rounded again, and is a second factor and code (the group's `rest`).
#pragma once

#include <cstddef>
#include <cstdint>

#include "product.h"

namespace mixbit {

// A row of activations is codes, then factors and sums of the groups, then codes and factors of the rests, zero where
// there are none, then a mask of the groups that have one, in words of 64.
struct Int8Args : ProductArgs {
  std::int64_t factors;  // bytes from the beginning of a row, as the other offsets
  std::int64_t sums;     // of both codes, each times its factor
  std::int64_t rest;
  std::int64_t rest_factors;
  std::int64_t mask;
};

// One row to be quantized. Groups beyond the last get zeros, up to a multiple of 16 groups and of 128 codes. A group has
// a rest if the square of its peak is more than `spread` times the mean over the row's groups.
struct QuantizeArgs {
  const float* x;
  std::int64_t cols;
  std::int64_t group_size;
  bool interleaved;  // codes of each 32 columns: even columns, then odd ones
  float spread;
  std::byte* codes;
  float* factors;
  float* sums;
  std::byte* rest;
  float* rest_factors;
  std::uint64_t* mask;
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
