// int8, many tokens: the codes of 4 L rows as bytes, then every token.
#pragma once

#include <utility>

#include "int8_blocks.h"

namespace mixbit {
namespace {

// A chunk of columns of 4 L rows: codes[piece][8][row][4 columns], scales and biases [group][row].
template <int G>
struct Tile {
  alignas(64) std::byte codes[chunk_groups<G> * (G / piece) * piece_codes];
  alignas(64) float scales[(chunk_groups<G> + tile_rows) * tile_rows];
  alignas(64) float biases[(chunk_groups<G> + tile_rows) * tile_rows];
};

template <int bits, int G>
void fill(const Int8Args& args, const Index (&rows)[tile_rows], Index first, Index groups, Tile<G>& tile) {
  constexpr int P = G / piece;
  for (Index at = 0; at < groups; at += tile_rows) {
    Float of_rows[2][tile_rows];
    load_block<bits>(args, rows, first + at, of_rows[0], of_rows[1]);
    Int scales[tile_rows], biases[tile_rows];
    for (int r = 0; r < tile_rows; ++r) scales[r] = V::bits(of_rows[0][r]), biases[r] = V::bits(of_rows[1][r]);
    V::transpose(scales);
    V::transpose(biases);
    for (int g = 0; g < tile_rows; ++g) {
      V::store(tile.scales + (at + g) * tile_rows, V::floats(scales[g]));
      V::store(tile.biases + (at + g) * tile_rows, V::floats(biases[g]));
    }
  }
  const Index pieces = groups * P;
  constexpr Index taken = tile_rows * 4 * bits;  // bytes of a piece of every row
  const Pointer ahead = args.weight + rows[0] * args.row_bytes + first * P * taken + fetched_ahead;
  for (Index at = 0; at < pieces; at += L) {
    for (int line = 0; line < L * taken; line += 64)
      __builtin_prefetch(ahead + at * taken + line, 0, 2);  // into the second-level cache
    const int present = static_cast<int>(smaller(L, pieces - at));
    const auto source = [&](int r) { return args.weight + rows[r] * args.row_bytes + (first * P + at) * (4 * bits); };
    const auto place = [&](int i) { return tile.codes + (at + i / 4) * piece_codes + i % 4 * (4 * tile_rows); };
    Int a[tile_rows], b[tile_rows];
    if constexpr (bits == 4) {  // bytes split after the transposition as well as before: half of the work
      for (int r = 0; r < tile_rows; ++r) a[r] = V::ints(V::packed(source(r), present));
      V::transpose(a);
      for (int i = 0; i < 4 * present; ++i) {
        V::Bytes even, odd;
        V::split(V::bytes(a[i]), even, odd);
        V::store_bytes(place(i), even);
        V::store_bytes(place(i) + 16 * tile_rows, odd);
      }
    } else {
      for (int r = 0; r < tile_rows; ++r) {
        V::Bytes first_half, second_half;
        V::template codes<bits>(source(r), present, first_half, second_half);
        a[r] = V::ints(first_half);
        b[r] = V::ints(second_half);
      }
      V::transpose(a);
      V::transpose(b);
      for (int i = 0; i < 4 * present; ++i) {
        V::store_bytes(place(i), V::bytes(a[i]));
        V::store_bytes(place(i) + 16 * tile_rows, V::bytes(b[i]));
      }
    }
  }
}

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
inline void dot_group(const Tile<G>* tiles, Index g, const Pointer (&x)[T], Index codes, Int (&dots)[T][N]) {
  for (auto& of_token : dots)
    for (Int& dot : of_token) dot = V::zero();
#pragma GCC unroll 4
  for (int p = 0; p < G / piece; ++p) {
    const Index at = g * (G / piece) + p, x_at = codes + at / L * (L * piece) + at % L * 16;
    constexpr int steps = decltype(partial<bits>(V::zero()))::steps;
    for (int first = 0; first < 4; first += steps)
      dot_steps<bits, G, N, T>(tiles->codes + at * piece_codes, x, x_at, first, dots, std::make_integer_sequence<int, T * N>());
  }
}

// out[t][n] = [row of tile n] over `groups` groups of the chunk that begins with group `first`.
template <int bits, int G, int N, int T>
inline void micro(const Int8Args& args, const Tile<G>* tiles, Index first, Index groups, const Pointer (&x)[T],
                  Float (&out)[T][N]) {
  constexpr int W = V::sums_wait ? L : 1;  // partial sums made at a time
  const auto of_group = [&](int t, Index offset, Index g) { return V::set(floats_at(x[t] + offset)[first + g]); };
  const std::uint64_t rest = with_rest<chunk_groups<G>>(args, x, first);
  for (int q = 0; q < L; q += W) {
    Float sums[W][T][N], rests[W][T][N], zero = V::floats(V::zero());
    if constexpr (V::sums_wait) __asm__("" : "+x"(zero));
    for (int i = 0; i < W; ++i)
      for (int t = 0; t < T; ++t)
        for (int n = 0; n < N; ++n) sums[i][t][n] = rests[i][t][n] = zero;
    Int dots[T][N];
    for (Index g = q; g < groups; g += L / W) {
      dot_group<bits, G, N, T>(tiles, g, x, first * G, dots);
      Float(&sum)[T][N] = sums[g % W];
      for (int n = 0; n < N; ++n) {
        const Float scale = V::load(tiles[n].scales + g * tile_rows), bias = V::load(tiles[n].biases + g * tile_rows);
        for (int t = 0; t < T; ++t) {
          sum[t][n] = V::fma(V::mul(V::convert(dots[t][n]), of_group(t, args.factors, g)), scale, sum[t][n]);
          sum[t][n] = V::fma(bias, of_group(t, args.sums, g), sum[t][n]);
        }
      }
    }
    for (std::uint64_t left = rest & every<L / W> << q; left != 0; left &= left - 1) {
      const Index g = __builtin_ctzll(left);
      dot_group<bits, G, N, T>(tiles, g, x, args.rest + first * G, dots);
      Float(&sum)[T][N] = rests[g % W];
      for (int n = 0; n < N; ++n) {
        const Float scale = V::load(tiles[n].scales + g * tile_rows);
        for (int t = 0; t < T; ++t)
          sum[t][n] = V::fma(V::mul(V::convert(dots[t][n]), of_group(t, args.rest_factors, g)), scale, sum[t][n]);
      }
    }
    for (int i = 0; i < W; ++i) {
      for (int t = 0; t < T; ++t) {
        for (int n = 0; n < N; ++n) {
          const Float sum = V::add(sums[i][t][n], rests[i][t][n]);
          out[t][n] = q + i == 0 ? sum : V::add(out[t][n], sum);
        }
      }
    }
  }
}

template <int bits, int G, int N, int T>
void multiply(const Int8Args& args, const Tile<G>* tiles, Index row, Index first, Index groups, Index i) {
  Pointer x[T];
  for (int t = 0; t < T; ++t) x[t] = token(args, i + t);
  Float out[T][N] = {};
  micro<bits, G, N, T>(args, tiles, first, groups, x, out);
  for (int n = 0; n < N; ++n, row += tile_rows) {
    const Index valid = args.row_end - row;
    for (int t = 0; t < T; ++t) {
      float* y = args.y + (i + t) * args.y_stride + row;
      alignas(64) float part[tile_rows];
      if (valid >= tile_rows) {
        V::store(y, first == 0 ? out[t][n] : V::add(V::load(y), out[t][n]));
        continue;
      }
      V::store(part, out[t][n]);
      for (Index r = 0; r < valid; ++r) y[r] = first == 0 ? part[r] : y[r] + part[r];
    }
  }
}

// Tokens [i, i + n) for n up to T.
template <int bits, int G, int N, int T = V::tokens>
void multiply_some(const Int8Args& args, const Tile<G>* tiles, Index row, Index first, Index groups, Index i, Index n) {
  if constexpr (T > 1) {
    if (n < T) return multiply_some<bits, G, N, T - 1>(args, tiles, row, first, groups, i, n);
  }
  multiply<bits, G, N, T>(args, tiles, row, first, groups, i);
}

template <int bits, int G>
void many(const Int8Args& args) {
  constexpr int kind = V::narrow_sums && bits > 4 ? bits : 4;  // the micro-kernel sees bytes: the width matters to sums only
  constexpr int at_once = kind == 8 ? 1 : V::tiles;  // tiles of a micro-kernel; codes of 8 bits take sums for two
  constexpr int tiles = 2;  // filled together, so that tokens come from memory once for both
  Tile<G> tile[tiles];
  const Index shares = (args.count + V::tokens - 1) / V::tokens;
  for (Index row = args.row_begin; row < args.row_end; row += tiles * tile_rows) {
    const Index filled = smaller(tiles, (args.row_end - row + tile_rows - 1) / tile_rows);
    for (Index first = 0; first < args.groups; first += chunk_groups<G>) {
      const Index groups = smaller(chunk_groups<G>, args.groups - first);
      for (Index n = 0; n < filled; ++n) {
        Index rows[tile_rows];
        for (int r = 0; r < tile_rows; ++r) rows[r] = smaller(row + n * tile_rows + r, args.row_end - 1);
        fill<bits, G>(args, rows, first, groups, tile[n]);
      }
      for (Index s = 0, i = 0; s < shares; ++s) {
        const Index end = args.count * (s + 1) / shares;
        Index n = 0;
        for (; n + at_once <= filled; n += at_once)
          multiply_some<kind, G, at_once>(args, tile + n, row + n * tile_rows, first, groups, i, end - i);
        if (n < filled) multiply_some<kind, G, 1>(args, tile + n, row + n * tile_rows, first, groups, i, end - i);
        i = end;
      }
    }
  }
}

}  // namespace
}  // namespace mixbit
