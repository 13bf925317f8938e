// int8, many tokens: tiles of codes as bytes, then every token: first the rests, few and anywhere, then all codes.
#pragma once

#include <utility>

#include "int8_tile.h"

namespace mixbit {
namespace {

constexpr int tiles = 2;          // filled together, so that tokens come from memory once for both
constexpr int block_tokens = 64;  // whose rests are listed together
constexpr int slice_blocks = 8;   // that meet a tile while it is filled

// dots[t][n] += [row of tile n] over the piece's steps [first, first + those that a partial sum holds), its codes at w.
template <int bits, int G, int N, int T, int... i>
inline void dot_steps(const std::byte* w, const Pointer (&x)[T], Index x_at, int first, Int (&dots)[T][N],
                      std::integer_sequence<int, i...>) {
  using Sum = decltype(partial<bits>(V::zero()));
  Sum sums[T * N] = {Sum(dots[i / N][i % N])...};
  for (int s = first; s < first + Sum::steps; ++s) {
    V::Bytes a[N], b[N];
    for (int n = 0; n < N; ++n) {
      const std::byte* codes = w + n * Index{sizeof(Tile<G>)} + s * 4 * tile_rows;
      a[n] = V::load_bytes(codes), b[n] = V::load_bytes(codes + 16 * tile_rows);
    }
    for (int t = 0; t < T; ++t) {
      const V::Bytes xa = V::repeat(x[t] + x_at + 4 * s), xb = V::repeat(x[t] + x_at + 4 * s + 16 * L);
      for (int n = 0; n < N; ++n) sums[t * N + n].add(a[n], b[n], xa, xb);
    }
  }
  ((dots[i / N][i % N] = sums[i].total(dots[i / N][i % N])), ...);
}

// dots[t][n] = [row of tile n] over the group's codes, with those of x at x[t] + codes.
template <int bits, int G, int N, int T>
inline void dot_group(const Tile<G>* tile, Index g, const Pointer (&x)[T], Index codes, Int (&dots)[T][N]) {
  for (auto& of_token : dots)
    for (Int& dot : of_token) dot = V::zero();
#pragma GCC unroll 4
  for (int p = 0; p < G / piece; ++p) {
    const Index at = g * (G / piece) + p, x_at = codes + at / L * (L * piece) + at % L * 16;
    constexpr int steps = decltype(partial<bits>(V::zero()))::steps;
    for (int first = 0; first < 4; first += steps)
      dot_steps<bits, G, N, T>(tile->codes + at * piece_codes, x, x_at, first, dots,
                               std::make_integer_sequence<int, T * N>());
  }
}

// Which tokens of a block have a rest, for each group of a chunk.
template <int G>
struct RestLists {
  std::uint8_t counts[chunk_groups<G>];
  std::uint8_t tokens[chunk_groups<G>][block_tokens];
};

// The sums over rests: [token of the block][tile][partial sum].
using RestSums = Float[block_tokens][tiles][L];

template <int G>
void list_rests(const Int8Args& args, Index first, Index begin, Index count, RestLists<G>& lists) {
  std::memset(lists.counts, 0, sizeof lists.counts);
  for (Index i = 0; i < count; ++i) {
    const Pointer x[] = {token(args, begin + i)};
    for (std::uint64_t left = with_rest<chunk_groups<G>>(args, x, first); left != 0; left &= left - 1) {
      const int g = __builtin_ctzll(left);
      lists.tokens[g][lists.counts[g]++] = static_cast<std::uint8_t>(i);
    }
  }
}

// Adds the rests that T tokens have in group g of the chunk. sums: from the first of N tiles on.
template <int bits, int G, int N, int T>
inline void add_rests(const Int8Args& args, const Tile<G>* tile, Index first, Index g, Index begin,
                      const std::uint8_t* tokens, Float (*sums)[tiles][L]) {
  Pointer x[T];
  for (int t = 0; t < T; ++t) x[t] = token(args, begin + tokens[t]);
  Int dots[T][N];
  dot_group<bits, G, N, T>(tile, g, x, args.rest + first * G, dots);
  for (int n = 0; n < N; ++n) {
    const Float scale = V::load(tile[n].scales + g * tile_rows);
    for (int t = 0; t < T; ++t) {
      Float& sum = sums[tokens[t]][n][g % L];
      const Float factor = V::set(floats_at(x[t] + args.rest_factors)[first + g]);
      sum = V::fma(V::mul(V::convert(dots[t][n]), factor), scale, sum);
    }
  }
}

// The same for `count` tokens, up to T.
template <int bits, int G, int N, int T = V::tokens>
inline void add_some_rests(const Int8Args& args, const Tile<G>* tile, Index first, Index g, Index begin,
                           const std::uint8_t* tokens, int count, Float (*sums)[tiles][L]) {
  if constexpr (T > 1) {
    if (count < T) return add_some_rests<bits, G, N, T - 1>(args, tile, first, g, begin, tokens, count, sums);
  }
  add_rests<bits, G, N, T>(args, tile, first, g, begin, tokens, sums);
}

template <int bits, int G, int N>
void sum_rests(const Int8Args& args, const Tile<G>* tile, Index first, Index groups, Index begin, const RestLists<G>& lists,
               Float (*sums)[tiles][L]) {
  for (Index g = 0; g < groups; ++g)
    for (int i = 0; i < lists.counts[g]; i += V::tokens)
      add_some_rests<bits, G, N>(args, tile, first, g, begin, lists.tokens[g] + i, lists.counts[g] - i, sums);
}

// out[t][n] = [row of tile n] over `groups` groups of the chunk that begins with group `first`, rests of token t and tile n
// in rests[t][n].
template <int bits, int G, int N, int T>
inline void micro(const Int8Args& args, const Tile<G>* tile, Index first, Index groups, const Pointer (&x)[T],
                  const Float (*rests)[tiles][L], Ahead ahead, Float (&out)[T][N]) {
  constexpr int W = V::sums_wait ? L : 1;  // partial sums made at a time
  const auto of_group = [&](int t, Index offset, Index g) { return V::set(floats_at(x[t] + offset)[first + g]); };
  for (int q = 0; q < L; q += W) {
    Float sums[W][T][N], zero = V::floats(V::zero());
    if constexpr (V::sums_wait) __asm__("" : "+x"(zero));
    for (int i = 0; i < W; ++i)
      for (int t = 0; t < T; ++t)
        for (int n = 0; n < N; ++n) sums[i][t][n] = zero;
    Int dots[T][N];
    for (Index g = q; g < groups; g += L / W) {
      for (Index line = 0; line < ahead.bytes; line += 64)
        __builtin_prefetch(ahead.from + g * ahead.bytes + line, 0, 2);  // into the second-level cache
      dot_group<bits, G, N, T>(tile, g, x, first * G, dots);
      Float(&sum)[T][N] = sums[g % W];
      for (int n = 0; n < N; ++n) {
        const Float scale = V::load(tile[n].scales + g * tile_rows), bias = V::load(tile[n].biases + g * tile_rows);
        for (int t = 0; t < T; ++t) {
          sum[t][n] = V::fma(V::mul(V::convert(dots[t][n]), of_group(t, args.factors, g)), scale, sum[t][n]);
          sum[t][n] = V::fma(bias, of_group(t, args.sums, g), sum[t][n]);
        }
      }
    }
    for (int i = 0; i < W; ++i) {
      for (int t = 0; t < T; ++t) {
        for (int n = 0; n < N; ++n) {
          const Float sum = V::add(sums[i][t][n], rests[t][n][q + i]);
          out[t][n] = q + i == 0 ? sum : V::add(out[t][n], sum);
        }
      }
    }
  }
}

template <int bits, int G, int N, int T>
void multiply(const Int8Args& args, const Tile<G>* tile, Index row, Index first, Index groups, Index i,
              const Float (*rests)[tiles][L], Ahead ahead) {
  Pointer x[T];
  for (int t = 0; t < T; ++t) x[t] = token(args, i + t);
  Float out[T][N];
  micro<bits, G, N, T>(args, tile, first, groups, x, rests, ahead, out);
  for (int n = 0; n < N; ++n, row += tile_rows) {
    for (int t = 0; t < T; ++t) store_sums(args, i + t, row, first == 0, out[t][n]);
  }
}

// Tokens [i, i + count) for a count up to T.
template <int bits, int G, int N, int T = V::tokens>
void multiply_some(const Int8Args& args, const Tile<G>* tile, Index row, Index first, Index groups, Index i, Index count,
                   const Float (*rests)[tiles][L], Ahead ahead) {
  if constexpr (T > 1) {
    if (count < T) return multiply_some<bits, G, N, T - 1>(args, tile, row, first, groups, i, count, rests, ahead);
  }
  multiply<bits, G, N, T>(args, tile, row, first, groups, i, rests, ahead);
}

// N filled tiles, whose first row is `row`, by the tokens of a block. ahead: fetched beside the first tokens.
template <int bits, int G, int N>
void multiply_block(const Int8Args& args, const Tile<G>* tile, Index row, Index first, Index groups, Index begin,
                    Index count, const RestLists<G>& lists, Ahead ahead) {
  RestSums rests;
  for (Index i = 0; i < count; ++i)
    for (int n = 0; n < N; ++n)
      for (Float& sum : rests[i][n]) sum = V::floats(V::zero());
  sum_rests<bits, G, N>(args, tile, first, groups, begin, lists, rests);
  const Index shares = (count + V::tokens - 1) / V::tokens, fetching = smaller(shares, 2);  // not all at once
  ahead.bytes /= fetching;
  for (Index s = 0, i = 0; s < shares; ++s) {
    const Index end = count * (s + 1) / shares;
    if (s == fetching) ahead.bytes = 0;
    multiply_some<bits, G, N>(args, tile, row, first, groups, begin + i, end - i, rests + i, ahead);
    ahead.from += groups * ahead.bytes;
    i = end;
  }
}

// Tokens [begin, end), up to slice_blocks blocks of them.
template <int bits, int G>
void many_slice(const Int8Args& args, Index begin, Index end) {
  constexpr int kind = V::narrow_sums && bits > 4 ? bits : 4;  // the micro-kernel sees bytes: the width matters to sums only
  constexpr int at_once = kind == 8 ? 1 : V::tiles;  // tiles of a micro-kernel; codes of 8 bits take sums for two
  Tile<G> tile[tiles];
  RestLists<G> lists[slice_blocks];
  const Index blocks = (end - begin + block_tokens - 1) / block_tokens;
  const auto part = [&](Index block) { return begin + (end - begin) * block / blocks; };
  for (Index first = 0; first < args.groups; first += chunk_groups<G>) {
    const Index groups = smaller(chunk_groups<G>, args.groups - first);
    for (Index block = 0; block < blocks; ++block)
      list_rests<G>(args, first, part(block), part(block + 1) - part(block), lists[block]);
    for (Index row = args.row_begin; row < args.row_end; row += tiles * tile_rows) {
      const Index filled = smaller(tiles, (args.row_end - row + tile_rows - 1) / tile_rows);
      for (Index n = 0; n < filled; ++n) {
        Index rows[tile_rows];
        for (int r = 0; r < tile_rows; ++r) rows[r] = smaller(row + n * tile_rows + r, args.row_end - 1);
        fill<bits, G>(args, rows, first, groups, tile[n]);
      }
      if (begin == 0 && first == 0) fetch_scales(args, row, filled * tile_rows);
      constexpr Index of_tile = tile_rows * (G * bits / 8);  // bytes of a group
      const Pointer ahead = ahead_of(args, args.weight + row * args.row_bytes + first * filled * of_tile, near_ahead);
      for (Index block = 0; block < blocks; ++block) {
        const Index fetched = block == 0 ? of_tile : 0, from = part(block), count = part(block + 1) - from;
        Index n = 0;
        for (; n + at_once <= filled; n += at_once)
          multiply_block<kind, G, at_once>(args, tile + n, row + n * tile_rows, first, groups, from, count, lists[block],
                                           {ahead + n * of_tile * groups, at_once * fetched});
        if (n < filled)
          multiply_block<kind, G, 1>(args, tile + n, row + n * tile_rows, first, groups, from, count, lists[block],
                                     {ahead + n * of_tile * groups, fetched});
      }
    }
  }
}

template <int bits, int G>
void many(const Int8Args& args) {
  constexpr Index most = slice_blocks * block_tokens;
  const Index slices = (args.count + most - 1) / most;
  for (Index s = 0; s < slices; ++s) many_slice<bits, G>(args, args.count * s / slices, args.count * (s + 1) / slices);
}

}  // namespace
}  // namespace mixbit
