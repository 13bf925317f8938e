// The choice of experts, and tokens grouped by the expert they chose.
#pragma once

#include <cstdint>
#include <vector>

#include "vector_ops.h"

namespace mixbit {

// experts, weights: [top_k], best first (equal logits: the lower expert). weights are of the softmax over all
// logits, made to sum to 1 if `normalize`. logits [count] are overwritten.
void route(const VectorOps& ops, float* logits, std::int64_t count, std::int64_t top_k, bool normalize,
           std::int32_t* experts, float* weights);

// The (token, expert) pairs of a step, by expert in ascending order, then by token: each expert's weights are
// read once, and a token's sum has an order of its own, whatever else is in the batch.
class Grouping {
 public:
  struct Group {
    std::int32_t expert;
    std::int64_t first, count;  // pairs [first, first + count)
  };

  Grouping(std::int64_t experts, std::int64_t max_pairs);

  // experts, weights: [tokens * top_k].
  void group(const std::int32_t* experts, const float* weights, std::int64_t tokens, std::int64_t top_k);

  const std::vector<Group>& groups() const { return groups_; }
  const std::int32_t* tokens() const { return tokens_.data(); }  // of each pair
  const float* weights() const { return weights_.data(); }
  const std::int32_t* pairs() const { return pairs_.data(); }  // 0, 1, 2, ...: an index of pairs

 private:
  std::vector<std::int64_t> next_;
  std::vector<Group> groups_;
  std::vector<std::int32_t> tokens_, pairs_;
  std::vector<float> weights_;
};

}  // namespace mixbit
