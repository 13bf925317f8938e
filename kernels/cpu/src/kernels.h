// What the kernels of one instruction set offer to matmul.cpp.
//
// Each isa_*.cpp is compiled with flags of its own. Whatever inline function or template it emitted
// could be the copy that the linker keeps for every other file, and crash on a lesser processor. So
// these units see plain data only, define one constant each, and keep all else in anonymous namespaces.
#pragma once

#include <cstddef>
#include <cstdint>

#include "product.h"

namespace mixbit {

// x: rows of float32, zero from cols up to the next multiple of 32.
struct MatmulArgs : ProductArgs {
  const float* sums;        // of x over each group, zero up to the next multiple of 16
  std::int64_t sum_stride;  // values
};

struct Kernels {
  void (*matmul)(const MatmulArgs& args);
  void (*unpack_row)(const ProductArgs& args, std::int64_t row, float* out);
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#elif defined(__aarch64__)
extern const Kernels neon_kernels;
#endif

}  // namespace mixbit
