#include "vector_ops.h"

namespace mixbit {

const VectorOps& vector_ops(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2: return avx2_vector_ops;
    case Isa::avx512: return avx512_vector_ops;
#elif defined(__aarch64__)
    case Isa::neon: return neon_vector_ops;
#endif
    default: return portable_vector_ops;
  }
}

}  // namespace mixbit
