// A matrix together with the Python buffers that its pointers lead into.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "tensor.h"

namespace mixbit {

// Memory of an object that offers Python's buffer protocol; kept alive until this is destroyed.
class PinnedBytes {
 public:
  PinnedBytes(nanobind::handle object, std::int64_t expected, const char* what) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw nanobind::python_error();
    if (view_.len == expected) return;
    const std::string got = std::to_string(view_.len);
    PyBuffer_Release(&view_);
    throw std::invalid_argument(std::string(what) + ": " + got + " bytes, expected " + std::to_string(expected));
  }
  ~PinnedBytes() { PyBuffer_Release(&view_); }
  PinnedBytes(const PinnedBytes&) = delete;
  PinnedBytes& operator=(const PinnedBytes&) = delete;

  const std::byte* data() const { return static_cast<const std::byte*>(view_.buf); }

 private:
  Py_buffer view_;
};

class Weight {
 public:
  // shape: experts, rows, cols. bits 0: dense, without scales and biases.
  Weight(nanobind::handle weight, nanobind::object scales, nanobind::object biases, DType dtype, int bits,
         int group_size, std::int64_t experts, std::int64_t rows, std::int64_t cols) {
    if (experts < 1 || rows < 1 || cols < 1) throw std::invalid_argument("an empty matrix");
    const bool width = bits >= 1 && bits <= 8 && bits != 7;
    const bool group = group_size == 32 || group_size == 64 || group_size == 128;
    if (bits != 0 && !(width && group && cols % group_size == 0)) {
      throw std::invalid_argument("no kernel for " + std::to_string(bits) + " bits in groups of " +
                                  std::to_string(group_size) + " of " + std::to_string(cols) + " columns");
    }
    matrix_.dtype = dtype;
    matrix_.bits = bits;
    matrix_.group_size = group_size;
    matrix_.rows = rows;
    matrix_.cols = cols;
    matrix_.experts = experts;
    pins_[0].emplace(weight, experts * rows * matrix_.row_bytes(), "weight");
    matrix_.weight = pins_[0]->data();
    if (bits == 0) return;
    const std::int64_t bytes = experts * rows * matrix_.groups() * size_of(dtype);
    pins_[1].emplace(scales, bytes, "scales");
    pins_[2].emplace(biases, bytes, "biases");
    matrix_.scales = pins_[1]->data();
    matrix_.biases = pins_[2]->data();
  }

  const Matrix& matrix() const { return matrix_; }

 private:
  Matrix matrix_;
  std::optional<PinnedBytes> pins_[3];
};

}  // namespace mixbit
