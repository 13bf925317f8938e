// Four lanes: AVX-512 F, BW, DQ, VL, VNNI, VBMI. For the files whose flags allow them.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "int8.h"

namespace mixbit {
namespace {

struct Table {
  alignas(64) std::uint8_t at[64];
};

// Up to 4 bits: the bytes that hold codes 16 h .. 16 h + 15 of 32, to each half h of a lane.
constexpr Table spread_bytes(int bits) {
  Table t{};
  for (int i = 0; i < 64; ++i) {
    const int lane = i / 16, half = i / 8 % 2, byte = i % 8;
    t.at[i] = static_cast<std::uint8_t>(4 * bits * lane + 2 * bits * half + byte);
  }
  return t;
}

// Above: the bytes that hold eight codes, to each half of a lane, 64 columns one after another.
constexpr Table row_bytes(int bits) {
  Table t{};
  for (int i = 0; i < 64; ++i) t.at[i] = static_cast<std::uint8_t>(bits * (i / 8) + i % 8);
  return t;
}

// Bit offsets of eight codes, each `step` after the other.
constexpr Table bit_offsets(int first, int step) {
  Table t{};
  for (int i = 0; i < 64; ++i) t.at[i] = static_cast<std::uint8_t>(first + step * (i % 8));
  return t;
}

template <int bits>
constexpr Table wanted_bytes = bits <= 4 ? spread_bytes(bits) : row_bytes(bits);
template <int bits>
constexpr Table first_offsets = bit_offsets(0, bits <= 4 ? 2 * bits : bits);
template <int bits>
constexpr Table second_offsets = bit_offsets(bits, 2 * bits);

struct V {
  static constexpr int lanes = 4, tokens = 8, tiles = 1;  // 8 sums of groups, 8 of lanes, 8 in all
  static constexpr bool sums_wait = false;
  static constexpr bool narrow_sums = false, masks = true;
  template <int>
  static constexpr float offset = 0;
  using Bytes = __m512i;
  using Int = __m512i;
  using Float = __m512;

  static Int zero() { return _mm512_setzero_si512(); }
  static Float set(float x) { return _mm512_set1_ps(x); }
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static Bytes load_bytes(const std::byte* p) { return _mm512_loadu_si512(p); }
  static void store_bytes(std::byte* p, Bytes a) { _mm512_storeu_si512(p, a); }
  static void store(float* p, Float a) { _mm512_storeu_ps(p, a); }
  template <DType type>
  static Float load_first(const std::byte* p, int n, bool) {
    const auto some = static_cast<__mmask16>((1u << n) - 1);
    if constexpr (type == DType::f32) return _mm512_maskz_loadu_ps(some, p);
    const __m256i halves = _mm256_maskz_loadu_epi16(some, p);
    if constexpr (type == DType::f16) return _mm512_cvtph_ps(halves);
    return floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  static Bytes repeat(const std::byte* p) {
    int value;
    std::memcpy(&value, p, 4);
    return _mm512_set1_epi32(value);
  }
  static void narrow(Int a, std::byte* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }
  static void narrow_pairs(Int a, std::byte* p, std::byte* q) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi64_epi8(a));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(q), _mm512_cvtepi64_epi8(_mm512_srli_epi64(a, 32)));
  }
  static Float floats(Int a) { return _mm512_castsi512_ps(a); }
  static Int bits(Float a) { return _mm512_castps_si512(a); }
  static Int ints(Bytes a) { return a; }
  static Bytes bytes(Int a) { return a; }
  static Float convert(Int a) { return _mm512_cvtepi32_ps(a); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }

  static Bytes packed(const std::byte* p, int n) { return part<64>(p, 16 * n); }
  static void split(Bytes v, Bytes& a, Bytes& b) {
    a = _mm512_and_si512(v, _mm512_set1_epi8(15));
    b = _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15));
  }
  template <int bits>
  static void codes(const std::byte* p, int n, Bytes& a, Bytes& b) {
    const __m512i mask = _mm512_set1_epi8((1 << bits) - 1);
    if constexpr (bits == 4) {
      split(packed(p, n), a, b);
    } else if constexpr (bits < 4) {
      const __m512i v = _mm512_permutexvar_epi8(table(wanted_bytes<bits>), part<16 * bits>(p, 4 * bits * n));
      a = _mm512_and_si512(_mm512_multishift_epi64_epi8(table(first_offsets<bits>), v), mask);
      b = _mm512_and_si512(_mm512_multishift_epi64_epi8(table(second_offsets<bits>), v), mask);
    } else {
      const __m512i low = run<bits>(p, 4 * bits * n), high = run<bits>(p + 8 * bits, 4 * bits * (n - 2));
      a = _mm512_shuffle_i32x4(low, high, 0x88);
      b = _mm512_shuffle_i32x4(low, high, 0xdd);
    }
  }

  template <int>
  static Int dot(Int sum, Bytes a, Bytes b, Bytes x, Bytes y) {
    return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, a, x), b, y);
  }
  template <int>
  static Int add4(Int a, Int b, Int c, Int d) {
    const Int ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const Int cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  }
  static Int add_lanes(Int a, Int b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  }

  static void transpose4(Int (&m)[4]) { transpose4(m[0], m[1], m[2], m[3]); }
  static void transpose(Int (&m)[16]) {
    for (int i = 0; i < 16; i += 4) transpose4(m[i], m[i + 1], m[i + 2], m[i + 3]);
    Int t[16];
    for (int i = 0; i < 4; ++i) {
      const Int a = _mm512_shuffle_i32x4(m[i], m[4 + i], 0x44), b = _mm512_shuffle_i32x4(m[8 + i], m[12 + i], 0x44);
      const Int c = _mm512_shuffle_i32x4(m[i], m[4 + i], 0xee), d = _mm512_shuffle_i32x4(m[8 + i], m[12 + i], 0xee);
      t[i] = _mm512_shuffle_i32x4(a, b, 0x88);
      t[4 + i] = _mm512_shuffle_i32x4(a, b, 0xdd);
      t[8 + i] = _mm512_shuffle_i32x4(c, d, 0x88);
      t[12 + i] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
    for (int i = 0; i < 16; ++i) m[i] = t[i];
  }
  static Float strided(Float a) {
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), a);
  }
  static Float spread(const float* p) {
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(lane, _mm512_castps128_ps512(_mm_loadu_ps(p)));
  }
  static void fold(Float a, float* out) {
    __m128 s = _mm_add_ps(_mm512_castps512_ps128(a), _mm512_extractf32x4_ps(a, 1));
    s = _mm_add_ps(s, _mm512_extractf32x4_ps(a, 2));
    _mm_storeu_ps(out, _mm_add_ps(s, _mm512_extractf32x4_ps(a, 3)));
  }

 private:
  static __m512i table(const Table& t) { return _mm512_load_si512(t.at); }

  // The first `here` of `whole` bytes; nothing beyond them is touched.
  template <int whole>
  static __m512i part(const std::byte* p, int here) {
    constexpr int every = whole >= 64 ? 64 : whole;
    const int count = here < every ? (here > 0 ? here : 0) : every;
    if (count == 64) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi8((1ull << count) - 1, p);
  }

  // 64 codes, one after another.
  template <int bits>
  static __m512i run(const std::byte* p, int here) {
    const __m512i v = part<8 * bits>(p, here);
    if constexpr (bits == 8) return v;
    const __m512i spread = _mm512_permutexvar_epi8(table(wanted_bytes<bits>), v);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(table(first_offsets<bits>), spread),
                            _mm512_set1_epi8((1 << bits) - 1));
  }

  static void transpose4(Int& a, Int& b, Int& c, Int& d) {
    const Int ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
    const Int high_ab = _mm512_unpackhi_epi32(a, b), high_cd = _mm512_unpackhi_epi32(c, d);
    a = _mm512_unpacklo_epi64(ab, cd);
    b = _mm512_unpackhi_epi64(ab, cd);
    c = _mm512_unpacklo_epi64(high_ab, high_cd);
    d = _mm512_unpackhi_epi64(high_ab, high_cd);
  }
};

}  // namespace
}  // namespace mixbit
