// What the ops of a program share: the machine they run on, the step they run, where their values are.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"
#include "pool.h"
#include "tensor.h"
#include "vector_ops.h"

namespace mixbit {

// What is fixed when a program is compiled.
struct Limits {
  std::int64_t max_tokens, blocks, block_size, state_slots;
  Precision precision;  // fast: quantized matrices meet rounded inputs, keys and values are bfloat16
};

struct Machine {
  Machine(int threads, Isa isa) : pool(threads), isa(isa), ops(vector_ops(isa)) {}

  ThreadPool pool;
  Isa isa;
  const VectorOps& ops;
};

enum class Rows : std::uint8_t { tokens, selected };

// An activation [rows, dim] of the program, by its place.
struct Value {
  int index;
  std::int64_t dim;
  Rows rows;
};

// Head h of a row starts at offset + h * stride.
struct Columns {
  Value value;
  std::int64_t offset, stride;
};

// One step's batch (see Batch in kernels/executor.py), checked, and the values it makes.
struct Step {
  std::int64_t tokens, sequences, selected, table_width;
  const std::int32_t* token_ids;
  const std::int32_t* query_starts;
  const std::int32_t* context_lengths;
  const std::int32_t* block_tables;
  const std::int32_t* state_slots;
  const std::int32_t* logit_rows;

  const std::int32_t* positions;  // [tokens]
  const std::int32_t* blocks;     // [tokens]: where each token's keys and values go
  std::vector<float*> values;     // by index; rows are contiguous

  std::int64_t rows(const Value& v) const { return v.rows == Rows::tokens ? tokens : selected; }
  float* row(const Value& v, std::int64_t i) const { return values[static_cast<std::size_t>(v.index)] + i * v.dim; }
  const float* head(const Columns& c, std::int64_t token, std::int64_t h) const {
    return row(c.value, token) + c.offset + h * c.stride;
  }
};

// A node of the program. Ops run one after another, each with every thread.
class Op {
 public:
  virtual ~Op() = default;
  virtual void run(const Step& step) = 0;
};

}  // namespace mixbit
