// Root-mean-square norms.
#include "checks.h"
#include "ops.h"

namespace mixbit {
namespace {

constexpr std::int64_t grain_values = 16384;

class RmsNorm final : public Op {
 public:
  RmsNorm(Context& context, Value x, Norm norm, Value out)
      : context_(context), x_(x), norm_(std::move(norm)), out_(out) {
    require_equal("rms_norm", static_cast<std::int64_t>(norm_.weight.size()), x.dim);
    require_equal("rms_norm", out.dim, x.dim);
  }

  void run(const Step& step) override {
    const std::int64_t n = x_.dim;
    context_.machine.pool.run_ranges(
        step.rows(x_), std::max<std::int64_t>(1, grain_values / n), [&](auto begin, auto end, int) {
          for (auto i = begin; i < end; ++i) {
            context_.machine.ops.rms_norm(step.row(x_, i), norm_.weight.data(), norm_.eps, 1, n, step.row(out_, i));
          }
        });
  }

 private:
  Context& context_;
  Value x_;
  Norm norm_;
  Value out_;
};

class AddNorm final : public Op {
 public:
  AddNorm(Context& context, Value x, Value delta, Norm norm, Value total, Value out)
      : context_(context), x_(x), delta_(delta), norm_(std::move(norm)), total_(total), out_(out) {
    require_equal("add_norm", static_cast<std::int64_t>(norm_.weight.size()), x.dim);
    for (Value v : {delta, total, out}) require_equal("add_norm", v.dim, x.dim);
  }

  void run(const Step& step) override {
    const std::int64_t n = x_.dim;
    const VectorOps& ops = context_.machine.ops;
    context_.machine.pool.run_ranges(
        step.rows(x_), std::max<std::int64_t>(1, grain_values / n), [&](auto begin, auto end, int) {
          for (auto i = begin; i < end; ++i) {
            float* total = step.row(total_, i);
            ops.add(step.row(x_, i), step.row(delta_, i), n, total);
            ops.rms_norm(total, norm_.weight.data(), norm_.eps, 1, n, step.row(out_, i));
          }
        });
  }

 private:
  Context& context_;
  Value x_, delta_;
  Norm norm_;
  Value total_, out_;
};

}  // namespace

std::unique_ptr<Op> make_rms_norm(Context& context, Value x, Norm norm, Value out) {
  return std::make_unique<RmsNorm>(context, x, std::move(norm), out);
}

std::unique_ptr<Op> make_add_norm(Context& context, Value x, Value delta, Norm norm, Value total, Value out) {
  return std::make_unique<AddNorm>(context, x, delta, std::move(norm), total, out);
}

}  // namespace mixbit
