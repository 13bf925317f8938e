// Rows of several matrices, cut into tiles that threads claim.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "matmul.h"

namespace mixbit {

struct Tile {
  std::size_t part;
  std::int64_t begin, end;
};

// Parts are cut one after another, each into tiles of its own size; tile i is found by its number.
class Tiling {
 public:
  void clear() { parts_.clear(), total_ = 0; }

  void add(std::int64_t rows, std::int64_t tile) {
    parts_.push_back({total_, rows, tile});
    total_ += (rows + tile - 1) / tile;
  }

  std::int64_t size() const { return total_; }

  Tile operator[](std::int64_t i) const {
    auto after = std::upper_bound(parts_.begin(), parts_.end(), i, [](auto n, const Part& p) { return n < p.first; });
    const Part& part = *(after - 1);
    const std::int64_t begin = (i - part.first) * part.tile;
    return {static_cast<std::size_t>(after - 1 - parts_.begin()), begin, std::min(begin + part.tile, part.rows)};
  }

 private:
  struct Part {
    std::int64_t first, rows, tile;
  };
  std::vector<Part> parts_;
  std::int64_t total_ = 0;
};

// The most rows that fall to one thread, if `rows` are cut into tiles of `tile`.
inline std::int64_t largest_share(std::int64_t rows, std::int64_t tile, int threads) {
  const std::int64_t tiles = (rows + tile - 1) / tile;
  return std::min(rows, (tiles + threads - 1) / threads * tile);
}

// Rows of w to a tile, for `count` rows of input. Small matrices are cut finer, so that every thread has
// several of the tiles of the `total_rows` that its region computes, and evenly, so that none has more of them than others.
// Results do not depend on it.
inline std::int64_t tile_rows(const Matrix& w, std::int64_t count, std::int64_t total_rows, int threads) {
  constexpr std::int64_t unit = 16;
  const std::int64_t fair = total_rows / (4 * threads) / unit * unit;
  const std::int64_t most = std::max(unit, std::min(preferred_tile(w, count), fair));
  const std::int64_t tiles = (w.rows + most - 1) / most;
  std::int64_t best = ((w.rows + tiles - 1) / tiles + unit - 1) / unit * unit;  // no small one at the end
  if (w.rows < total_rows) return best;
  for (std::int64_t tile = best - unit; 2 * tile >= most; tile -= unit) {
    if (largest_share(w.rows, tile, threads) < largest_share(w.rows, best, threads)) best = tile;
  }
  return best;
}

}  // namespace mixbit
