// Activations rounded to int8, for the including int8_*.cpp; L is the number of lanes of its registers.
#include <cstring>

#include "int8.h"

namespace mixbit {
namespace {

using Index = std::int64_t;

constexpr int L = V::lanes;
constexpr int piece = 32;  // columns: the smallest group, and the part of a row in a lane

template <class T, int n>
struct VectorOf {
  typedef T Type __attribute__((vector_size(n * sizeof(T))));
};
template <class T, int n>
using Vector = typename VectorOf<T, n>::Type;

constexpr int width = 4 * L;
using Floats = Vector<float, width>;
using Ints = Vector<std::int32_t, width>;

template <class T>
inline T read_as(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

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

// Nearest integers to 32 values times `inverse`, ties to even, as codes in two halves; returns their sum. What they
// times `factor` leave of x goes to `rest`, unless that is null.
inline Floats encode(const float* x, float inverse, bool interleaved, std::byte* first, std::byte* second, float factor,
                     float* rest) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: the low byte of a sum with it is the integer
  Floats total = {};
  for (int k = 0; k < piece; k += width) {
    const Floats scaled = read_as<Floats>(x + k) * inverse;  // rounded by itself: no fused multiply-add
    const Floats shifted = scaled + magic;
    const Floats rounded = shifted - magic;
    total += rounded;
    if (rest) {
      const Floats left = read_as<Floats>(x + k) - rounded * factor;
      std::memcpy(rest + k, &left, sizeof left);
    }
    const auto codes = read_as<V::Int>(&shifted);
    if (interleaved) V::narrow_pairs(codes, first + k / 2, second + k / 2);
    else V::narrow(codes, k < 16 ? first + k : second + k - 16);
  }
  return total;
}

std::byte* place(const QuantizeArgs& args, Index at) { return args.codes + at / L * (L * piece) + at % L * 16; }

void quantize(const QuantizeArgs& args) {
  constexpr float tiny = 1e-30f;  // a group below it counts as zero: 127 / it would overflow
  const Index pieces = args.group_size / piece, groups = args.cols / args.group_size;
  for (Index g = 0; g < groups; ++g) {
    const float* x = args.x + g * args.group_size;
    const auto larger = [](auto a, auto b) { return a > b ? a : b; };
    Ints most = {};  // magnitudes as integers: NaN is above all
    for (Index i = 0; i < args.group_size; i += width) most = larger(read_as<Ints>(x + i) & 0x7fffffff, most);
    const std::int32_t peak_bits = across<std::int32_t, width>(most, larger);
    const float peak = read_as<float>(&peak_bits);
    const float factor = peak / 127, inverse = peak > tiny ? 127 / peak : 0;
    Floats sums = {};
    for (Index p = 0; p < pieces; ++p) {
      std::byte* codes = place(args, g * pieces + p);
      float* rest = args.rest ? args.rest + g * args.group_size + p * piece : nullptr;
      sums += encode(x + p * piece, inverse, args.interleaved, codes, codes + 16 * L, factor, rest);
    }
    args.factors[g] = factor;
    args.sums[g] = factor * across<float, width>(sums, [](auto a, auto b) { return a + b; });
  }
  for (Index g = groups; g % 16 != 0; ++g) args.factors[g] = args.sums[g] = 0;
  for (Index at = groups * pieces; at % L != 0; ++at) {
    std::byte* codes = place(args, at);
    std::memset(codes, 0, 16);
    std::memset(codes + 16 * L, 0, 16);
  }
}

}  // namespace
}  // namespace mixbit
