// The part of Metal's language and library that our kernels use, for clang on the host.
// Address spaces are clang's own, so that the compiler refuses to mix them.
#pragma once

#include "runtime.h"

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#pragma GCC poison vertex fragment

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
#define half _Float16  // a keyword in Metal: no name for anything else
#define bfloat __bf16
typedef half float16_t;
typedef bfloat bfloat16_t;

#define METAL_VECTORS(T)                             \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
METAL_VECTORS(float)
METAL_VECTORS(int)
METAL_VECTORS(uint)
METAL_VECTORS(ushort)
METAL_VECTORS(uchar)
typedef half half2 __attribute__((ext_vector_type(2)));
typedef half half4 __attribute__((ext_vector_type(4)));
typedef bfloat bfloat2 __attribute__((ext_vector_type(2)));
typedef bfloat bfloat4 __attribute__((ext_vector_type(4)));

template <typename To, typename From>
inline To as_type(From value) {
  return __builtin_bit_cast(To, value);
}

namespace metal {

template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));

#define METAL_UNARY(name) \
  inline float name(float x) { return __builtin_##name##f(x); }
METAL_UNARY(exp)
METAL_UNARY(log)
METAL_UNARY(sqrt)
METAL_UNARY(sin)
METAL_UNARY(cos)
METAL_UNARY(floor)
inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float fabs(float x) { return __builtin_fabsf(x); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline uint popcount(uint x) { return __builtin_popcount(x); }
inline uint extract_bits(uint x, uint offset, uint bits) { return x >> offset & ((1u << bits) - 1); }

#define METAL_ORDER(T)                                  \
  inline T min(T a, T b) { return b < a ? b : a; }      \
  inline T max(T a, T b) { return a < b ? b : a; }      \
  inline T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }
METAL_ORDER(float)
METAL_ORDER(int)
METAL_ORDER(uint)

namespace precise {
using metal::cos;
using metal::exp;
using metal::log;
using metal::rsqrt;
using metal::sin;
using metal::sqrt;
}  // namespace precise
namespace fast = precise;

// --- barriers ---

enum class mem_flags { mem_none = 0, mem_device = 1 << METAL_DEVICE, mem_threadgroup = 1 << METAL_THREADGROUP };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

inline void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  metal_barrier(METAL_THREADGROUP_BARRIER, int(flags), line);
}
inline void simdgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  metal_barrier(METAL_SIMDGROUP_BARRIER, int(flags), line);
}

// --- simd operations: every lane of the simdgroup must take part ---

template <typename T>
struct Lanes {
  const char* slots;
  T operator[](uint lane) const { return *(const T*)(slots + 16 * lane); }
};

template <typename T>
inline Lanes<T> exchange(T value, int line) {
  return {(const char*)metal_exchange(&value, sizeof(T), line)};
}

#define METAL_REDUCE(name, expression)                                                      \
  template <typename T>                                                                     \
  inline T simd_##name(T value, int line = __builtin_LINE()) {                              \
    const Lanes<T> lanes = exchange(value, line);                                           \
    T a = lanes[0];                                                                         \
    for (uint i = 1; i < metal_lanes(); i++) {                                              \
      const T b = lanes[i];                                                                 \
      a = expression;                                                                       \
    }                                                                                       \
    return a;                                                                               \
  }
METAL_REDUCE(sum, a + b)
METAL_REDUCE(max, a < b ? b : a)
METAL_REDUCE(min, b < a ? b : a)

template <typename T>
inline T read_lane(T value, uint lane, int line) {
  const Lanes<T> lanes = exchange(value, line);
  metal_require_lane(lane, line);
  return lanes[lane];
}
template <typename T>
inline T simd_shuffle(T value, ushort lane, int line = __builtin_LINE()) {
  return read_lane(value, lane, line);
}
template <typename T>
inline T simd_broadcast(T value, ushort lane, int line = __builtin_LINE()) {
  return read_lane(value, lane, line);
}
template <typename T>
inline T simd_shuffle_xor(T value, ushort mask, int line = __builtin_LINE()) {
  return read_lane(value, metal_lane() ^ mask, line);
}
// Lanes past the end keep an undefined value on the GPU: here all ones, which is NaN for floats.
template <typename T>
inline T simd_shuffle_down(T value, ushort delta, int line = __builtin_LINE()) {
  const Lanes<T> lanes = exchange(value, line);
  T undefined;
  __builtin_memset(&undefined, 0xff, sizeof(T));
  return metal_lane() + delta < metal_lanes() ? lanes[metal_lane() + delta] : undefined;
}

}  // namespace metal

using namespace metal;
