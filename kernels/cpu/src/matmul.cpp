#include "matmul.h"

#include <algorithm>
#include <utility>

#include "bf16.h"
#include "int8.h"
#include "kernels.h"

namespace mixbit {
namespace {

// A group of activations is rounded twice if the square of its peak is more than this multiple of the row's mean: the
// few that make most of the error (bench/LEDGER.md). Routers' always: other experts are another model.
constexpr float spread_of(Precision precision) { return precision == Precision::fine ? 0.0f : 1.2f; }

constexpr std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

const Kernels& kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2: return avx2_kernels;
    case Isa::avx512:
    case Isa::amx: return avx512_kernels;
#elif defined(__aarch64__)
    case Isa::neon: return neon_kernels;
#endif
    default: return portable_kernels;
  }
}

const Int8Kernels& int8_kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2: return avx2_int8;
    case Isa::avx512:
    case Isa::amx: return avx512_int8;
#elif defined(__aarch64__)
    case Isa::neon: return neon_int8;
#endif
    default: return portable_int8;
  }
}

// Null: none.
const Bf16Kernels* bf16_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::amx) return &amx_bf16;
#endif
  return nullptr;
}

// Where so many rows meet each weight they are faster: what they do for a weight, int8 does for each row.
constexpr std::int64_t bf16_least = 8;

// What an unpacking needs; a product needs more.
ProductArgs matrix_args(const Matrix& w) {
  ProductArgs args{};
  args.weight = w.weight, args.scales = w.scales, args.biases = w.biases;
  args.dtype = w.dtype, args.bits = w.bits;
  args.group_size = w.group_size, args.groups = w.groups();
  args.cols = w.cols, args.row_bytes = w.row_bytes();
  return args;
}

}  // namespace

// Strides are odd multiples of a cache line or so: rows that lie a power of two apart would all fall
// into the same few sets of a cache.
void Activations::serve(const Matrix& w) {
  if (!w.rounds_inputs()) {
    if (exact_) return;
    const std::int64_t part = round_up(max_dim_, 512) / 32;  // room for the sums of groups of 32
    exact_ = {round_up(max_dim_, 32) + 16, round_up(2 * part + 32, 16), {}, {}};
    exact_->values = Buffer<float>(max_rows_ * exact_->stride);
    exact_->sums = Buffer<float>(max_rows_ * exact_->sum_stride);
    return;
  }
  if (bf16_kernels(isa_) != nullptr) serve_bf16(interleaved(w.bits), w.precision == Precision::fine);
  if (int8_for(w)) return;
  const std::int64_t codes = round_up(max_dim_, 128), groups = round_up(codes / w.group_size, 16);
  Int8 form{w.group_size, interleaved(w.bits), spread_of(w.precision), 0, 0, 0, 0, 0, 0, {}};
  form.factors = codes;
  form.sums = form.factors + 4 * groups;
  form.rest = form.sums + 4 * groups;
  form.rest_factors = form.rest + codes;
  form.mask = form.rest_factors + 4 * groups;
  form.stride = (form.mask + round_up(groups, 64) / 8) / 128 * 128 + 192;
  form.rows = Buffer<std::byte>(max_rows_ * form.stride);
  int8_.push_back(std::move(form));
}

void Activations::serve_bf16(bool interleaved, bool fine) {
  const auto form = std::find_if(bf16_.begin(), bf16_.end(), [=](const Bf16& each) { return each.interleaved == interleaved; });
  if (form != bf16_.end() && form->fine >= fine) return;
  const std::int64_t planes = fine ? 2 : 1, rest = 2 * round_up(max_dim_, 64), stride = (planes * rest) / 128 * 128 + 192;
  static_assert(together == panel_rows);
  Bf16 made{interleaved, fine, rest, stride, planes * rest * panel_rows, {}, {}};
  made.rows = Buffer<std::byte>(max_rows_ * stride);
  made.panels = Buffer<std::byte>(round_up(max_rows_, panel_rows) / panel_rows * made.panel_stride);
  if (form == bf16_.end()) bf16_.push_back(std::move(made));
  else *form = std::move(made);
}

const Activations::Bf16& Activations::bf16_for(const Matrix& w) const {
  return bf16_.front().interleaved == interleaved(w.bits) ? bf16_.front() : bf16_.back();
}

Activations::Int8* Activations::int8_for(const Matrix& w) {
  const auto found = std::find_if(int8_.begin(), int8_.end(), [&](const Int8& form) {
    return form.group_size == w.group_size && form.interleaved == interleaved(w.bits) &&
           form.spread == spread_of(w.precision);
  });
  return found == int8_.end() ? nullptr : &*found;
}

std::int64_t Activations::bytes() const {
  std::int64_t bytes = exact_ ? (exact_->values.size() + exact_->sums.size()) * std::int64_t{sizeof(float)} : 0;
  for (const Int8& form : int8_) bytes += form.rows.size();
  for (const Bf16& form : bf16_) bytes += form.rows.size() + form.panels.size();
  return bytes;
}

void Activations::begin(std::int64_t meeting, bool in_order) {
  many_ = !bf16_.empty() && meeting >= bf16_least;
  in_order_ = in_order;
}

std::int64_t Activations::grain(std::int64_t wanted) const {
  return round_up(std::max<std::int64_t>(1, wanted), many_ ? panel_rows : 1);
}

void Activations::prepare(std::int64_t row, const float* x, std::int64_t dim) {
  if (exact_) prepare_exact(row, x, dim);
  if (many_) {
    for (const Bf16& form : bf16_) {
      std::byte* to = form.rows.data() + row * form.stride;
      bf16_kernels(isa_)->narrow(x, dim, form.interleaved, to, form.fine ? to + form.rest : nullptr);
    }
    return;
  }
  for (const Int8& form : int8_) prepare_int8(form, row, x, dim);
}

void Activations::line_up(std::int64_t begin, std::int64_t end, std::int64_t dim) {
  if (!many_) return;
  for (const Bf16& form : bf16_) {
    for (std::int64_t row = begin; row < end; row += panel_rows) {
      std::byte* panel = form.panels.data() + row / panel_rows * form.panel_stride;
      const std::byte* from = form.rows.data() + row * form.stride;
      for (int plane = 0; plane <= form.fine; ++plane)
        bf16_kernels(isa_)->turn(from + plane * form.rest, form.stride, std::min(panel_rows, end - row), dim,
                                 panel + plane * panel_rows * form.rest);
    }
  }
}

void Activations::prepare_int8(const Int8& form, std::int64_t row, const float* x, std::int64_t dim) {
  std::byte* to = form.rows.data() + row * form.stride;
  const auto floats = [&](std::int64_t offset) { return reinterpret_cast<float*>(to + offset); };
  int8_kernels(isa_).quantize({x, dim, form.group_size, form.interleaved, form.spread, to, floats(form.factors),
                              floats(form.sums), to + form.rest, floats(form.rest_factors),
                              reinterpret_cast<std::uint64_t*>(to + form.mask)});
}

// Parts of size n/32, n/64 and n/128, each rounded up to 16.
std::int64_t Activations::Exact::sum_offset(int group_size) const {
  const std::int64_t part = sum_stride / 2 - 16;
  if (group_size <= 32) return 0;
  return group_size == 64 ? part : part + round_up(part / 2, 16);
}

void Activations::prepare_exact(std::int64_t row, const float* x, std::int64_t dim) {
  float* values = exact_->values.data() + row * exact_->stride;
  const std::int64_t padded = round_up(dim, 32);
  std::copy_n(x, dim, values);
  std::fill(values + dim, values + padded, 0.0f);

  float* sums = exact_->sums.data() + row * exact_->sum_stride;
  std::fill_n(sums, exact_->sum_stride, 0.0f);
  float* of64 = sums + exact_->sum_offset(64);
  float* of128 = sums + exact_->sum_offset(128);
  for (std::int64_t g = 0; g < padded / 32; ++g) {
    const float* v = values + g * 32;
    float lanes[8] = {};
    for (int i = 0; i < 32; i += 8)
      for (int j = 0; j < 8; ++j) lanes[j] += v[i + j];
    const float sum = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
    sums[g] = sum;
    of64[g / 2] += sum;
    of128[g / 4] += sum;
  }
}

void matmul_rows(const Matrix& w, const Activations& x, const std::int32_t* index,
                 std::int64_t count, std::int64_t row_begin, std::int64_t row_end, float* y,
                 std::int64_t y_stride, const std::byte* next) {
  if (count <= 0 || row_begin >= row_end) return;
  ProductArgs product = matrix_args(w);
  product.index = index, product.count = count;
  product.row_begin = row_begin, product.row_end = row_end;
  product.y = y, product.y_stride = y_stride;
  product.next = next != nullptr ? next : w.row(row_end);
  const auto take = [&](const std::byte* rows, std::int64_t stride) { product.x = rows, product.x_stride = stride; };
  if (!w.rounds_inputs()) {
    const Activations::Exact& form = *x.exact_;
    take(reinterpret_cast<const std::byte*>(form.values.data()), form.stride * std::int64_t{sizeof(float)});
    kernels(x.isa_).matmul({product, form.sums.data() + form.sum_offset(w.group_size), form.sum_stride});
  } else if (x.many_) {
    const Activations::Bf16& form = x.bf16_for(w);
    take(form.rows.data(), form.stride);
    bf16_kernels(x.isa_)->matmul({product, x.in_order_ ? form.panels.data() : nullptr, form.panel_stride, form.rest,
                                  w.precision == Precision::fine});
  } else {
    const Activations::Int8& form = *x.int8_for(w);
    take(form.rows.data(), form.stride);
    int8_kernels(x.isa_).matmul({product, form.factors, form.sums, form.rest, form.rest_factors, form.mask});
  }
}

std::int64_t preferred_tile(const Matrix& w, std::int64_t count) {
  const bool rounded = w.rounds_inputs();
  const std::int64_t row_step = rounded && count >= 32 ? 32 : 16;  // rows the kernels unpack together
  // From four on, each call does some work of its own: int8 kernels go over all rows of x first, others load tile registers.
  const std::int64_t least = !rounded || count < 4 ? row_step : 192;
  constexpr std::int64_t work = 1 << 18;  // multiplications; some ten microseconds of one core
  const std::int64_t per_row = std::max<std::int64_t>(1, w.cols * std::max<std::int64_t>(count, 1));
  return std::clamp(round_up(work / per_row, row_step), least, std::int64_t{256});
}

void unpack_row(const Matrix& w, std::int64_t row, float* out) {
  kernels(best_isa()).unpack_row(matrix_args(w), row, out);
}

}  // namespace mixbit
