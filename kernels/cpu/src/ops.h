// The ops of a program, one for each kind of node in kernels/ops.py, where they are defined.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "buffer.h"
#include "pieces.h"
#include "step.h"
#include "tensor.h"
#include "workspace.h"

namespace mixbit {

struct Norm {
  std::vector<float> weight;
  float eps;
};

// cos and sin of every token's position, made once a step for all layers that share them.
class Rope {
 public:
  Rope(std::vector<float> inv_freq, float scale, std::int64_t max_tokens);

  void prepare(ThreadPool& pool, const Step& step);
  std::int64_t half() const { return static_cast<std::int64_t>(inv_freq_.size()); }
  const float* cos(std::int64_t token) const { return cos_.data() + token * half(); }
  const float* sin(std::int64_t token) const { return sin_.data() + token * half(); }

 private:
  std::vector<float> inv_freq_;
  float scale_;
  Buffer<float> cos_, sin_;
};

struct Linear {
  Matrix matrix;
  std::vector<float> bias;  // empty: none
};

struct MlpWeights {
  Matrix gate, up, down;
};

class ExpertStore;

// store: where experts are streamed, what has them as its number `layer`; null where they stay as they are mapped.
struct MoeWeights {
  Matrix router;
  MlpWeights experts;
  std::int64_t top_k;
  bool normalize;
  std::optional<MlpWeights> shared;
  std::optional<Matrix> shared_gate;
  ExpertStore* store = nullptr;
  int layer = 0;
};

struct AttentionSpec {
  std::int64_t heads, kv_heads, head_dim;
  float scale;
  const Rope* rope;  // null: none
  std::optional<Norm> q_norm, k_norm;
};

struct GatedDeltaSpec {
  std::int64_t key_heads, value_heads, key_dim, value_dim, kernel;
  std::vector<float> conv;  // [channels, kernel]
  std::vector<float> a_log, dt_bias;
  Norm norm;
};

struct GatedDeltaInputs {
  Columns q, k, v, z, b, a;
};

// What an op is made with. Ops keep the reference; each asks the workspace for what it will need.
struct Context {
  Limits limits;
  Machine machine;
  Workspace workspace;
  Pieces blocks, states;  // of the pools that the ops own

  Context(const Limits& limits, int threads, Isa isa)
      : limits(limits),
        machine(threads, isa),
        workspace(machine.pool.size(), isa),
        blocks("block", limits.blocks),
        states("state slot", limits.state_slots) {}
};

// All throw std::invalid_argument if shapes contradict each other.
std::unique_ptr<Op> make_embed(Context& context, const Matrix& table, Value out);
std::unique_ptr<Op> make_select_rows(Context& context, Value x, Value out);
std::unique_ptr<Op> make_rms_norm(Context& context, Value x, Norm norm, Value out);
std::unique_ptr<Op> make_add_norm(Context& context, Value x, Value delta, Norm norm, Value total, Value out);
std::unique_ptr<Op> make_batch_matvec(Context& context, Value x, std::vector<Linear> parts, std::vector<Value> outs);
std::unique_ptr<Op> make_mlp(Context& context, Value x, const MlpWeights& weights, Value out);
std::unique_ptr<Op> make_read_ahead(Context& context, Value x, Norm norm, const Matrix& router, std::int64_t top_k,
                                    ExpertStore& store, int layer, std::optional<Value> before);
std::unique_ptr<Op> make_moe(Context& context, Value x, const MoeWeights& weights, Value out);

// These two own a pool each; bytes is increased by its size.
std::unique_ptr<Op> make_attention(Context& context, Columns q, Columns k, Columns v, std::optional<Columns> gate,
                                   AttentionSpec spec, Value out, std::int64_t& bytes);
std::unique_ptr<Op> make_gated_delta(Context& context, const GatedDeltaInputs& inputs, GatedDeltaSpec spec, Value out,
                                     std::int64_t& bytes);

}  // namespace mixbit
