// int8_tmm.h on tile registers that are played by loops, for machines that have none: equal to the bit to the sums that
// int8_impl.h defines, on random shapes, slices, rests and orders of rows.
#include "int8_portable.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace mixbit {
namespace {

template <int G>
void start() {}
void stop() {}

template <int, int G>
void dot(const std::byte* x, const std::byte* w, std::int32_t* out) {
  constexpr int tokens = 16, rows = 4 * V::lanes;
  for (int t = 0; t < tokens; ++t) {
    for (int r = 0; r < rows; ++r) {
      std::int32_t sum = 0;
      for (int c = 0; c < G; ++c) {
        const auto code = static_cast<std::uint8_t>(w[c / 4 * (4 * rows) + 4 * r + c % 4]);
        sum += static_cast<std::int8_t>(x[t * G + c]) * code;
      }
      out[t * rows + r] = sum;
    }
  }
}

}  // namespace
}  // namespace mixbit

#include "int8_tmm.h"

namespace mixbit {
namespace {

std::mt19937 engine(1);

int below(int end) { return static_cast<int>(engine() % static_cast<unsigned>(end)); }

template <class T, class Make>
std::vector<T> filled(std::size_t size, Make make) {
  std::vector<T> values(size);
  for (T& value : values) value = make();
  return values;
}

constexpr Index round_up(Index n, Index step) { return (n + step - 1) / step * step; }

// A row of the matrix by a row of x, as int8_impl.h puts it for one partial sum.
template <int bits, int G>
float product(const Int8Args& args, Index row, Pointer x) {
  static_assert(L == 1);
  const auto code = [&](Index column) {
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(args.weight + row * args.row_bytes);
    const Index bit = column * bits;
    const int pair = bytes[bit / 8] | (bit % 8 + bits > 8 ? bytes[bit / 8 + 1] << 8 : 0);
    return pair >> bit % 8 & ((1 << bits) - 1);
  };
  const auto dot = [&](Pointer codes, Index g) {
    std::int32_t sum = 0;
    for (Index c = g * G; c < (g + 1) * G; ++c) {
      const Index within = c % piece, place = interleaved(bits) ? within % 2 * 16 + within / 2 : within;
      sum += code(c) * static_cast<std::int8_t>(codes[c / piece * piece + place]);
    }
    return static_cast<float>(sum);
  };
  float y = 0;
  for (Index first = 0; first < args.groups; first += chunk_groups<G>) {
    float sum = 0, rest = 0;
    for (Index g = first; g < smaller(first + chunk_groups<G>, args.groups); ++g) {
      const Index at = row * args.groups + g;
      const float scale = floats_at(args.scales)[at], bias = floats_at(args.biases)[at];
      const float scaled = dot(x, g) * floats_at(x + args.factors)[g];
      sum = scaled * scale + sum;
      sum = bias * floats_at(x + args.sums)[g] + sum;
      const float rests = dot(x + args.rest, g) * floats_at(x + args.rest_factors)[g];
      rest = rests * scale + rest;
    }
    y = first == 0 ? sum + rest : y + (sum + rest);
  }
  return y;
}

template <int bits, int G>
bool same(int count, int groups, int rows) {
  const Index cols = groups * G, row_bytes = cols * bits / 8, padded = round_up(groups, 16) * 4, all = count + 3;
  const Index factors = round_up(cols, 128), sums = factors + padded, rest = sums + padded;
  const Index rest_factors = rest + factors, mask = rest_factors + padded, stride = mask + round_up(groups, 64) / 8;
  const auto weight = filled<std::byte>(static_cast<std::size_t>(rows * row_bytes), [] { return std::byte(below(256)); });
  const auto number = [] { return static_cast<float>(below(2001) - 1000) * 1e-3f; };
  const std::vector<float> scales = filled<float>(static_cast<std::size_t>(rows * groups), number);
  const std::vector<float> biases = filled<float>(static_cast<std::size_t>(rows * groups), number);
  std::vector<std::byte> x(static_cast<std::size_t>(all * stride));
  for (Index i = 0; i < all; ++i) {
    std::byte* row = x.data() + i * stride;
    const auto at = [&](Index offset) { return reinterpret_cast<float*>(row + offset); };
    const auto values = filled<float>(static_cast<std::size_t>(cols), [&] { return number() * (below(200) == 0 ? 20 : 1); });
    quantize({values.data(), cols, G, interleaved(bits), 2, row, at(factors), at(sums), row + rest, at(rest_factors),
              reinterpret_cast<std::uint64_t*>(row + mask)});
  }
  const auto order = filled<std::int32_t>(static_cast<std::size_t>(count), [&] { return below(static_cast<int>(all)); });
  const Index y_stride = rows + 5, first_row = below(rows);
  std::vector<float> y(static_cast<std::size_t>(count * y_stride), 7);
  const auto bytes = [](const std::vector<float>& v) { return reinterpret_cast<const std::byte*>(v.data()); };
  Int8Args args{weight.data(), bytes(scales), bytes(biases), DType::f32, bits, G, groups, row_bytes, x.data(), stride,
                factors, sums, rest, rest_factors, mask, below(2) == 0 ? nullptr : order.data(), count, first_row, rows,
                y.data(), y_stride, weight.data()};
  many<bits, G>(args);
  for (Index i = 0; i < count; ++i) {
    for (Index row = 0; row < y_stride; ++row) {
      const bool inside = row >= first_row && row < rows;
      const float found = y[static_cast<std::size_t>(i * y_stride + row)];
      const float expected = inside ? product<bits, G>(args, row, token(args, i)) : 7;
      if (found == expected) continue;
      std::printf("%d bits, groups of %d, %d of them, %d tokens: row %d of token %d is %g, not %g\n", bits, G, groups, count,
                  static_cast<int>(row), static_cast<int>(i), found, expected);
      return false;
    }
  }
  return true;
}

template <int bits, int G>
int different() {
  int failed = 0;
  for (int i = 0; i < 12; ++i) {
    const int count = i == 0 ? 300 : 1 + below(60), groups = 1 + below(i % 3 == 0 ? 70 : 20);
    failed += !same<bits, G>(count, groups, 1 + below(40));
  }
  return failed;
}

}  // namespace
}  // namespace mixbit

int main() {
  using namespace mixbit;
  const int failed = different<4, 32>() + different<4, 64>() + different<4, 128>() + different<3, 64>() +
                     different<8, 32>() + different<8, 64>();
  std::printf("72 cases, %d differ\n", failed);
  return failed != 0;
}
