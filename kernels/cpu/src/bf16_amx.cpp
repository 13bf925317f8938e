#if defined(__x86_64__)
#include "int8_avx512.h"
#include "tile_registers.h"

namespace mixbit {
namespace {

// As the vectors of bf16_unpack.h.
using Sixteen_ = float __attribute__((vector_size(64)));
using Halves_ = std::uint16_t __attribute__((vector_size(64)));

inline Halves_ in_turn(Sixteen_ a, Sixteen_ b) { return (Halves_)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }
inline Halves_ lookup(Halves_ table, Halves_ index) {
  return (Halves_)_mm512_permutexvar_epi16((__m512i)index, (__m512i)table);
}

inline Halves_ widen(const std::byte* p) {
  return (Halves_)_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Sixteen_ widen_to_float(const std::byte* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

}  // namespace
}  // namespace mixbit

#include "bf16_tmm.h"

const mixbit::Bf16Kernels mixbit::amx_bf16 = {mixbit::matmul, mixbit::narrow, mixbit::turn};
#endif
