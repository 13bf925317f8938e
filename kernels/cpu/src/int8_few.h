// int8, few tokens: four rows at a time, from code to product in registers.
#pragma once

#include "int8_blocks.h"

namespace mixbit {
namespace {

// Scales or biases of a chunk of four rows in the order of their use: entry j is [group j L + lane][row].
template <int G>
using ChunkOfFour = Float[chunk_groups<G> / L];

[[gnu::always_inline]] inline void transpose_block(const Float (&m)[4], Float* to) {
  Int t[4];
  for (int r = 0; r < 4; ++r) t[r] = V::bits(V::strided(m[r]));
  V::transpose4(t);
  for (int r = 0; r < 4; ++r) to[r] = V::floats(t[r]);
}

template <int bits, int G, DType type>
void load_chunk_of(const Int8Args& args, const Index (&rows)[4], Index first, Index groups, ChunkOfFour<G>& scales,
                   ChunkOfFour<G>& biases) {
  for (Index at = 0; at < groups; at += tile_rows) {
    Float s[4], b[4];
    load_block_rows<bits, type>(args, rows, first + at, s, b);
    transpose_block(s, scales + at / L);
    transpose_block(b, biases + at / L);
  }
}

template <int bits, int G>
void load_chunk(const Int8Args& args, const Index (&rows)[4], Index first, Index groups, ChunkOfFour<G>& scales,
                ChunkOfFour<G>& biases) {
  switch (args.dtype) {
    case DType::f16: return load_chunk_of<bits, G, DType::f16>(args, rows, first, groups, scales, biases);
    case DType::bf16: return load_chunk_of<bits, G, DType::bf16>(args, rows, first, groups, scales, biases);
    default: return load_chunk_of<bits, G, DType::f32>(args, rows, first, groups, scales, biases);
  }
}

// sums[t] = [part][row] over the L parts of G / 32 pieces from piece `at`; `left` pieces are there.
template <int bits, int P, int T>
[[gnu::always_inline]] inline void dot_parts(const Pointer (&w)[4], const Pointer (&x)[T], Index at, Index left, Int (&sums)[T]) {
  if constexpr (P == 1) {
    if (left <= 0) {
      for (int t = 0; t < T; ++t) sums[t] = V::zero();
      return;
    }
    const int present = left < L ? static_cast<int>(left) : L;
    V::Bytes a[4], b[4];
    for (int r = 0; r < 4; ++r) V::template codes<bits>(w[r] + at * (4 * bits), present, a[r], b[r]);
    for (int t = 0; t < T; ++t) {
      const V::Bytes xa = V::load_bytes(x[t] + at * piece), xb = V::load_bytes(x[t] + at * piece + 16 * L);
      Int d[4];
      for (int r = 0; r < 4; ++r) d[r] = V::template dot<bits>(V::zero(), a[r], b[r], xa, xb);
      sums[t] = V::template add4<bits>(d[0], d[1], d[2], d[3]);
    }
  } else {
    Int more[T];
    dot_parts<bits, P / 2, T>(w, x, at, left, sums);
    dot_parts<bits, P / 2, T>(w, x, at + L * P / 2, left - L * P / 2, more);
    for (int t = 0; t < T; ++t) sums[t] = V::add_lanes(sums[t], more[t]);
  }
}

template <int bits, int G, int T>
void few_rows(const Int8Args& args, Index row) {
  constexpr int P = G / piece;
  const int valid = static_cast<int>(smaller(4, args.row_end - row));
  Index rows[4];
  Pointer w[4], x[T];
  for (int r = 0; r < 4; ++r) {
    rows[r] = row + (r < valid ? r : 0);
    w[r] = args.weight + rows[r] * args.row_bytes;
  }
  for (int t = 0; t < T; ++t) x[t] = token(args, t);

  Pointer x_rest[T];
  for (int t = 0; t < T; ++t) x_rest[t] = x[t] + args.rest;

  alignas(64) float total[T][4] = {};
  ChunkOfFour<G> scales, biases;
  for (Index first = 0; first < args.groups; first += chunk_groups<G>) {
    const Index groups = smaller(chunk_groups<G>, args.groups - first);
    load_chunk<bits, G>(args, rows, first, groups, scales, biases);
    Float sums[T], rests[T];
    for (int t = 0; t < T; ++t) sums[t] = rests[t] = V::floats(V::zero());
    const Pointer ahead = ahead_of(args, args.weight + row * args.row_bytes + first * P * 16 * bits, far_ahead);
    for (Index at = 0; at < groups; at += L) {
      Int dots[T];
      const Index left = (groups - at) * P;
      if (left >= L * P) dot_parts<bits, P, T>(w, x, (first + at) * P, L * P, dots);
      else dot_parts<bits, P, T>(w, x, (first + at) * P, left, dots);
      for (int line = 0; line < L * P * 16 * bits; line += 64)
        __builtin_prefetch(ahead + at * P * 16 * bits + line, 0, 2);  // into the second-level cache
      for (int t = 0; t < T; ++t) {
        const Float factor = V::spread(floats_at(x[t] + args.factors) + first + at);
        const Float x_sum = V::spread(floats_at(x[t] + args.sums) + first + at);
        sums[t] = V::fma(V::mul(V::convert(dots[t]), factor), scales[at / L], sums[t]);
        sums[t] = V::fma(biases[at / L], x_sum, sums[t]);
      }
    }
    for (std::uint64_t rest = with_rest<chunk_groups<G>>(args, x, first); rest != 0;) {
      const Index at = __builtin_ctzll(rest) / L * L, left = smaller((groups - at) * P, L * P);
      rest &= ~(((std::uint64_t{1} << L) - 1) << at);
      Int dots[T];
      dot_parts<bits, P, T>(w, x_rest, (first + at) * P, left, dots);
      for (int t = 0; t < T; ++t) {
        const Float factor = V::spread(floats_at(x[t] + args.rest_factors) + first + at);
        rests[t] = V::fma(V::mul(V::convert(dots[t]), factor), scales[at / L], rests[t]);
      }
    }
    for (int t = 0; t < T; ++t) {
      alignas(16) float part[4];
      V::fold(V::add(sums[t], rests[t]), part);
      for (int r = 0; r < 4; ++r) total[t][r] += part[r];
    }
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < valid; ++r) args.y[t * args.y_stride + row + r] = total[t][r];
}

template <int bits, int G, int T>
void few(const Int8Args& args) {
  for (Index row = args.row_begin; row < args.row_end; row += 4) few_rows<bits, G, T>(args, row);
}

}  // namespace
}  // namespace mixbit
