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
    tiles_.clear();
    tiles_.add(width_, bounded_tile(weights_.gate, count, count, width_, threads));
    machine.pool.run(tiles_.size(), [&](std::int64_t i, int thread) {
      const Tile tile = tiles_[i];
      swiglu_rows(machine, weights_, ready_, nullptr, count, tile.begin, tile.end, hidden, width_,
                  context_.workspace.own(thread));
    });

    prepare_rows(machine, hidden_, hidden, count, width_);
    tiles_.clear();
    tiles_.add(out_.dim, tile_rows(weights_.down, count, out_.dim, threads));
    machine.pool.run(tiles_.size(), [&](std::int64_t i, int) {
      const Tile tile = tiles_[i];
      matmul_rows(machine.isa, weights_.down, hidden_, nullptr, count, tile.begin, tile.end, step.row(out_, 0),
                  out_.dim);
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
  Tiling tiles_;
};

}  // namespace

std::unique_ptr<Op> make_mlp(Context& context, Value x, const MlpWeights& weights, Value out) {
  return std::make_unique<Mlp>(context, x, weights, out);
}

}  // namespace mixbit
