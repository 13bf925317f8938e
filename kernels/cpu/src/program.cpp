#include "program.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "plan.h"

namespace mixbit {

void Program::add_value(std::int64_t dim, Rows rows) {
  values_.push_back({static_cast<int>(values_.size()), dim, rows});
}

void Program::add_rope(std::vector<float> inv_freq, float scale) {
  ropes_.push_back(std::make_unique<Rope>(std::move(inv_freq), scale, context_.limits.max_tokens));
}

void Program::add(const char* kind, std::unique_ptr<Op> op, std::vector<int> inputs, std::vector<int> outputs) {
  nodes_.push_back({kind, std::move(op), std::move(inputs), std::move(outputs)});
}

void Program::uses_vocabulary(std::int64_t size) { token_limit_ = std::min(token_limit_, size); }

void Program::finish(int logits, int hidden) {
  logits_ = value(logits).index;
  hidden_ = value(hidden).index;
  const auto makes = [&](const Node& node) { return std::ranges::find(node.outputs, hidden) != node.outputs.end(); };
  const auto last = std::ranges::find_if(nodes_, makes);
  if (last == nodes_.end()) throw std::invalid_argument("no node makes the hidden states");
  to_hidden_ = static_cast<std::size_t>(last - nodes_.begin()) + 1;
  const std::int64_t rows = context_.limits.max_tokens;
  std::vector<NodeValues> nodes;
  for (const Node& node : nodes_) nodes.push_back({node.inputs, node.outputs});
  std::vector<std::int64_t> sizes;
  for (const Value& v : values_) sizes.push_back(v.dim * rows);
  MemoryPlan plan = plan_memory(nodes, sizes, logits_);
  for (std::int64_t size : plan.sizes) memory_.emplace_back(size);
  place_ = std::move(plan.place);
  if (store_) store_->finish();
  positions_.resize(static_cast<std::size_t>(rows));
  blocks_.resize(static_cast<std::size_t>(rows));
}

std::int64_t Program::step_bytes() const {
  std::int64_t bytes = context_.workspace.bytes();
  for (const Buffer<float>& each : memory_) bytes += each.size() * std::int64_t{sizeof(float)};
  return bytes;
}

Step Program::begin_step(const Batch& batch) {
  Step step;
  step.tokens = static_cast<std::int64_t>(batch.tokens.size());
  step.sequences = static_cast<std::int64_t>(batch.context_lengths.size());
  step.selected = static_cast<std::int64_t>(batch.logit_rows.size());
  step.table_width = batch.table_width;
  step.token_ids = batch.tokens.data();
  step.query_starts = batch.query_starts.data();
  step.context_lengths = batch.context_lengths.data();
  step.block_tables = batch.block_tables.data();
  step.state_slots = batch.state_slots.data();
  step.logit_rows = batch.logit_rows.data();
  const auto block_size = static_cast<std::int32_t>(context_.limits.block_size);
  for (std::int64_t s = 0; s < step.sequences; ++s) {
    for (std::int32_t t = step.query_starts[s]; t < step.query_starts[s + 1]; ++t) {
      const std::int32_t position = step.context_lengths[s] + t - step.query_starts[s];
      positions_[static_cast<std::size_t>(t)] = position;
      blocks_[static_cast<std::size_t>(t)] =
          has_attention_ ? step.block_tables[s * step.table_width + position / block_size] : -1;
    }
  }
  step.positions = positions_.data();
  step.blocks = blocks_.data();
  for (std::size_t v = 0; v < values_.size(); ++v) {
    step.values.push_back(place_[v] < 0 ? nullptr : memory_[static_cast<std::size_t>(place_[v])].data());
  }
  return step;
}

void Program::run(const Batch& batch, Output output, float* out) {
  check(batch);
  Step step = begin_step(batch);
  step.values[static_cast<std::size_t>(logits_)] = out;
  for (const auto& rope : ropes_) rope->prepare(context_.machine.pool, step);
  using Clock = std::chrono::steady_clock;
  const std::size_t count = output == Output::logits ? nodes_.size() : to_hidden_;
  for (Node& node : std::span(nodes_).first(count)) {
    if (!profile_) {
      node.op->run(step);
      continue;
    }
    const auto start = Clock::now();
    node.op->run(step);
    seconds_[node.kind] += std::chrono::duration<double>(Clock::now() - start).count();
  }
  if (output == Output::hidden && hidden_ != logits_) {
    const Value hidden = value(hidden_);
    std::copy_n(step.row(hidden, 0), step.rows(hidden) * hidden.dim, out);
  }
}

}  // namespace mixbit
