// bfloat16 products on tile registers (AMX): 16 rows of the matrix, unpacked, by panels of 16 tokens, two by two. Sums
// stay in registers for a chunk of columns; then they are turned and go into y.
//
// Beside what bf16_unpack.h asks for, the including file gives `Registers` (see tile_registers.h).
#pragma once

#include <type_traits>

#include "bf16_unpack.h"
#include "int8_tile.h"
#include "tile_products.h"

namespace mixbit {
namespace {

constexpr Index step_bytes = 1024;  // of a panel, and of 16 unpacked rows
constexpr Index block_steps = block / 32;

// Where a chunk of a slice's tokens lies: panel p at at + p * stride, its rests `rest` bytes further.
struct PanelChunk {
  Pointer at;
  Index stride, rest;
};

// Tokens that do not lie one after another, made panels of.
constexpr Index most_gathered = 128;
template <int planes>
struct Gathered {
  alignas(64) std::byte panels[most_gathered / panel_rows * planes * (chunk_cols / 32) * step_bytes];
};

// 16 or 32 rows, `tiles` of a block each.
template <int planes>
using UnpackedPair = UnpackedBlock<planes>[2];

template <int tiles, int planes>
inline void load_rows(const UnpackedPair<planes>& w, int plane, Index step) {
  Registers::load<4>(w[0].values[plane][step], 64);
  if constexpr (tiles == 2) Registers::load<5>(w[1].values[plane][step], 64);
}

template <int panels>
inline void load_panels(const PanelChunk& x, Index at) {
  Registers::load<6>(x.at + at, 64);
  if constexpr (panels == 2) Registers::load<7>(x.at + x.stride + at, 64);
}

// Adds a block's products to the sums; `at`: where its steps begin in a panel.
template <int planes, int tiles, int panels>
inline void add_block(const UnpackedPair<planes>& w, const PanelChunk& x, Index at) {
  for (Index step = 0; step < block_steps; ++step, at += step_bytes) {
    load_rows<tiles, planes>(w, 0, step);
    load_panels<panels>(x, at);
    dot_all<tiles, panels>();
    if constexpr (planes == 2) {
      load_panels<panels>(x, x.rest + at);
      dot_all<tiles, panels>();
      load_rows<tiles, planes>(w, 1, step);
      load_panels<panels>(x, at);
      dot_all<tiles, panels>();
    }
  }
}

using Sums = float[matrix_rows][panel_rows];

// Registers to sums[2 * tile + panel].
template <int tiles, int panels>
inline void save_sums(Sums* sums) {
  Registers::save<0>(sums[0], 64);
  if constexpr (panels == 2) Registers::save<1>(sums[1], 64);
  if constexpr (tiles == 2) Registers::save<2>(sums[2], 64);
  if constexpr (tiles == 2 && panels == 2) Registers::save<3>(sums[3], 64);
}

// Sums of 16 rows from `row` on and `tokens` tokens from `begin` on, as far as there are such rows.
inline void store_turned(const ProductArgs& args, const Sums& sums, Index row, Index begin, Index tokens, bool fresh) {
  for (Index r = 0; r < matrix_rows && row + r < args.row_end; r += tile_rows) {
    for (Index t = 0; t < tokens; t += tile_rows) {
      Int m[tile_rows];
      for (Index i = 0; i < tile_rows; ++i) m[i] = V::bits(V::load(sums[r + i] + t));
      V::transpose(m);
      for (Index i = 0; i < tile_rows && t + i < tokens; ++i)
        store_sums(args, begin + t + i, row + r, fresh, V::floats(m[i]));
    }
  }
}

template <int tiles, int panels>
inline void store_sums(const ProductArgs& args, Index row, Index begin, Index count, bool fresh) {
  alignas(64) Sums sums[4];
  save_sums<tiles, panels>(sums);
  for (Index tile = 0; tile < tiles; ++tile)
    for (Index panel = 0; panel < panels; ++panel)
      store_turned(args, sums[2 * tile + panel], row + tile * matrix_rows, begin + panel * panel_rows,
                   smaller(panel_rows, count - panel * panel_rows), fresh);
}

// A chunk of columns, groups [first, first + groups), as blocks.
template <int G>
struct Chunk {
  Index first, groups;

  Index blocks() const { return (groups * G + block - 1) / block; }
  int pieces(Index number) const { return static_cast<int>(smaller(block, groups * G - number * block) / piece); }

  static constexpr Index most_groups = chunk_cols / G;
  bool more(const ProductArgs& args) const { return first + groups < args.groups; }
  static Chunk from(const ProductArgs& args, Index first) { return {first, smaller(most_groups, args.groups - first)}; }
  Chunk next(const ProductArgs& args) const { return from(args, first + groups); }
};

// Unpacks a block of 16 or 32 rows and asks for as much of what follows: the columns of these rows are read together, so
// all of the next rows are to be there when the first columns of them are read.
template <int bits, int G, int tiles, int planes>
inline void unpack_pair(const ProductArgs& args, Index row, Index rows, const Chunk<G>& chunk, Index number,
                        const RowScales* scales, UnpackedPair<planes>& to) {
  constexpr Index slack = 4000;  // bytes: the memory's delay
  const int present = chunk.pieces(number);
  const Index done = (chunk.first * G / block + number) * rows, scale_bytes = args.dtype == DType::f32 ? 4 : 2;
  const Pointer now = args.weight + row * args.row_bytes + done * code_bytes<bits>;
  const Pointer ahead = ahead_of(args, now, rows * args.row_bytes + slack);
  const auto unpack = [&](int tile, Index count) {
    const Index first = tile * matrix_rows, scale = (row + rows) * args.groups + (done + first) * block / G;
    __builtin_prefetch(args.scales + scale * scale_bytes, 0, 2);
    __builtin_prefetch(args.biases + scale * scale_bytes, 0, 2);
    unpack_block<bits, G>(args, row + first, count, chunk.first, number, present, scales + first,
                          ahead + first * code_bytes<bits>, to[tile]);
  };
  unpack(0, smaller(matrix_rows, rows));
  if constexpr (tiles == 2) unpack(1, rows - matrix_rows);
}

// Up to 32 tokens by rows [row, row + rows), at most 32: a block is unpacked while that before it is multiplied.
template <int bits, int G, int planes, int tiles, int panels>
void multiply_few(const ProductArgs& args, const PanelChunk& x, Index row, Index rows, Index begin, Index count) {
  UnpackedPair<planes> pairs[2];
  RowScales scales[2 * matrix_rows];
  zero_sums<tiles, panels>();
  Index at = 0;
  int set = 0;
  const auto add = [&](int which) { add_block<planes, tiles, panels>(pairs[which], x, at), at += block_steps * step_bytes; };
  for (auto chunk = Chunk<G>::from(args, 0);; chunk = chunk.next(args)) {
    load_scales<bits>(args, row, rows, chunk.first, chunk.groups, scales);
    for (Index number = 0; number < chunk.blocks(); ++number, set ^= 1) {
      unpack_pair<bits, G, tiles>(args, row, rows, chunk, number, scales, pairs[set]);
      if (chunk.first + number > 0) add(set ^ 1);
    }
    if (!chunk.more(args)) break;
  }
  add(set ^ 1);
  store_sums<tiles, panels>(args, row, begin, count, true);
}

// Any number of tokens, a chunk of columns after the other.
template <int bits, int G, int planes, int tiles>
void multiply_chunk(const ProductArgs& args, const PanelChunk& x, const Chunk<G>& chunk, Index row, Index rows, Index begin,
                    Index count) {
  UnpackedPair<planes> pairs[chunk_cols / block];
  RowScales scales[2 * matrix_rows];
  const Index blocks = chunk.blocks();
  load_scales<bits>(args, row, rows, chunk.first, chunk.groups, scales);
  for (Index number = 0; number < blocks; ++number)
    unpack_pair<bits, G, tiles>(args, row, rows, chunk, number, scales, pairs[number]);
  const auto multiply = [&]<int panels>(Index i) {
    const PanelChunk from{x.at + i / panel_rows * x.stride, x.stride, x.rest};
    zero_sums<tiles, panels>();
    for (Index number = 0; number < blocks; ++number)
      add_block<planes, tiles, panels>(pairs[number], from, number * block_steps * step_bytes);
    store_sums<tiles, panels>(args, row, begin + i, smaller(panels * panel_rows, count - i), chunk.first == 0);
  };
  for (Index i = 0; i < count; i += 2 * panel_rows) {
    if (i + panel_rows < count) multiply.template operator()<2>(i);
    else multiply.template operator()<1>(i);
  }
}

// Calls fn<tiles>(row, rows) for each 32 rows or what is left of them.
template <class Fn>
inline void each_pair(const ProductArgs& args, Fn fn) {
  for (Index row = args.row_begin; row < args.row_end; row += 2 * matrix_rows) {
    const Index rows = smaller(2 * matrix_rows, args.row_end - row);
    if (rows > matrix_rows) fn.template operator()<2>(row, rows);
    else fn.template operator()<1>(row, rows);
  }
}

// Tokens [begin, begin + count) to panels of columns [from, from + cols).
template <int planes>
[[gnu::noinline]] PanelChunk gather(const Bf16Args& args, Index from, Index cols, Index begin, Index count,
                                    Gathered<planes>& to) {
  const Index pairs = (cols + block - 1) / block * (block / 2), bytes = pairs * 64;
  for (Index i = 0; i < count; i += panel_rows) {
    for (int plane = 0; plane < planes; ++plane) {
      Pointer rows[panel_rows];
      for (Index r = 0; r < panel_rows; ++r)
        rows[r] = i + r < count ? token(args, begin + i + r) + plane * args.rest + 2 * from : nullptr;
      turn_rows(rows, pairs, to.panels + (i / panel_rows * planes + plane) * bytes);
    }
  }
  return {to.panels, planes * bytes, bytes};
}

// Tokens [begin, begin + count). panels: where they are; null: they are to be gathered.
template <int bits, int G, int planes>
void multiply_slice(const Bf16Args& args, Index begin, Index count, Pointer panels, Gathered<planes>* gathered) {
  const Index cols = args.groups * G;
  PanelChunk x{panels, args.panel_stride, panel_rows * args.rest};
  const Index room = most_gathered / panel_rows * chunk_cols;
  const bool all_fit = panels != nullptr || cols * ((count + panel_rows - 1) / panel_rows) <= room;
  if (count <= 2 * panel_rows && all_fit) {
    if (panels == nullptr) x = gather(args, 0, cols, begin, count, *gathered);
    return each_pair(args, [&]<int tiles>(Index row, Index rows) {
      if (count > panel_rows) multiply_few<bits, G, planes, tiles, 2>(args, x, row, rows, begin, count);
      else multiply_few<bits, G, planes, tiles, 1>(args, x, row, rows, begin, count);
    });
  }
  for (auto chunk = Chunk<G>::from(args, 0);; chunk = chunk.next(args)) {
    const PanelChunk part = panels == nullptr
                                ? gather(args, chunk.first * G, chunk.groups * G, begin, count, *gathered)
                                : PanelChunk{panels + chunk.first * G / 32 * step_bytes, args.panel_stride, x.rest};
    each_pair(args, [&]<int tiles>(Index row, Index rows) {
      multiply_chunk<bits, G, planes, tiles>(args, part, chunk, row, rows, begin, count);
    });
    if (!chunk.more(args)) return;
  }
}

template <int bits, int G, int planes>
void multiply(const Bf16Args& args) {
  const std::int32_t* index = args.index;
  bool in_order = args.panels != nullptr && (index == nullptr || index[0] % panel_rows == 0);
  for (Index i = 1; index != nullptr && in_order && i < args.count; ++i) in_order = index[i] == index[0] + i;
  if (in_order) {
    const Pointer panels = args.panels + (index == nullptr ? 0 : index[0] / panel_rows) * args.panel_stride;
    return multiply_slice<bits, G, planes>(args, 0, args.count, panels, nullptr);
  }
  Gathered<planes> gathered;
  const Index slices = (args.count + most_gathered - 1) / most_gathered;
  for (Index s = 0; s < slices; ++s) {
    const Index begin = args.count * s / slices;
    multiply_slice<bits, G, planes>(args, begin, args.count * (s + 1) / slices - begin, nullptr, &gathered);
  }
}

template <int bits, int G>
void matmul_of(const Bf16Args& args) {
  Registers::begin();
  if (args.fine) multiply<bits, G, 2>(args);
  else multiply<bits, G, 1>(args);
  Registers::end();
}

}  // namespace
}  // namespace mixbit

#include "product_dispatch.h"
