// Eight lanes: AVX2, FMA, F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace mixbit {
namespace {

template <class T>
T read(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

struct V {
  static constexpr int width = 8, tokens = 3;  // 4 x 3 sums, 3 inputs and a weight: all 16 registers
  using Reg = __m256;

  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg set1(float x) { return _mm256_set1_ps(x); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Reg a) { _mm256_storeu_ps(p, a); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }

  static Reg from_f16(const std::byte* p) { return _mm256_cvtph_ps(load_16(p)); }
  static Reg from_bf16(const std::byte* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16(p)), 16));
  }

  // Up to 4 bits, eight codes lie in one word; above, each half of the register has its own.
  template <int bits>
  static Reg codes(const std::byte* p, int i) {
    __m256i all;
    if constexpr (bits == 8) {
      all = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i)));
    } else {
      const Place low = place<bits>(2 * i), high = bits <= 4 ? Place{low.start, low.shift + 4 * bits} : place<bits>(2 * i + 1);
      all = word(p + low.start);
      if constexpr (bits > 4) all = _mm256_blend_epi32(all, word(p + high.start), 0xf0);
      all = _mm256_srlv_epi32(all, shifts(low.shift, high.shift, bits));
      all = _mm256_and_si256(all, _mm256_set1_epi32((1 << bits) - 1));
    }
    return _mm256_cvtepi32_ps(all);
  }

  static float sum(Reg a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static void sum4(Reg a, Reg b, Reg c, Reg d, float* out) {
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
  }

 private:
  static __m128i load_16(const std::byte* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static __m256i word(const std::byte* p) { return _mm256_set1_epi32(read<int>(p)); }

  // Where the word that holds codes [4 * quad, 4 * quad + 4) of 32 starts, and their first bit in it.
  struct Place {
    int start, shift;
  };
  template <int bits>
  static constexpr Place place(int quad) {
    const int wanted = bits * quad / 2, last = 4 * bits - 4, start = wanted < last ? wanted : last;
    return {start, 4 * bits * quad - 8 * start};
  }
  static __m256i shifts(int low, int high, int bits) {
    return _mm256_setr_epi32(low, low + bits, low + 2 * bits, low + 3 * bits, high, high + bits, high + 2 * bits,
                             high + 3 * bits);
  }
};

}  // namespace
}  // namespace mixbit

#include "kernels_impl.h"

const mixbit::Kernels mixbit::avx2_kernels = {matmul, unpack_row};
#endif
