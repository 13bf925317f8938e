// The tile registers of AMX, each 16 rows of 64 bytes. For files that run where the processor has them.
#pragma once

#include <cstdint>

namespace mixbit {
namespace {

// Memory is neither read nor written across load and save.
struct Registers {
  // As LDTILECFG reads it.
  struct alignas(64) Shapes {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };

  // Before the first use, and after the last one: what they hold would be kept with the thread.
  static void begin() {
    static constexpr Shapes shapes{};
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
  }
  static void end() { __asm__ volatile("tilerelease"); }

  // In place of intrinsics: those of GCC want numbers of registers as they are written. stride: bytes.
  template <int r>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(r));
  }
  template <int r>
  static void load(const void* p, std::int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(r) : "memory");
  }
  template <int r>
  static void save(void* p, std::int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(r) : "memory");
  }

  // sums[i][j] += the sum of a[i][k] * b[k / 2][j][k % 2] over k in [0, 32), in float32, of bfloat16.
  template <int sums, int a, int b>
  static void dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
  }
};

}  // namespace
}  // namespace mixbit
