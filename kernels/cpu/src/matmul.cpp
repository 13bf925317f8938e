#include "matmul.h"

#include <algorithm>
#include <new>

#include "kernels.h"

namespace mixbit {
namespace {

constexpr std::align_val_t cache_line{64};

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

}  // namespace

void Activations::Free::operator()(float* p) const { ::operator delete[](p, cache_line); }

Activations::Buffer Activations::allocate(std::int64_t size) {
  const auto bytes = static_cast<std::size_t>(size) * sizeof(float);
  Buffer buffer(static_cast<float*>(::operator new[](bytes, cache_line)));
  std::fill_n(buffer.get(), size, 0.0f);
  return buffer;
}

// Strides are odd multiples of a cache line or so: rows that lie a power of two apart would all fall
// into the same few sets of a cache.
Activations::Activations(std::int64_t max_rows, std::int64_t max_dim)
    : value_stride_(round_up(max_dim, 32) + 16),
      sum_part_(round_up(max_dim, 512) / 32),
      sum_stride_(round_up(2 * sum_part_ + 32, 16)),
      values_(allocate(max_rows * value_stride_)),
      sums_(allocate(max_rows * sum_stride_)) {}

// Parts of size n/32, n/64 and n/128, each rounded up to 16.
std::int64_t Activations::sum_offset(int group_size) const {
  if (group_size <= 32) return 0;
  const std::int64_t second = sum_part_ + round_up(sum_part_ / 2, 16);
  return group_size == 64 ? sum_part_ : second;
}

void Activations::prepare(Isa, std::int64_t row, const float* x, std::int64_t dim) {
  float* values = values_.get() + row * value_stride_;
  const std::int64_t padded = round_up(dim, 32);
  std::copy_n(x, dim, values);
  std::fill(values + dim, values + padded, 0.0f);

  float* sums = sums_.get() + row * sum_stride_;
  std::fill_n(sums, sum_stride_, 0.0f);
  float* of64 = sums + sum_offset(64);
  float* of128 = sums + sum_offset(128);
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
  MatmulArgs args = weight_args(w);
  args.x = x.values(0);
  args.x_stride = x.value_stride();
  args.sums = x.sums(0, w.group_size);
  args.sum_stride = x.sum_stride();
  args.index = index;
  args.count = count;
  args.row_begin = row_begin;
  args.row_end = row_end;
  args.y = y;
  args.y_stride = y_stride;
  kernels(isa).matmul(args);
}

std::int64_t preferred_tile(const Matrix& w, std::int64_t count) {
  constexpr std::int64_t row_step = 16;  // rows the kernels unpack together
  constexpr std::int64_t work = 1 << 18;  // multiplications; some ten microseconds of one core
  const std::int64_t per_row = std::max<std::int64_t>(1, w.cols * std::max<std::int64_t>(count, 1));
  return std::clamp(round_up(work / per_row, row_step), row_step, std::int64_t{256});
}

void unpack_row(const Matrix& w, std::int64_t row, float* out) {
  kernels(best_isa()).unpack_row(weight_args(w), row, out);
}

}  // namespace mixbit
