// Rows of tables: embedding and the choice of rows for the head.
#include <cstring>

#include "checks.h"
#include "matmul.h"
#include "ops.h"

namespace mixbit {
namespace {

constexpr std::int64_t grain_values = 16384;  // a few microseconds of copying

std::int64_t grain(std::int64_t dim) { return std::max<std::int64_t>(1, grain_values / dim); }

class Embed final : public Op {
 public:
  Embed(Context& context, const Matrix& table, Value out) : context_(context), table_(table), out_(out) {
    require_equal("embed", table.cols, out.dim);
  }

  void run(const Step& step) override {
    context_.machine.pool.run_ranges(step.tokens, grain(out_.dim), [&](auto begin, auto end, int) {
      for (auto t = begin; t < end; ++t) unpack_row(table_, step.token_ids[t], step.row(out_, t));
    });
  }

 private:
  Context& context_;
  Matrix table_;
  Value out_;
};

class SelectRows final : public Op {
 public:
  SelectRows(Context& context, Value x, Value out) : context_(context), x_(x), out_(out) {
    require_equal("select_rows", out.dim, x.dim);
  }

  void run(const Step& step) override {
    context_.machine.pool.run_ranges(step.selected, grain(out_.dim), [&](auto begin, auto end, int) {
      for (auto i = begin; i < end; ++i) {
        std::memcpy(step.row(out_, i), step.row(x_, step.logit_rows[i]), static_cast<std::size_t>(x_.dim) * 4);
      }
    });
  }

 private:
  Context& context_;
  Value x_, out_;
};

}  // namespace

std::unique_ptr<Op> make_embed(Context& context, const Matrix& table, Value out) {
  return std::make_unique<Embed>(context, table, out);
}

std::unique_ptr<Op> make_select_rows(Context& context, Value x, Value out) {
  return std::make_unique<SelectRows>(context, x, out);
}

}  // namespace mixbit
