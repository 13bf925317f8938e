// What this machine can do, for floors: bytes read a second, and operations a second of int8 dot products and of
// float32 multiply-adds, on N threads together. Prints one line of JSON.
//
//   rates [THREADS]         compile for the machine it runs on: c++ -O3 -march=native -std=c++20 -pthread rates.cpp
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

constexpr int chains = 12, rounds = 1 << 18, repeats = 30;  // short and many: another process may take a core
volatile std::uint64_t sink;

// Seconds of the fastest of some runs of task(thread) on all threads together.
double best(int threads, const std::function<void(int)>& task) {
  double least = 1e9;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(task, t);
    task(0);
    for (std::thread& other : others) other.join();
    least = std::min(least, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return least;
}

void read_all(const std::uint64_t* data, std::size_t count) {
  std::uint64_t a = 0, b = 0, c = 0, d = 0;  // vectors, after the compiler
  for (std::size_t i = 0; i < count; i += 32) {
    for (std::size_t j = 0; j < 8; ++j) {
      a += data[i + j], b ^= data[i + 8 + j], c += data[i + 16 + j], d ^= data[i + 24 + j];
    }
  }
  sink = a + b + c + d;
}

#if defined(__x86_64__)
#define MIXBIT_OPAQUE(value) __asm__ volatile("" : "+v"(value))
#else
#define MIXBIT_OPAQUE(value) __asm__ volatile("" : "+w"(value))
#endif

// Sums that the compiler cannot know to be equal, or would compute once.
template <typename Vector>
void start(Vector (&sums)[chains]) {
  for (Vector& sum : sums) MIXBIT_OPAQUE(sum);
}

// Makes the compiler compute every sum.
template <typename Vector>
void keep(const Vector (&sums)[chains]) {
  std::uint64_t words[sizeof sums / 8], total = 0;
  std::memcpy(words, sums, sizeof sums);
  for (std::uint64_t word : words) total ^= word;
  sink = total;
}

// One round: `chains` independent sums. Operations of a round (a multiplication and an addition count as two).
#if defined(__AVX512VNNI__)
double int8_dots() {
  __m512i sums[chains] = {}, a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  start(sums);
  for (int i = 0; i < rounds; ++i) {
    MIXBIT_OPAQUE(a);
    MIXBIT_OPAQUE(b);
    for (__m512i& s : sums) s = _mm512_dpbusd_epi32(s, a, b);
  }
  keep(sums);
  return 128.0 * chains * rounds;
}
#elif defined(__AVX2__)
double int8_dots() {
  __m256i sums[chains] = {}, a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
  const __m256i ones = _mm256_set1_epi16(1);
  start(sums);
  for (int i = 0; i < rounds; ++i) {
    MIXBIT_OPAQUE(a);
    MIXBIT_OPAQUE(b);
    for (__m256i& s : sums) s = _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
  }
  keep(sums);
  return 64.0 * chains * rounds;
}
#elif defined(__ARM_FEATURE_DOTPROD)
double int8_dots() {
  int32x4_t sums[chains] = {};
  int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(5);
  start(sums);
  for (int i = 0; i < rounds; ++i) {
    MIXBIT_OPAQUE(a);
    MIXBIT_OPAQUE(b);
    for (int32x4_t& s : sums) s = vdotq_s32(s, a, b);
  }
  keep(sums);
  return 32.0 * chains * rounds;
}
#else
double int8_dots() { return 0; }
#endif

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

double float_multiply_adds() {
  using Lanes = float __attribute__((vector_size(4 * lanes)));
  Lanes sums[chains] = {}, a = Lanes{} + 0.5f, b = Lanes{} + 0.25f;
  start(sums);
  for (int i = 0; i < rounds; ++i) {
    MIXBIT_OPAQUE(a);
    MIXBIT_OPAQUE(b);
    for (Lanes& s : sums) s = a * s + b;
  }
  keep(sums);
  return 2.0 * lanes * chains * rounds;
}

// Operations a second of `work` on all threads together.
double rate(int threads, double (*work)()) {
  double done = 0;
  const double seconds = best(threads, [&](int thread) {
    const double operations = work();
    if (thread == 0) done = operations * threads;
  });
  return done / seconds;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = std::max(1, argc > 1 ? std::atoi(argv[1]) : static_cast<int>(std::thread::hardware_concurrency()));
  const std::size_t count = std::size_t{1} << 24;  // words of a thread: far more than caches hold
  std::vector<std::unique_ptr<std::uint64_t[]>> data;
  for (int t = 0; t < threads; ++t) {
    data.emplace_back(new std::uint64_t[count]);
    std::fill_n(data.back().get(), count, 1u);
  }
  const double seconds = best(threads, [&](int t) { read_all(data[static_cast<std::size_t>(t)].get(), count); });
  const double bytes = 8.0 * static_cast<double>(count) * threads;
  std::printf("{\"read\": %.4g, \"int8\": %.4g, \"float32\": %.4g}\n", bytes / seconds, rate(threads, int8_dots),
              rate(threads, float_multiply_adds));
}
