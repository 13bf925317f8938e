#include <cmath>

#include "ops.h"

namespace mixbit {

Rope::Rope(std::vector<float> inv_freq, float scale, std::int64_t max_tokens)
    : inv_freq_(std::move(inv_freq)), scale_(scale), cos_(max_tokens * half()), sin_(max_tokens * half()) {}

// The angle is rounded to float32, as the models were trained; cos and sin of it are exact to float32.
void Rope::prepare(ThreadPool& pool, const Step& step) {
  pool.run_ranges(step.tokens, 16, [&](auto begin, auto end, int) {
    for (auto t = begin; t < end; ++t) {
      for (std::int64_t i = 0; i < half(); ++i) {
        const float angle = static_cast<float>(step.positions[t]) * inv_freq_[static_cast<std::size_t>(i)];
        cos_[t * half() + i] = static_cast<float>(std::cos(static_cast<double>(angle))) * scale_;
        sin_[t * half() + i] = static_cast<float>(std::sin(static_cast<double>(angle))) * scale_;
      }
    }
  });
}

}  // namespace mixbit
