// Four lanes: NEON of Armv8.2 with the dot product.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstring>

#include "kernels.h"

namespace mixbit {
namespace {

template <class T>
T read(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

struct V {
  static constexpr int width = 4, tokens = 6;  // 4 x 6 sums, 6 inputs and a weight of 32 registers
  using Reg = float32x4_t;

  static Reg zero() { return vdupq_n_f32(0.0f); }
  static Reg set1(float x) { return vdupq_n_f32(x); }
  static Reg load(const float* p) { return read<Reg>(p); }
  static void store(float* p, Reg a) { vst1q_f32(p, a); }
  static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }

  static Reg from_f16(const std::byte* p) { return vcvt_f32_f16(read<float16x4_t>(p)); }
  static Reg from_bf16(const std::byte* p) { return vreinterpretq_f32_u32(vshll_n_u16(read<uint16x4_t>(p), 16)); }

  template <int bits>
  static Reg codes(const std::byte* p, int i) {
    if constexpr (bits == 8) {
      const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(read<std::uint32_t>(p + 4 * i)));
      return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
    } else {  // four codes end within 32 bits; the last word must not pass the end
      const int wanted = bits * i / 2, last = 4 * bits - 4, start = wanted < last ? wanted : last;
      const int first = 4 * bits * i - 8 * start;
      const int32x4_t shifts = {-first, -first - bits, -first - 2 * bits, -first - 3 * bits};
      const uint32x4_t word = vdupq_n_u32(read<std::uint32_t>(p + start));
      return vcvtq_f32_u32(vandq_u32(vshlq_u32(word, shifts), vdupq_n_u32((1u << bits) - 1)));
    }
  }

  static float sum(Reg a) { return vaddvq_f32(a); }
  static void sum4(Reg a, Reg b, Reg c, Reg d, float* out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
  }
};

}  // namespace
}  // namespace mixbit

#include "kernels_impl.h"

const mixbit::Kernels mixbit::neon_kernels = {matmul, unpack_row};
#endif
