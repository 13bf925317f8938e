// Two lanes: AVX2, FMA, F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "int8.h"

namespace mixbit {
namespace {

// How to bring sixteen fields of `width` bits to the bytes of a lane: even and odd fields apart, each by way of the
// two bytes that hold it and a product that moves it to the top of them.
struct Fields {
  alignas(32) std::uint8_t bytes[2][32];
  alignas(32) std::uint16_t factors[2][16];
};

// low, high: first bit of field 0 in each lane.
constexpr Fields fields(int width, int low, int high) {
  Fields f{};
  for (int odd = 0; odd < 2; ++odd)
    for (int i = 0; i < 16; ++i) {
      const int bit = (i < 8 ? low : high) + width * (2 * (i % 8) + odd), byte = bit / 8;
      f.bytes[odd][2 * i] = static_cast<std::uint8_t>(byte);
      f.bytes[odd][2 * i + 1] = static_cast<std::uint8_t>(byte < 15 ? byte + 1 : byte);
      f.factors[odd][i] = static_cast<std::uint16_t>(1 << (16 - width - bit % 8));
    }
  return f;
}
template <int width, int low, int high>
constexpr Fields fields_at = fields(width, low, high);

struct V {
  static constexpr int lanes = 2, tokens = 4, tiles = 2;  // 8 sums of groups; those of lanes and in all wait in memory
  static constexpr bool sums_wait = true;
  static constexpr bool narrow_sums = true;    // pairs of products are added in 16 bits
  static constexpr bool masks = true;
  template <int>
  static constexpr float offset = 0;
  using Bytes = __m256i;
  using Int = __m256i;
  using Float = __m256;

  static Int zero() { return _mm256_setzero_si256(); }
  static Float set(float x) { return _mm256_set1_ps(x); }
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static Bytes load_bytes(const std::byte* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_bytes(std::byte* p, Bytes a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static void store(float* p, Float a) { _mm256_storeu_ps(p, a); }
  template <DType type>
  static Float load_first(const std::byte* p, int n, bool more) {
    if constexpr (type == DType::f32) {
      const __m256i wanted = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
      return _mm256_maskload_ps(reinterpret_cast<const float*>(p), wanted);
    } else {
      const __m128i halves = n == 8 ? load_16(p) : more ? last_halves(p, n) : first_halves(p, n);
      if constexpr (type == DType::f16) return _mm256_cvtph_ps(halves);
      else return floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
  }
  static Bytes repeat(const std::byte* p) {
    int value;
    std::memcpy(&value, p, 4);
    return _mm256_set1_epi32(value);
  }
  static void narrow(Int a, std::byte* p) {
    const __m256i bytes = _mm256_shuffle_epi8(a, _mm256_broadcastsi128_si256(_mm_setr_epi32(0x0c080400, -1, -1, -1)));
    const __m128i all = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), all);
  }
  static void narrow_pairs(Int a, std::byte* p, std::byte* q) {
    const __m256i bytes = _mm256_shuffle_epi8(a, _mm256_broadcastsi128_si256(_mm_setr_epi32(0x0c040800, -1, -1, -1)));
    const __m128i all = _mm_unpacklo_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    const long long both = _mm_cvtsi128_si64(all);
    std::memcpy(p, &both, 4);
    std::memcpy(q, reinterpret_cast<const char*>(&both) + 4, 4);
  }
  static Float floats(Int a) { return _mm256_castsi256_ps(a); }
  static Int bits(Float a) { return _mm256_castps_si256(a); }
  static Int ints(Bytes a) { return a; }
  static Bytes bytes(Int a) { return a; }
  static Float convert(Int a) { return _mm256_cvtepi32_ps(a); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }

  static Bytes packed(const std::byte* p, int n) {
    return n == 2 ? load_bytes(p) : _mm256_zextsi128_si256(load_16(p));
  }
  static void split(Bytes v, Bytes& a, Bytes& b) {
    a = _mm256_and_si256(v, _mm256_set1_epi8(15));
    b = _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15));
  }
  template <int bits>
  static void codes(const std::byte* p, int n, Bytes& a, Bytes& b) {
    alignas(32) std::byte one[8 * bits] = {};
    if (n < 2) {
      std::memcpy(one, p, 4 * bits);
      p = one;
    }
    if constexpr (bits == 2) {
      const __m256i twice = _mm256_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11,
                                             12, 12, 13, 13, 14, 14, 15, 15);
      const __m256i v = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_16(p)), twice);
      a = crumbs(v);
      b = crumbs(_mm256_srli_epi16(v, 2));
    } else if constexpr (bits == 3) {
      const __m256i pairs = sixteen<6, 0, 32>(p, p + 8);
      a = _mm256_and_si256(pairs, _mm256_set1_epi8(7));
      b = _mm256_and_si256(_mm256_srli_epi16(pairs, 3), _mm256_set1_epi8(7));
    } else if constexpr (bits == 4) {
      split(load_bytes(p), a, b);
    } else if constexpr (bits == 5) {
      a = sixteen<5, 0, 0>(p, p + 20);
      b = sixteen<5, 0, 48>(p + 10, p + 24);
    } else if constexpr (bits == 6) {
      a = sixteen<6, 0, 0>(p, p + 24);
      b = sixteen<6, 0, 32>(p + 12, p + 32);
    } else {
      const __m256i low = load_bytes(p), high = load_bytes(p + 32);
      a = _mm256_permute2x128_si256(low, high, 0x20);
      b = _mm256_permute2x128_si256(low, high, 0x31);
    }
  }

  // A step adds four products of a code and 7 bits to each 16: 16 products of 4 bits fit, 8 of 5, 4 of 6. Codes of
  // 8 bits go as halves of 4.
  template <int bits>
  struct Partial {
    static constexpr int steps = bits == 5 ? 2 : bits == 6 ? 1 : 4;
    __m256i low = zero(), high = zero();
    explicit Partial(Int) {}
    void add(Bytes a, Bytes b, Bytes x, Bytes y) {
      if constexpr (bits < 8) {
        low = in_turn(_mm256_add_epi16(low, products(a, b, x, y)));
      } else {
        Bytes low_a, high_a, low_b, high_b;
        split(a, low_a, high_a);
        split(b, low_b, high_b);
        low = in_turn(_mm256_add_epi16(low, products(low_a, low_b, x, y)));
        high = in_turn(_mm256_add_epi16(high, products(high_a, high_b, x, y)));
      }
    }
    Int total(Int sum) const {
      sum = _mm256_add_epi32(sum, V::total(low, 1));
      return bits < 8 ? sum : _mm256_add_epi32(sum, V::total(high, 16));
    }
  };
  template <int bits>
  static Int dot(Int sum, Bytes a, Bytes b, Bytes x, Bytes y) {
    Partial<bits> partial(sum);
    partial.add(a, b, x, y);
    return partial.total(sum);
  }
  template <int bits>
  static Int add4(Int a, Int b, Int c, Int d) {
    if constexpr (bits > 4) return _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    // Half of the columns fit in 16 bits, and hadd takes four times as long.
    const Int ab = total(_mm256_packs_epi32(a, b), 1), cd = total(_mm256_packs_epi32(c, d), 1);
    return total(_mm256_packs_epi32(ab, cd), 1);
  }
  static Int add_lanes(Int a, Int b) {
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
  }

  static void transpose4(Int (&m)[4]) { transpose4(m[0], m[1], m[2], m[3]); }
  [[gnu::always_inline]] static void transpose(Int (&m)[8]) {
    transpose4(m[0], m[1], m[2], m[3]);
    transpose4(m[4], m[5], m[6], m[7]);
    for (int i = 0; i < 4; ++i) {
      const Int low = m[i], high = m[4 + i];
      m[i] = _mm256_permute2x128_si256(low, high, 0x20);
      m[4 + i] = _mm256_permute2x128_si256(low, high, 0x31);
    }
  }
  static Float strided(Float a) { return _mm256_permutevar8x32_ps(a, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)); }
  static Float spread(const float* p) {
    double both;
    std::memcpy(&both, p, 8);
    return _mm256_permutevar_ps(_mm256_castpd_ps(_mm256_set1_pd(both)), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  }
  static void fold(Float a, float* out) {
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)));
  }

 private:
  static __m128i load_16(const std::byte* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static __m256i load(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }

  // The last n of eight, then zeros.
  static __m128i last_halves(const std::byte* p, int n) {
    alignas(32) static constexpr std::int8_t places[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                           -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    const auto* from = reinterpret_cast<const std::byte*>(places) + 16 - 2 * n;
    return _mm_shuffle_epi8(load_16(p + 2 * n - 16), load_16(from));
  }
  // The first n of eight, then zeros, by loads that overlap: a load of what was just stored in parts would wait for it.
  static __m128i first_halves(const std::byte* p, int n) {
    std::uint32_t low = 0, high = 0;
    if (n >= 4) {
      const __m128i last = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 2 * n - 8));
      return _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)),
                                _mm_srl_epi64(last, _mm_cvtsi32_si128(128 - 16 * n)));
    }
    if (n >= 2) {
      std::memcpy(&low, p, 4);
      std::memcpy(&high, p + 2 * n - 4, 4);
      high = n == 2 ? 0 : high >> 16;
    } else if (n == 1) {
      std::memcpy(&low, p, 2);
    }
    return _mm_cvtsi64_si128(static_cast<long long>(std::uint64_t{high} << 32 | low));
  }
  // Keeps the compiler from making all products first and adding them in a tree, which spills every register.
  static __m256i in_turn(__m256i sum) {
    __asm__("" : "+x"(sum));
    return sum;
  }
  static __m256i products(Bytes a, Bytes b, Bytes x, Bytes y) {
    return _mm256_add_epi16(_mm256_maddubs_epi16(a, x), _mm256_maddubs_epi16(b, y));
  }
  static Int total(__m256i pairs, short factor) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(factor)); }

  // Of bytes that come twice: bits 0 and 1 of the first, 4 and 5 of the second.
  static __m256i crumbs(__m256i v) {
    return _mm256_or_si256(_mm256_and_si256(v, _mm256_set1_epi16(0x0003)),
                           _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi16(0x0300)));
  }

  // Sixteen fields of each lane, from bit `low` of 16 bytes at p and bit `high` of 16 at q.
  template <int width, int low, int high>
  static __m256i sixteen(const std::byte* p, const std::byte* q) {
    const Fields& f = fields_at<width, low, high>;
    const __m256i v = _mm256_inserti128_si256(_mm256_castsi128_si256(load_16(p)), load_16(q), 1);
    const __m256i even = _mm256_mullo_epi16(_mm256_shuffle_epi8(v, load(f.bytes[0])), load(f.factors[0]));
    const __m256i odd = _mm256_mullo_epi16(_mm256_shuffle_epi8(v, load(f.bytes[1])), load(f.factors[1]));
    const __m256i mask = _mm256_set1_epi16(((1 << width) - 1) << 8);
    return _mm256_or_si256(_mm256_srli_epi16(even, 16 - width),
                           _mm256_and_si256(_mm256_srli_epi16(odd, 8 - width), mask));
  }

  static void transpose4(Int& a, Int& b, Int& c, Int& d) {
    const Int ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
    const Int high_ab = _mm256_unpackhi_epi32(a, b), high_cd = _mm256_unpackhi_epi32(c, d);
    a = _mm256_unpacklo_epi64(ab, cd);
    b = _mm256_unpackhi_epi64(ab, cd);
    c = _mm256_unpacklo_epi64(high_ab, high_cd);
    d = _mm256_unpackhi_epi64(high_ab, high_cd);
  }
};

}  // namespace
}  // namespace mixbit

#include "int8_impl.h"

const mixbit::Int8Kernels mixbit::avx2_int8 = {matmul, quantize};
#endif
