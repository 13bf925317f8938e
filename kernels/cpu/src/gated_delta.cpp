// Gated delta net, one region: each task is one key head of one sequence, with its value heads. It takes the
// tokens in chunks whose convolved inputs stay in cache.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "checks.h"
#include "ops.h"
#include "state_pool.h"

namespace mixbit {
namespace {

constexpr float qk_eps = 1e-6f;  // added to the sum of squares of q and k, as transformers does
constexpr std::int64_t chunk = delta_chunk_most;  // tokens
constexpr std::int64_t max_taps = 16;

float softplus(float x) { return std::max(x, 0.0f) + std::log1p(std::exp(-std::fabs(x))); }

class GatedDelta final : public Op {
 public:
  GatedDelta(Context& context, const GatedDeltaInputs& in, GatedDeltaSpec spec, Value out)
      : context_(context),
        in_(in),
        spec_(std::move(spec)),
        out_(out),
        ratio_(spec_.value_heads / spec_.key_heads),
        keys_(spec_.key_heads * spec_.key_dim),
        pool_(context.limits.state_slots, spec_.kernel - 1, channels(spec_), spec_.value_heads, spec_.key_dim,
              spec_.value_dim) {
    taps_.resize(spec_.conv.size());
    for (std::int64_t c = 0; c < pool_.channels; ++c) {
      for (std::int64_t j = 0; j < spec_.kernel; ++j) {
        taps_[index(j * pool_.channels + c)] = spec_.conv[index(c * spec_.kernel + j)];
      }
    }
    for (float& a : spec_.a_log) a = std::exp(a);
    context.workspace.reserve(0, scratch(nullptr).size);
    pool_.list(context.states);
  }

  static std::int64_t channels(const GatedDeltaSpec& s) {
    return 2 * s.key_heads * s.key_dim + s.value_heads * s.value_dim;
  }

  void run(const Step& step) override {
    context_.machine.pool.run(step.sequences * spec_.key_heads, [&](std::int64_t i, int thread) {
      advance(step, i / spec_.key_heads, i % spec_.key_heads, scratch(context_.workspace.own(thread)));
    });
  }

  std::int64_t bytes() const { return pool_.bytes(); }

 private:
  // The channels of one part (q, k or v) of one key head.
  struct Part {
    const Columns* columns;
    std::int64_t channel, width;
  };

  // A thread's own memory, for a chunk: q, k [chunk, key_dim]; v [chunk, ratio * value_dim] (and room for
  // padded reads); decay, beta [ratio, chunk]; out [chunk, value_stride];
  // delta: see delta_scratch.
  struct Scratch {
    float *q, *k, *v, *decay, *beta, *out, *delta;
    std::int64_t size;
  };

  static std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

  Scratch scratch(float* base) const {
    const std::int64_t k = chunk * spec_.key_dim, v = 2 * k, decay = v + chunk * ratio_ * spec_.value_dim + lane_pad;
    const std::int64_t beta = decay + ratio_ * chunk, out = beta + ratio_ * chunk;
    const std::int64_t delta = out + chunk * pool_.value_stride;
    const std::int64_t size = delta + delta_scratch(spec_.key_dim, pool_.value_stride);
    if (base == nullptr) return {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, size};
    return {base, base + k, base + v, base + decay, base + beta, base + out, base + delta, size};
  }

  void advance(const Step& step, std::int64_t sequence, std::int64_t head, const Scratch& s) const {
    const std::int64_t slot = step.state_slots[sequence];
    const std::int64_t first = step.query_starts[sequence], last = step.query_starts[sequence + 1];
    const Part parts[] = {{&in_.q, head * spec_.key_dim, spec_.key_dim},
                          {&in_.k, keys_ + head * spec_.key_dim, spec_.key_dim},
                          {&in_.v, 2 * keys_ + head * ratio_ * spec_.value_dim, ratio_ * spec_.value_dim}};
    float* const buffers[] = {s.q, s.k, s.v};
    if (step.context_lengths[sequence] == 0) clear(slot, head, parts);
    for (std::int64_t begin = first; begin < last; begin += chunk) {
      const std::int64_t tokens = std::min(chunk, last - begin);
      for (int p = 0; p < 3; ++p) {
        for (std::int64_t t = 0; t < tokens; ++t) {
          convolve(step, parts[p], slot, head, first, begin + t, buffers[p] + t * parts[p].width);
        }
      }
      normalize(tokens, s);
      make_gates(step, head, begin, tokens, s);
      for (std::int64_t r = 0; r < ratio_; ++r) recur(step, slot, head, r, begin, tokens, s);
    }
    for (const Part& part : parts) keep_inputs(step, part, slot, head, first, last);
  }

  void clear(std::int64_t slot, std::int64_t head, const Part (&parts)[3]) const {
    for (const Part& part : parts) {
      for (std::int64_t i = 0; i + 1 < spec_.kernel; ++i) {
        std::fill_n(pool_.conv(slot, i) + part.channel, part.width, 0.0f);
      }
    }
    std::fill_n(pool_.memory(slot, head * ratio_), ratio_ * pool_.head_size, 0.0f);
  }

  // The part's inputs of `token`, a row of the batch; from the state if it lies before the sequence's first.
  const float* input(const Step& step, const Part& part, std::int64_t slot, std::int64_t head, std::int64_t first,
                     std::int64_t token) const {
    if (token >= first) return step.head(*part.columns, token, head);
    return pool_.conv(slot, token - first + spec_.kernel - 1) + part.channel;
  }

  void convolve(const Step& step, const Part& part, std::int64_t slot, std::int64_t head, std::int64_t first,
                std::int64_t token, float* y) const {
    const float* inputs[max_taps];
    for (std::int64_t j = 0; j < spec_.kernel; ++j) {
      inputs[j] = input(step, part, slot, head, first, token - spec_.kernel + 1 + j);
    }
    context_.machine.ops.conv_silu(inputs, taps_.data() + part.channel, pool_.channels, spec_.kernel, part.width, y);
  }

  void normalize(std::int64_t tokens, const Scratch& s) const {
    const VectorOps& ops = context_.machine.ops;
    const std::int64_t n = spec_.key_dim;
    const float size = static_cast<float>(n), eps = qk_eps / size;
    for (std::int64_t t = 0; t < tokens; ++t) {
      ops.rms_norm(s.q + t * n, nullptr, eps, 1 / size, n, s.q + t * n);
      ops.rms_norm(s.k + t * n, nullptr, eps, 1 / std::sqrt(size), n, s.k + t * n);
    }
  }

  void make_gates(const Step& step, std::int64_t head, std::int64_t begin, std::int64_t tokens,
                  const Scratch& s) const {
    for (std::int64_t t = 0; t < tokens; ++t) {
      const float* a = step.head(in_.a, begin + t, head);
      const float* b = step.head(in_.b, begin + t, head);
      for (std::int64_t r = 0; r < ratio_; ++r) {
        const std::size_t h = index(head * ratio_ + r);
        s.decay[r * chunk + t] = std::exp(-spec_.a_log[h] * softplus(a[r] + spec_.dt_bias[h]));
        s.beta[r * chunk + t] = 1 / (1 + std::exp(-b[r]));
      }
    }
  }

  void recur(const Step& step, std::int64_t slot, std::int64_t head, std::int64_t r, std::int64_t begin,
             std::int64_t tokens, const Scratch& s) const {
    const VectorOps& ops = context_.machine.ops;
    const std::int64_t n = spec_.value_dim, h = head * ratio_ + r;
    DeltaRun run;
    run.state = pool_.memory(slot, h);
    run.q = s.q;
    run.k = s.k;
    run.key_dim = spec_.key_dim;
    run.v = s.v + r * n;
    run.v_stride = ratio_ * n;
    run.value_stride = pool_.value_stride;
    run.decay = s.decay + r * chunk;
    run.beta = s.beta + r * chunk;
    run.tokens = tokens;
    run.out = s.out;
    run.scratch = s.delta;
    if (r == 0) ops.delta_keys(run);
    ops.delta(run);
    for (std::int64_t t = 0; t < tokens; ++t) {
      float* out = step.row(out_, begin + t) + h * n;
      ops.rms_norm(s.out + t * pool_.value_stride, spec_.norm.weight.data(), spec_.norm.eps, 1, n, out);
      ops.silu_mul(step.head(in_.z, begin + t, head) + r * n, out, n, out);
    }
  }

  // The last kernel - 1 inputs, old ones among them where the step had fewer tokens. In ascending order: what is
  // moved lies behind what is still to be read.
  void keep_inputs(const Step& step, const Part& part, std::int64_t slot, std::int64_t head, std::int64_t first,
                   std::int64_t last) const {
    for (std::int64_t i = 0; i + 1 < spec_.kernel; ++i) {
      const float* from = input(step, part, slot, head, first, last - spec_.kernel + 1 + i);
      std::memcpy(pool_.conv(slot, i) + part.channel, from, index(part.width) * sizeof(float));
    }
  }

  Context& context_;
  GatedDeltaInputs in_;
  GatedDeltaSpec spec_;
  Value out_;
  std::int64_t ratio_, keys_;
  StatePool pool_;
  std::vector<float> taps_;  // [kernel, channels]
};

void check(const GatedDeltaInputs& in, const GatedDeltaSpec& spec, Value out) {
  if (spec.key_heads < 1 || spec.value_heads < 1 || spec.key_dim < 1 || spec.value_dim < 1 ||
      spec.value_heads % spec.key_heads != 0 || spec.kernel < 1 || spec.kernel > max_taps) {
    throw std::invalid_argument("gated_delta: " + std::to_string(spec.value_heads) + " value heads over " +
                                std::to_string(spec.key_heads) + " key heads, convolution of " +
                                std::to_string(spec.kernel) + " taps (at most " + std::to_string(max_taps) + ")");
  }
  const std::int64_t ratio = spec.value_heads / spec.key_heads;
  require_columns("gated_delta q", in.q, spec.key_heads, spec.key_dim);
  require_columns("gated_delta k", in.k, spec.key_heads, spec.key_dim);
  require_columns("gated_delta v", in.v, spec.key_heads, ratio * spec.value_dim);
  require_columns("gated_delta z", in.z, spec.key_heads, ratio * spec.value_dim);
  require_columns("gated_delta b", in.b, spec.key_heads, ratio);
  require_columns("gated_delta a", in.a, spec.key_heads, ratio);
  auto size = [](const std::vector<float>& v) { return static_cast<std::int64_t>(v.size()); };
  require_equal("gated_delta conv", size(spec.conv), GatedDelta::channels(spec) * spec.kernel);
  require_equal("gated_delta a_log", size(spec.a_log), spec.value_heads);
  require_equal("gated_delta dt_bias", size(spec.dt_bias), spec.value_heads);
  require_equal("gated_delta norm", size(spec.norm.weight), spec.value_dim);
  require_equal("gated_delta output", out.dim, spec.value_heads * spec.value_dim);
}

}  // namespace

std::unique_ptr<Op> make_gated_delta(Context& context, const GatedDeltaInputs& inputs, GatedDeltaSpec spec, Value out,
                                     std::int64_t& bytes) {
  check(inputs, spec, out);
  auto op = std::make_unique<GatedDelta>(context, inputs, std::move(spec), out);
  bytes += op->bytes();
  return op;
}

}  // namespace mixbit
