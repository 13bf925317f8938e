// Sixteen lanes: AVX-512 F, BW, DQ, VL, VNNI, VBMI.
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

// How to bring code j of 16 into lane j: the two bytes that hold it, then a shift.
struct Gather {
  alignas(64) std::uint8_t bytes[64];
  alignas(64) std::uint32_t shifts[16];
};

// The 16 codes start at bit `first` of a run of bytes that is repeated to fill a register.
constexpr Gather gather(int bits, int first) {
  Gather g{};
  for (int j = 0; j < 16; ++j) {
    const int bit = first + bits * j;
    g.bytes[4 * j] = static_cast<std::uint8_t>(bit / 8);
    g.bytes[4 * j + 1] = static_cast<std::uint8_t>((bit / 8 + 1) & 15);
    g.bytes[4 * j + 2] = g.bytes[4 * j + 3] = 0x80;  // zero
    g.shifts[j] = static_cast<std::uint32_t>(bit % 8);
  }
  return g;
}

// The run that is loaded for half `i` of 32 codes: 8 bytes up to 4 bits, else 16; never past the end.
constexpr int run_bytes(int bits) { return bits <= 4 ? 8 : 16; }
constexpr int run_start(int bits, int i) {
  const int wanted = 2 * bits * i, last = 4 * bits - run_bytes(bits);
  return wanted < last ? wanted : last;
}
template <int bits>
constexpr Gather gathers[2] = {gather(bits, 0), gather(bits, 16 * bits - 8 * run_start(bits, 1))};

struct V {
  static constexpr int width = 16, tokens = 6;  // 4 x 6 sums, 6 inputs and a weight of 32 registers
  using Reg = __m512;

  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg set1(float x) { return _mm512_set1_ps(x); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Reg a) { _mm512_storeu_ps(p, a); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }

  static Reg from_f16(const std::byte* p) { return _mm512_cvtph_ps(load_32(p)); }
  static Reg from_bf16(const std::byte* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_32(p)), 16));
  }

  template <int bits>
  static Reg codes(const std::byte* p, int i) {
    const __m512i mask = _mm512_set1_epi32((1 << bits) - 1);
    if constexpr (bits == 8) {
      return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_16(p + 16 * i)));
    } else if constexpr (bits <= 2) {  // sixteen codes in one word
      const int start = bits == 1 ? 0 : 4 * i, first = bits == 1 ? 16 * i : 0;
      const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i shifts = _mm512_add_epi32(_mm512_slli_epi32(lanes, bits - 1), _mm512_set1_epi32(first));
      const __m512i word = _mm512_set1_epi32(read<int>(p + start));
      return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srlv_epi32(word, shifts), mask));
    } else {
      p += run_start(bits, i);
      __m512i all;
      if constexpr (bits <= 4) all = _mm512_set1_epi64(read<long long>(p));
      else all = _mm512_broadcast_i32x4(load_16(p));
      all = _mm512_shuffle_epi8(all, _mm512_load_si512(gathers<bits>[i].bytes));
      all = _mm512_srlv_epi32(all, _mm512_load_si512(gathers<bits>[i].shifts));
      if constexpr (bits == 4) {  // a lookup reads the low four bits of each lane
        const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_permutexvar_ps(all, values);
      }
      return _mm512_cvtepi32_ps(_mm512_and_si512(all, mask));
    }
  }

  static float sum(Reg a) { return _mm512_reduce_add_ps(a); }
  static void sum4(Reg a, Reg b, Reg c, Reg d, float* out) {
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
  }

 private:
  static __m128i load_16(const std::byte* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static __m256i load_32(const std::byte* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static __m256 half(Reg a) { return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)); }
};

}  // namespace
}  // namespace mixbit

#include "kernels_impl.h"

const mixbit::Kernels mixbit::avx512_kernels = {matmul, unpack_row};
#endif
