// bf16_tmm.h on tile registers that are played by loops, for machines that have none: random shapes, orders of rows and
// parts of a matrix, against sums of rounded values in double precision.
#include "int8_portable.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace mixbit {
namespace {

using Floats16 = float __attribute__((vector_size(64)));
using Halves32 = std::uint16_t __attribute__((vector_size(64)));

float from_upper(std::uint32_t half) {
  half <<= 16;
  return V::read<float>(&half);
}

// The nearest bfloat16, ties to even.
std::uint32_t upper(float x) {
  const auto bits = V::read<std::uint32_t>(&x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

Halves32 in_turn(Floats16 a, Floats16 b) {
  Halves32 out;
  for (int i = 0; i < 16; ++i) out[i] = static_cast<std::uint16_t>(upper(a[i])), out[16 + i] = static_cast<std::uint16_t>(upper(b[i]));
  return out;
}

Halves32 lookup(Halves32 table, Halves32 index) {
  Halves32 out;
  for (int i = 0; i < 32; ++i) out[i] = table[index[i] & 31];
  return out;
}

Halves32 widen(const std::byte* p) {
  Halves32 out;
  for (int i = 0; i < 32; ++i) out[i] = static_cast<std::uint16_t>(p[i]);
  return out;
}

Floats16 widen_to_float(const std::byte* p) {
  Floats16 out;
  for (int i = 0; i < 16; ++i) out[i] = static_cast<float>(p[i]);
  return out;
}

}  // namespace
}  // namespace mixbit

#include "played_registers.h"
#include "bf16_tmm.h"

namespace mixbit {
namespace {

std::mt19937 engine(1);

constexpr Index round_up(Index n, Index step) { return (n + step - 1) / step * step; }

int below(int end) { return static_cast<int>(engine() % static_cast<unsigned>(end)); }

template <class T, class Make>
std::vector<T> filled(Index size, Make make) {
  std::vector<T> values(static_cast<std::size_t>(size));
  for (T& value : values) value = make();
  return values;
}

// What a product makes of a value: its nearest bfloat16, and where it is fine also that of what is left.
struct Taken {
  double value, rest;
  Taken(float x, bool fine) : value(from_upper(upper(x))), rest(0) {
    if (fine) rest = from_upper(upper(x - static_cast<float>(value)));
  }
};

template <int bits, int G>
bool same(int count, int groups, int rows, bool fine) {
  const Index cols = groups * G, row_bytes = cols * bits / 8, all = count + 16;
  const Index rest = round_up(2 * cols, 128), stride = 2 * rest + 64, panel_stride = 2 * panel_rows * rest;
  const auto weight = filled<std::byte>(rows * row_bytes, [] { return std::byte(below(256)); });
  const auto number = [] { return static_cast<float>(below(2001) - 1000) * 1e-3f; };
  const std::vector<float> scales = filled<float>(rows * groups, number), biases = filled<float>(rows * groups, number);
  const std::vector<float> inputs = filled<float>(all * cols, number);
  std::vector<std::byte> x(static_cast<std::size_t>(all * stride));
  std::vector<std::byte> panels(static_cast<std::size_t>(round_up(all, panel_rows) / panel_rows * panel_stride));
  for (Index i = 0; i < all; ++i) {
    std::byte* to = x.data() + i * stride;
    narrow(inputs.data() + i * cols, cols, interleaved(bits), to, fine ? to + rest : nullptr);
  }
  for (Index i = 0; i < all; i += panel_rows) {
    for (int plane = 0; plane <= fine; ++plane)
      turn(x.data() + i * stride + plane * rest, stride, smaller(panel_rows, all - i), cols,
           panels.data() + i / panel_rows * panel_stride + plane * panel_rows * rest);
  }
  const int kind = below(3);  // all from the first on, from another on, or any
  const int shift = kind == 1 && count > 16 && below(2) == 0 ? 16 : below(4);
  int next = 0;
  const auto order = filled<std::int32_t>(count, [&] { return kind == 1 ? shift + next++ : below(static_cast<int>(all)); });
  const Index y_stride = rows + 5, first_row = below(rows);
  std::vector<float> y(static_cast<std::size_t>(count * y_stride), 7);
  const auto bytes = [](const std::vector<float>& v) { return reinterpret_cast<const std::byte*>(v.data()); };
  const ProductArgs product{weight.data(), bytes(scales), bytes(biases), DType::f32, bits, G, groups, cols, row_bytes, x.data(),
                            stride, kind == 0 ? nullptr : order.data(), count, first_row, rows, y.data(), y_stride,
                            weight.data()};
  matmul(Bf16Args{product, below(3) == 0 ? nullptr : panels.data(), panel_stride, rest, fine});
  const auto code = [&](Index row, Index column) {
    const auto* from = reinterpret_cast<const std::uint8_t*>(weight.data() + row * row_bytes);
    const Index bit = column * bits;
    const int two = from[bit / 8] | (bit % 8 + bits > 8 ? from[bit / 8 + 1] << 8 : 0);
    return static_cast<float>(two >> bit % 8 & ((1 << bits) - 1));
  };
  for (Index i = 0; i < count; ++i) {
    const float* of = inputs.data() + (kind == 0 ? i : order[static_cast<std::size_t>(i)]) * cols;
    for (Index row = 0; row < y_stride; ++row) {
      const float found = y[static_cast<std::size_t>(i * y_stride + row)];
      double expected = 7, size = 0;
      if (row >= first_row && row < rows) {
        expected = 0;
        for (Index c = 0; c < cols; ++c) {
          const auto at = static_cast<std::size_t>(row * groups + c / G);
          const float scaled = code(row, c) * scales[at];
          const Taken w(scaled + biases[at], fine), v(of[c], fine);
          expected += w.value * v.value + w.value * v.rest + w.rest * v.value;
          size += std::fabs(w.value * v.value);
        }
      }
      if (std::fabs(found - expected) <= 2e-6 * size) continue;
      std::printf("%d bits, groups of %d, %d of them, %d tokens in order %d, %s: row %d of token %d is %g, not %g\n", bits,
                  G, groups, count, kind, fine ? "fine" : "fast", static_cast<int>(row), static_cast<int>(i), found,
                  expected);
      return false;
    }
  }
  return true;
}

template <int bits, int G>
int different() {
  int failed = 0;
  for (int i = 0; i < 12; ++i) {
    const int count = i == 0 ? 300 : 1 + below(60), groups = 1 + below(i % 3 == 0 ? 40 : 10);
    failed += !same<bits, G>(count, groups, 1 + below(40), i % 4 == 1);
  }
  return failed;
}

}  // namespace
}  // namespace mixbit

int main() {
  using namespace mixbit;
  const int failed = different<2, 32>() + different<3, 64>() + different<4, 32>() + different<4, 64>() +
                     different<4, 128>() + different<5, 32>() + different<6, 128>() + different<8, 32>() +
                     different<8, 64>();
  std::printf("108 cases, %d differ\n", failed);
  return failed != 0;
}
