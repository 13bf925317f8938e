// Shapes that an op relies on, checked once when a program is compiled.
#pragma once

#include <stdexcept>
#include <string>

#include "step.h"
#include "tensor.h"

namespace mixbit {

inline void require_equal(const char* what, std::int64_t got, std::int64_t expected) {
  if (got != expected) {
    throw std::invalid_argument(std::string(what) + ": " + std::to_string(got) + ", expected " +
                                std::to_string(expected));
  }
}

inline void require_shape(const char* what, const Matrix& m, std::int64_t rows, std::int64_t cols) {
  if (m.rows != rows || m.cols != cols) {
    throw std::invalid_argument(std::string(what) + ": matrix of " + std::to_string(m.rows) + " x " +
                                std::to_string(m.cols) + ", expected " + std::to_string(rows) + " x " +
                                std::to_string(cols));
  }
}

// Heads 0 .. heads - 1, `width` values each, must lie within a row, which has one row a token.
inline void require_columns(const char* what, const Columns& c, std::int64_t heads, std::int64_t width) {
  const std::int64_t end = c.offset + (heads - 1) * c.stride + width;
  if (c.value.rows != Rows::tokens || c.offset < 0 || c.stride < 0 || end > c.value.dim) {
    throw std::invalid_argument(std::string(what) + ": " + std::to_string(heads) + " heads of " +
                                std::to_string(width) + " values at " + std::to_string(c.offset) + " + h * " +
                                std::to_string(c.stride) + " do not fit in a row of " + std::to_string(c.value.dim));
  }
}

}  // namespace mixbit
