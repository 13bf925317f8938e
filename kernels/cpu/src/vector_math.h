// Vectors of one width and the functions written on them. Included once for each instruction set, by
// vector_ops_*.cpp, each compiled with its own flags: everything here is local to the file that includes it,
// and uses no inline function of the standard library, which the linker might share between files.
#pragma once

#include <cstdint>

namespace mixbit {
namespace {

#if defined(MIXBIT_LANES)  // the compiler takes any width apart: tests run those that the machine has no registers for
constexpr int lanes = MIXBIT_LANES;
#elif defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float Vec __attribute__((vector_size(lanes * 4)));
typedef std::int32_t IntVec __attribute__((vector_size(lanes * 4)));
typedef float UnalignedVec __attribute__((vector_size(lanes * 4), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
inline Vec splat(float x) { return x - Vec{}; }  // x - 0 is x for every x

inline Vec load_part(const float* p, std::int64_t n) {
  float part[lanes] = {};
  for (std::int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}

inline void store_part(float* p, Vec v, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) p[i] = v[i];
}

// f(i, width) for each whole vector, then for the rest.
template <typename Whole, typename Rest>
inline void each(std::int64_t n, const Whole& whole, const Rest& rest) {
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) whole(i);
  if (i < n) rest(i, n - i);
}

// y[0 : n] = f(vectors of each input)
template <typename F, typename... In>
inline void map(std::int64_t n, float* y, const F& f, const In*... in) {
  each(
      n, [&](std::int64_t i) { store(y + i, f(load(in + i)...)); },
      [&](std::int64_t i, std::int64_t m) { store_part(y + i, f(load_part(in + i, m)...), m); });
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// f over the lanes, halves with halves.
template <int n, typename F>
inline float fold(const float (&v)[n], const F& f) {
  if constexpr (n == 1) {
    return v[0];
  } else {
    float half[n / 2];
    for (int i = 0; i < n / 2; ++i) half[i] = f(v[i], v[i + n / 2]);
    return fold<n / 2>(half, f);
  }
}

template <typename F>
inline float fold(Vec v, const F& f) {
  float values[lanes];
  store(values, v);
  return fold<lanes>(values, f);
}

inline float sum(Vec v) {
  return fold(v, [](float a, float b) { return a + b; });
}

inline float largest(Vec v) {
  return fold(v, [](float a, float b) { return a > b ? a : b; });
}

// e^x to 1-2 ulp in [-87.3, 88.3]: 2^n * e^r with |r| <= ln(2) / 2 and the polynomial of Cephes' expf.
// Below it is 0, above it stays at e^88.3. NaN stays NaN.
inline Vec exp(Vec x) {
  const Vec low = splat(-87.3f), high = splat(88.3f);
  Vec t = x > high ? high : x;
  const Vec round = splat(12582912.0f);  // 1.5 * 2^23: the sum's low bits are the nearest integer
  Vec n = (t * 1.44269504088896341f + round) - round;
  n = x < low ? Vec{} : n;
  Vec r = t - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return x < low ? Vec{} : p * (Vec)power;
}

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

// 2^x to 1-2 ulp for x <= 0; 0 below -127. NaN stays NaN. The polynomial is the best of its degree on [-0.5, 0.5].
inline Vec exp2(Vec x) {
  const Vec low = splat(-127.0f);
  Vec t = x < low ? low : x;
  const Vec round = splat(12582912.0f);  // as in exp
  Vec n = (t + round) - round;
  Vec r = t - n;
  Vec p = splat(1.3276416e-3f);
  p = p * r + 9.6755289e-3f;
  p = p * r + 5.5507133e-2f;
  p = p * r + 2.4022120e-1f;
  p = p * r + 6.9314697e-1f;
  p = p * r + 1.0f;
  IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return p * (Vec)power;
}

}  // namespace
}  // namespace mixbit
