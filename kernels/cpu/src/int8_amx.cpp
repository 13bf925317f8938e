// AVX-512, and from a few tokens on the tile registers of AMX.
#if defined(__x86_64__)
#include "int8_avx512.h"

namespace mixbit {
namespace {

// What tile registers hold, as LDTILECFG reads it.
struct alignas(64) Shapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

// Registers 0 and 1 take sums, 2 and 3 activations, 4 and 5 codes of the matrix.
template <int G>
void start() {
  constexpr int columns = G < 64 ? G : 64;
  Shapes shapes;
  for (int i = 0; i < 6; ++i) {
    shapes.row_bytes[i] = i / 2 == 1 ? columns : 64;
    shapes.rows[i] = i / 2 == 2 ? columns / 4 : 16;
  }
  _tile_loadconfig(&shapes);
}

void stop() { _tile_release(); }

template <int set, int G>
inline void dot(const std::byte* x, const std::byte* w, std::int32_t* out) {
  if constexpr (set == 0) {
    _tile_zero(0);
    for (int at = 0; at < G; at += 64) {
      _tile_loadd(2, x + at, G);
      _tile_loadd(4, w + 16 * at, 64);
      _tile_dpbsud(0, 2, 4);
    }
    _tile_stored(0, out, 64);
  } else {
    _tile_zero(1);
    for (int at = 0; at < G; at += 64) {
      _tile_loadd(3, x + at, G);
      _tile_loadd(5, w + 16 * at, 64);
      _tile_dpbsud(1, 3, 5);
    }
    _tile_stored(1, out, 64);
  }
}

}  // namespace
}  // namespace mixbit

#include "int8_tmm.h"

namespace mixbit {
namespace {

// Fewer leave most of a register empty.
template <int G>
constexpr Index least_tokens = G == 32 ? 12 : 6;

template <int bits, int G>
void matmul_of(const Int8Args& args) {
  if (args.count < least_tokens<G>) return avx512_int8.matmul(args);
  many<bits, G>(args);
}

}  // namespace
}  // namespace mixbit

#include "int8_dispatch.h"

const mixbit::Int8Kernels mixbit::amx_int8 = {mixbit::matmul, mixbit::quantize};
#endif
