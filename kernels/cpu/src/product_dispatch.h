// A product by its width and group size, for each of which the including file defines matmul_of<bits, G>(args).
#pragma once

#include "product.h"

namespace mixbit {
namespace {

template <int bits, class Args>
void matmul_bits(const Args& args) {
  switch (args.group_size) {
    case 32: return matmul_of<bits, 32>(args);
    case 64: return matmul_of<bits, 64>(args);
    case 128: return matmul_of<bits, 128>(args);
    default: return;
  }
}

template <class Args>
void matmul(const Args& args) {
  switch (args.bits) {
    case 2: return matmul_bits<2>(args);
    case 3: return matmul_bits<3>(args);
    case 4: return matmul_bits<4>(args);
    case 5: return matmul_bits<5>(args);
    case 6: return matmul_bits<6>(args);
    case 8: return matmul_bits<8>(args);
    default: return;
  }
}

}  // namespace
}  // namespace mixbit
