// Matrix times activations, one tile of rows at a time, for every width and instruction set.
#pragma once

#include <cstdint>
#include <memory>

#include "isa.h"
#include "tensor.h"

namespace mixbit {

// Rows of activations made ready for the kernels: the values, and what can be shared by every row of
// every matrix they meet (for the bias term, the sum over each group of 32, 64 and 128 columns).
// The owner allocates once for the largest batch and prepares row by row, from any thread.
class Activations {
 public:
  Activations(std::int64_t max_rows, std::int64_t max_dim);

  // Copies x[0 : dim] in as row `row`. Rows may be prepared concurrently. All rows share one dim.
  void prepare(Isa isa, std::int64_t row, const float* x, std::int64_t dim);

  // Zero from dim up to the next multiple of 32.
  const float* values(std::int64_t row) const { return values_.get() + row * value_stride_; }
  std::int64_t value_stride() const { return value_stride_; }

  // Sums over each group of `group_size` columns, zero up to the next multiple of 16.
  const float* sums(std::int64_t row, int group_size) const {
    return sums_.get() + row * sum_stride_ + sum_offset(group_size);
  }
  std::int64_t sum_stride() const { return sum_stride_; }

 private:
  struct Free {
    void operator()(float* p) const;
  };
  using Buffer = std::unique_ptr<float[], Free>;

  static Buffer allocate(std::int64_t size);
  std::int64_t sum_offset(int group_size) const;

  std::int64_t value_stride_;
  std::int64_t sum_part_;  // room for the sums of groups of 32
  std::int64_t sum_stride_;
  Buffer values_;
  Buffer sums_;
};

// y[i * y_stride + r] = dot(w row r, x row i') for r in [row_begin, row_end), i in [0, count), where
// i' = index ? index[i] : i. Accumulates in float32. `w` is a single matrix (take Matrix::expert first),
// x was prepared with w.cols values. Called from many threads at once, on disjoint rows; the tile size
// is the caller's (see preferred_tile).
void matmul_rows(Isa isa, const Matrix& w, const Activations& x, const std::int32_t* index,
                 std::int64_t count, std::int64_t row_begin, std::int64_t row_end, float* y,
                 std::int64_t y_stride);

// Rows that one call should cover: enough work to be worth a claim by a thread, few enough to share out.
std::int64_t preferred_tile(const Matrix& w, std::int64_t count);

// out[0 : cols] = row r of w, as float32.
void unpack_row(const Matrix& w, std::int64_t row, float* out);

}  // namespace mixbit
