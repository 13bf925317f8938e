// matmul_rows of one instruction set against a plain double-precision product, on random shapes. Where activations
// are rounded, to int8 or with the matrix to bfloat16, the product is of the values as they should be rounded.
//
//   matmul_test [ISA [CASES [SEED]]]     without ISA: all that this processor can run
//
// Stands alone, so that it can be cross-compiled and run under an emulator. Every array of a matrix ends
// where a page that must not be touched begins. Exit status: 0 passed, 1 failed, 77 ISA not supported.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string_view>
#include <vector>

#include "matmul.h"

using namespace mixbit;

namespace {

std::mt19937_64 random_bits;

int below(int n) { return static_cast<int>(random_bits() % static_cast<unsigned>(n)); }
double normal() { return std::normal_distribution<double>()(random_bits); }

class Guarded {
 public:
  explicit Guarded(std::size_t size) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    mapped_ = (size + page - 1) / page * page + page;
    base_ = static_cast<std::byte*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + mapped_ - page, page, PROT_NONE) != 0) std::abort();
    data_ = base_ + mapped_ - page - size;
  }
  ~Guarded() { munmap(base_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  std::byte* data() const { return data_; }

 private:
  std::byte *base_, *data_;
  std::size_t mapped_;
};

// Stores `value` rounded to `type` and returns what was stored. Halves are written for normal numbers only.
double put(std::byte* p, DType type, double value) {
  const float f = static_cast<float>(value);
  std::uint32_t word;
  std::memcpy(&word, &f, 4);
  if (type == DType::f32) {
    std::memcpy(p, &f, 4);
    return f;
  }
  if (type == DType::bf16) {
    const auto half = static_cast<std::uint16_t>(word >> 16);
    std::memcpy(p, &half, 2);
    word = static_cast<std::uint32_t>(half) << 16;
    float stored;
    std::memcpy(&stored, &word, 4);
    return stored;
  }
  int exponent;
  const double fraction = std::frexp(std::fabs(value), &exponent);  // [0.5, 1)
  const int bits = exponent < -13 ? 0 : static_cast<int>(fraction * 2048) - 1024;
  const bool zero = exponent < -13;
  const auto half = static_cast<std::uint16_t>((value < 0 ? 0x8000 : 0) | (zero ? 0 : (exponent + 14) << 10) | bits);
  std::memcpy(p, &half, 2);
  const double stored = zero ? 0 : std::ldexp(1024 + bits, exponent - 11);
  return value < 0 ? -stored : stored;
}

struct Case {
  Matrix matrix;
  int count;
  bool gathered;
};

Case random_case(int serial) {
  constexpr int widths[] = {1, 2, 3, 4, 5, 6, 8, 0};
  constexpr int counts[] = {1, 2, 3, 4, 5, 7, 8, 33, 0, 140, 10, 13};
  Case c;
  Matrix& m = c.matrix;
  m.bits = widths[serial % 8];
  m.dtype = static_cast<DType>(serial / 8 % 3);
  m.group_size = m.bits == 0 ? 0 : 32 << serial / 24 % 3;
  m.precision = static_cast<Precision>(serial / 72 % 3);
  m.rows = 1 + below(below(4) == 0 ? 150 : 37);
  m.cols = m.bits == 0 ? 1 + below(700) : m.group_size * (1 + below(below(4) == 0 ? 90 : 9));
  c.count = counts[below(12)];
  c.gathered = below(2) == 0;
  return c;
}

// Groups of x as the nearest multiples of a 127th of their peak. rest: what that leaves, in float32.
std::vector<double> rounded(const std::vector<float>& x, int group_size, std::vector<float>& rest) {
  std::vector<double> out;
  rest.clear();
  for (std::size_t first = 0; first < x.size(); first += static_cast<std::size_t>(group_size)) {
    float peak = 0;
    for (int i = 0; i < group_size; ++i) peak = std::max(peak, std::fabs(x[first + static_cast<std::size_t>(i)]));
    const float inverse = peak > 0 ? 127 / peak : 0;
    for (int i = 0; i < group_size; ++i) {
      const float value = x[first + static_cast<std::size_t>(i)], code = std::nearbyint(value * inverse);
      const volatile float product = peak / 127 * code;  // not to be fused with the difference
      out.push_back(static_cast<double>(peak / 127) * code);
      rest.push_back(value - product);
    }
  }
  return out;
}

// What the kernels of `m` take x for: groups whose peak, squared, is more than `spread` times the row's mean are rounded
// twice.
std::vector<double> taken_for(const std::vector<float>& x, const Matrix& m) {
  if (!m.rounds_inputs()) return {x.begin(), x.end()};
  const float spread = m.precision == Precision::fine ? 0.0f : 1.2f;
  const auto size = static_cast<std::size_t>(m.group_size), groups = x.size() / size;
  std::vector<float> squares(groups), rest, none;
  float total = 0;
  for (std::size_t i = 0; i < x.size(); ++i) squares[i / size] = std::max(squares[i / size], std::fabs(x[i]));
  for (float& peak : squares) {
    peak *= peak;
    const volatile float sum = total + peak;  // one after another, as the kernels add them
    total = sum;
  }
  std::vector<double> out = rounded(x, m.group_size, rest);
  const std::vector<double> more = rounded(rest, m.group_size, none);
  for (std::size_t i = 0; i < out.size(); ++i)
    if (squares[i / size] > spread * (total / static_cast<float>(groups))) out[i] += more[i];
  return out;
}

// The nearest bfloat16, ties to even.
double bfloat16(double value) {
  const auto f = static_cast<float>(value);
  std::uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  float rounded;
  std::memcpy(&rounded, &bits, sizeof rounded);
  return rounded;
}

bool run(Isa isa, const Case& c) {
  Matrix m = c.matrix;
  const auto cells = static_cast<std::size_t>(m.rows * m.cols);
  const std::size_t scale_bytes = static_cast<std::size_t>(m.rows * m.groups() * size_of(m.dtype));
  Guarded weight(static_cast<std::size_t>(m.rows * m.row_bytes())), scales(scale_bytes), biases(scale_bytes);
  m.weight = weight.data(), m.scales = scales.data(), m.biases = biases.data();

  std::vector<double> w(cells);
  for (std::int64_t r = 0; r < m.rows; ++r) {
    double scale = 1, bias = 0;
    for (std::int64_t k = 0; k < m.cols; ++k) {
      double& value = w[static_cast<std::size_t>(r * m.cols + k)];
      if (m.bits == 0) {
        value = put(weight.data() + (r * m.cols + k) * size_of(m.dtype), m.dtype, normal());
        continue;
      }
      if (k % m.group_size == 0) {
        const std::int64_t at = (r * m.groups() + k / m.group_size) * size_of(m.dtype);
        scale = put(scales.data() + at, m.dtype, normal());
        bias = put(biases.data() + at, m.dtype, 4 * normal());
      }
      const int code = below(1 << m.bits);
      for (int b = 0; b < m.bits; ++b) {
        const std::int64_t bit = k * m.bits + b;
        if (code >> b & 1) weight.data()[r * m.row_bytes() + bit / 8] |= std::byte{1} << bit % 8;
      }
      value = scale * code + bias;
    }
  }

  const int x_rows = c.count + 3;
  Activations x(isa, x_rows, m.cols + 64 * below(2));
  x.serve(m);
  const bool lined_up = below(2) == 0;
  x.begin(x_rows, lined_up);
  std::vector<std::vector<float>> values(static_cast<std::size_t>(x_rows), std::vector<float>(static_cast<std::size_t>(m.cols)));
  for (int i = 0; i < x_rows; ++i) {
    for (float& v : values[static_cast<std::size_t>(i)]) v = static_cast<float>(normal());
    if (m.cols >= 32 && below(4) == 0) std::fill_n(values[static_cast<std::size_t>(i)].begin(), 32, 0.0f);
    x.prepare(i, values[static_cast<std::size_t>(i)].data(), m.cols);
  }
  if (lined_up) x.line_up(0, x_rows, m.cols);
  std::vector<std::vector<double>> taken;
  const bool halves = isa == Isa::amx && m.rounds_inputs() && x_rows >= 8;
  for (const auto& v : values) {
    if (!halves) {
      taken.push_back(taken_for(v, m));
      continue;
    }
    taken.emplace_back(v.begin(), v.end());
    for (double& each : taken.back()) each = m.precision == Precision::fine ? each : bfloat16(each);
  }
  const double tolerance = halves ? 2e-5 : 2e-6;  // the least products of fine ones are not made
  std::vector<std::int32_t> index;
  for (int i = 0; i < c.count; ++i) index.push_back(c.gathered ? below(x_rows) : i);

  constexpr float untouched = -12345;
  const std::int64_t begin = below(static_cast<int>(m.rows)), end = begin + below(static_cast<int>(m.rows - begin) + 1);
  const std::int64_t stride = m.rows + below(5);
  std::vector<float> y(static_cast<std::size_t>(c.count * stride + 1), untouched);
  matmul_rows(m, x, c.gathered ? index.data() : nullptr, c.count, begin, end, y.data(), stride);

  std::vector<float> row(static_cast<std::size_t>(m.cols));
  bool good = true;
  const bool coarse = halves && m.precision == Precision::fast;
  for (std::int64_t r = 0; r < m.rows; ++r) {
    unpack_row(m, r, row.data());
    for (std::int64_t k = 0; k < m.cols; ++k) {
      const double want = w[static_cast<std::size_t>(r * m.cols + k)];
      good &= std::fabs(row[static_cast<std::size_t>(k)] - want) <= 1e-6 * (1 + std::fabs(want));
    }
    for (int i = 0; i < c.count; ++i) {
      const float got = y[static_cast<std::size_t>(i * stride + r)];
      if (r < begin || r >= end) {
        good &= got == untouched;
        continue;
      }
      const auto& v = taken[static_cast<std::size_t>(index[static_cast<std::size_t>(i)])];
      double want = 0, size = 0;
      for (std::int64_t k = 0; k < m.cols; ++k) {
        const double exact = w[static_cast<std::size_t>(r * m.cols + k)];
        const double product = (coarse ? bfloat16(exact) : exact) * v[static_cast<std::size_t>(k)];
        want += product, size += std::fabs(product);
      }
      good &= std::fabs(got - want) <= tolerance * size + 1e-6;
    }
  }
  if (!good)
    std::printf("%s: wrong: %s, %d bits, group %d, dtype %d, %lld x %lld, %d tokens%s, rows [%lld, %lld)\n", name(isa),
                m.precision == Precision::exact ? "exact" : m.precision == Precision::fast ? "fast" : "fine", m.bits,
                m.group_size, static_cast<int>(m.dtype), static_cast<long long>(m.rows),
                static_cast<long long>(m.cols), c.count, c.gathered ? " gathered" : "", static_cast<long long>(begin),
                static_cast<long long>(end));
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view wanted = argc > 1 ? argv[1] : "";
  const int cases = argc > 2 ? std::atoi(argv[2]) : 720;
  int ran = 0, failed = 0;
  for (Isa isa : all_isas) {
    if (!supported(isa) || (!wanted.empty() && wanted != name(isa))) continue;
    random_bits.seed(argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 1);
    for (int i = 0; i < cases; ++i) failed += !run(isa, random_case(i));
    std::printf("%s: %d cases\n", name(isa), cases);
    ++ran;
  }
  if (ran == 0) std::printf("%s: not supported here\n", argv[1]);
  return ran == 0 ? 77 : failed != 0;
}
