// Attention on tile registers that are played by loops against the same without them, for random queries, keys in any
// blocks, and lengths.
#include "played_registers.h"
#include "vector_attention.h"
#include "vector_tiles.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace mixbit {
namespace {

// Pairs of bfloat16, as Bfloat16s has them where an instruction sums their products.
struct Pairs {
  using Stored = Bfloat16;
  using Left = std::int32_t;
  static constexpr int depth = 2, lefts = 1, most_rows = 4;

  static const Left* left(const float* p) { return reinterpret_cast<const Left*>(p); }

  static void store_left(float* row, std::int64_t i, Vec v) {
    float values[lanes];
    __builtin_memcpy(values, &v, sizeof v);
    narrow(values, lanes, reinterpret_cast<Bfloat16*>(row) + i);
  }

  template <int rows, int width>
  static void add(Vec (&total)[rows][width], const Left* a, std::int64_t a_stride, const Stored* b) {
    const auto value = [](std::uint32_t half) {
      half <<= 16;
      float x;
      __builtin_memcpy(&x, &half, sizeof x);
      return x;
    };
    for (int r = 0; r < rows; ++r) {
      const auto pair = static_cast<std::uint32_t>(a[r * a_stride]);
      for (int w = 0; w < width; ++w)
        for (int i = 0; i < lanes; ++i)
          for (int half = 0; half < 2; ++half)
            total[r][w][i] += value(pair >> 16 * half & 0xffff) * value(b[2 * (w * lanes + i) + half]);
    }
  }
};

std::mt19937 engine(1);

int below(int end) { return static_cast<int>(engine() % static_cast<unsigned>(end)); }
float number() { return static_cast<float>(below(2001) - 1000) * 1e-3f; }

std::vector<Bfloat16> halves(std::int64_t size) {
  std::vector<Bfloat16> out(static_cast<std::size_t>(size));
  for (Bfloat16& each : out) {
    const float x = number();
    narrow(&x, 1, &each);
  }
  return out;
}

struct Result {
  std::vector<float> out, peak, total;
};

bool same(int serial) {
  const std::int64_t head_dim = 32 << below(3), block_size = below(2) == 0 ? 32 : 64, group = 1 + below(8);
  const std::int64_t tokens = (16 + below(33) + group - 1) / group, rows = tokens * group, room = padded(rows);
  const std::int64_t begin = block_size * below(3), visible = begin + 1 + below(150), end = visible + tokens - 1;
  const std::int64_t blocks = (end + block_size - 1) / block_size, stride = 2 * block_size;
  const std::vector<Bfloat16> keys = halves((blocks + 2) * head_dim * block_size);
  std::vector<Bfloat16> values = halves((blocks + 2) * head_dim * block_size);
  std::vector<std::int32_t> order;
  for (std::int64_t i = 0; i < blocks; ++i) order.push_back(static_cast<std::int32_t>((i * 5 + serial) % (blocks + 2)));
  if (blocks % 5 == 3) return true;  // not an order
  // What lies beyond the last key is not a number.
  for (std::int64_t i = (end % block_size + 1) / 2 * 2; i < block_size && end % block_size != 0; ++i)
    for (std::int64_t d = 0; d < head_dim; ++d)
      values[static_cast<std::size_t>(order.back() * head_dim * block_size + (i / 2 * head_dim + d) * 2 + i % 2)] = 0x7fc0;

  std::vector<float> q(static_cast<std::size_t>(room * head_dim));
  const std::vector<Bfloat16> narrow_q = halves(rows * head_dim);
  std::memcpy(q.data(), narrow_q.data(), narrow_q.size() * sizeof(Bfloat16));
  std::vector<float> scores(static_cast<std::size_t>(room * stride));
  const auto attended = [&](auto attend) {
    Result r{std::vector<float>(static_cast<std::size_t>(room * head_dim)), std::vector<float>(static_cast<std::size_t>(room)),
             std::vector<float>(static_cast<std::size_t>(room))};
    AttentionTile<Bfloat16> t{};
    t.q = q.data(), t.rows = rows, t.head_dim = head_dim, t.q_stride = head_dim, t.value_stride = head_dim;
    t.group = group, t.visible = visible, t.keys = keys.data(), t.values = values.data();
    t.key_block_stride = t.value_block_stride = head_dim * block_size;
    t.blocks = order.data(), t.block_size = t.key_stride = block_size, t.blocks_per_pass = 2;
    t.begin = begin, t.end = end, t.scores = scores.data();
    t.out = r.out.data(), t.peak = r.peak.data(), t.total = r.total.data();
    attend(t);
    return r;
  };
  const Result expected = attended([](const auto& t) { attend<Pairs>(t); });
  const Result found = attended([](const auto& t) { attend_on_tiles<Pairs>(t); });
  for (std::int64_t i = 0; i < rows; ++i) {
    const auto row = static_cast<std::size_t>(i);
    bool good = std::fabs(found.total[row] - expected.total[row]) <= 1e-2f * expected.total[row];
    for (std::int64_t d = 0; d < head_dim; ++d) {
      const auto at = static_cast<std::size_t>(i * head_dim + d);
      good &= std::fabs(found.out[at] / found.total[row] - expected.out[at] / expected.total[row]) <= 2e-3f;
    }
    if (good) continue;
    std::printf("case %d: heads of %d, blocks of %d, %d rows, keys %d to %d: row %d differs\n", serial,
                static_cast<int>(head_dim), static_cast<int>(block_size), static_cast<int>(rows), static_cast<int>(begin),
                static_cast<int>(end), static_cast<int>(i));
    return false;
  }
  return true;
}

}  // namespace
}  // namespace mixbit

int main() {
  int failed = 0;
  for (int i = 0; i < 60; ++i) failed += !mixbit::same(i);
  std::printf("60 cases, %d differ\n", failed);
  return failed != 0;
}
