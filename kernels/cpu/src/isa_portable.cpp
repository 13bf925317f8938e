// Four lanes in the vector extension of GCC and Clang: SSE2, NEON or whatever the target always has.
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
  static constexpr int width = 4, tokens = 2;
  using Reg = float __attribute__((vector_size(16)));
  using Words = std::uint32_t __attribute__((vector_size(16)));
  using Ints = std::int32_t __attribute__((vector_size(16)));

  static Reg zero() { return Reg{}; }
  static Reg set1(float x) { return Reg{x, x, x, x}; }
  static Reg load(const float* p) { return read<Reg>(p); }
  static void store(float* p, Reg a) { std::memcpy(p, &a, sizeof a); }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }

  static Words halves(const std::byte* p) {
    const auto word = [p](int i) -> std::uint32_t { return read<std::uint16_t>(p + 2 * i); };
    return Words{word(0), word(1), word(2), word(3)};
  }
  static Reg from_bf16(const std::byte* p) { return read_bits(halves(p) << 16); }

  // Moves exponent and fraction into place, then corrects the exponent's bias by a product, which also
  // makes subnormals right; infinity and NaN keep the largest exponent.
  static Reg from_f16(const std::byte* p) {
    const Words h = halves(p), magnitude = (h & 0x7fff) << 13;
    const Words scaled = bits_of(read_bits(magnitude) * set1(0x1p112f));
    const Words special = magnitude >= Words{0x0f800000, 0x0f800000, 0x0f800000, 0x0f800000};
    return read_bits(scaled | (special & 0x7f800000) | (h & 0x8000) << 16);
  }

  // Four codes end within 32 bits. Masked where they are, they are exact floats up to a power of two.
  template <int bits>
  static Reg codes(const std::byte* p, int i) {
    if constexpr (bits == 8) {
      p += 4 * i;
      const auto code = [p](int j) { return static_cast<float>(static_cast<std::uint8_t>(p[j])); };
      return Reg{code(0), code(1), code(2), code(3)};
    } else {
      constexpr std::uint32_t mask = (1u << bits) - 1;
      const int wanted = bits * i / 2, last = 4 * bits - 4;
      const int start = wanted < last ? wanted : last;
      const std::uint32_t word = read<std::uint32_t>(p + start) >> (4 * bits * i - 8 * start);
      const Words all = Words{word, word, word, word} & Words{mask, mask << bits, mask << 2 * bits, mask << 3 * bits};
      constexpr float step = 1.0f / (1 << bits);
      return __builtin_convertvector(reinterpret_cast<const Ints&>(all), Reg) *
             Reg{1.0f, step, step * step, step * step * step};
    }
  }

  static float sum(Reg a) { return (a[0] + a[1]) + (a[2] + a[3]); }
  static void sum4(Reg a, Reg b, Reg c, Reg d, float* out) {
    out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
  }

 private:
  static Words bits_of(Reg a) { return read<Words>(&a); }
  static Reg read_bits(Words a) { return read<Reg>(&a); }
};

}  // namespace
}  // namespace mixbit

#include "kernels_impl.h"

const mixbit::Kernels mixbit::portable_kernels = {matmul, unpack_row};
