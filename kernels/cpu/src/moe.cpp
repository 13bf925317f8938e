// Mixture of experts. Three regions: what every token needs (router, shared gate and up); gate and up of the
// chosen experts; down of them all with the weighted sum, a tile of outputs at a time.
#include <cmath>

#include "checks.h"
#include "linear.h"
#include "route.h"

namespace mixbit {
namespace {

MlpWeights expert(const MlpWeights& w, std::int64_t e) { return {w.gate.expert(e), w.up.expert(e), w.down.expert(e)}; }

void check(const char* what, const MlpWeights& w, std::int64_t experts, std::int64_t in, std::int64_t out) {
  require_shape(what, w.gate, w.gate.rows, in);
  require_shape(what, w.up, w.gate.rows, in);
  require_shape(what, w.down, out, w.gate.rows);
  for (const Matrix* m : {&w.gate, &w.up, &w.down}) require_equal(what, m->experts, experts);
}

class Moe final : public Op {
 public:
  Moe(Context& context, Value x, const MoeWeights& weights, Value out)
      : context_(context),
        x_(x),
        weights_(weights),
        out_(out),
        experts_(weights.router.rows),
        width_(weights.experts.gate.rows),
        shared_width_(weights.shared ? weights.shared->gate.rows : 0),
        ready_(context.workspace.activations(context.limits.max_tokens, x.dim)),
        hidden_(context.workspace.activations(context.limits.max_tokens * weights.top_k, width_)),
        grouping_(experts_, context.limits.max_tokens * weights.top_k) {
    require_shape("moe router", weights.router, experts_, x.dim);
    check("moe experts", weights.experts, experts_, x.dim, out.dim);
    if (weights.top_k < 1 || weights.top_k > experts_) {
      throw std::invalid_argument("moe: top_k " + std::to_string(weights.top_k) + " of " + std::to_string(experts_) +
                                  " experts");
    }
    serve_inputs(weights.experts, ready_, hidden_);
    ready_.serve(weights.router);
    const std::int64_t rows = context.limits.max_tokens;
    if (weights.shared) {
      check("moe shared expert", *weights.shared, 1, x.dim, out.dim);
      shared_hidden_ = &context.workspace.activations(rows, shared_width_);
      serve_inputs(*weights.shared, ready_, *shared_hidden_);
    }
    if (weights.shared_gate) {
      require_shape("moe shared gate", *weights.shared_gate, 1, x.dim);
      ready_.serve(*weights.shared_gate);
    }
    context.workspace.reserve(buffer_size(rows), tile_scratch(rows));
    chosen_.resize(static_cast<std::size_t>(rows * weights.top_k));
    chosen_weights_.resize(chosen_.size());
  }

  void run(const Step& step) override {
    const std::int64_t count = step.rows(x_);
    if (count == 0) return;
    const Buffers b = buffers(context_.workspace.shared(), count);
    prepare_rows(context_.machine, ready_, step.row(x_, 0), count, x_.dim);
    for_every_token(b, count);
    choose(b, count);
    gate_and_up(b);
    prepare_rows(context_.machine, hidden_, b.hidden, count * weights_.top_k, width_);
    if (weights_.shared) prepare_rows(context_.machine, *shared_hidden_, b.shared_hidden, count, shared_width_);
    down(step, b, count);
  }

 private:
  // Parts of the workspace's shared memory.
  struct Buffers {
    float *logits, *shared_gate, *shared_hidden, *hidden;
  };

  std::int64_t buffer_size(std::int64_t rows) const {
    return rows * (experts_ + 1 + shared_width_ + weights_.top_k * width_);
  }

  Buffers buffers(float* base, std::int64_t rows) const {
    float* gate = base + rows * experts_;
    float* shared = gate + rows;
    return {base, gate, shared, shared + rows * shared_width_};
  }

  void for_every_token(const Buffers& b, std::int64_t count) {
    Machine& machine = context_.machine;
    const int threads = machine.pool.size();
    const std::int64_t rows = experts_ + 2 * shared_width_;
    tiles_.clear();
    tiles_.add(experts_, tile_rows(weights_.router, count, rows, threads));
    if (weights_.shared_gate) tiles_.add(1, 1);
    const std::size_t shared_part = weights_.shared_gate ? 2 : 1;
    if (weights_.shared) tiles_.add(shared_width_, bounded_tile(weights_.shared->gate, count, count, rows, threads));
    machine.pool.run(tiles_.size(), [&](std::int64_t i, int thread) {
      const Tile tile = tiles_[i];
      if (tile.part == 0) {
        matmul_rows(machine.isa, weights_.router, ready_, nullptr, count, tile.begin, tile.end, b.logits, experts_);
      } else if (tile.part == shared_part) {
        swiglu_rows(machine, *weights_.shared, ready_, nullptr, count, tile.begin, tile.end, b.shared_hidden,
                    shared_width_, context_.workspace.own(thread));
      } else {
        matmul_rows(machine.isa, *weights_.shared_gate, ready_, nullptr, count, 0, 1, b.shared_gate, 1);
      }
    });
  }

  void choose(const Buffers& b, std::int64_t count) {
    const std::int64_t top_k = weights_.top_k;
    context_.machine.pool.run_ranges(count, 8, [&](auto begin, auto end, int) {
      for (auto t = begin; t < end; ++t) {
        route(context_.machine.ops, b.logits + t * experts_, experts_, top_k, weights_.normalize,
              chosen_.data() + t * top_k, chosen_weights_.data() + t * top_k);
      }
    });
    grouping_.group(chosen_.data(), chosen_weights_.data(), count, top_k);
  }

  void gate_and_up(const Buffers& b) {
    Machine& machine = context_.machine;
    const auto& groups = grouping_.groups();
    const std::int64_t rows = width_ * static_cast<std::int64_t>(groups.size());
    const int threads = machine.pool.size();
    tiles_.clear();
    for (const auto& group : groups) {
      tiles_.add(width_, bounded_tile(weights_.experts.gate, group.count, group.count, rows, threads));
    }
    machine.pool.run(tiles_.size(), [&](std::int64_t i, int thread) {
      const Tile tile = tiles_[i];
      const auto& [e, first, pairs] = groups[tile.part];
      swiglu_rows(machine, expert(weights_.experts, e), ready_, grouping_.tokens() + first, pairs, tile.begin,
                  tile.end, b.hidden + first * width_, width_, context_.workspace.own(thread));
    });
  }

  void down(const Step& step, const Buffers& b, std::int64_t count) {
    Machine& machine = context_.machine;
    const auto groups = static_cast<std::int64_t>(grouping_.groups().size());
    const std::int64_t mean = (count * weights_.top_k + groups - 1) / groups;
    tiles_.clear();
    tiles_.add(out_.dim, bounded_tile(weights_.experts.down, mean, count, out_.dim, machine.pool.size()));
    machine.pool.run(tiles_.size(), [&](std::int64_t i, int thread) {
      down_tile(step, b, count, tiles_[i], context_.workspace.own(thread));
    });
  }

  // scratch: the tile of one expert's outputs, a row for each of its pairs.
  void down_tile(const Step& step, const Buffers& b, std::int64_t count, const Tile& tile, float* scratch) const {
    const Machine& machine = context_.machine;
    const std::int64_t width = tile.end - tile.begin;
    for (std::int64_t t = 0; t < count; ++t) std::fill_n(step.row(out_, t) + tile.begin, width, 0.0f);
    for (const auto& [e, first, pairs] : grouping_.groups()) {
      matmul_rows(machine.isa, weights_.experts.down.expert(e), hidden_, grouping_.pairs() + first, pairs, tile.begin,
                  tile.end, scratch - tile.begin, width);
      for (std::int64_t i = 0; i < pairs; ++i) {
        float* out = step.row(out_, grouping_.tokens()[first + i]) + tile.begin;
        machine.ops.axpy(grouping_.weights()[first + i], scratch + i * width, width, out);
      }
    }
    if (!weights_.shared) return;
    matmul_rows(machine.isa, weights_.shared->down, *shared_hidden_, nullptr, count, tile.begin, tile.end,
                scratch - tile.begin, width);
    for (std::int64_t t = 0; t < count; ++t) {
      const float factor = weights_.shared_gate ? 1 / (1 + std::exp(-b.shared_gate[t])) : 1;
      machine.ops.axpy(factor, scratch + t * width, width, step.row(out_, t) + tile.begin);
    }
  }

  Context& context_;
  Value x_;
  MoeWeights weights_;
  Value out_;
  std::int64_t experts_, width_, shared_width_;
  Activations& ready_;
  Activations& hidden_;
  Activations* shared_hidden_ = nullptr;
  Grouping grouping_;
  Tiling tiles_;
  std::vector<std::int32_t> chosen_;
  std::vector<float> chosen_weights_;
};

}  // namespace

std::unique_ptr<Op> make_moe(Context& context, Value x, const MoeWeights& weights, Value out) {
  return std::make_unique<Moe>(context, x, weights, out);
}

}  // namespace mixbit
