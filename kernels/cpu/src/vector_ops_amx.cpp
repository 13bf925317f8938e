// AVX-512 with bfloat16, and attention on tile registers.
#if defined(__x86_64__)
#include "tile_registers.h"
#include "vector_kernels.h"
#include "vector_tiles.h"

namespace mixbit {
namespace {

constexpr VectorOps with_tiles() {
  VectorOps ops = table;
  ops.attend_bfloat16 = attend_on_tiles<Bfloat16s>;
  return ops;
}

}  // namespace
}  // namespace mixbit

const mixbit::VectorOps mixbit::amx_vector_ops = mixbit::with_tiles();
#endif
