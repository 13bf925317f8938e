// The kernels, written once over the vector type `V` that the including isa_*.cpp defines before:
//
//   width, tokens        floats in a Reg; tokens that the micro-kernel takes at a time
//   zero set1 load store fma(a, b, c) = a * b + c
//   from_f16 from_bf16   `width` halves at any address
//   codes<bits>(p, i)    codes [i * width, (i + 1) * width) of the 32 at p, as floats; touches 4 * bits bytes
//   sum, sum4            over the lanes of one register, of four
//
// Everything is in an anonymous namespace: see kernels.h.
#include <cstring>

#include "kernels.h"

namespace mixbit {
namespace {

using Reg = V::Reg;
using Bytes = const std::byte*;
using Int = std::int64_t;

constexpr int chunk = 32;                          // columns: the smallest group
constexpr int chunk_regs = chunk / V::width;       // registers they fill
constexpr int block = 64;                          // groups whose scales are converted at a time
constexpr int micro_rows = 4, micro_tokens = V::tokens;
constexpr int tile_rows = 16, tile_cols = 512;     // unpacked weights that stay in the first-level cache
constexpr int tile_stride = tile_cols + 16;

constexpr Int smaller(Int a, Int b) { return a < b ? a : b; }

// ---- How 32 columns lie in a row ----

template <int bits>
struct Affine {
  static constexpr int bytes = 4 * bits;
  static Reg load(Bytes p, int i) { return V::codes<bits>(p, i); }
};

template <DType type>
struct Dense {
  static constexpr int bytes = type == DType::f32 ? 128 : 64;
  static Reg load(Bytes p, int i) {
    p += i * (bytes / chunk_regs);
    if constexpr (type == DType::f32) return V::load(reinterpret_cast<const float*>(p));
    else if constexpr (type == DType::f16) return V::from_f16(p);
    else return V::from_bf16(p);
  }
};

// Calls fn with the type that describes the weight of `args`.
template <class Fn>
void with_layout(const ProductArgs& args, Fn fn) {
  switch (args.bits) {
    case 1: return fn(Affine<1>{});
    case 2: return fn(Affine<2>{});
    case 3: return fn(Affine<3>{});
    case 4: return fn(Affine<4>{});
    case 5: return fn(Affine<5>{});
    case 6: return fn(Affine<6>{});
    case 8: return fn(Affine<8>{});
    default: break;
  }
  switch (args.dtype) {
    case DType::f32: return fn(Dense<DType::f32>{});
    case DType::f16: return fn(Dense<DType::f16>{});
    case DType::bf16: return fn(Dense<DType::bf16>{});
  }
}

// ---- Scales and biases ----

template <DType type>
void convert(Bytes src, int count, float* out) {
  constexpr int size = Dense<type>::bytes / chunk;
  auto one = [](Bytes p) { return Dense<type>::load(p, 0); };
  int i = 0;
  for (; i + V::width <= count; i += V::width) V::store(out + i, one(src + i * size));
  if (i < count) {
    alignas(64) std::byte rest[V::width * size] = {};
    std::memcpy(rest, src + i * size, static_cast<std::size_t>((count - i) * size));
    V::store(out + i, one(rest));
  }
}

// out[0 : count] = values [first, first + count) of one row of scales or biases, zero up to a whole register.
void load_scales(const ProductArgs& args, Bytes base, Int row, Int first, int count, float* out) {
  const Int at = row * args.groups + first;
  switch (args.dtype) {
    case DType::f32: return convert<DType::f32>(base + at * 4, count, out);
    case DType::f16: return convert<DType::f16>(base + at * 2, count, out);
    case DType::bf16: return convert<DType::bf16>(base + at * 2, count, out);
  }
}

// Of the i-th of `count` rows of x.
Int token(const ProductArgs& args, Int i) { return args.index != nullptr ? args.index[i] : i; }
const float* values(const ProductArgs& args, Int i) {
  return reinterpret_cast<const float*>(args.x + token(args, i) * args.x_stride);
}

// ---- Up to four tokens: R rows times T tokens, weights go from code to product in registers ----

template <int R, int T>
struct Sums {
  Reg at[R][T];
  void clear() {
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) at[r][t] = V::zero();
  }
};

template <class Layout, int R, int T>
inline void dot_chunk(const Bytes (&w)[R], const float* const (&x)[T], Int column, Sums<R, T>& sums) {
  for (int i = 0; i < chunk_regs; ++i) {
    Reg values[T];
    for (int t = 0; t < T; ++t) values[t] = V::load(x[t] + column + i * V::width);
    for (int r = 0; r < R; ++r) {
      const Reg weight = Layout::load(w[r], i);
      for (int t = 0; t < T; ++t) sums.at[r][t] = V::fma(weight, values[t], sums.at[r][t]);
    }
  }
}

// sum((s * q + b) * x) = s * sum(q * x) + b * sum(x) for each group.
template <int bits, int R, int T>
void dot(Affine<bits>, const MatmulArgs& args, const Bytes (&rows)[R], Int row, const float* const (&x)[T],
         const float* const (&x_sums)[T], Sums<R, T>& total) {
  using Layout = Affine<bits>;
  alignas(64) float scales[R][block], biases[block];
  Bytes w[R];
  for (int r = 0; r < R; ++r) w[r] = rows[r];
  Int column = 0;
  for (Int first = 0; first < args.groups; first += block) {
    const int count = static_cast<int>(smaller(block, args.groups - first));
    for (int r = 0; r < R; ++r) {
      load_scales(args, args.scales, row + r, first, count, scales[r]);
      load_scales(args, args.biases, row + r, first, count, biases);
      for (int g = 0; g < count; g += V::width)
        for (int t = 0; t < T; ++t)
          total.at[r][t] = V::fma(V::load(biases + g), V::load(x_sums[t] + first + g), total.at[r][t]);
    }
    for (int g = 0; g < count; ++g) {
      Sums<R, T> group;
      group.clear();
      for (const Int end = column + args.group_size; column < end; column += chunk) {
        dot_chunk<Layout>(w, x, column, group);
        for (int r = 0; r < R; ++r) w[r] += Layout::bytes;
      }
      for (int r = 0; r < R; ++r) __builtin_prefetch(w[r] + R * args.row_bytes);  // the rows after these
      for (int r = 0; r < R; ++r) {
        const Reg scale = V::set1(scales[r][g]);
        for (int t = 0; t < T; ++t) total.at[r][t] = V::fma(scale, group.at[r][t], total.at[r][t]);
      }
    }
  }
}

template <DType type, int R, int T>
void dot(Dense<type>, const MatmulArgs& args, const Bytes (&rows)[R], Int, const float* const (&x)[T],
         const float* const (&)[T], Sums<R, T>& total) {
  using Layout = Dense<type>;
  Bytes w[R];
  for (int r = 0; r < R; ++r) w[r] = rows[r];
  Int column = 0;
  for (; column + chunk <= args.cols; column += chunk) {
    dot_chunk<Layout>(w, x, column, total);
    for (int r = 0; r < R; ++r) w[r] += Layout::bytes;
  }
  if (column < args.cols) {
    alignas(64) std::byte rest[R][Layout::bytes] = {};
    for (int r = 0; r < R; ++r) {
      std::memcpy(rest[r], w[r], static_cast<std::size_t>((args.cols - column) * (Layout::bytes / chunk)));
      w[r] = rest[r];
    }
    dot_chunk<Layout>(w, x, column, total);
  }
}

template <class Layout, int R, int T>
void few_rows(const MatmulArgs& args, Int row) {
  Bytes rows[R];
  for (int r = 0; r < R; ++r) rows[r] = args.weight + (row + r) * args.row_bytes;
  const float *x[T], *x_sums[T];
  for (int t = 0; t < T; ++t) {
    const Int i = t < args.count ? t : 0;
    x[t] = values(args, i);
    x_sums[t] = args.sums + token(args, i) * args.sum_stride;
  }
  Sums<R, T> total;
  total.clear();
  dot(Layout{}, args, rows, row, x, x_sums, total);
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T && t < args.count; ++t) args.y[t * args.y_stride + row + r] = V::sum(total.at[r][t]);
}

template <class Layout, int R, int T>
void few(const MatmulArgs& args) {
  Int row = args.row_begin;
  for (; row + R <= args.row_end; row += R) few_rows<Layout, R, T>(args, row);
  for (; row < args.row_end; ++row) few_rows<Layout, 1, T>(args, row);
}

// ---- Many tokens: unpack a tile of weights, multiply it with every token ----

template <int bits>
void unpack(Affine<bits>, const ProductArgs& args, Int row, Int first, Int count, float* out) {
  using Layout = Affine<bits>;
  alignas(64) float scales[block], biases[block];
  static_assert(tile_cols / chunk <= block);
  const int groups = static_cast<int>(count / args.group_size);
  load_scales(args, args.scales, row, first / args.group_size, groups, scales);
  load_scales(args, args.biases, row, first / args.group_size, groups, biases);
  Bytes w = args.weight + row * args.row_bytes + first / chunk * Layout::bytes;
  for (int g = 0; g < groups; ++g) {
    const Reg scale = V::set1(scales[g]), bias = V::set1(biases[g]);
    for (const float* end = out + args.group_size; out != end; out += chunk, w += Layout::bytes)
      for (int i = 0; i < chunk_regs; ++i) V::store(out + i * V::width, V::fma(scale, Layout::load(w, i), bias));
  }
}

template <DType type>
void unpack(Dense<type>, const ProductArgs& args, Int row, Int first, Int count, float* out) {
  using Layout = Dense<type>;
  constexpr int size = Layout::bytes / chunk;
  Bytes w = args.weight + row * args.row_bytes + first * size;
  alignas(64) std::byte rest[Layout::bytes] = {};
  for (Int left = count; left > 0; left -= chunk, w += Layout::bytes, out += chunk) {
    if (left < chunk) {
      std::memcpy(rest, w, static_cast<std::size_t>(left * size));
      w = rest;
    }
    for (int i = 0; i < chunk_regs; ++i) V::store(out + i * V::width, Layout::load(w, i));
  }
}

// sums[r][t] = dot(w row r, x token t) over `count` columns, a multiple of 32.
inline void micro(const float* w, const float* const (&x)[micro_tokens], Int count,
                  float (&sums)[micro_tokens][micro_rows]) {
  Reg acc[micro_rows][micro_tokens];
  for (int r = 0; r < micro_rows; ++r)
    for (int t = 0; t < micro_tokens; ++t) acc[r][t] = V::zero();
  for (Int k = 0; k < count; k += V::width) {
    Reg values[micro_tokens];
    for (int t = 0; t < micro_tokens; ++t) values[t] = V::load(x[t] + k);
    for (int r = 0; r < micro_rows; ++r) {
      const Reg weight = V::load(w + r * tile_stride + k);
      for (int t = 0; t < micro_tokens; ++t) acc[r][t] = V::fma(weight, values[t], acc[r][t]);
    }
  }
  for (int t = 0; t < micro_tokens; ++t) V::sum4(acc[0][t], acc[1][t], acc[2][t], acc[3][t], sums[t]);
}

// y (+)= tile * x for columns [first, first + count) of x; `count` is a multiple of 32.
void multiply_tile(const MatmulArgs& args, const float* tile, Int row, int rows, Int first, Int count) {
  for (Int i = 0; i < args.count; i += micro_tokens) {
    const int tokens = static_cast<int>(smaller(micro_tokens, args.count - i));
    const float* x[micro_tokens];
    for (int t = 0; t < micro_tokens; ++t) x[t] = values(args, i + (t < tokens ? t : 0)) + first;
    for (int r = 0; r < rows; r += micro_rows) {
      alignas(64) float sums[micro_tokens][micro_rows];
      micro(tile + r * tile_stride, x, count, sums);
      const int valid = static_cast<int>(smaller(micro_rows, rows - r));
      for (int t = 0; t < tokens; ++t) {
        float* y = args.y + (i + t) * args.y_stride + row + r;
        for (int j = 0; j < valid; ++j) y[j] = first == 0 ? sums[t][j] : y[j] + sums[t][j];
      }
    }
  }
}

template <class Layout>
void many(const MatmulArgs& args) {
  alignas(64) float tile[tile_rows * tile_stride] = {};
  for (Int row = args.row_begin; row < args.row_end; row += tile_rows) {
    const int rows = static_cast<int>(smaller(tile_rows, args.row_end - row));
    Int first = 0;
    do {  // a matrix without columns still gives zeros
      const Int count = smaller(tile_cols, args.cols - first);
      for (int r = 0; r < rows; ++r) unpack(Layout{}, args, row + r, first, count, tile + r * tile_stride);
      multiply_tile(args, tile, row, rows, first, (count + chunk - 1) / chunk * chunk);
      first += tile_cols;
    } while (first < args.cols);
  }
}

// ---- Entry points ----

void matmul(const MatmulArgs& args) {
  with_layout(args, [&](auto layout) {
    using Layout = decltype(layout);
    switch (args.count) {
      case 1: return few<Layout, 4, 1>(args);
      case 2: return few<Layout, 2, 2>(args);
      case 3:
      case 4: return few<Layout, 1, 4>(args);
      default: return many<Layout>(args);
    }
  });
}

void unpack_row(const ProductArgs& args, Int row, float* out) {
  with_layout(args, [&](auto layout) {
    alignas(64) float columns[tile_cols];
    for (Int first = 0; first < args.cols; first += tile_cols) {
      const Int count = smaller(tile_cols, args.cols - first);
      unpack(layout, args, row, first, count, columns);
      std::memcpy(out + first, columns, static_cast<std::size_t>(count) * sizeof(float));
    }
  });
}

}  // namespace
}  // namespace mixbit
