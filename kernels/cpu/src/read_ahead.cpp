// Which experts a layer will probably choose, told to the store twice: while the layer before waits for its own, and
// before the layer's mixer has run. Its router is applied to the residual stream as it then is. Only what is read when
// depends on it, no value of the step.
#include <algorithm>
#include <optional>
#include <vector>

#include "checks.h"
#include "expert_store.h"
#include "linear.h"
#include "route.h"

namespace mixbit {
namespace {

constexpr std::int64_t most_tokens = 8;  // of more tokens the layer needs too many experts for a guess to matter
constexpr int beside_moe = 3;  // inputs of matrices that no moe uses

class ReadAhead final : public Op {
 public:
  ReadAhead(Context& context, Value x, Norm norm, const Matrix& router, std::int64_t top_k, ExpertStore& store, int layer,
            std::optional<Value> before)
      : context_(context),
        x_(x),
        norm_(std::move(norm)),
        router_(router),
        top_k_(top_k),
        store_(store),
        layer_(layer),
        ready_(context.workspace.activations(most_tokens, x.dim, beside_moe)) {
    require_equal("read_ahead norm", static_cast<std::int64_t>(norm_.weight.size()), x.dim);
    require_shape("read_ahead router", router, router.rows, x.dim);
    ready_.serve(router);
    normed_.resize(static_cast<std::size_t>(most_tokens * x.dim));
    logits_.resize(static_cast<std::size_t>(most_tokens * router.rows));
    chosen_.resize(static_cast<std::size_t>(most_tokens * top_k));
    weights_.resize(chosen_.size());
    if (before) store.guess_during(layer - 1, [this, early = *before](const Step& step) { guess(step, early); });
  }

  void run(const Step& step) override { guess(step, x_); }

 private:
  // The workspace is not used: a moe may be at work in it.
  void guess(const Step& step, Value residual) {
    const std::int64_t count = step.rows(residual), experts = router_.rows, dim = residual.dim;
    if (count == 0 || count > most_tokens || !store_.misses(layer_)) return;
    Machine& machine = context_.machine;
    for (std::int64_t t = 0; t < count; ++t) {
      machine.ops.rms_norm(step.row(residual, t), norm_.weight.data(), norm_.eps, 1, dim, normed_.data() + t * dim);
    }
    prepare_rows(machine, ready_, normed_.data(), count, dim);
    machine.pool.run_ranges(experts, tile_rows(router_, count, experts, machine.pool.size()),
                            [&](auto begin, auto end, int) {
                              matmul_rows(router_, ready_, nullptr, count, begin, end, logits_.data(), experts);
                            });
    for (std::int64_t t = 0; t < count; ++t) {
      route(machine.ops, logits_.data() + t * experts, experts, top_k_, false, chosen_.data() + t * top_k_,
            weights_.data() + t * top_k_);
    }
    tell(count);
  }

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
  std::vector<float> normed_, logits_, weights_;
};

}  // namespace

std::unique_ptr<Op> make_read_ahead(Context& context, Value x, Norm norm, const Matrix& router, std::int64_t top_k,
                                    ExpertStore& store, int layer, std::optional<Value> before) {
  return std::make_unique<ReadAhead>(context, x, std::move(norm), router, top_k, store, layer, before);
}

}  // namespace mixbit
