// One lane: NEON of Armv8.2 with the dot product.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstring>

#include "int8.h"

namespace mixbit {
namespace {

// How to bring sixteen fields of `width` bits, the first at bit `first` of 16 bytes, to a byte each: the two bytes
// that hold a field, then a shift.
struct Fields {
  std::uint8_t bytes[2][16];
  std::int16_t shifts[2][8];
};
constexpr Fields fields(int width, int first) {
  Fields f{};
  for (int i = 0; i < 16; ++i) {
    const int bit = first + width * i;
    f.bytes[i / 8][i % 8 * 2] = static_cast<std::uint8_t>(bit / 8);
    f.bytes[i / 8][i % 8 * 2 + 1] = static_cast<std::uint8_t>(bit / 8 + 1);  // beyond the last byte: zero
    f.shifts[i / 8][i % 8] = static_cast<std::int16_t>(-(bit % 8));
  }
  return f;
}
template <int width, int first>
constexpr Fields fields_at = fields(width, first);

struct V {
  static constexpr int lanes = 1, tokens = 6, tiles = 1;  // 6 sums of groups, 6 of lanes, 6 in all, of 32 registers
  static constexpr bool sums_wait = false;
  static constexpr bool narrow_sums = false, masks = false;
  template <int bits>
  static constexpr float offset = bits == 8 ? 128 : 0;
  using Bytes = int8x16_t;
  using Int = int32x4_t;
  using Float = float32x4_t;

  template <class T>
  static T read(const void* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }

  static Int zero() { return vdupq_n_s32(0); }
  static Float set(float x) { return vdupq_n_f32(x); }
  static Float load(const float* p) { return read<Float>(p); }
  static Bytes load_bytes(const std::byte* p) { return read<Bytes>(p); }
  static void store_bytes(std::byte* p, Bytes a) { std::memcpy(p, &a, sizeof a); }
  static void store(float* p, Float a) { std::memcpy(p, &a, sizeof a); }
  static Float from_f16(const std::byte* p) { return vcvt_f32_f16(read<float16x4_t>(p)); }
  static Float from_bf16(const std::byte* p) { return vreinterpretq_f32_u32(vshll_n_u16(read<uint16x4_t>(p), 16)); }
  static Bytes repeat(const std::byte* p) { return vreinterpretq_s8_s32(vdupq_n_s32(read<std::int32_t>(p))); }
  static void narrow(Int a, std::byte* p) {
    for (int i = 0; i < 4; ++i) p[i] = static_cast<std::byte>(a[i] & 255);
  }
  static void narrow_pairs(Int a, std::byte* p, std::byte* q) {
    for (int i = 0; i < 2; ++i) {
      p[i] = static_cast<std::byte>(a[2 * i] & 255);
      q[i] = static_cast<std::byte>(a[2 * i + 1] & 255);
    }
  }
  static Float floats(Int a) { return vreinterpretq_f32_s32(a); }
  static Int bits(Float a) { return vreinterpretq_s32_f32(a); }
  static Int ints(Bytes a) { return vreinterpretq_s32_s8(a); }
  static Bytes bytes(Int a) { return vreinterpretq_s8_s32(a); }
  static Float convert(Int a) { return vcvtq_f32_s32(a); }
  static Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static Float mul(Float a, Float b) { return vmulq_f32(a, b); }
  static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }

  static Bytes packed(const std::byte* p, int) { return load_bytes(p); }
  static void split(Bytes v, Bytes& a, Bytes& b) {
    a = vandq_s8(v, vdupq_n_s8(15));
    b = vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(v), 4));
  }
  template <int bits>
  static void codes(const std::byte* p, int, Bytes& a, Bytes& b) {
    uint8x16_t first, second;
    if constexpr (bits == 2) {
      const uint8x8_t v = read<uint8x8_t>(p);
      const uint8x16_t twice = vcombine_u8(vzip1_u8(v, v), vzip2_u8(v, v));
      const int8x16_t shifts = {0, -4, 0, -4, 0, -4, 0, -4, 0, -4, 0, -4, 0, -4, 0, -4};
      first = vandq_u8(vshlq_u8(twice, shifts), vdupq_n_u8(3));
      second = vandq_u8(vshlq_u8(twice, vsubq_s8(shifts, vdupq_n_s8(2))), vdupq_n_u8(3));
    } else if constexpr (bits == 3) {
      uint8x16_t v = vdupq_n_u8(0);
      std::memcpy(&v, p, 12);
      const uint8x16_t pairs = sixteen<6, 0>(v);
      first = vandq_u8(pairs, vdupq_n_u8(7));
      second = vshrq_n_u8(pairs, 3);
    } else if constexpr (bits == 4) {
      return split(load_bytes(p), a, b);
    } else if constexpr (bits == 8) {  // signed, by 128 less
      first = veorq_u8(read<uint8x16_t>(p), vdupq_n_u8(128));
      second = veorq_u8(read<uint8x16_t>(p + 16), vdupq_n_u8(128));
    } else {  // the second sixteen end with the last byte
      constexpr int start = 4 * bits - 16;
      first = sixteen<bits, 0>(read<uint8x16_t>(p));
      second = sixteen<bits, 16 * bits - 8 * start>(read<uint8x16_t>(p + start));
    }
    a = vreinterpretq_s8_u8(first);
    b = vreinterpretq_s8_u8(second);
  }

  template <int>
  static Int dot(Int sum, Bytes a, Bytes b, Bytes x, Bytes y) {
    return vdotq_s32(vdotq_s32(sum, a, x), b, y);
  }
  template <int>
  static Int add4(Int a, Int b, Int c, Int d) { return vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)); }
  static Int add_lanes(Int a, Int b) { return vaddq_s32(a, b); }

  static void transpose4(Int (&m)[4]) {
    const int64x2_t ab = vreinterpretq_s64_s32(vtrn1q_s32(m[0], m[1])), cd = vreinterpretq_s64_s32(vtrn1q_s32(m[2], m[3]));
    const int64x2_t odd_ab = vreinterpretq_s64_s32(vtrn2q_s32(m[0], m[1]));
    const int64x2_t odd_cd = vreinterpretq_s64_s32(vtrn2q_s32(m[2], m[3]));
    m[0] = vreinterpretq_s32_s64(vtrn1q_s64(ab, cd));
    m[1] = vreinterpretq_s32_s64(vtrn1q_s64(odd_ab, odd_cd));
    m[2] = vreinterpretq_s32_s64(vtrn2q_s64(ab, cd));
    m[3] = vreinterpretq_s32_s64(vtrn2q_s64(odd_ab, odd_cd));
  }
  static void transpose(Int (&m)[4]) { transpose4(m); }
  static Float strided(Float a) { return a; }
  static Float spread(const float* p) { return set(*p); }
  static void fold(Float a, float* out) { store(out, a); }

 private:
  template <int width, int first>
  static uint8x16_t sixteen(uint8x16_t v) {
    const Fields& f = fields_at<width, first>;
    uint16x8_t half[2];
    for (int i = 0; i < 2; ++i) {
      const uint8x16_t words = vqtbl1q_u8(v, vld1q_u8(f.bytes[i]));
      half[i] = vshlq_u16(vreinterpretq_u16_u8(words), vld1q_s16(f.shifts[i]));
    }
    const uint8x16_t all = vuzp1q_u8(vreinterpretq_u8_u16(half[0]), vreinterpretq_u8_u16(half[1]));
    return vandq_u8(all, vdupq_n_u8((1 << width) - 1));
  }
};

}  // namespace
}  // namespace mixbit

#include "int8_impl.h"

const mixbit::Int8Kernels mixbit::neon_int8 = {matmul, quantize};
#endif
