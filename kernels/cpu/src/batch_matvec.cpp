// Matrices of any widths that share an input, in one region.
#include <numeric>

#include "checks.h"
#include "linear.h"

namespace mixbit {
namespace {

// Tokens that meet all matrices before the next ones do: more, and what they read and write leaves the caches between two
// tiles.
constexpr std::int64_t slice_tokens = 512, unit = Activations::together;

class BatchMatvec final : public Op {
 public:
  BatchMatvec(Context& context, Value x, std::vector<Linear> parts, std::vector<Value> outs)
      : context_(context),
        x_(x),
        parts_(std::move(parts)),
        outs_(std::move(outs)),
        ready_(context.workspace.activations(context.limits.max_tokens, x.dim)) {
    require_equal("batch_matvec: outputs", static_cast<std::int64_t>(outs_.size()),
                  static_cast<std::int64_t>(parts_.size()));
    for (std::size_t i = 0; i < parts_.size(); ++i) {
      require_shape("batch_matvec", parts_[i].matrix, outs_[i].dim, x.dim);
      if (!parts_[i].bias.empty()) {
        require_equal("batch_matvec: bias", static_cast<std::int64_t>(parts_[i].bias.size()), outs_[i].dim);
      }
      ready_.serve(parts_[i].matrix);
      total_rows_ += outs_[i].dim;
    }
    order_.resize(static_cast<std::size_t>(context.limits.max_tokens));
    std::iota(order_.begin(), order_.end(), 0);
  }

  void run(const Step& step) override {
    const std::int64_t count = step.rows(x_);
    if (count == 0) return;
    Machine& machine = context_.machine;
    prepare_rows(machine, ready_, step.row(x_, 0), count, x_.dim);
    const std::int64_t slices = (count + slice_tokens - 1) / slice_tokens;
    tiles_.clear();
    for (const Linear& part : parts_) {
      tiles_.add(part.matrix.rows, tile_rows(part.matrix, count / slices, total_rows_, machine.pool.size()));
    }
    machine.pool.run(slices * tiles_.size(), [&](std::int64_t i, int) {
      const std::int64_t slice = i / tiles_.size();
      const auto first = [&](std::int64_t s) { return s == slices ? count : count * s / slices / unit * unit; };
      compute(step, tiles_[i % tiles_.size()], first(slice), first(slice + 1) - first(slice));
    });
  }

 private:
  // Of tokens [first, first + count).
  void compute(const Step& step, const Tile& tile, std::int64_t first, std::int64_t count) const {
    const auto& [matrix, bias] = parts_[tile.part];
    const Value& out = outs_[tile.part];
    matmul_rows(matrix, ready_, order_.data() + first, count, tile.begin, tile.end,
                step.row(out, first), out.dim);
    if (bias.empty()) return;
    for (std::int64_t i = first; i < first + count; ++i) {
      float* y = step.row(out, i) + tile.begin;
      context_.machine.ops.add(y, bias.data() + tile.begin, tile.end - tile.begin, y);
    }
  }

  Context& context_;
  Value x_;
  std::vector<Linear> parts_;
  std::vector<Value> outs_;
  Activations& ready_;
  std::int64_t total_rows_ = 0;
  std::vector<std::int32_t> order_;  // 0, 1, 2, ...: an index of tokens
  Tiling tiles_;
};

}  // namespace

std::unique_ptr<Op> make_batch_matvec(Context& context, Value x, std::vector<Linear> parts, std::vector<Value> outs) {
  return std::make_unique<BatchMatvec>(context, x, std::move(parts), std::move(outs));
}

}  // namespace mixbit
