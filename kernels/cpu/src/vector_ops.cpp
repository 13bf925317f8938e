#include "vector_ops.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace mixbit {
namespace {

#if defined(__x86_64__)
bool has_bf16_dot() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1) != 0;
}
#endif

}  // namespace

const VectorOps& vector_ops(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2: return avx2_vector_ops;
    case Isa::avx512: return has_bf16_dot() ? avx512_bf16_vector_ops : avx512_vector_ops;
    case Isa::amx: return amx_vector_ops;
#elif defined(__aarch64__)
    case Isa::neon: return neon_vector_ops;
#endif
    default: return portable_vector_ops;
  }
}

}  // namespace mixbit
