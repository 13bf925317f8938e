// Matrix times activations, one tile of rows at a time, for every width and instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "tensor.h"

namespace mixbit {

enum class Isa : std::uint8_t { portable, avx2, avx512, neon };

const char* name(Isa isa);
bool supported(Isa isa);  // by this build and this processor
Isa best_isa();

// Rows of activations made ready for the kernels of one instruction set: the values, and what can be
// shared by every row of every matrix they meet (the sum of each run of 32 values, for the bias term).
// The owner allocates once for the largest batch and prepares row by row, from any thread.
class Activations {
 public:
  static constexpr std::int64_t sum_width = 32;

  Activations(std::int64_t max_rows, std::int64_t max_dim);

  // Copies x[0 : dim] in as row `row`. Rows may be prepared concurrently. All rows share one dim.
  void prepare(Isa isa, std::int64_t row, const float* x, std::int64_t dim);

  const float* values(std::int64_t row) const { return values_.data() + row * value_stride_; }
  const float* sums(std::int64_t row) const { return sums_.data() + row * sum_stride_; }

 private:
  std::int64_t value_stride_;
  std::int64_t sum_stride_;
  std::vector<float> values_;
  std::vector<float> sums_;
};

// y[i * y_stride + r] = dot(w row r, x row i') for r in [row_begin, row_end), i in [0, count), where
// i' = index ? index[i] : i. Accumulates in float32. `w` is a single matrix (take Matrix::expert first).
// Called from many threads at once, on disjoint rows; the tile size is the caller's (see preferred_tile).
void matmul_rows(Isa isa, const Matrix& w, const Activations& x, const std::int32_t* index,
                 std::int64_t count, std::int64_t row_begin, std::int64_t row_end, float* y,
                 std::int64_t y_stride);

// Rows that one call should cover so that an unpacked tile stays in cache.
std::int64_t preferred_tile(const Matrix& w, std::int64_t count);

// out[0 : cols] = row r of w, as float32.
void unpack_row(const Matrix& w, std::int64_t row, float* out);

}  // namespace mixbit
