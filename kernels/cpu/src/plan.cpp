#include "plan.h"

#include <algorithm>

namespace mixbit {
namespace {

// The free buffer that fits best: the smallest that is large enough, else the largest. -1 if none is free.
int best_free(const std::vector<int>& free, const std::vector<std::int64_t>& sizes, std::int64_t size) {
  int best = -1;
  for (int buffer : free) {
    if (best < 0) best = buffer;
    const std::int64_t old = sizes[static_cast<std::size_t>(best)], now = sizes[static_cast<std::size_t>(buffer)];
    if (old < size ? now > old : now >= size && now < old) best = buffer;
  }
  return best;
}

}  // namespace

MemoryPlan plan_memory(const std::vector<NodeValues>& nodes, const std::vector<std::int64_t>& sizes, int external) {
  std::vector<std::size_t> last_use(sizes.size(), 0);
  for (std::size_t n = 0; n < nodes.size(); ++n) {
    for (int v : nodes[n].outputs) last_use[static_cast<std::size_t>(v)] = n;
    for (int v : nodes[n].inputs) last_use[static_cast<std::size_t>(v)] = n;
  }

  MemoryPlan plan{std::vector<int>(sizes.size(), -1), {}};
  std::vector<int> free;
  auto release = [&](const std::vector<int>& values, std::size_t n) {
    for (int v : values) {
      const int buffer = plan.place[static_cast<std::size_t>(v)];
      if (buffer < 0 || last_use[static_cast<std::size_t>(v)] != n) continue;
      if (std::find(free.begin(), free.end(), buffer) == free.end()) free.push_back(buffer);
    }
  };
  for (std::size_t n = 0; n < nodes.size(); ++n) {
    for (int v : nodes[n].outputs) {
      if (v == external) continue;
      const std::int64_t size = sizes[static_cast<std::size_t>(v)];
      int buffer = best_free(free, plan.sizes, size);
      if (buffer < 0) {
        buffer = static_cast<int>(plan.sizes.size());
        plan.sizes.push_back(size);
      } else {
        free.erase(std::find(free.begin(), free.end(), buffer));
        plan.sizes[static_cast<std::size_t>(buffer)] = std::max(plan.sizes[static_cast<std::size_t>(buffer)], size);
      }
      plan.place[static_cast<std::size_t>(v)] = buffer;
    }
    release(nodes[n].inputs, n);
    release(nodes[n].outputs, n);
  }
  return plan;
}

}  // namespace mixbit
