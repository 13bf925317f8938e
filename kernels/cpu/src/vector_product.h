// Small matrix products in registers. Included once for each instruction set (see vector_math.h).
#pragma once

#include "vector_formats.h"
#include "vector_math.h"

namespace mixbit {
namespace {

// c[rows, columns] = keep * c + a * b, where c is not read if keep is 0. columns are a multiple of lane_pad. The summed
// dimension lies in steps (see vector_formats.h), `steps` in all, in parts of part_steps: step s of part p of b
// is at b + parts[p] * b_part + s * b_stride, that of row r of a at a + r * a_stride + p * a_part + s * F::lefts.
template <typename F>
struct Product {
  const typename F::Left* a;
  std::int64_t a_stride, a_part;
  const typename F::Stored* b;
  std::int64_t b_stride, b_part;
  const std::int32_t* parts;
  std::int64_t part_steps, steps;
  float keep;
  float* c;
  std::int64_t c_stride, rows, columns;
  // Memory that is fetched beside the products, as fast as b is read: so many bytes from each, null: none.
  const void* beside[2] = {};
  std::int64_t beside_bytes = 0;
};

constexpr std::int32_t one_part[] = {0};

// Of both: [at, at + bytes).
template <typename F>
inline void fetch_beside(const Product<F>& m, std::int64_t at, std::int64_t bytes) {
  for (const void* from : m.beside) {
    if (from == nullptr) continue;
    for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + at + i, 0, 2);
  }
}

template <typename F, int rows, int width>
inline void multiply_block(const Product<F>& m, std::int64_t row, std::int64_t column) {
  Vec total[rows][width] = {};
  const typename F::Left* a = m.a + row * m.a_stride;  // each sum has one order, whatever the rows beside it
  const std::int32_t* part = m.parts;
  constexpr std::int64_t bytes = width * lanes * F::depth * std::int64_t{sizeof *m.b};  // of b in a step
  const std::int64_t fetched = row == 0 ? m.beside_bytes : 0;
  std::int64_t at = m.steps * (column / (width * lanes)) * bytes;
  for (std::int64_t left = m.steps; left > 0; left -= m.part_steps, a += m.a_part) {
    const typename F::Stored* b = m.b + *part * m.b_part + column * F::depth;
    const std::int64_t steps = left < m.part_steps ? left : m.part_steps;
    for (std::int64_t s = 0; s < steps; ++s, at += bytes) {
      if (at < fetched) fetch_beside(m, at, bytes);
      F::template add<rows, width>(total, a + s * F::lefts, m.a_stride, b + s * m.b_stride);
    }
    ++part;
  }
  for (int r = 0; r < rows; ++r) {
    for (int w = 0; w < width; ++w) {
      float* c = m.c + (row + r) * m.c_stride + column + w * lanes;
      store(c, m.keep == 0 ? total[r][w] : load(c) * m.keep + total[r][w]);
    }
  }
}

// Rows from `row` on, fewer than `most`.
template <typename F, int most, int width>
inline void multiply_rest(const Product<F>& m, std::int64_t row, std::int64_t column) {
  if constexpr (most > 1) {
    if (m.rows - row == most - 1) return multiply_block<F, most - 1, width>(m, row, column);
    multiply_rest<F, most - 1, width>(m, row, column);
  }
}

template <typename F, int width>
inline void multiply_columns(const Product<F>& m, std::int64_t column) {
  std::int64_t row = 0;
  for (; row + F::most_rows <= m.rows; row += F::most_rows) multiply_block<F, F::most_rows, width>(m, row, column);
  if (row < m.rows) multiply_rest<F, F::most_rows, width>(m, row, column);
}

template <typename F>
inline void multiply(const Product<F>& m) {
  std::int64_t column = 0;
  for (; column + 2 * lanes <= m.columns; column += 2 * lanes) multiply_columns<F, 2>(m, column);
  for (; column < m.columns; column += lanes) multiply_columns<F, 1>(m, column);
}

}  // namespace
}  // namespace mixbit
