// A recorded step: ops in order, and memory for the values between them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "expert_store.h"
#include "ops.h"

namespace mixbit {

// One step's input as it comes: see Batch in kernels/executor.py.
struct Batch {
  std::span<const std::int32_t> tokens, query_starts, context_lengths;
  std::span<const std::int32_t> block_tables;  // [sequences, table_width]
  std::int64_t table_width;
  std::span<const std::int32_t> state_slots, logit_rows;
};

// What a step gives: of each selected row the logits, or what the head would have made them from.
enum class Output : std::uint8_t { logits, hidden };

class Program {
 public:
  Program(const Limits& limits, int threads, Isa isa, bool profile)
      : context_(limits, threads, isa), profile_(profile) {}

  Context& context() { return context_; }
  const Context& context() const { return context_; }

  // Values and ropes are named by the order in which they are added.
  void add_value(std::int64_t dim, Rows rows);
  void add_rope(std::vector<float> inv_freq, float scale);
  Value value(int index) const { return values_.at(static_cast<std::size_t>(index)); }
  const Rope* rope(int index) const { return ropes_.at(static_cast<std::size_t>(index)).get(); }

  // Experts are streamed from now on, by the ops that say where theirs lie.
  void stream_experts(StoreOptions options) { store_ = std::make_unique<ExpertStore>(std::move(options)); }
  ExpertStore* store() const { return store_.get(); }

  // inputs, outputs: the values it reads and writes, for the plan of memory. kind: its name in profiles.
  void add(const char* kind, std::unique_ptr<Op> op, std::vector<int> inputs, std::vector<int> outputs);

  // Bounds that batches are checked against.
  void uses_vocabulary(std::int64_t size);
  void uses_blocks() { has_attention_ = true; }
  void uses_state() { has_state_ = true; }
  std::int64_t& cache_bytes() { return cache_bytes_; }

  // Ends recording: values whose lives do not overlap share memory. `logits` is written to the caller's; `hidden` is
  // what the head makes them from, or `logits` again if there is no head.
  void finish(int logits, int hidden);

  // Of values and scratch, once steps of max_tokens have been run.
  std::int64_t step_bytes() const;

  std::int64_t width(Output output) const { return value(output == Output::logits ? logits_ : hidden_).dim; }

  // out: [selected, width(output)]. Throws std::invalid_argument, before anything is touched, if the batch
  // contradicts itself or the pools.
  void run(const Batch& batch, Output output, float* out);

  const std::map<std::string, double>& seconds() const { return seconds_; }

 private:
  struct Node {
    const char* kind;
    std::unique_ptr<Op> op;
    std::vector<int> inputs, outputs;
  };

  void check(const Batch& batch) const;
  void check_sequence(const Batch& batch, std::size_t s) const;
  Step begin_step(const Batch& batch);

  Context context_;
  std::unique_ptr<ExpertStore> store_;
  bool profile_;
  bool has_attention_ = false, has_state_ = false;
  std::int64_t token_limit_ = INT32_MAX, cache_bytes_ = 0;
  std::vector<Value> values_;
  std::vector<std::unique_ptr<Rope>> ropes_;
  std::vector<Node> nodes_;
  int logits_ = -1, hidden_ = -1;
  std::size_t to_hidden_ = 0;  // nodes, up to the one that makes the hidden states
  std::vector<Buffer<float>> memory_;
  std::vector<int> place_;  // of each value in memory_
  std::vector<std::int32_t> positions_, blocks_;
  std::map<std::string, double> seconds_;
};

}  // namespace mixbit
