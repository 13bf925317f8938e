// Which experts a layer will probably choose, told to the store before the layer's mixer has run: its router is applied
// to the residual stream that the mixer is going to add to. Only what is read when depends on it, no value of the step.
#include <algorithm>

#include "checks.h"
#include "expert_store.h"
#include "linear.h"
#include "route.h"

namespace mixbit {
namespace {

constexpr std::int64_t most_tokens = 8;  // of more tokens the layer needs too many experts for a guess to matter

class ReadAhead final : public Op {
 public:
  ReadAhead(Context& context, Value x, Norm norm, const Matrix& router, std::int64_t top_k, ExpertStore& store, int layer)
      : context_(context),
        x_(x),
        norm_(std::move(norm)),
        router_(router),
        top_k_(top_k),
        store_(store),
        layer_(layer),
        ready_(context.workspace.activations(std::min(context.limits.max_tokens, most_tokens), x.dim)) {
    require_equal("read_ahead norm", static_cast<std::int64_t>(norm_.weight.size()), x.dim);
    require_shape("read_ahead router", router, router.rows, x.dim);
    ready_.serve(router);
    context.workspace.reserve(most_tokens * (x.dim + router.rows), 0);
    chosen_.resize(static_cast<std::size_t>(most_tokens * top_k));
    weights_.resize(chosen_.size());
  }

  void run(const Step& step) override {
    const std::int64_t count = step.rows(x_), experts = router_.rows;
    if (count == 0 || count > most_tokens || !store_.misses(layer_)) return;
    Machine& machine = context_.machine;
    float* const normed = context_.workspace.shared();
    float* const logits = normed + count * x_.dim;
    for (std::int64_t t = 0; t < count; ++t) {
      machine.ops.rms_norm(step.row(x_, t), norm_.weight.data(), norm_.eps, 1, x_.dim, normed + t * x_.dim);
    }
    prepare_rows(machine, ready_, normed, count, x_.dim);
    machine.pool.run_ranges(experts, tile_rows(router_, count, experts, machine.pool.size()),
                            [&](auto begin, auto end, int) {
                              matmul_rows(machine.isa, router_, ready_, nullptr, count, begin, end, logits, experts);
                            });
    for (std::int64_t t = 0; t < count; ++t) {
      route(machine.ops, logits + t * experts, experts, top_k_, false, chosen_.data() + t * top_k_,
            weights_.data() + t * top_k_);
    }
    tell(count);
  }

 private:
  // The first choice of every token, then the second.
  void tell(std::int64_t count) {
    expected_.clear();
    for (std::int64_t rank = 0; rank < top_k_; ++rank) {
      for (std::int64_t t = 0; t < count; ++t) {
        const std::int32_t expert = chosen_[static_cast<std::size_t>(t * top_k_ + rank)];
        if (std::find(expected_.begin(), expected_.end(), expert) == expected_.end()) expected_.push_back(expert);
      }
    }
    store_.expect(layer_, expected_);
  }

  Context& context_;
  Value x_;
  Norm norm_;
  Matrix router_;
  std::int64_t top_k_;
  ExpertStore& store_;
  int layer_;
  Activations& ready_;
  std::vector<std::int32_t> chosen_, expected_;
  std::vector<float> weights_;
};

}  // namespace

std::unique_ptr<Op> make_read_ahead(Context& context, Value x, Norm norm, const Matrix& router, std::int64_t top_k,
                                    ExpertStore& store, int layer) {
  return std::make_unique<ReadAhead>(context, x, std::move(norm), router, top_k, store, layer);
}

}  // namespace mixbit
