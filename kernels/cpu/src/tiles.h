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

// Rows of w to a tile, for `count` rows of input. Small matrices are cut finer, so that every thread has
// several of the tiles of the `total_rows` that its region computes. Results do not depend on it.
inline std::int64_t tile_rows(const Matrix& w, std::int64_t count, std::int64_t total_rows, int threads) {
  constexpr std::int64_t unit = 16;
  std::int64_t fair = total_rows / (4 * threads) / unit * unit;
  return std::max(unit, std::min(preferred_tile(w, count), fair));
}

}  // namespace mixbit
