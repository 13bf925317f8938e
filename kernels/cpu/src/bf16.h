// What the bfloat16 kernels of one instruction set offer to matmul.cpp: products for many rows of activations, where
// tile registers make them cheap. For their units the rule of kernels.h holds.
//
// Weights and activations are rounded to bfloat16 and their products summed in float32. Where the matrix is `fine`, both
// are sums of two: what the rounding leaves is rounded again, and of the four products all but the least are made.
//
// A row of activations is its values, and from byte `rest` on what their rounding left, if fine. Their order is that in
// which codes are unpacked: of each 64 columns first the even ones, then the odd ones, if codes are interleaved (see
// int8.h), else columns 0 to 15 and 32 to 47, then the others; with zeros up to the next multiple of 64. A panel is 16
// rows turned, pairs of values one after another: [pair][row][2], and from byte 16 * rest on the rests.
#pragma once

#include <cstddef>
#include <cstdint>

#include "product.h"

namespace mixbit {

struct Bf16Args : ProductArgs {
  const std::byte* panels;    // of all rows of x; null: there are none
  std::int64_t panel_stride;  // bytes
  std::int64_t rest;
  bool fine;
};

struct Bf16Kernels {
  void (*matmul)(const Bf16Args& args);
  // One row. rest: null, or where the rests go.
  void (*narrow)(const float* x, std::int64_t cols, bool interleaved, std::byte* values, std::byte* rest);
  // A panel of `count` rows, at most 16, and zeros, of either kind of values.
  void (*turn)(const std::byte* rows, std::int64_t stride, std::int64_t count, std::int64_t cols, std::byte* panel);
};

constexpr std::int64_t panel_rows = 16;

#if defined(__x86_64__)
extern const Bf16Kernels amx_bf16;
#endif

}  // namespace mixbit
