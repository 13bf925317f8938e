// int8, many tokens: the codes of 4 L rows as bytes, in the order in which the micro-kernel reads them.
#pragma once

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

// Scales and biases of groups [first, first + groups), turned: [group][row], whole blocks of 4 L groups.
template <int bits, DType type>
void fill_scales(const ProductArgs& args, const Index (&rows)[tile_rows], Index first, Index groups, float* scales,
                 float* biases) {
  for (Index at = 0; at < groups; at += tile_rows) {
    Float of_rows[2][tile_rows];
    load_block_rows<bits, type>(args, rows, first + at, of_rows[0], of_rows[1]);
    for (int kind = 0; kind < 2; ++kind) {
      Int m[tile_rows];
      for (int r = 0; r < tile_rows; ++r) m[r] = V::bits(of_rows[kind][r]);
      V::transpose(m);
      float* to = (kind == 0 ? scales : biases) + at * tile_rows;
      for (int g = 0; g < tile_rows; ++g) V::store(to + g * tile_rows, V::floats(m[g]));
    }
  }
}

template <int bits>
void fill_scales(const ProductArgs& args, const Index (&rows)[tile_rows], Index first, Index groups, float* scales,
                 float* biases) {
  switch (args.dtype) {
    case DType::f16: return fill_scales<bits, DType::f16>(args, rows, first, groups, scales, biases);
    case DType::bf16: return fill_scales<bits, DType::bf16>(args, rows, first, groups, scales, biases);
    default: return fill_scales<bits, DType::f32>(args, rows, first, groups, scales, biases);
  }
}

template <int bits, int G>
void fill(const ProductArgs& args, const Index (&rows)[tile_rows], Index first, Index groups, Tile<G>& tile) {
  constexpr int P = G / piece;
  fill_scales<bits>(args, rows, first, groups, tile.scales, tile.biases);
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

// Memory that is asked for beside the products: so many bytes with each group.
struct Ahead {
  Pointer from;
  Index bytes;
};

// Sums of token i and rows [row, row + 4 L), as far as there are such rows; from the second chunk on they are added to
// what is there.
inline void store_sums(const ProductArgs& args, Index i, Index row, bool first_chunk, Float sums) {
  float* y = args.y + i * args.y_stride + row;
  const Index valid = args.row_end - row;
  if (valid >= tile_rows) return V::store(y, first_chunk ? sums : V::add(V::load(y), sums));
  alignas(64) float part[tile_rows];
  V::store(part, sums);
  for (Index r = 0; r < valid; ++r) y[r] = first_chunk ? part[r] : y[r] + part[r];
}

}  // namespace
}  // namespace mixbit
