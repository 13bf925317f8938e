// One lane in the vector extension of GCC and Clang: SSE2, NEON or whatever the target always has.
#pragma once

#include <cstring>

#include "int8.h"

namespace mixbit {
namespace {

struct V {
  static constexpr int lanes = 1, tokens = 2, tiles = 1;
  static constexpr bool sums_wait = false;
  static constexpr bool narrow_sums = false, masks = false;
  template <int>
  static constexpr float offset = 0;
  using Bytes = std::uint8_t __attribute__((vector_size(16)));
  using Int = std::int32_t __attribute__((vector_size(16)));
  using Float = float __attribute__((vector_size(16)));
  using Halves = std::uint32_t __attribute__((vector_size(16)));

  template <class T>
  static T read(const void* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }

  static Int zero() { return Int{}; }
  static Float set(float x) { return Float{x, x, x, x}; }
  static Float load(const float* p) { return read<Float>(p); }
  static Bytes load_bytes(const std::byte* p) { return read<Bytes>(p); }
  static void store_bytes(std::byte* p, Bytes a) { std::memcpy(p, &a, sizeof a); }
  static void store(float* p, Float a) { std::memcpy(p, &a, sizeof a); }
  static Halves halves(const std::byte* p) {
    const auto word = [p](int i) -> std::uint32_t { return read<std::uint16_t>(p + 2 * i); };
    return Halves{word(0), word(1), word(2), word(3)};
  }
  static Float from_bf16(const std::byte* p) { return as<Float>(halves(p) << 16); }
  // As in isa_portable.cpp: the product corrects the exponent's bias, infinity and NaN keep the largest exponent.
  static Float from_f16(const std::byte* p) {
    const Halves h = halves(p), magnitude = (h & 0x7fff) << 13;
    const Halves scaled = as<Halves>(as<Float>(magnitude) * set(0x1p112f));
    const Halves special = magnitude >= Halves{0x0f800000, 0x0f800000, 0x0f800000, 0x0f800000};
    return as<Float>(scaled | (special & 0x7f800000) | (h & 0x8000) << 16);
  }
  static Bytes repeat(const std::byte* p) {
    const auto value = read<std::int32_t>(p);
    return as<Bytes>(Int{value, value, value, value});
  }
  static void narrow(Int a, std::byte* p) {
    for (int i = 0; i < 4; ++i) p[i] = static_cast<std::byte>(a[i] & 255);
  }
  static void narrow_pairs(Int a, std::byte* p, std::byte* q) {
    for (int i = 0; i < 2; ++i) {
      p[i] = static_cast<std::byte>(a[2 * i] & 255);
      q[i] = static_cast<std::byte>(a[2 * i + 1] & 255);
    }
  }
  static Float floats(Int a) { return as<Float>(a); }
  static Int bits(Float a) { return as<Int>(a); }
  static Int ints(Bytes a) { return as<Int>(a); }
  static Bytes bytes(Int a) { return as<Bytes>(a); }
  static Float convert(Int a) { return __builtin_convertvector(a, Float); }
  static Float add(Float a, Float b) { return a + b; }
  static Float mul(Float a, Float b) { return a * b; }
  static Float fma(Float a, Float b, Float c) { return a * b + c; }

  static Bytes packed(const std::byte* p, int) { return load_bytes(p); }
  static void split(Bytes v, Bytes& a, Bytes& b) { a = v & 15, b = v >> 4; }
  // Eight codes fill `bits` bytes.
  template <int bits>
  static void codes(const std::byte* p, int, Bytes& a, Bytes& b) {
    std::uint8_t all[32];
    for (int i = 0; i < 32; i += 8, p += bits) {
      std::uint64_t word = 0;
      std::memcpy(&word, p, bits);
      for (int j = 0; j < 8; ++j) {
        const auto code = static_cast<std::uint8_t>(word >> (bits * j) & ((1u << bits) - 1));
        const int at = i + j;
        all[interleaved(bits) ? at / 2 + at % 2 * 16 : at] = code;
      }
    }
    a = read<Bytes>(all);
    b = read<Bytes>(all + 16);
  }

  template <int>
  static Int dot(Int sum, Bytes a, Bytes b, Bytes x, Bytes y) {
    std::uint8_t w[32];
    std::int8_t v[32];
    std::memcpy(w, &a, 16), std::memcpy(w + 16, &b, 16);
    std::memcpy(v, &x, 16), std::memcpy(v + 16, &y, 16);
    for (int i = 0; i < 32; ++i) sum[i / 4 % 4] += w[i] * v[i];
    return sum;
  }
  template <int>
  static Int add4(Int a, Int b, Int c, Int d) {
    const auto total = [](Int v) { return (v[0] + v[1]) + (v[2] + v[3]); };
    return Int{total(a), total(b), total(c), total(d)};
  }
  static Int add_lanes(Int a, Int b) { return a + b; }

  static void transpose4(Int (&m)[4]) {
    const Int t[4] = {m[0], m[1], m[2], m[3]};
    for (int i = 0; i < 4; ++i) m[i] = Int{t[0][i], t[1][i], t[2][i], t[3][i]};
  }
  static void transpose(Int (&m)[4]) { transpose4(m); }
  static Float strided(Float a) { return a; }
  static Float spread(const float* p) { return set(*p); }
  static void fold(Float a, float* out) { store(out, a); }

 private:
  template <class To, class From>
  static To as(From a) {
    return read<To>(&a);
  }
};

}  // namespace
}  // namespace mixbit
