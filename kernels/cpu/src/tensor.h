// Weights as the kernels see them: pointers into the memory-mapped checkpoint, never copied.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mixbit {

enum class DType : std::uint8_t { f32, f16, bf16 };

// How a matrix is applied: to float32 activations, or where its codes allow to rounded ones, int8 or, of many rows,
// bfloat16 (see int8.h and bf16.h); fine: what rounding leaves is always rounded too.
enum class Precision : std::uint8_t { exact, fast, fine };

constexpr std::int64_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

// A dense matrix (bits == 0: weight holds `dtype` values) or an affine-quantized one
// (w = scale * code + bias per group of columns; codes are one LSB-first bit stream a row;
// scales and biases hold `dtype` values). A stack of experts is `experts` matrices, one after another.
// Nothing is aligned beyond the element size: safetensors gives no more.
struct Matrix {
  const std::byte* weight = nullptr;
  const std::byte* scales = nullptr;
  const std::byte* biases = nullptr;
  DType dtype = DType::f32;
  int bits = 0;
  int group_size = 0;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t experts = 1;
  Precision precision = Precision::exact;

  bool rounds_inputs() const { return precision != Precision::exact && bits > 1; }
  std::int64_t row_bytes() const { return bits == 0 ? cols * size_of(dtype) : cols * bits / 8; }
  const std::byte* row(std::int64_t r) const { return weight + r * row_bytes(); }
  std::int64_t groups() const { return bits == 0 ? 0 : cols / group_size; }

  // The matrix of one expert.
  Matrix expert(std::int64_t e) const {
    Matrix m = *this;
    m.experts = 1;
    m.weight += e * rows * row_bytes();
    if (bits != 0) {
      m.scales += e * rows * groups() * size_of(dtype);
      m.biases += e * rows * groups() * size_of(dtype);
    }
    return m;
  }
};

}  // namespace mixbit
