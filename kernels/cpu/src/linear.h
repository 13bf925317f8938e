// What the ops that apply matrices share.
#pragma once

#include "matmul.h"
#include "ops.h"
#include "tiles.h"

namespace mixbit {

// x[0 : rows], contiguous rows of dim values, made ready as rows [0, rows) of `ready`. meeting: see Activations.
inline void prepare_rows(Machine& machine, Activations& ready, const float* x, std::int64_t rows, std::int64_t dim,
                         std::int64_t meeting) {
  constexpr std::int64_t grain_values = 2048;  // a microsecond or two: worth a claim
  ready.begin(meeting, true);
  machine.pool.run_ranges(rows, ready.grain(grain_values / dim), [&](auto begin, auto end, int) {
    for (auto i = begin; i < end; ++i) ready.prepare(i, x + i * dim, dim);
    ready.line_up(begin, end, dim);
  });
}

// Where all rows meet each weight.
inline void prepare_rows(Machine& machine, Activations& ready, const float* x, std::int64_t rows, std::int64_t dim) {
  prepare_rows(machine, ready, x, rows, dim, rows);
}

// Makes room for what a feed-forward reads.
inline void serve_inputs(const MlpWeights& w, Activations& x, Activations& hidden) {
  x.serve(w.gate);
  x.serve(w.up);
  hidden.serve(w.down);
}

// hidden[i * stride + r] = silu(gate x) * up x for rows [begin, end) of gate and up.
// scratch: count * (end - begin) floats. next: see matmul_rows.
inline void swiglu_rows(const Machine& machine, const MlpWeights& w, const Activations& x, const std::int32_t* index,
                        std::int64_t count, std::int64_t begin, std::int64_t end, float* hidden, std::int64_t stride,
                        float* scratch, const std::byte* next) {
  const std::int64_t width = end - begin;
  matmul_rows(w.gate, x, index, count, begin, end, hidden, stride, w.up.row(begin));
  matmul_rows(w.up, x, index, count, begin, end, scratch - begin, width, next);
  for (std::int64_t i = 0; i < count; ++i) {
    float* y = hidden + i * stride + begin;
    machine.ops.silu_mul(y, scratch + i * width, width, y);
  }
}

// Floats of scratch in which a tile of `bounded_tile` rows of any matrix holds its outputs for max_rows inputs.
constexpr std::int64_t tile_scratch(std::int64_t max_rows) { return 64 * max_rows + 16384; }

// As tile_rows for `count` inputs; the outputs of the tile for `most` inputs fit in tile_scratch(most).
inline std::int64_t bounded_tile(const Matrix& w, std::int64_t count, std::int64_t most, std::int64_t total_rows,
                                 int threads) {
  return std::min(tile_rows(w, count, total_rows, threads), tile_scratch(most) / most / 16 * 16);
}

}  // namespace mixbit
