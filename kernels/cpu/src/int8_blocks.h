// What the int8 kernels for few and for many tokens share; see int8_impl.h for `V`.
#pragma once

#include <cstring>

#include "int8.h"
#include "int8_vectors.h"

namespace mixbit {
namespace {

using Int = V::Int;
using Float = V::Float;
using Pointer = const std::byte*;

constexpr int tile_rows = 4 * L;   // rows whose codes the micro-kernel reads together; also groups of a block of scales
constexpr int piece_codes = 8 * tile_rows * 4;  // bytes of a piece of every row of the tile

// Bytes: the memory's delay, several times; where a few tokens meet each weight, it is read at its full rate.
constexpr Index far_ahead = 30000, near_ahead = 8000;

// Where the codes are that come so far after those at `from`, in the order of reading.
inline const std::byte* ahead_of(const ProductArgs& args, const std::byte* from, Index distance) {
  const std::byte *place = from + distance, *end = args.weight + args.row_end * args.row_bytes;
  return place < end ? place : args.next + (place - end);
}

// Asks for the scales and biases of `rows` rows that come `near_ahead` later: streams too thin for the processor to look ahead in.
inline void fetch_scales(const ProductArgs& args, Index row, Index rows) {
  const Index bytes = args.groups * (args.dtype == DType::f32 ? 4 : 2);
  const Index first = (row + near_ahead / args.row_bytes) * bytes;
  for (Index line = first; line < first + rows * bytes; line += 64) {
    __builtin_prefetch(args.scales + line, 0, 2);
    __builtin_prefetch(args.biases + line, 0, 2);
  }
}

template <int G>
constexpr int chunk_groups = G == 128 ? 16 : 1024 / G;

constexpr Index smaller(Index a, Index b) { return a < b ? a : b; }

const std::byte* token(const ProductArgs& args, Index i) {
  return args.x + (args.index != nullptr ? args.index[i] : i) * args.x_stride;
}

const float* floats_at(Pointer p) { return reinterpret_cast<const float*>(p); }

// Of groups from `first` on, a multiple of `most`: which have a rest in any of the tokens. most divides 64.
template <int most, int T>
std::uint64_t with_rest(const Int8Args& args, const Pointer (&x)[T], Index first) {
  std::uint64_t any = 0;
  for (int t = 0; t < T; ++t) any |= read_as<std::uint64_t>(x[t] + args.mask + first / 64 * 8);
  return any >> first % 64 & ((std::uint64_t{2} << (most - 1)) - 1);
}

// The sum of products over the four steps of a piece, kept as it comes.
template <int bits>
struct Direct {
  static constexpr int steps = 4;
  Int sum;
  explicit Direct(Int before) : sum(before) {}
  void add(V::Bytes a, V::Bytes b, V::Bytes x, V::Bytes y) { sum = V::template dot<bits>(sum, a, b, x, y); }
  Int total(Int) const { return sum; }
};
template <int bits, class W = V>
auto partial(Int before) {
  if constexpr (W::narrow_sums) return typename W::template Partial<bits>(before);
  else return Direct<bits>(before);
}

// ---- Scales and biases: blocks of 4 L groups ----

// The first `count` of 4 L scales or biases at p, then zeros. more: as many as make it whole lie before p. Nothing else is
// touched.
template <DType type, class W = V>
[[gnu::always_inline]] inline Float load_scales(Pointer p, Index count, bool more) {
  constexpr int size = type == DType::f32 ? 4 : 2;
  if constexpr (W::masks) return W::template load_first<type>(p, static_cast<int>(count), more);
  else {
    alignas(64) std::byte rest[tile_rows * size] = {};
    if (count < tile_rows) {
      for (Index i = 0; i < count; ++i) std::memcpy(rest + i * size, p + i * size, size);
      p = rest;
    }
    if constexpr (type == DType::f32) return W::load(floats_at(p));
    else if constexpr (type == DType::f16) return W::from_f16(p);
    else return W::from_bf16(p);
  }
}

// Scales and biases of groups [first, first + count) of R rows.
template <int bits, DType type, int R>
[[gnu::always_inline]] inline void load_block_part(const ProductArgs& args, const Index (&rows)[R], Index first, Index count,
                                                   Float (&scales)[R], Float (&biases)[R]) {
  constexpr int size = type == DType::f32 ? 4 : 2;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Index at = (rows[r] * args.groups + first) * size;
    scales[r] = load_scales<type>(args.scales + at, count, first > 0);
    biases[r] = load_scales<type>(args.biases + at, count, first > 0);
    if constexpr (V::template offset<bits> != 0) biases[r] = V::fma(V::set(V::template offset<bits>), scales[r], biases[r]);
  }
}

// Those of groups [first, first + 4 L), zero where there are none.
template <int bits, DType type, int R>
[[gnu::always_inline]] inline void load_block_rows(const ProductArgs& args, const Index (&rows)[R], Index first,
                                                   Float (&scales)[R], Float (&biases)[R]) {
  const Index count = args.groups - first;
  if (count >= tile_rows) return load_block_part<bits, type>(args, rows, first, tile_rows, scales, biases);
  load_block_part<bits, type>(args, rows, first, count, scales, biases);
}

}  // namespace
}  // namespace mixbit
