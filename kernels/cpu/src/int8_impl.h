// The int8 kernels, written once over the vector type `V` that the including int8_*.cpp defines before:
//
//   lanes                     parts of 128 bits in a register, L
//   tokens, tiles             tokens that the micro-kernel takes at a time, and tiles of 4 L rows, 1 or 2
//   sums_wait                 whether its sums of groups leave no registers for those over groups: then these are in memory
//   Bytes, Int, Float         registers: of 16 L codes, of 4 L int32, of 4 L float32
//   codes<bits>(p, n, a, b)   32 columns a lane, the first n lanes' at p (the rest: anything): even columns in a and
//                             odd ones in b where interleaved(bits), else the first and the last 16
//   packed(p, n), split(v, a, b)   codes<4> in two steps, the second bytewise
//   dot<bits>(s, a, b, x, y)  s + a * x + b * y, in each int32 the sum over its four codes
//   offset<bits>              what codes<bits> subtracts, for instruction sets that want signed codes
//   add4<bits>(a, b, c, d)    in each lane: the four sums of the lane's four values, each a dot<bits> of 8 columns
//   add_lanes(a, b)           lanes of a, then of b, neighbours added
//   transpose4(m)             in each lane, 4 x 4; transpose(m): all 4 L x 4 L
//   strided(a)                value 4 q + j becomes value j L + q
//   spread(p), fold(a, out)   value q to all of lane q; ((lane 0 + lane 1) + ...), four values
//   narrow(a, p)              low byte of each value; narrow_pairs(a, p, q): of even values to p, of odd ones to q
//   masks, load_first<type>(p, n, more)   whether a part of a register can be read, and that of f32, f16 or bf16; more: as
//                             many as make it whole lie before p
//   load set zero floats bits convert mul fma from_f16 from_bf16 ...
//
//   narrow_sums               whether sums of several products are kept in fewer bits for a while: then Partial<bits>,
//                             with the interface of Direct below, tells how many steps they hold
//
// Whatever the number of tokens, a product is the same sum in the same order: within a chunk of columns, group g
// goes to partial sum g % L, its rest to another; both are added, then partial sums in order, then chunks. A token
// without a rest where another has one adds zeros. So a token's result does not depend on its company.
#include <utility>

#include "int8_quantize.h"

namespace mixbit {
namespace {

using Int = V::Int;
using Float = V::Float;
using Pointer = const std::byte*;

constexpr int tile_rows = 4 * L;   // rows whose codes the micro-kernel reads together; also groups of a block of scales
constexpr int piece_codes = 8 * tile_rows * 4;  // bytes of a piece of every row of the tile

// Bit 0, step, 2 step, ...
template <int step>
constexpr std::uint64_t every = step == 1 ? ~std::uint64_t{0} : step == 2 ? 0x5555555555555555u : 0x1111111111111111u;

constexpr Index fetched_ahead = 30000;  // bytes: the memory's delay at its full rate, several times

template <int G>
constexpr int chunk_groups = G == 128 ? 16 : 1024 / G;

constexpr Index smaller(Index a, Index b) { return a < b ? a : b; }

const std::byte* token(const Int8Args& args, Index i) {
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

// Groups [first, first + 4 L) of a row of `groups` scales or biases at p, zero where there are none; nothing outside of
// the row is touched.
template <DType type, class W = V>
[[gnu::always_inline]] inline Float load_block(Pointer p, Index first, Index groups) {
  constexpr int size = type == DType::f32 ? 4 : 2;
  const Index count = smaller(groups - first, tile_rows);
  p += first * size;
  if constexpr (W::masks) return W::template load_first<type>(p, static_cast<int>(count), first > 0);
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

// Scales and biases of groups [first, first + 4 L) of R rows.
template <int bits, DType type, int R>
[[gnu::always_inline]] inline void load_block_rows(const Int8Args& args, const Index (&rows)[R], Index first,
                                                   Float (&scales)[R], Float (&biases)[R]) {
  constexpr int size = type == DType::f32 ? 4 : 2;
  for (int r = 0; r < R; ++r) {
    const Index row = rows[r] * args.groups * size;
    scales[r] = load_block<type>(args.scales + row, first, args.groups);
    biases[r] = load_block<type>(args.biases + row, first, args.groups);
    if constexpr (V::template offset<bits> != 0) biases[r] = V::fma(V::set(V::template offset<bits>), scales[r], biases[r]);
  }
}

template <int bits, int R>
inline void load_block(const Int8Args& args, const Index (&rows)[R], Index first, Float (&scales)[R], Float (&biases)[R]) {
  switch (args.dtype) {
    case DType::f16: return load_block_rows<bits, DType::f16, R>(args, rows, first, scales, biases);
    case DType::bf16: return load_block_rows<bits, DType::bf16, R>(args, rows, first, scales, biases);
    default: return load_block_rows<bits, DType::f32, R>(args, rows, first, scales, biases);
  }
}

// ---- Few tokens: four rows at a time, from code to product in registers ----

// Scales or biases of a chunk of four rows in the order of their use: entry j is [group j L + lane][row].
template <int G>
using ChunkOfFour = Float[chunk_groups<G> / L];

inline void transpose_block(const Float (&m)[4], Float* to) {
  Int t[4];
  for (int r = 0; r < 4; ++r) t[r] = V::bits(V::strided(m[r]));
  V::transpose4(t);
  for (int r = 0; r < 4; ++r) to[r] = V::floats(t[r]);
}

template <int bits, int G>
void load_chunk(const Int8Args& args, const Index (&rows)[4], Index first, Index groups, ChunkOfFour<G>& scales,
                ChunkOfFour<G>& biases) {
  for (Index at = 0; at < groups; at += tile_rows) {
    Float s[4], b[4];
    load_block<bits>(args, rows, first + at, s, b);
    transpose_block(s, scales + at / L);
    transpose_block(b, biases + at / L);
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
    const Pointer ahead = args.weight + row * args.row_bytes + first * P * 16 * bits + fetched_ahead;
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

// ---- Many tokens: the codes of 4 L rows as bytes, then every token ----

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
  for (Index at = 0; at < pieces; at += L) {
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

// ---- Entry point ----

template <int bits, int G>
void matmul_of(const Int8Args& args) {
  switch (args.count) {
    case 1: return few<bits, G, 1>(args);
    case 2: return few<bits, G, 2>(args);
    case 3: return few<bits, G, 3>(args);
    default: return many<bits, G>(args);
  }
}

template <int bits>
void matmul_bits(const Int8Args& args) {
  switch (args.group_size) {
    case 32: return matmul_of<bits, 32>(args);
    case 64: return matmul_of<bits, 64>(args);
    case 128: return matmul_of<bits, 128>(args);
    default: return;
  }
}

void matmul(const Int8Args& args) {
  switch (args.bits) {
    case 2: return matmul_bits<2>(args);
    case 3: return matmul_bits<3>(args);
    case 4: return matmul_bits<4>(args);
    case 5: return matmul_bits<5>(args);
    case 6: return matmul_bits<6>(args);
    case 8: return matmul_bits<8>(args);
    default: return;
  }
}

}  // namespace
}  // namespace mixbit
