// The vector functions of one instruction set against plain double-precision loops, on random sizes.
//
//   vector_ops_test [ISA [CASES [SEED]]]     without ISA: all that this processor can run
//
// Stands alone, so that it can be cross-compiled and run under an emulator. Outputs are checked for stray
// writes behind their end. Exit status: 0 passed, 1 failed, 77 ISA not supported.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

#include "kv_pool.h"
#include "vector_ops.h"

using namespace mixbit;

namespace {

using Floats = std::vector<float>;

constexpr float canary = 12345.0f;
constexpr std::size_t margin = 32;

std::mt19937_64 random_bits;
const char* running = "";
int failures = 0;

std::int64_t between(std::int64_t low, std::int64_t high) {
  return low + static_cast<std::int64_t>(random_bits() % static_cast<std::uint64_t>(high - low + 1));
}

Floats values(std::int64_t n, double spread = 1) {
  Floats out(static_cast<std::size_t>(n));
  for (float& v : out) v = static_cast<float>(std::normal_distribution<double>(0, spread)(random_bits));
  return out;
}

Floats output(std::int64_t n) { return Floats(static_cast<std::size_t>(n) + margin, canary); }

// got[0 : want] to `tolerance` of the largest value; what lies behind must be as it was.
void expect(const char* what, const Floats& got, const std::vector<double>& want, double tolerance = 2e-6) {
  double worst = 0, largest = 1e-3;
  for (std::size_t i = 0; i < want.size(); ++i) {
    worst = std::max(worst, std::isfinite(got[i]) ? std::fabs(got[i] - want[i]) : HUGE_VAL);
    largest = std::max(largest, std::fabs(want[i]));
  }
  const bool stray = std::any_of(got.begin() + static_cast<std::ptrdiff_t>(want.size()), got.end(),
                                 [](float v) { return v != canary; });
  if (worst <= tolerance * largest && !stray) return;
  ++failures;
  std::printf("%s %s: off by %g of %g, %zu values%s\n", running, what, worst, largest, want.size(),
              stray ? ", writes behind the end" : "");
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

std::vector<double> each(std::int64_t n, const auto& f) {
  std::vector<double> out;
  for (std::int64_t i = 0; i < n; ++i) out.push_back(f(static_cast<std::size_t>(i)));
  return out;
}

void test_elementwise(const VectorOps& ops) {
  const std::int64_t n = between(1, 200);
  const Floats a = values(n, 3), b = values(n, 3);
  Floats y = output(n);
  ops.add(a.data(), b.data(), n, y.data());
  expect("add", y, each(n, [&](auto i) { return a[i] + b[i]; }));
  ops.axpy(-0.7f, a.data(), n, y.data());
  expect("axpy", y, each(n, [&](auto i) { return a[i] + b[i] - 0.7 * a[i]; }));
  ops.scale(1.5f, n, y.data());
  expect("scale", y, each(n, [&](auto i) { return 1.5 * (a[i] + b[i] - 0.7 * a[i]); }));
  ops.silu_mul(a.data(), b.data(), n, y.data());
  expect("silu_mul", y, each(n, [&](auto i) { return a[i] * sigmoid(a[i]) * b[i]; }));
  ops.sigmoid_mul(a.data(), b.data(), 0.5f, n, y.data());
  expect("sigmoid_mul", y, each(n, [&](auto i) { return 0.5 * b[i] * sigmoid(a[i]); }));

  double squares = 0;
  for (float v : a) squares += double{v} * v;
  const double root = std::sqrt(squares / static_cast<double>(n) + 1e-3);
  ops.rms_norm(a.data(), b.data(), 1e-3f, 2, n, y.data());
  expect("rms_norm", y, each(n, [&](auto i) { return 2 * a[i] / root * b[i]; }));
  ops.rms_norm(a.data(), nullptr, 1e-3f, 1, n, y.data());
  expect("rms_norm without weight", y, each(n, [&](auto i) { return a[i] / root; }));
}

void test_extremes(const VectorOps& ops) {
  const Floats x{0, -0.0f, 1e-30f, 88, 100, 1e30f, -88, -100, -1e30f, 20, -20};
  const auto n = static_cast<std::int64_t>(x.size());
  const Floats ones(x.size(), 1.0f);
  Floats y = output(n);
  ops.sigmoid_mul(x.data(), ones.data(), 1, n, y.data());
  expect("sigmoid of extremes", y, each(n, [&](auto i) { return sigmoid(x[i]); }));
  const float total = ops.softmax(x.data(), n, y.data());
  expect("softmax of extremes", y, each(n, [&](auto i) { return i == 5 ? 1.0 : 0.0; }));
  if (total != 1) ++failures;
}

void test_softmax(const VectorOps& ops) {
  const std::int64_t n = between(1, 600);
  const Floats x = values(n, 5);
  const double peak = *std::max_element(x.begin(), x.end());
  const auto want = each(n, [&](auto i) { return std::exp(x[i] - peak); });
  Floats y = output(n);
  const double total = ops.softmax(x.data(), n, y.data()), sum = std::accumulate(want.begin(), want.end(), 0.0);
  expect("softmax", y, want);
  if (std::fabs(total - sum) <= 2e-6 * sum) return;
  ++failures;
  std::printf("%s softmax: total %g, not %g\n", running, total, sum);
}

void test_conv(const VectorOps& ops) {
  const std::int64_t n = between(1, 100), taps = between(1, 6), stride = n + between(0, 5);
  const Floats weights = values(taps * stride), x = values(taps * n);
  std::vector<const float*> inputs;
  for (std::int64_t j = 0; j < taps; ++j) inputs.push_back(x.data() + j * n);
  Floats y = output(n);
  ops.conv_silu(inputs.data(), weights.data(), stride, taps, n, y.data());
  expect("conv_silu", y, each(n, [&](auto i) {
           double sum = 0;
           for (std::size_t j = 0; j < inputs.size(); ++j) {
             sum += double{inputs[j][i]} * weights[j * static_cast<std::size_t>(stride) + i];
           }
           return sum * sigmoid(sum);
         }));
}

void test_rotate(const VectorOps& ops) {
  const std::int64_t half = between(1, 70);
  const Floats cos = values(half), sin = values(half), x = values(2 * half);
  Floats y = output(2 * half);
  std::copy(x.begin(), x.end(), y.begin());
  ops.rotate(cos.data(), sin.data(), half, y.data());
  const auto h = static_cast<std::size_t>(half);
  expect("rotate", y, each(2 * half, [&](auto i) {
           return i < h ? double{x[i]} * cos[i] - double{x[i + h]} * sin[i]
                        : double{x[i]} * cos[i - h] + double{x[i - h]} * sin[i - h];
         }));
}

void attend(const VectorOps& ops, const AttentionTile<float>& tile) { ops.attend(tile); }
void attend(const VectorOps& ops, const AttentionTile<Bfloat16>& tile) { ops.attend_bfloat16(tile); }

// x in a storage, by rounding that no vector function is part of.
template <typename Storage>
Storage stored(float x) {
  if constexpr (std::is_same_v<Storage, float>) {
    return x;
  } else {
    int exponent;
    const float whole = std::nearbyint(std::ldexp(std::frexp(x, &exponent), 8));
    return static_cast<Bfloat16>(std::bit_cast<std::uint32_t>(std::ldexp(whole, exponent - 8)) >> 16);
  }
}

float loaded(float x) { return x; }
float loaded(Bfloat16 x) { return std::bit_cast<float>(std::uint32_t{x} << 16); }

// out / total and peak, total of a tile whose keys lie in shuffled blocks. The tolerance covers weights that are rounded to
// the storage, 2^-9 of each, and sums in which they cancel.
template <typename Storage>
void test_attend(const VectorOps& ops) {
  constexpr std::int64_t depth = KvPool<Storage>::depth;
  const double tolerance = depth == 1 ? 1e-5 : 1.0 / 32;
  constexpr std::int64_t sizes[] = {1, 5, 16, 24, 32, 48, 64};
  const std::int64_t dim = between(1, 80), block = sizes[between(0, 6)];
  const std::int64_t group = between(1, 8), tokens = between(1, 9);
  const std::int64_t length = tokens + between(0, 150), rows = tokens * group;
  const std::int64_t count = (length + block - 1) / block, q_stride = KvPool<Storage>::steps(dim) * depth;
  const std::int64_t begin = between(0, (length - 1) / block) * block, passes = between(1, 4);
  const Floats keys = values(length * dim), v = values(length * dim);
  Floats q(static_cast<std::size_t>(rows * q_stride));
  for (std::int64_t r = 0; r < rows; ++r) {
    for (float& x : std::span(q).subspan(static_cast<std::size_t>(r * q_stride), static_cast<std::size_t>(dim))) {
      x = loaded(stored<Storage>(values(1, 0.5)[0]));
    }
  }

  std::vector<std::int32_t> blocks(static_cast<std::size_t>(count));
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), random_bits);
  KvPool<Storage> pool(count, block, 1, dim);
  const auto poison = stored<Storage>(1e30f);
  std::fill_n(const_cast<Storage*>(pool.keys(0)), count * pool.key_block_stride, stored<Storage>(NAN));
  std::fill_n(const_cast<Storage*>(pool.values(0)), count * pool.value_block_stride, poison);
  for (std::int64_t p = 0; p < length; ++p) {
    std::vector<Storage> key(static_cast<std::size_t>(q_stride)), value(key.size());
    for (std::size_t d = 0; d < static_cast<std::size_t>(dim); ++d) {
      key[d] = stored<Storage>(keys[static_cast<std::size_t>(p * dim) + d]);
      value[d] = stored<Storage>(v[static_cast<std::size_t>(p * dim) + d]);
    }
    const bool last = p + 1 == length || (p + 1) % block == 0;
    pool.write(blocks[static_cast<std::size_t>(p / block)], p % block, 0, key.data(), value.data(), last);
  }

  Floats scores(static_cast<std::size_t>(rows * passes * pool.key_stride)), out = output(rows * pool.value_stride);
  Floats peak = output(rows), total = output(rows), packed = q;
  if (depth > 1) ops.pack_lefts(packed.data(), rows * q_stride);
  attend(ops, AttentionTile<Storage>{packed.data(), rows, dim, q_stride, pool.value_stride, group, length - tokens + 1,
                                     pool.keys(0), pool.values(0), pool.key_block_stride, pool.value_block_stride,
                                     blocks.data(), block, pool.key_stride, passes, begin, length, scores.data(),
                                     out.data(), peak.data(), total.data()});

  std::vector<double> wanted_total, wanted, got_values;
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t seen = length - tokens + 1 + r / group;
    std::vector<double> score;
    for (std::int64_t p = begin; p < seen; ++p) {
      double dot = 0;
      for (std::int64_t d = 0; d < dim; ++d) {
        dot += double{q[static_cast<std::size_t>(r * q_stride + d)]} *
               loaded(stored<Storage>(keys[static_cast<std::size_t>(p * dim + d)]));
      }
      score.push_back(dot);
    }
    const double top = score.empty() ? -HUGE_VAL : *std::max_element(score.begin(), score.end());
    double sum = 0;
    for (double& s : score) sum += s = std::exp2(s - top);
    wanted_total.push_back(sum);
    for (std::int64_t d = 0; d < dim; ++d) {
      double value = 0;
      for (std::size_t i = 0; i < score.size(); ++i) {
        value += score[i] * loaded(stored<Storage>(v[(static_cast<std::size_t>(begin) + i) *
                                                         static_cast<std::size_t>(dim) + static_cast<std::size_t>(d)]));
      }
      wanted.push_back(value);
      got_values.push_back(out[static_cast<std::size_t>(r * pool.value_stride + d)]);
    }
  }
  expect("attend: total", total, wanted_total, 1e-5);
  expect("attend", Floats(got_values.begin(), got_values.end()), wanted, tolerance);
  expect("attend: peak", Floats(peak.begin() + rows, peak.end()), {});
  expect("attend: end", Floats(out.begin() + rows * pool.value_stride, out.end()), {});
}

void test_narrow(const VectorOps& ops) {
  const std::int64_t n = between(1, 70);
  const Floats x = values(n, 100);
  std::vector<Bfloat16> y(static_cast<std::size_t>(n));
  ops.narrow(x.data(), n, y.data());
  for (std::size_t i = 0; i < y.size(); ++i) {
    if (y[i] == stored<Bfloat16>(x[i])) continue;
    ++failures;
    std::printf("%s narrow: %a becomes %a\n", running, x[i], loaded(y[i]));
  }
}

void test_delta(const VectorOps& ops) {
  const std::int64_t keys = between(1, 40), width = between(1, 80), stride = padded(width), tokens = between(1, delta_chunk_most);
  Floats state = values(keys * stride), out = output(tokens * stride);
  const Floats q = values(tokens * keys, 0.3), k = values(tokens * keys, 0.3), v = values(tokens * stride);
  Floats decay(static_cast<std::size_t>(tokens)), beta(decay.size());
  for (float& g : decay) g = static_cast<float>(between(1, 99)) / 100;
  for (float& b : beta) b = static_cast<float>(between(1, 99)) / 100;

  std::vector<double> s(state.begin(), state.end()), wanted;
  for (std::int64_t t = 0; t < tokens; ++t) {
    std::vector<double> row(static_cast<std::size_t>(stride));
    for (std::int64_t c = 0; c < stride; ++c) {
      auto cell = [&](std::int64_t d) -> double& { return s[static_cast<std::size_t>(d * stride + c)]; };
      auto at = [&](const Floats& x, std::int64_t d) { return double{x[static_cast<std::size_t>(t * keys + d)]}; };
      const auto time = static_cast<std::size_t>(t);
      double recalled = 0, asked = 0;
      for (std::int64_t d = 0; d < keys; ++d) recalled += (cell(d) *= decay[time]) * at(k, d);
      const double delta = beta[time] * (v[static_cast<std::size_t>(t * stride + c)] - recalled);
      for (std::int64_t d = 0; d < keys; ++d) asked += (cell(d) += at(k, d) * delta) * at(q, d);
      row[static_cast<std::size_t>(c)] = asked;
    }
    wanted.insert(wanted.end(), row.begin(), row.end());
  }
  Floats scratch(static_cast<std::size_t>(delta_scratch(keys, stride)), NAN);
  const DeltaRun run{state.data(), q.data(),     k.data(),    keys,   v.data(),   stride,
                     stride,       decay.data(), beta.data(), tokens, out.data(), scratch.data()};
  ops.delta_keys(run);
  ops.delta(run);
  expect("delta", out, wanted, 1e-5);
  expect("delta: state", state, s, 1e-5);
}

int test(const char* what, const VectorOps& ops, int cases, unsigned long seed) {
  random_bits.seed(seed);
  running = what;
  failures = 0;
  test_extremes(ops);
  for (int i = 0; i < cases; ++i) {
    test_elementwise(ops);
    test_softmax(ops);
    test_conv(ops);
    test_rotate(ops);
    test_attend<float>(ops);
    test_attend<Bfloat16>(ops);
    test_narrow(ops);
    test_delta(ops);
  }
  std::printf("%s: %d cases, %d failures\n", running, cases, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view wanted = argc > 1 ? argv[1] : "";
  const int cases = argc > 2 ? std::atoi(argv[2]) : 200;
  const unsigned long seed = argc > 3 ? std::strtoul(argv[3], nullptr, 10) : 1;
  int status = 77;
  for (Isa isa : all_isas) {
    if (!supported(isa) || (!wanted.empty() && wanted != name(isa))) continue;
    status = (status == 77 ? 0 : status) | test(name(isa), vector_ops(isa), cases, seed);
#if defined(__x86_64__)
    const bool newer = &vector_ops(isa) == &avx512_bf16_vector_ops;  // the processor runs the older table too
    if (newer) status |= test("avx512 without bf16", avx512_vector_ops, cases, seed);
#endif
  }
  return status;
}
