// Quantized weights as rows of bfloat16, and activations in the same order of columns (see bf16.h). The including file
// defines `V` (see int8_impl.h), and over vectors of 16 float and 32 halves
//   in_turn(a, b)          a, then b, rounded to bfloat16
//   lookup(table, index)   table[index & 31]
//   widen(p)               32 bytes as halves
//   widen_to_float(p)      16 bytes
#pragma once

#include "bf16.h"
#include "int8_blocks.h"

namespace mixbit {
namespace {

using Sixteen = Vector<float, 16>;
using Halves = Vector<std::uint16_t, 32>;

constexpr int block = 64;           // columns: two registers of halves
constexpr int matrix_rows = 16;     // of a tile register
constexpr Index chunk_cols = 1024;  // unpacked at a time, at most
template <int bits>
constexpr Index code_bytes = block / 8 * bits;  // of a row of a block

// A block of 16 rows. The second plane is what the rounding left of the first.
template <int planes>
struct UnpackedBlock {
  alignas(64) std::byte values[planes][block / 32][matrix_rows][64];
};

inline void store_halves(std::byte* to, Halves v) { std::memcpy(to, &v, sizeof v); }

// What rounding left of a, then b.
inline Halves rest_of(Halves taken, Sixteen a, Sixteen b) {
  using Part = Vector<std::uint16_t, 16>;
  using Words = Vector<std::uint32_t, 16>;
  const auto left = [](Sixteen v, const std::byte* part) {
    const Words wide = __builtin_convertvector(read_as<Part>(part), Words) << 16;
    return v - read_as<Sixteen>(&wide);
  };
  const auto* parts = reinterpret_cast<const std::byte*>(&taken);
  return in_turn(left(a, parts), left(b, parts + 32));
}

// The codes of a block at p, a byte for each: in bytes[0] those that are unpacked first, of both pieces, in bytes[1] the
// others. present: pieces that there are; another's are zeros.
template <int bits>
inline void read_codes(Pointer p, int present, std::byte (&bytes)[2][64]) {
  std::memset(bytes, 0, sizeof bytes);
  for (int at = 0; at < present; at += L) {
    V::Bytes a, b;
    V::template codes<bits>(p + at * (4 * bits), present - at, a, b);
    V::store_bytes(bytes[0] + 16 * at, a);
    V::store_bytes(bytes[1] + 16 * at, b);
  }
}

// Of the groups of a chunk of a row; zero beyond the row's last.
struct RowScales {
  alignas(64) float scales[chunk_cols / 32], biases[chunk_cols / 32];
};

template <int bits, DType type>
inline void load_row_scales(const ProductArgs& args, Index row, Index first, Index groups, RowScales& to) {
  const Index rows[] = {row};
  for (Index g = 0; g < groups; g += tile_rows) {
    Float scales[1], biases[1];
    load_block_rows<bits, type>(args, rows, first + g, scales, biases);
    V::store(to.scales + g, scales[0]);
    V::store(to.biases + g, biases[0]);
  }
}

// Of `count` rows, before any of them is unpacked: what is read from where it was just written makes the processor wait.
template <int bits>
void load_scales(const ProductArgs& args, Index row, Index count, Index first, Index groups, RowScales* to) {
  for (Index r = 0; r < count; ++r) {
    switch (args.dtype) {
      case DType::f16: load_row_scales<bits, DType::f16>(args, row + r, first, groups, to[r]); break;
      case DType::bf16: load_row_scales<bits, DType::bf16>(args, row + r, first, groups, to[r]); break;
      default: load_row_scales<bits, DType::f32>(args, row + r, first, groups, to[r]);
    }
  }
}

// A block of a row to two steps of 32 columns. Its pieces have scales [0] and [second], and biases.
//
// By a table of the 16 values that a code may have, for each piece.
template <int bits, int planes>
class ByTable {
 public:
  ByTable(const float* scales, const float* biases, int second) {
    constexpr Sixteen codes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Sixteen a = codes * scales[0] + biases[0], b = codes * scales[second] + biases[second];
    tables_[0] = in_turn(a, b);
    if constexpr (planes == 2) tables_[1] = rest_of(tables_[0], a, b);
  }

  void put(Pointer p, int present, std::byte* to, Index step_bytes, Index plane_bytes) const {
    constexpr Halves of_second = {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                  16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16};
    Halves codes[2];
    codes_of(p, present, codes);
    for (int half = 0; half < 2; ++half)
      for (int plane = 0; plane < planes; ++plane)
        store_halves(to + half * step_bytes + plane * plane_bytes, lookup(tables_[plane], codes[half] | of_second));
  }

 private:
  static void codes_of(Pointer p, int present, Halves (&out)[2]) {
    alignas(64) std::byte bytes[2][64];
    if constexpr (bits == 4) {
      if (present < 2) {
        std::memset(bytes, 0, 32);
        p = static_cast<Pointer>(std::memcpy(bytes, p, 16));
      }
      const Halves both = widen(p);
      out[0] = both & 15;
      out[1] = both >> 4;
    } else {
      read_codes<bits>(p, present, bytes);
      out[0] = widen(bytes[0]);
      out[1] = widen(bytes[1]);
    }
  }

  Halves tables_[planes];
};

// One by one.
template <int bits, int planes>
class ByValue {
 public:
  ByValue(const float* scales, const float* biases, int second)
      : scales_{scales[0], scales[second]}, biases_{biases[0], biases[second]} {}

  void put(Pointer p, int present, std::byte* to, Index step_bytes, Index plane_bytes) const {
    alignas(64) std::byte bytes[2][64];
    const bool as_they_lie = bits == 8 && present == 2;
    if (!as_they_lie) read_codes<bits>(p, present, bytes);
    for (int half = 0; half < 2; ++half) {
      const auto value = [&](int i) {
        return widen_to_float(as_they_lie ? p + piece * i + 16 * half : bytes[half] + 16 * i) * scales_[i] + biases_[i];
      };
      const Sixteen a = value(0), b = value(1);
      const Halves taken = in_turn(a, b);
      store_halves(to + half * step_bytes, taken);
      if constexpr (planes == 2) store_halves(to + half * step_bytes + plane_bytes, rest_of(taken, a, b));
    }
  }

 private:
  float scales_[2], biases_[2];
};

// Block `number` of a chunk that begins with group `first`, of rows [row, row + count), at most 16. present: pieces of
// the block that there are; another's are zeros. ahead: as many codes that are asked for row by row: all at once they would
// take the buffers in which other loads wait for the second-level cache.
template <int bits, int G, int planes>
inline void unpack_block(const ProductArgs& args, Index row, Index count, Index first, Index number, int present,
                         const RowScales* scales, Pointer ahead, UnpackedBlock<planes>& to) {
  static_assert(V::template offset<bits> == 0);
  using Values = std::conditional_t<(bits <= 4), ByTable<bits, planes>, ByValue<bits, planes>>;
  constexpr Index step_bytes = sizeof to.values[0][0], plane_bytes = sizeof to.values[0];
  const Index group = G < block ? number * (block / G) : number / (G / block);
  Pointer from = args.weight + row * args.row_bytes + (first * G + number * block) / 8 * bits;
  std::byte* out = to.values[0][0][0];
  for (Index r = 0; r < count; ++r, from += args.row_bytes, out += 64) {
    if (r * code_bytes<bits> % 64 < code_bytes<bits>) __builtin_prefetch(ahead + r * code_bytes<bits>, 0, 2);
    Values(scales[r].scales + group, scales[r].biases + group, G < block ? 1 : 0)
        .put(from, present, out, step_bytes, plane_bytes);
  }
}

// Values of a block in the order of codes: first, then second ones.
inline void order_block(const float* x, bool interleaved, float (&out)[block]) {
  for (int piece_at = 0; piece_at < 2; ++piece_at)
    for (int i = 0; i < 16; ++i)
      for (int half = 0; half < 2; ++half)
        out[32 * half + 16 * piece_at + i] = x[piece * piece_at + (interleaved ? 2 * i + half : 16 * half + i)];
}

void narrow(const float* x, Index cols, bool interleaved, std::byte* values, std::byte* rest) {
  for (Index i = 0; i < cols; i += block, values += 2 * block) {
    alignas(64) float padded[block] = {}, ordered[block];
    const bool whole = i + block <= cols;
    if (!whole) std::memcpy(padded, x + i, static_cast<std::size_t>(cols - i) * sizeof(float));
    if (interleaved) order_block(whole ? x + i : padded, true, ordered);
    else order_block(whole ? x + i : padded, false, ordered);
    for (int half = 0; half < 2; ++half) {
      const auto a = read_as<Sixteen>(ordered + 32 * half), b = read_as<Sixteen>(ordered + 32 * half + 16);
      const Halves taken = in_turn(a, b);
      store_halves(values + 64 * half, taken);
      if (rest != nullptr) store_halves(rest + 64 * half, rest_of(taken, a, b));
    }
    if (rest != nullptr) rest += 2 * block;
  }
}

// `pairs` pairs of values of up to 16 rows, a multiple of 16, to [pair][row].
inline void turn_rows(const Pointer (&rows)[panel_rows], Index pairs, std::byte* to) {
  for (Index at = 0; at < pairs; at += tile_rows) {
    for (Index first = 0; first < panel_rows; first += tile_rows) {
      Int m[tile_rows];
      for (Index r = 0; r < tile_rows; ++r)
        m[r] = rows[first + r] == nullptr ? V::zero() : V::ints(V::load_bytes(rows[first + r] + 4 * at));
      V::transpose(m);
      for (Index r = 0; r < tile_rows; ++r) V::store_bytes(to + ((at + r) * panel_rows + first) * 4, V::bytes(m[r]));
    }
  }
}

void turn(const std::byte* from, Index stride, Index count, Index cols, std::byte* panel) {
  Pointer rows[panel_rows];
  for (Index r = 0; r < panel_rows; ++r) rows[r] = r < count ? from + r * stride : nullptr;
  turn_rows(rows, (cols + block - 1) / block * (block / 2), panel);
}

}  // namespace
}  // namespace mixbit
