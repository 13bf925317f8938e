// The products of attention on tile registers. Beside vector_product.h, the including file gives `Registers` (see
// tile_registers.h).
#pragma once

#include "tile_products.h"
#include "vector_product.h"

namespace mixbit {
namespace {

// F, whose left values are pairs of bfloat16, as tile registers multiply it: memory has room for whole tiles of 16 rows,
// and all parts but the last are multiples of tile_steps. keep is 0 or 1.
template <typename F>
struct OnTiles : F {};

constexpr std::int64_t tile_steps = 16, tile_side = 16;

template <typename F, int lefts, int rights>
inline void multiply_tile(const Product<OnTiles<F>>& m, std::int64_t row, std::int64_t column) {
  using R = Registers;
  float* c = m.c + row * m.c_stride + column;
  const std::int64_t c_bytes = m.c_stride * std::int64_t{sizeof *c};
  const auto sum = [&](int left, int right) { return c + left * tile_side * m.c_stride + right * tile_side; };
  if (m.keep == 0) {
    zero_sums<lefts, rights>();
  } else {
    R::load<0>(sum(0, 0), c_bytes);
    if constexpr (rights == 2) R::load<1>(sum(0, 1), c_bytes);
    if constexpr (lefts == 2) R::load<2>(sum(1, 0), c_bytes);
    if constexpr (lefts == 2 && rights == 2) R::load<3>(sum(1, 1), c_bytes);
  }
  constexpr std::int64_t b_row = tile_side * F::depth;  // of a register
  alignas(64) typename F::Stored part[rights][tile_steps][b_row];
  const typename F::Left* a = m.a + row * m.a_stride;
  const std::int64_t a_bytes = m.a_stride * std::int64_t{sizeof *a};
  const std::int64_t fetched = row == 0 ? m.beside_bytes : 0;
  constexpr std::int64_t step_bytes = rights * b_row * std::int64_t{sizeof *m.b};
  std::int64_t at = m.steps * (column / (rights * tile_side)) * step_bytes;
  const std::int32_t* number = m.parts;
  for (std::int64_t left = m.steps; left > 0; left -= m.part_steps, a += m.a_part, ++number) {
    const std::int64_t steps = left < m.part_steps ? left : m.part_steps;
    const typename F::Stored* b = m.b + *number * m.b_part + column * F::depth;
    for (std::int64_t s = 0; s < steps; s += tile_steps, at += tile_steps * step_bytes) {
      if (at < fetched) fetch_beside(m, at, tile_steps * step_bytes);
      const typename F::Stored* from = b + s * m.b_stride;
      std::int64_t b_bytes = m.b_stride * std::int64_t{sizeof *b}, other = b_row;
      if (steps - s < tile_steps) {  // beyond the last keys lies anything
        __builtin_memset(part, 0, sizeof part);
        for (int n = 0; n < rights; ++n)
          for (std::int64_t i = 0; i < steps - s; ++i)
            __builtin_memcpy(part[n][i], from + i * m.b_stride + n * b_row, sizeof part[n][i]);
        from = part[0][0], b_bytes = sizeof part[0][0], other = tile_steps * b_row;
      }
      R::load<4>(a + s, a_bytes);
      if constexpr (lefts == 2) R::load<5>(a + s + tile_side * m.a_stride, a_bytes);
      R::load<6>(from, b_bytes);
      if constexpr (rights == 2) R::load<7>(from + other, b_bytes);
      dot_all<lefts, rights>();
    }
  }
  R::save<0>(sum(0, 0), c_bytes);
  if constexpr (rights == 2) R::save<1>(sum(0, 1), c_bytes);
  if constexpr (lefts == 2) R::save<2>(sum(1, 0), c_bytes);
  if constexpr (lefts == 2 && rights == 2) R::save<3>(sum(1, 1), c_bytes);
}

template <typename F, int rights>
inline void multiply_columns(const Product<OnTiles<F>>& m, std::int64_t column) {
  std::int64_t row = 0;
  for (; row + tile_side < m.rows; row += 2 * tile_side) multiply_tile<F, 2, rights>(m, row, column);
  if (row < m.rows) multiply_tile<F, 1, rights>(m, row, column);
}

template <typename F>
inline void multiply(const Product<OnTiles<F>>& m) {
  std::int64_t column = 0;
  for (; column + 2 * tile_side <= m.columns; column += 2 * tile_side) multiply_columns<F, 2>(m, column);
  if (column < m.columns) multiply_columns<F, 1>(m, column);
}

// attend<F>, on tile registers where rows fill them and steps allow.
template <typename F>
void attend_on_tiles(const AttentionTile<typename F::Stored>& t) {
  constexpr std::int64_t unit = tile_steps * F::depth;
  if (t.rows < tile_side || t.head_dim % unit != 0 || t.block_size % unit != 0) return attend<F>(t);
  Registers::begin();
  attend<OnTiles<F>>(t);
  Registers::end();
}

}  // namespace
}  // namespace mixbit
