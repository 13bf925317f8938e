#include "route.h"

#include <algorithm>
#include <numeric>

namespace mixbit {

void route(const VectorOps& ops, float* logits, std::int64_t count, std::int64_t top_k, bool normalize,
           std::int32_t* experts, float* weights) {
  // Insertion into a short sorted list: few of many logits get past the last of the best.
  for (std::int64_t e = 0; e < count; ++e) {
    std::int64_t place = std::min(e, top_k);
    if (place == top_k && !(logits[e] > weights[top_k - 1])) continue;
    if (place == top_k) --place;
    for (; place > 0 && logits[e] > weights[place - 1]; --place) {
      weights[place] = weights[place - 1];
      experts[place] = experts[place - 1];
    }
    weights[place] = logits[e];
    experts[place] = static_cast<std::int32_t>(e);
  }
  const float total = ops.softmax(logits, count, logits);
  float chosen = 0;
  for (std::int64_t i = 0; i < top_k; ++i) {
    weights[i] = logits[experts[i]] / total;
    chosen += weights[i];
  }
  if (!normalize) return;
  for (std::int64_t i = 0; i < top_k; ++i) weights[i] /= chosen;
}

Grouping::Grouping(std::int64_t experts, std::int64_t max_pairs)
    : next_(static_cast<std::size_t>(experts)),
      tokens_(static_cast<std::size_t>(max_pairs)),
      pairs_(static_cast<std::size_t>(max_pairs)),
      weights_(static_cast<std::size_t>(max_pairs)) {
  std::iota(pairs_.begin(), pairs_.end(), 0);
}

void Grouping::group(const std::int32_t* experts, const float* weights, std::int64_t tokens, std::int64_t top_k) {
  const std::int64_t pairs = tokens * top_k;
  std::fill(next_.begin(), next_.end(), 0);
  for (std::int64_t i = 0; i < pairs; ++i) ++next_[static_cast<std::size_t>(experts[i])];
  groups_.clear();
  std::int64_t first = 0;
  for (std::size_t e = 0; e < next_.size(); ++e) {
    const std::int64_t count = next_[e];
    next_[e] = first;
    if (count > 0) groups_.push_back({static_cast<std::int32_t>(e), first, count});
    first += count;
  }
  for (std::int64_t i = 0; i < pairs; ++i) {
    auto place = static_cast<std::size_t>(next_[static_cast<std::size_t>(experts[i])]++);
    tokens_[place] = static_cast<std::int32_t>(i / top_k);
    weights_[place] = weights[i];
  }
}

}  // namespace mixbit
