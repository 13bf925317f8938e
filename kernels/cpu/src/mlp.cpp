// SwiGLU feed-forward: gate and up fused in one region, down in the next.
#include "checks.h"
#include "linear.h"

namespace mixbit {
namespace {

class Mlp final : public Op {
 public:
  Mlp(Context& context, Value x, const MlpWeights& weights, Value out)
      : context_(context),
        x_(x),
        weights_(weights),
        out_(out),
        width_(weights.gate.rows),
        ready_(context.workspace.activations(context.limits.max_tokens, x.dim)),
        hidden_(context.workspace.activations(context.limits.max_tokens, weights.gate.rows)) {
    require_shape("mlp gate", weights.gate, width_, x.dim);
    require_shape("mlp up", weights.up, width_, x.dim);
    require_shape("mlp down", weights.down, out.dim, width_);
    serve_inputs(weights, ready_, hidden_);
    const std::int64_t rows = context.limits.max_tokens;
    context.workspace.reserve(rows * width_, tile_scratch(rows));
  }

  void run(const Step& step) override {
    const std::int64_t count = step.rows(x_);
    if (count == 0) return;
    Machine& machine = context_.machine;
    const int threads = machine.pool.size();
    float* hidden = context_.workspace.shared();

    prepare_rows(machine, ready_, step.row(x_, 0), count, x_.dim);
    const std::int64_t tile = bounded_tile(weights_.gate, count, count, width_, threads);
    const std::int64_t down_tile = tile_rows(weights_.down, count, out_.dim, threads);
    const std::int64_t down_tiles = (out_.dim + down_tile - 1) / down_tile;
    machine.pool.run_ranges(width_, tile, [&](auto begin, auto end, int thread) {
      const bool last = (end + tile - 1) / tile == machine.pool.first((width_ + tile - 1) / tile, thread + 1);
      const std::byte* next =
          last ? weights_.down.row(machine.pool.first(down_tiles, thread) * down_tile) : weights_.gate.row(end);
      swiglu_rows(machine, weights_, ready_, nullptr, count, begin, end, hidden, width_, context_.workspace.own(thread),
                  next);
    });

    prepare_rows(machine, hidden_, hidden, count, width_);
    machine.pool.run_ranges(out_.dim, down_tile, [&](auto begin, auto end, int) {
      matmul_rows(weights_.down, hidden_, nullptr, count, begin, end, step.row(out_, 0), out_.dim);
    });
  }

 private:
  Context& context_;
  Value x_;
  MlpWeights weights_;
  Value out_;
  std::int64_t width_;
  Activations& ready_;
  Activations& hidden_;
};

}  // namespace

std::unique_ptr<Op> make_mlp(Context& context, Value x, const MlpWeights& weights, Value out) {
  return std::make_unique<Mlp>(context, x, weights, out);
}

}  // namespace mixbit
