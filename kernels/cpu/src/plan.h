// Which values may share memory.
#pragma once

#include <cstdint>
#include <vector>

namespace mixbit {

struct NodeValues {
  const std::vector<int>& inputs;
  const std::vector<int>& outputs;
};

struct MemoryPlan {
  std::vector<int> place;           // of each value: a number of a buffer, -1 where it needs none
  std::vector<std::int64_t> sizes;  // of each buffer
};

// Nodes run in order; a value lives from the node that writes it to the last that reads it. `external` gets no
// buffer. sizes: of each value.
MemoryPlan plan_memory(const std::vector<NodeValues>& nodes, const std::vector<std::int64_t>& sizes, int external);

}  // namespace mixbit
