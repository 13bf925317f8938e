// Mixture of experts. Three regions: what every token needs (router, shared gate and up); gate and up of the
// chosen experts; down of them all with the weighted sum, a tile of outputs at a time. Where experts are streamed, the
// last two are done for those in memory while others are read; a token's sum keeps its order, so that it is the same
// to the bit.
#include <cmath>
#include <numeric>

#include "checks.h"
#include "expert_store.h"
#include "linear.h"
#include "route.h"

namespace mixbit {
namespace {

// Streamed experts of so few pairs are computed as they arrive, and their outputs kept for the sum. Of more, in the order
// of the sum, which is then made at once.
constexpr std::int64_t most_kept = 512;

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
        hidden_(context.workspace.activations(context.limits.max_tokens * weights.top_k, width_, weights.store ? 1 : 0)),
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
      shared_hidden_ = &context.workspace.activations(rows, shared_width_, weights.store ? 2 : 0);  // waves overlap it
      serve_inputs(*weights.shared, ready_, *shared_hidden_);
    }
    if (weights.shared_gate) {
      require_shape("moe shared gate", *weights.shared_gate, 1, x.dim);
      ready_.serve(*weights.shared_gate);
    }
    if (weights.store) kept_ = std::min(rows * weights.top_k, most_kept) * out.dim;
    context.workspace.reserve(buffer_size(rows) + kept_, tile_scratch(rows));
    chosen_.resize(static_cast<std::size_t>(rows * weights.top_k));
    chosen_weights_.resize(chosen_.size());
  }

  void run(const Step& step) override {
    const std::int64_t count = step.rows(x_);
    if (count == 0) return;
    const Buffers b = buffers(context_.workspace.shared(), count);
    const std::int64_t meeting = count * weights_.top_k / experts_;  // of an expert's weights, in the mean
    prepare_rows(context_.machine, ready_, step.row(x_, 0), count, x_.dim, meeting);
    hidden_.begin(meeting, false);
    if (weights_.store) {
      streamed(step, b, count);
      return;
    }
    for_every_token(b, count, true, true);
    choose(b, count);
    wave_.resize(grouping_.groups().size());
    std::iota(wave_.begin(), wave_.end(), std::size_t{0});
    wave_weights_.clear();
    for (const auto& group : grouping_.groups()) wave_weights_.push_back(expert(weights_.experts, group.expert));
    gate_and_up(b);
    if (weights_.shared) prepare_shared(b, count);
    sum_in_place(step, b, count, true, true);
  }

 private:
  // Parts of the workspace's shared memory.
  struct Buffers {
    float *logits, *shared_gate, *shared_hidden, *hidden, *kept;
  };

  std::int64_t buffer_size(std::int64_t rows) const {
    return rows * (experts_ + 1 + shared_width_ + weights_.top_k * width_);
  }

  Buffers buffers(float* base, std::int64_t rows) const {
    float* gate = base + rows * experts_;
    float* shared = gate + rows;
    return {base, gate, shared, shared + rows * shared_width_, base + buffer_size(rows)};
  }

  void streamed(const Step& step, const Buffers& b, std::int64_t count) {
    for_every_token(b, count, true, false);
    choose(b, count);
    const bool in_order = count * weights_.top_k * out_.dim > kept_;
    ExpertFetch fetch(*weights_.store, weights_.layer, grouping_.groups(), count, in_order);
    if (weights_.shared) {
      for_every_token(b, count, false, true);
      prepare_shared(b, count);
    }
    weights_.store->guess(weights_.layer, step);
    std::size_t given = 0;
    for (auto wave = fetch.next(); !wave.empty(); wave = fetch.next()) {
      wave_.assign(wave.begin(), wave.end());
      wave_weights_.clear();
      for (std::size_t group : wave) wave_weights_.push_back(fetch.weights(group));
      gate_and_up(b);
      const bool first = given == 0;
      given += wave.size();
      const bool last = given == grouping_.groups().size();
      if (in_order) {
        sum_in_place(step, b, count, first, last);
      } else if (last) {
        sum_up(step, b, count);
      } else {
        keep(b);
      }
    }
  }

  // Router; gate and up of the shared expert.
  void for_every_token(const Buffers& b, std::int64_t count, bool router, bool shared) {
    Machine& machine = context_.machine;
    const int threads = machine.pool.size();
    const std::int64_t rows = (router ? experts_ : 0) + (shared ? 2 * shared_width_ : 0);
    enum Part { of_router, of_gate, of_shared };
    Part parts[3];
    int found = 0;
    tiles_.clear();
    if (router) {
      parts[found++] = of_router;
      tiles_.add(experts_, tile_rows(weights_.router, count, rows, threads));
    }
    if (shared && weights_.shared_gate) {
      parts[found++] = of_gate;
      tiles_.add(1, 1);
    }
    if (shared && weights_.shared) {
      parts[found++] = of_shared;
      tiles_.add(shared_width_, bounded_tile(weights_.shared->gate, count, count, rows, threads));
    }
    machine.pool.run(tiles_.size(), [&](std::int64_t i, int thread) {
      const Tile tile = tiles_[i];
      switch (parts[tile.part]) {
        case of_router:
          matmul_rows(weights_.router, ready_, nullptr, count, tile.begin, tile.end, b.logits, experts_);
          break;
        case of_gate:
          matmul_rows(*weights_.shared_gate, ready_, nullptr, count, 0, 1, b.shared_gate, 1);
          break;
        case of_shared:
          swiglu_rows(machine, *weights_.shared, ready_, nullptr, count, tile.begin, tile.end, b.shared_hidden,
                      shared_width_, context_.workspace.own(thread), weights_.shared->gate.row(tile.end));
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

  void prepare_shared(const Buffers& b, std::int64_t count) {
    prepare_rows(context_.machine, *shared_hidden_, b.shared_hidden, count, shared_width_);
  }

  const Grouping::Group& group(std::size_t place) const { return grouping_.groups()[wave_[place]]; }

  // Hidden activations of the wave's pairs, made ready for down.
  void gate_and_up(const Buffers& b) {
    Machine& machine = context_.machine;
    const std::int64_t rows = width_ * static_cast<std::int64_t>(wave_.size());
    const int threads = machine.pool.size();
    tiles_.clear();
    for (std::size_t i = 0; i < wave_.size(); ++i) {
      tiles_.add(width_, bounded_tile(weights_.experts.gate, group(i).count, group(i).count, rows, threads));
    }
    machine.pool.run(tiles_.size(), [&](std::int64_t i, int thread) {
      const Tile tile = tiles_[i];
      const auto& [e, first, pairs] = group(tile.part);
      const Matrix& gate = wave_weights_[tile.part].gate;
      const std::byte* next = tile.end < width_                      ? gate.row(tile.end)
                              : tile.part + 1 < wave_weights_.size() ? wave_weights_[tile.part + 1].gate.weight
                                                                     : wave_weights_.front().down.weight;
      swiglu_rows(machine, wave_weights_[tile.part], ready_, grouping_.tokens() + first, pairs, tile.begin, tile.end,
                  b.hidden + first * width_, width_, context_.workspace.own(thread), next);
    });
    prepare_hidden(b);
  }

  void prepare_hidden(const Buffers& b) {
    pairs_.clear();
    for (std::size_t i = 0; i < wave_.size(); ++i) {
      for (std::int64_t p = 0; p < group(i).count; ++p) pairs_.push_back(group(i).first + p);
    }
    const std::int64_t grain = std::max<std::int64_t>(1, 16384 / width_);
    context_.machine.pool.run_ranges(static_cast<std::int64_t>(pairs_.size()), grain, [&](auto begin, auto end, int) {
      for (auto i = begin; i < end; ++i) {
        const std::int64_t pair = pairs_[static_cast<std::size_t>(i)];
        hidden_.prepare(pair, b.hidden + pair * width_, width_);
      }
    });
  }

  // Down of the wave, added to the outputs. first: they are zero before; last: the shared expert follows.
  void sum_in_place(const Step& step, const Buffers& b, std::int64_t count, bool first, bool last) {
    Machine& machine = context_.machine;
    std::int64_t pairs = 0;
    for (std::size_t i = 0; i < wave_.size(); ++i) pairs += group(i).count;
    const auto groups = static_cast<std::int64_t>(wave_.size());
    const std::int64_t mean = (pairs + groups - 1) / groups;
    tiles_.clear();
    tiles_.add(out_.dim, bounded_tile(weights_.experts.down, mean, count, out_.dim, machine.pool.size()));
    machine.pool.run(tiles_.size(), [&](std::int64_t i, int thread) {
      const Tile tile = tiles_[i];
      float* scratch = context_.workspace.own(thread);
      if (first) clear(step, count, tile);
      for (std::size_t g = 0; g < wave_.size(); ++g) down_tile(step, g, tile, scratch);
      if (last) add_shared(step, b, count, tile, scratch);
    });
  }

  void clear(const Step& step, std::int64_t count, const Tile& tile) const {
    for (std::int64_t t = 0; t < count; ++t) {
      std::fill_n(step.row(out_, t) + tile.begin, tile.end - tile.begin, 0.0f);
    }
  }

  // scratch: the tile of one expert's outputs, a row for each of its pairs.
  void down_tile(const Step& step, std::size_t place, const Tile& tile, float* scratch) const {
    const std::int64_t width = tile.end - tile.begin;
    const auto& [e, first, pairs] = group(place);
    const bool last = place + 1 == wave_weights_.size();
    const std::byte* next = !last             ? wave_weights_[place + 1].down.row(tile.begin)
                            : weights_.shared ? weights_.shared->down.row(tile.begin)
                                              : wave_weights_.front().down.row(tile.end);
    matmul_rows(wave_weights_[place].down, hidden_, grouping_.pairs() + first, pairs, tile.begin, tile.end,
                scratch - tile.begin, width, next);
    add_outputs(step, grouping_.groups()[wave_[place]], tile, scratch, width);
  }

  // outputs: of the group's pairs, from the tile's first value on.
  void add_outputs(const Step& step, const Grouping::Group& group, const Tile& tile, const float* outputs,
                   std::int64_t stride) const {
    for (std::int64_t i = 0; i < group.count; ++i) {
      float* out = step.row(out_, grouping_.tokens()[group.first + i]) + tile.begin;
      context_.machine.ops.axpy(grouping_.weights()[group.first + i], outputs + i * stride, tile.end - tile.begin, out);
    }
  }

  void add_shared(const Step& step, const Buffers& b, std::int64_t count, const Tile& tile, float* scratch) const {
    if (!weights_.shared) return;
    const Machine& machine = context_.machine;
    const std::int64_t width = tile.end - tile.begin;
    matmul_rows(weights_.shared->down, *shared_hidden_, nullptr, count, tile.begin, tile.end,
                scratch - tile.begin, width, wave_weights_.front().down.row(tile.end));
    for (std::int64_t t = 0; t < count; ++t) {
      const float factor = weights_.shared_gate ? 1 / (1 + std::exp(-b.shared_gate[t])) : 1;
      machine.ops.axpy(factor, scratch + t * width, width, step.row(out_, t) + tile.begin);
    }
  }

  // Down of the wave: a row of outputs for each pair.
  void keep(const Buffers& b) {
    Machine& machine = context_.machine;
    const std::int64_t rows = out_.dim * static_cast<std::int64_t>(wave_.size());
    tiles_.clear();
    for (std::size_t i = 0; i < wave_.size(); ++i) {
      tiles_.add(out_.dim, tile_rows(weights_.experts.down, group(i).count, rows, machine.pool.size()));
    }
    machine.pool.run(tiles_.size(), [&](std::int64_t i, int) {
      const Tile tile = tiles_[i];
      const auto& [e, first, pairs] = group(tile.part);
      matmul_rows(wave_weights_[tile.part].down, hidden_, grouping_.pairs() + first, pairs, tile.begin,
                  tile.end, b.kept + first * out_.dim, out_.dim);
    });
  }

  // Outputs that were kept and down of the wave, the last one, in the order of groups; then the shared expert.
  void sum_up(const Step& step, const Buffers& b, std::int64_t count) {
    Machine& machine = context_.machine;
    tiles_.clear();
    tiles_.add(out_.dim, bounded_tile(weights_.experts.down, count, count, out_.dim, machine.pool.size()));
    machine.pool.run(tiles_.size(), [&](std::int64_t i, int thread) {
      const Tile tile = tiles_[i];
      float* scratch = context_.workspace.own(thread);
      clear(step, count, tile);
      std::size_t place = 0;
      for (std::size_t g = 0; g < grouping_.groups().size(); ++g) {
        const Grouping::Group& each = grouping_.groups()[g];
        if (place < wave_.size() && wave_[place] == g) {
          down_tile(step, place++, tile, scratch);
        } else {
          add_outputs(step, each, tile, b.kept + each.first * out_.dim + tile.begin, out_.dim);
        }
      }
      add_shared(step, b, count, tile, scratch);
    });
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
  std::int64_t kept_ = 0;  // floats that outputs may take
  // Groups that are computed together, their experts, and their pairs.
  std::vector<std::size_t> wave_;
  std::vector<MlpWeights> wave_weights_;
  std::vector<std::int64_t> pairs_;
};

}  // namespace

std::unique_ptr<Op> make_moe(Context& context, Value x, const MoeWeights& weights, Value out) {
  return std::make_unique<Moe>(context, x, weights, out);
}

}  // namespace mixbit
