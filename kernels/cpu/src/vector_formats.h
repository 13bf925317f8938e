// What attention multiplies: how keys and values are stored, and what they are multiplied with ("left"). A step of
// the summed dimension is `depth` stored values, neighbours in memory, and `lefts` left ones. Included once for each
// instruction set (see vector_math.h).
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "vector_math.h"
#include "vector_ops.h"

namespace mixbit {
namespace {

// float32 with float32.
struct Floats {
  using Stored = float;
  using Left = float;
  static constexpr int depth = 1, lefts = 1;
  static constexpr int most_rows = lanes == 16 ? 12 : 6;  // of two vectors: the sums, the operands, a broadcast

  static const Left* left(const float* p) { return p; }
  static void store_left(float* row, std::int64_t i, Vec v) { store(row + i, v); }

  template <int rows, int width>
  static inline void add(Vec (&total)[rows][width], const Left* a, std::int64_t a_stride, const Stored* b) {
    Vec right[width];
    for (int w = 0; w < width; ++w) right[w] = load(b + w * lanes);
    for (int r = 0; r < rows; ++r) {
      const Vec left = splat(a[r * a_stride]);
      for (int w = 0; w < width; ++w) total[r][w] += left * right[w];
    }
  }
};

#if defined(__AVX512BF16__)

// bfloat16 with bfloat16, pairs summed by one instruction.
struct Bfloat16s {
  using Stored = Bfloat16;
  using Left = std::int32_t;  // a pair
  static constexpr int depth = 2, lefts = 1;
  static constexpr int most_rows = 12;

  static const Left* left(const float* p) { return reinterpret_cast<const Left*>(p); }

  // In place: a row of pairs takes half of the room.
  static void store_left(float* row, std::int64_t i, Vec v) {
    const auto narrow = (__m256i)_mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(reinterpret_cast<char*>(row) + 2 * i, &narrow, sizeof narrow);
  }

  template <int rows, int width>
  static inline void add(Vec (&total)[rows][width], const Left* a, std::int64_t a_stride, const Stored* b) {
    __m512bh right[width];
    for (int w = 0; w < width; ++w) right[w] = (__m512bh)_mm512_loadu_si512(b + 2 * w * lanes);
    for (int r = 0; r < rows; ++r) {
      const auto left = (__m512bh)_mm512_set1_epi32(a[r * a_stride]);
      for (int w = 0; w < width; ++w) total[r][w] = (Vec)_mm512_dpbf16_ps((__m512)total[r][w], right[w], left);
    }
  }
};

// n, a multiple of 2, values become n / 2 pairs, in place.
inline void pack_lefts(float* p, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) Bfloat16s::store_left(p, i, load(p + i));
  for (; i < n; i += 2) {
    const __m128i pair = (__m128i)_mm_cvtneps_pbh(_mm_set_ps(0, 0, p[i + 1], p[i]));
    __builtin_memcpy(reinterpret_cast<char*>(p) + 2 * i, &pair, 4);
  }
}

#else

// bfloat16 widened to float32 as it is read: the upper half of a float32.
struct Bfloat16s {
  using Stored = Bfloat16;
  using Left = float;
  static constexpr int depth = 2, lefts = 2;
  static constexpr int most_rows = lanes == 16 ? 12 : 4;

  static const Left* left(const float* p) { return p; }
  static void store_left(float* row, std::int64_t i, Vec v) { store(row + i, v); }

  template <int rows, int width>
  static inline void add(Vec (&total)[rows][width], const Left* a, std::int64_t a_stride, const Stored* b) {
    Vec even[width], odd[width];
    for (int w = 0; w < width; ++w) {
      IntVec pair;
      __builtin_memcpy(&pair, b + 2 * w * lanes, sizeof pair);
      even[w] = (Vec)(pair << 16);
      odd[w] = (Vec)(pair & -65536);
    }
    for (int r = 0; r < rows; ++r) {
      const Vec first = splat(a[r * a_stride]), second = splat(a[r * a_stride + 1]);
      for (int w = 0; w < width; ++w) total[r][w] += first * even[w];
      for (int w = 0; w < width; ++w) total[r][w] += second * odd[w];
    }
  }
};

inline void pack_lefts(float*, std::int64_t) {}

#endif

// y = x rounded to the nearest bfloat16, ties to even; NaN stays NaN.
inline void narrow(const float* x, std::int64_t n, Bfloat16* y) {
  for (std::int64_t i = 0; i < n; ++i) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof bits);
    const std::uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    y[i] = static_cast<Bfloat16>((x[i] == x[i] ? rounded : bits | 0x400000) >> 16);
  }
}

}  // namespace
}  // namespace mixbit
