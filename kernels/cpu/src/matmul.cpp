#include "matmul.h"

#include <algorithm>

#include "int8.h"
#include "kernels.h"

namespace mixbit {
namespace {

constexpr std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

const Kernels& kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2: return avx2_kernels;
    case Isa::avx512: return avx512_kernels;
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
    case Isa::avx512: return avx512_int8;
#elif defined(__aarch64__)
    case Isa::neon: return neon_int8;
#endif
    default: return portable_int8;
  }
}

MatmulArgs weight_args(const Matrix& w) {
  MatmulArgs args{};
  args.weight = w.weight;
  args.scales = w.scales;
  args.biases = w.biases;
  args.dtype = w.dtype;
  args.bits = w.bits;
  args.group_size = w.group_size;
  args.groups = w.groups();
  args.cols = w.cols;
  args.row_bytes = w.row_bytes();
  return args;
}

// Each row of x is two: its codes and those of its rest. The products of both are added.
void fine_matmul(const Int8Kernels& kernels, Int8Args args) {
  thread_local std::vector<float> sums;
  thread_local std::vector<std::int32_t> rows;
  const std::int64_t width = args.row_end - args.row_begin, count = args.count, y_stride = args.y_stride;
  float* y = args.y;
  sums.resize(static_cast<std::size_t>(2 * count * width));
  if (args.index) {
    rows.resize(static_cast<std::size_t>(2 * count));
    for (std::int64_t i = 0; i < 2 * count; ++i)
      rows[static_cast<std::size_t>(i)] = 2 * args.index[i / 2] + static_cast<std::int32_t>(i % 2);
    args.index = rows.data();
  }
  args.count = 2 * count;
  args.y = sums.data() - args.row_begin;
  args.y_stride = width;
  kernels.matmul(args);
  for (std::int64_t i = 0; i < count; ++i) {
    const float* of_codes = sums.data() + 2 * i * width;
    for (std::int64_t r = 0; r < width; ++r) y[i * y_stride + args.row_begin + r] = of_codes[r] + of_codes[width + r];
  }
}

}  // namespace

// Strides are odd multiples of a cache line or so: rows that lie a power of two apart would all fall
// into the same few sets of a cache.
void Activations::serve(const Matrix& w) {
  if (!w.takes_int8()) {
    if (exact_) return;
    const std::int64_t part = round_up(max_dim_, 512) / 32;  // room for the sums of groups of 32
    exact_ = {round_up(max_dim_, 32) + 16, round_up(2 * part + 32, 16), {}, {}};
    exact_->values = Buffer<float>(max_rows_ * exact_->stride);
    exact_->sums = Buffer<float>(max_rows_ * exact_->sum_stride);
    return;
  }
  const bool rest = w.precision == Precision::fine;
  if (Int8* form = int8_for(w)) {
    if (rest && !form->rest) form->rest = true, form->rows = Buffer<std::byte>(max_rows_ * form->row_bytes());
    return;
  }
  const std::int64_t codes = round_up(max_dim_, 128), groups = round_up(codes / w.group_size, 16);
  const std::int64_t bytes = codes + 8 * groups;
  int8_.push_back({w.group_size, interleaved(w.bits), rest, codes, codes + 4 * groups, bytes / 128 * 128 + 192, {}});
  int8_.back().rows = Buffer<std::byte>(max_rows_ * int8_.back().row_bytes());
}

Activations::Int8* Activations::int8_for(const Matrix& w) {
  const auto found = std::find_if(int8_.begin(), int8_.end(), [&](const Int8& form) {
    return form.group_size == w.group_size && form.interleaved == interleaved(w.bits);
  });
  return found == int8_.end() ? nullptr : &*found;
}

std::int64_t Activations::bytes() const {
  std::int64_t bytes = exact_ ? (exact_->values.size() + exact_->sums.size()) * std::int64_t{sizeof(float)} : 0;
  for (const Int8& form : int8_) bytes += form.rows.size();
  return bytes;
}

void Activations::prepare(Isa isa, std::int64_t row, const float* x, std::int64_t dim) {
  if (exact_) prepare_exact(row, x, dim);
  for (const Int8& form : int8_) prepare_int8(form, isa, row, x, dim);
}

void Activations::prepare_int8(const Int8& form, Isa isa, std::int64_t row, const float* x, std::int64_t dim) {
  thread_local std::vector<float> rest;
  if (form.rest) rest.resize(static_cast<std::size_t>(dim));
  const auto quantize = [&](const float* from, std::byte* to, float* left) {
    int8_kernels(isa).quantize({from, dim, form.group_size, form.interleaved, to,
                                reinterpret_cast<float*>(to + form.factors), reinterpret_cast<float*>(to + form.sums),
                                left});
  };
  std::byte* to = form.rows.data() + row * form.row_bytes();
  quantize(x, to, form.rest ? rest.data() : nullptr);
  if (form.rest) quantize(rest.data(), to + form.stride, nullptr);
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

void matmul_rows(Isa isa, const Matrix& w, const Activations& x, const std::int32_t* index,
                 std::int64_t count, std::int64_t row_begin, std::int64_t row_end, float* y,
                 std::int64_t y_stride) {
  if (count <= 0 || row_begin >= row_end) return;
  if (w.takes_int8()) {
    const Activations::Int8& form = *x.int8_for(w);
    Int8Args args{w.weight, w.scales, w.biases, w.dtype, w.bits, w.group_size, w.groups(), w.row_bytes(),
                  form.rows.data(), form.row_bytes(), form.factors, form.sums, index, count, row_begin, row_end,
                  y, y_stride};
    if (w.precision == Precision::fine) {
      args.x_stride = form.stride;
      fine_matmul(int8_kernels(isa), args);
    } else {
      int8_kernels(isa).matmul(args);
    }
    return;
  }
  MatmulArgs args = weight_args(w);
  const Activations::Exact& form = *x.exact_;
  args.x = form.values.data();
  args.x_stride = form.stride;
  args.sums = form.sums.data() + form.sum_offset(w.group_size);
  args.sum_stride = form.sum_stride;
  args.index = index;
  args.count = count;
  args.row_begin = row_begin;
  args.row_end = row_end;
  args.y = y;
  args.y_stride = y_stride;
  kernels(isa).matmul(args);
}

std::int64_t preferred_tile(const Matrix& w, std::int64_t count) {
  if (w.precision == Precision::fine) count *= 2;
  const std::int64_t row_step = w.takes_int8() && count >= 32 ? 32 : 16;  // rows the kernels unpack together
  constexpr std::int64_t work = 1 << 18;  // multiplications; some ten microseconds of one core
  const std::int64_t per_row = std::max<std::int64_t>(1, w.cols * std::max<std::int64_t>(count, 1));
  return std::clamp(round_up(work / per_row, row_step), row_step, std::int64_t{256});
}

void unpack_row(const Matrix& w, std::int64_t row, float* out) {
  kernels(best_isa()).unpack_row(weight_args(w), row, out);
}

}  // namespace mixbit
