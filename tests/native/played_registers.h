// Tile registers (see tile_registers.h) that are played by loops, for machines that have none.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace mixbit {
namespace {

class Registers {
 public:
  static void begin() {
    std::memset(at_, 0, sizeof at_);
    begun_ = true;
  }
  static void end() { begun_ = false; }

  template <int r>
  static void zero() {
    std::memset(at_[r], 0, sizeof at_[r]);
  }
  template <int r>
  static void load(const void* p, std::int64_t stride) {
    for (int i = 0; i < 16; ++i) std::memcpy(at_[r][i], static_cast<const char*>(p) + i * stride, 64);
  }
  template <int r>
  static void save(void* p, std::int64_t stride) {
    for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(p) + i * stride, at_[r][i], 64);
  }
  template <int sums, int a, int b>
  static void dot() {
    if (!begun_) std::abort();
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) {
        float sum;
        std::memcpy(&sum, &at_[sums][i][j], sizeof sum);
        for (int pair = 0; pair < 16; ++pair) {
          const std::uint32_t left = at_[a][i][pair], right = at_[b][pair][j];
          sum += upper_half(left << 16) * upper_half(right << 16);
          sum += upper_half(left) * upper_half(right);
        }
        std::memcpy(&at_[sums][i][j], &sum, sizeof sum);
      }
    }
  }

 private:
  static float upper_half(std::uint32_t bits) {
    bits &= 0xffff0000;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  static inline std::uint32_t at_[8][16][16];
  static inline bool begun_ = false;
};

}  // namespace
}  // namespace mixbit
