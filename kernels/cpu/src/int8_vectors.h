// Registers of the including file's `V` (see int8_impl.h) as vectors of numbers.
#pragma once

#include <cstdint>
#include <cstring>

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

}  // namespace
}  // namespace mixbit
