// Activations rounded to int8, for the including int8_*.cpp; L is the number of lanes of its registers.
#include "int8.h"
#include "int8_vectors.h"

namespace mixbit {
namespace {

// f over the values of v, halves at a time.
template <class T, int n, class F>
inline T across(Vector<T, n> v, F f) {
  if constexpr (n == 4) return f(f(v[0], v[1]), f(v[2], v[3]));
  else {
    Vector<T, n / 2> low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const std::byte*>(&v) + sizeof low, sizeof high);
    return across<T, n / 2>(f(low, high), f);
  }
}

// A group's codes, from x times `inverse` to the nearest integers, ties to even, in two halves a piece; returns their
// sum. What they times `factor` leave of x goes to `left`, unless that is null.
inline float encode(const float* x, Index size, float inverse, float factor, bool interleaved, std::byte* codes, Index at,
                    float* left) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: the low byte of a sum with it is the integer
  Floats total = {};
  for (Index p = 0; p < size; p += piece, ++at) {
    std::byte* first = codes + at / L * (L * piece) + at % L * 16;
    std::byte* second = first + 16 * L;
    for (int k = 0; k < piece; k += width) {
      const Floats values = read_as<Floats>(x + p + k);
      const Floats scaled = values * inverse;  // rounded by itself: no fused multiply-add
      const Floats shifted = scaled + magic;
      const Floats rounded = shifted - magic;
      total += rounded;
      if (left) {
        const Floats rest = values - rounded * factor;
        std::memcpy(left + p + k, &rest, sizeof rest);
      }
      const auto bytes = read_as<V::Int>(&shifted);
      if (interleaved) V::narrow_pairs(bytes, first + k / 2, second + k / 2);
      else V::narrow(bytes, k < 16 ? first + k : second + k - 16);
    }
  }
  return across<float, width>(total, [](auto a, auto b) { return a + b; });
}

// Largest magnitude; NaN is above all.
inline float peak_of(const float* x, Index size) {
  const auto larger = [](auto a, auto b) { return a > b ? a : b; };
  Ints most = {};  // magnitudes as integers
  for (Index i = 0; i < size; i += width) most = larger(read_as<Ints>(x + i) & 0x7fffffff, most);
  const std::int32_t bits = across<std::int32_t, width>(most, larger);
  return read_as<float>(&bits);
}

// A group below it counts as zero: 127 / it would overflow.
inline float inverse_of(float peak) { return peak > 1e-30f ? 127 / peak : 0; }

void quantize(const QuantizeArgs& args) {
  const Index size = args.group_size, pieces = size / piece, groups = args.cols / size;
  const Index padded = (groups + 15) / 16 * 16;
  float squares = 0;
  for (Index g = 0; g < groups; ++g) {
    args.factors[g] = peak_of(args.x + g * size, size);
    squares += args.factors[g] * args.factors[g];
  }
  const float most = args.spread * (squares / static_cast<float>(groups));
  std::memset(args.mask, 0, static_cast<std::size_t>((groups + 63) / 64 * 8));
  std::memset(args.rest_factors, 0, static_cast<std::size_t>(padded) * sizeof(float));
  std::memset(args.rest, 0, static_cast<std::size_t>((groups * pieces + L - 1) / L * (L * piece)));
  for (Index g = 0; g < groups; ++g) {
    const float peak = args.factors[g], factor = peak / 127;
    const bool coarse = peak * peak > most;
    float left[128];
    const auto code = [&](const float* x, float inverse, std::byte* codes, float* rest) {
      return encode(x, size, inverse, factor, args.interleaved, codes, g * pieces, rest);
    };
    const float sum = code(args.x + g * size, inverse_of(peak), args.codes, coarse ? left : nullptr);
    args.factors[g] = factor;
    args.sums[g] = factor * sum;
    if (!coarse) continue;
    const float rest_peak = peak_of(left, size), rest_factor = rest_peak / 127;
    const float rest_sum = code(left, inverse_of(rest_peak), args.rest, nullptr);
    args.rest_factors[g] = rest_factor;
    args.sums[g] += rest_factor * rest_sum;
    args.mask[g / 64] |= std::uint64_t{1} << g % 64;
  }
  for (Index g = groups; g < padded; ++g) args.factors[g] = args.sums[g] = 0;
  for (Index at = groups * pieces; at % L != 0; ++at) {
    std::byte* codes = args.codes + at / L * (L * piece) + at % L * 16;
    std::memset(codes, 0, 16);
    std::memset(codes + 16 * L, 0, 16);
  }
}

}  // namespace
}  // namespace mixbit
