// Speed of matmul_rows beside its floors: a plain read of the same bytes, and the rate of fused multiply-adds.
//
//   cmake -S . -B build/native -DMIXBIT_PYTHON=OFF && cmake --build build/native --target native_matmul
//   build/native/native_matmul [--isa NAME] [--threads N] [--bits B] [--group G] [--rows R] [--cols C] [--tokens T]
//
// Rows of matrices are shared out in equal parts; every figure is the best of several runs.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string_view>
#include <thread>
#include <vector>

#include "matmul.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

using namespace mixbit;

namespace {

struct Options {
  Isa isa = best_isa();
  Precision precision = Precision::fast;
  int threads = 2, bits = 4, group = 64, tokens = 512;
  std::int64_t rows = 65536, cols = 4096;
};

// Seconds of the fastest of `repeats` runs of task(thread) on all threads.
double best_time(int threads, int repeats, const std::function<void(int)>& task) {
  double best = 1e9;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(task, t);
    task(0);
    for (std::thread& other : others) other.join();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

volatile std::uint64_t sink;

void read_all(const std::byte* data, std::int64_t size) {
  using Wide = std::uint64_t __attribute__((vector_size(16)));
  Wide a{}, b{}, c{}, d{};
  for (std::int64_t i = 0; i + 64 <= size; i += 64) {
    Wide v[4];
    std::memcpy(v, data + i, 64);
    a += v[0], b += v[1], c += v[2], d += v[3];
  }
  a += b + c + d;
  sink = a[0] + a[1];
}

// Floating-point operations of one call: 10 independent chains of fused multiply-adds.
constexpr int fma_rounds = 1 << 22, fma_chains = 10;

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) double fma_avx2() {
  __m256 sums[fma_chains] = {};
  __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
  for (int i = 0; i < fma_rounds; ++i) {
    __asm__ volatile("" : "+x"(a), "+x"(b));
    for (__m256& s : sums) s = _mm256_fmadd_ps(a, s, b);
  }
  float total = 0;
  for (const __m256& s : sums) total += _mm256_cvtss_f32(s);
  sink = static_cast<std::uint64_t>(total);
  return 2.0 * 8 * fma_chains * fma_rounds;
}

__attribute__((target("avx512f"))) double fma_avx512() {
  __m512 sums[fma_chains] = {};
  __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.25f);
  for (int i = 0; i < fma_rounds; ++i) {
    __asm__ volatile("" : "+v"(a), "+v"(b));
    for (__m512& s : sums) s = _mm512_fmadd_ps(a, s, b);
  }
  float total = 0;
  for (const __m512& s : sums) total += _mm512_cvtss_f32(s);
  sink = static_cast<std::uint64_t>(total);
  return 2.0 * 16 * fma_chains * fma_rounds;
}
#endif

double fma_plain() {
  using Lanes = float __attribute__((vector_size(16)));
  Lanes sums[fma_chains] = {}, a = {0.5f, 0.5f, 0.5f, 0.5f}, b = a;
  for (int i = 0; i < fma_rounds; ++i) {
#if defined(__x86_64__)
    __asm__ volatile("" : "+x"(a), "+x"(b));
#elif defined(__aarch64__)
    __asm__ volatile("" : "+w"(a), "+w"(b));
#endif
    for (Lanes& s : sums) s = a * s + b;
  }
  float total = 0;
  for (const Lanes& s : sums) total += s[0];
  sink = static_cast<std::uint64_t>(total);
  return 2.0 * 4 * fma_chains * fma_rounds;
}

double fma_loop(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx2) return fma_avx2();
  if (isa == Isa::avx512) return fma_avx512();
#else
  (void)isa;
#endif
  return fma_plain();
}

[[noreturn]] void usage(const char* why) {
  std::fprintf(stderr, "native_matmul: %s; options: --isa --precision --threads --bits (0: bf16) --group --rows --cols --tokens\n", why);
  std::exit(2);
}

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; i += 2) {
    const std::string_view key = argv[i];
    if (i + 1 == argc) usage("an option lacks its value");
    const int value = std::atoi(argv[i + 1]);
    if (key == "--isa") {
      const Isa* found = std::find_if(std::begin(all_isas), std::end(all_isas),
                                      [&](Isa isa) { return argv[i + 1] == std::string_view(name(isa)); });
      if (found == std::end(all_isas) || !supported(*found)) usage("this processor does not have that ISA");
      o.isa = *found;
    } else if (key == "--precision") {
      const std::string_view wanted = argv[i + 1];
      if (wanted != "exact" && wanted != "fast") usage("precision is exact or fast");
      o.precision = wanted == "exact" ? Precision::exact : Precision::fast;
    } else if (key == "--threads") o.threads = std::max(value, 1);
    else if (key == "--bits") o.bits = value;
    else if (key == "--group") o.group = value;
    else if (key == "--rows") o.rows = value;
    else if (key == "--cols") o.cols = value;
    else if (key == "--tokens") o.tokens = value;
    else usage("unknown option");
  }
  return o;
}

}  // namespace

int main(int argc, char** argv) {
  const Options o = parse(argc, argv);
  Matrix m;
  m.bits = o.bits;
  m.dtype = DType::bf16;
  m.group_size = o.bits == 0 ? 0 : o.group;
  m.rows = o.rows;
  m.cols = o.cols;
  m.precision = o.precision;
  const std::int64_t codes = m.rows * m.row_bytes(), scales = m.rows * m.groups() * 2, bytes = codes + 2 * scales;
  std::vector<std::byte> data(static_cast<std::size_t>(bytes));
  for (std::size_t i = 0; i < data.size(); ++i)  // sound bf16 numbers in any place: 0x3c.. to 0x3f..
    data[i] = static_cast<std::byte>(i % 2 != 0 ? 0x3c + i * 2654435761u % 4 : i * 2654435761u >> 7);
  m.weight = data.data();
  m.scales = m.weight + codes;
  m.biases = m.scales + scales;

  Activations x(o.isa, o.tokens, m.cols);
  x.serve(m);
  std::vector<float> values(static_cast<std::size_t>(m.cols));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i * 2654435761u % 1000) / 500 - 1;
  x.begin(o.tokens, true);
  for (int i = 0; i < o.tokens; ++i) x.prepare(i, values.data(), m.cols);
  x.line_up(0, o.tokens, m.cols);
  std::vector<float> y(static_cast<std::size_t>(m.rows * o.tokens));

  const auto part = [&](std::int64_t total, int t) { return total * t / o.threads; };
  const auto multiply = [&](std::int64_t rows, int tokens) {
    return best_time(o.threads, 9, [&, rows, tokens](int t) {
      const std::int64_t tile = preferred_tile(m, tokens), end = part(rows, t + 1);
      for (std::int64_t r = part(rows, t); r < end; r += tile)
        matmul_rows(m, x, nullptr, tokens, r, std::min(r + tile, end), y.data(), m.rows);
    });
  };

  std::printf("%s, %d thread%s, %lld x %lld, %d bits, group %d: %.1f MB\n", name(o.isa), o.threads,
              o.threads == 1 ? "" : "s", static_cast<long long>(m.rows), static_cast<long long>(m.cols), m.bits,
              m.group_size, static_cast<double>(bytes) / 1e6);
  const double size = static_cast<double>(bytes) / 1e9;
  const double read = size / best_time(o.threads, 9, [&](int t) {
    read_all(data.data() + part(bytes, t) / 64 * 64, part(bytes, t + 1) - part(bytes, t));
  });
  std::printf("plain read        %8.1f GB/s\n", read);
  for (int tokens = 1; tokens <= std::min(o.tokens, 8); tokens *= 2) {
    const double rate = size / multiply(m.rows, tokens);
    std::printf("%d token%s          %8.1f GB/s   %4.0f %% of the read\n", tokens, tokens == 1 ? " " : "s", rate,
                100 * rate / read);
  }
  double operations = 0;
  const double fma_time = best_time(o.threads, 5, [&](int t) {
    const double done = fma_loop(o.isa);
    if (t == 0) operations = done * o.threads;
  });
  const double peak = operations / fma_time / 1e9;
  std::printf("multiply-add peak %8.1f GFLOP/s\n", peak);
  const std::int64_t rows = std::min<std::int64_t>(m.rows, 2048);
  const double flops = 2e-9 * static_cast<double>(rows * m.cols * o.tokens) / multiply(rows, o.tokens);
  std::printf("%-4d tokens       %8.1f GFLOP/s %4.0f %% of the peak\n", o.tokens, flops, 100 * flops / peak);
}
