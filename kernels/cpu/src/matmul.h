// Matrix times activations, one tile of rows at a time, for every width and instruction set.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "buffer.h"
#include "isa.h"
#include "tensor.h"

namespace mixbit {

// Rows of activations made ready for the kernels of `isa`, in each form that the matrices they meet ask for: float32 with
// the sum over each group of 32, 64 and 128 columns (for the bias term), or int8 for one group size, order of codes and
// share of groups that are rounded twice; or bfloat16.
// `serve` is called for each such matrix first; then, each time, `begin`, and rows are prepared, from any thread.
class Activations {
 public:
  Activations(Isa isa, std::int64_t max_rows, std::int64_t max_dim) : isa_(isa), max_rows_(max_rows), max_dim_(max_dim) {}

  // Makes room for what the kernels of `w` read.
  void serve(const Matrix& w);

  // Rows follow of which `meeting` meet each weight, or so. Where these are many, rounded rows are bfloat16, if the
  // instruction set has products of it. in_order: all of them will be lined up.
  void begin(std::int64_t meeting, bool in_order);

  // Takes x[0 : dim] in as row `row`. Rows may be prepared concurrently. All rows share one dim.
  void prepare(std::int64_t row, const float* x, std::int64_t dim);

  // Rows [begin, end) are prepared, and will be multiplied in order. begin is a multiple of `grain`.
  void line_up(std::int64_t begin, std::int64_t end, std::int64_t dim);

  // Rows that are prepared at a time: `wanted` or so.
  std::int64_t grain(std::int64_t wanted) const;

  // What is multiplied in order may begin at multiples of this.
  static constexpr std::int64_t together = 16;

  std::int64_t bytes() const;

 private:
  friend void matmul_rows(const Matrix&, const Activations&, const std::int32_t*, std::int64_t, std::int64_t,
                          std::int64_t, float*, std::int64_t, const std::byte*);

  // Rows of `stride` values, zero from dim up to the next multiple of 32; rows of sums, a part for each group size,
  // zero up to the next multiple of 16.
  struct Exact {
    std::int64_t stride, sum_stride;
    Buffer<float> values, sums;
    std::int64_t sum_offset(int group_size) const;
  };
  // Rows as int8.h lays them out, of `stride` bytes.
  struct Int8 {
    int group_size;
    bool interleaved;
    float spread;
    std::int64_t factors, sums, rest, rest_factors, mask, stride;
    Buffer<std::byte> rows;
  };
  // Rows and panels as bf16.h lays them out. fine: with rests.
  struct Bf16 {
    bool interleaved, fine;
    std::int64_t rest, stride, panel_stride;
    Buffer<std::byte> rows, panels;
  };

  void serve_bf16(bool interleaved, bool fine);
  void prepare_exact(std::int64_t row, const float* x, std::int64_t dim);
  void prepare_int8(const Int8& form, std::int64_t row, const float* x, std::int64_t dim);
  const Bf16& bf16_for(const Matrix& w) const;
  Int8* int8_for(const Matrix& w);
  const Int8* int8_for(const Matrix& w) const { return const_cast<Activations*>(this)->int8_for(w); }

  Isa isa_;
  std::int64_t max_rows_, max_dim_;
  std::optional<Exact> exact_;
  std::vector<Int8> int8_;
  std::vector<Bf16> bf16_;
  bool many_ = false, in_order_ = false;
};

// y[i * y_stride + r] = dot(w row r, x row i') for r in [row_begin, row_end), i in [0, count), where
// i' = index ? index[i] : i. Accumulates in float32. `w` is a single matrix (take Matrix::expert first), which x
// serves; x was prepared with w.cols values. Where w.rounds_inputs(), a row of y is the same whatever the other rows are,
// in the form that x has; with index null, or in order from a multiple of Activations::together on, those are lined up.
// Called from many threads at once, on disjoint rows; the tile size
// is the caller's (see preferred_tile). next: the weights that the thread will read then, a hint; null: the next rows.
void matmul_rows(const Matrix& w, const Activations& x, const std::int32_t* index,
                 std::int64_t count, std::int64_t row_begin, std::int64_t row_end, float* y,
                 std::int64_t y_stride, const std::byte* next = nullptr);

// Rows that one call should cover: enough work to be worth a claim by a thread, few enough to share out.
std::int64_t preferred_tile(const Matrix& w, std::int64_t count);

// out[0 : cols] = row r of w, as float32.
void unpack_row(const Matrix& w, std::int64_t row, float* out);

}  // namespace mixbit
