#if defined(__x86_64__)
#include "int8_avx512.h"
#include "tile_registers.h"

namespace mixbit {
namespace {

// Sixteen and Halves of bf16_unpack.h.
using FloatVec = float __attribute__((vector_size(64)));
using HalfVec = std::uint16_t __attribute__((vector_size(64)));

inline HalfVec in_turn(FloatVec a, FloatVec b) { return (HalfVec)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }
inline HalfVec lookup(HalfVec table, HalfVec index) {
  return (HalfVec)_mm512_permutexvar_epi16((__m512i)index, (__m512i)table);
}

inline HalfVec widen(const std::byte* p) {
  return (HalfVec)_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline FloatVec widen_to_float(const std::byte* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

}  // namespace
}  // namespace mixbit

#include "bf16_tmm.h"

const mixbit::Bf16Kernels mixbit::amx_bf16 = {mixbit::matmul, mixbit::narrow, mixbit::turn};
#endif
