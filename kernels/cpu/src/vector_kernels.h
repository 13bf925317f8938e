// The functions of VectorOps, but for attention and the delta rule. Included once for each instruction set (see vector_math.h).
#pragma once

#include "vector_attention.h"
#include "vector_delta.h"
#include "vector_math.h"
#include "vector_ops.h"

namespace mixbit {
namespace {

void rms_norm(const float* x, const float* weight, float eps, float factor, std::int64_t n, float* y) {
  Vec squares[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    for (int j = 0; j < 4; ++j) {
      Vec v = load(x + i + j * lanes);
      squares[j] += v * v;
    }
  }
  for (; i < n; i += lanes) {
    Vec v = i + lanes <= n ? load(x + i) : load_part(x + i, n - i);
    squares[0] += v * v;
  }
  float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(n);
  float scale = factor / __builtin_sqrtf(mean + eps);
  if (weight == nullptr) {
    map(n, y, [=](Vec v) { return v * scale; }, x);
  } else {
    map(n, y, [=](Vec v, Vec w) { return v * scale * w; }, x, weight);
  }
}

void add(const float* a, const float* b, std::int64_t n, float* y) {
  map(n, y, [](Vec u, Vec v) { return u + v; }, a, b);
}

void axpy(float a, const float* x, std::int64_t n, float* y) {
  map(n, y, [=](Vec u, Vec v) { return u * a + v; }, x, static_cast<const float*>(y));
}

void scale(float a, std::int64_t n, float* y) {
  map(n, y, [=](Vec v) { return v * a; }, static_cast<const float*>(y));
}

void silu_mul(const float* gate, const float* up, std::int64_t n, float* y) {
  map(n, y, [](Vec g, Vec u) { return g * sigmoid(g) * u; }, gate, up);
}

void sigmoid_mul(const float* gate, const float* x, float factor, std::int64_t n, float* y) {
  map(n, y, [=](Vec g, Vec v) { return v * factor * sigmoid(g); }, gate, x);
}

float softmax(const float* x, std::int64_t n, float* y) {
  Vec peaks = splat(x[0]);
  each(
      n, [&](std::int64_t i) { peaks = max(peaks, load(x + i)); },
      [&](std::int64_t i, std::int64_t m) {
        for (; m > 0; --m, ++i) peaks[0] = x[i] > peaks[0] ? x[i] : peaks[0];
      });
  const float peak = largest(peaks);
  Vec totals = {};
  each(
      n,
      [&](std::int64_t i) {
        Vec e = exp(load(x + i) - peak);
        totals += e;
        store(y + i, e);
      },
      [&](std::int64_t i, std::int64_t m) {
        Vec e = exp(load_part(x + i, m) - peak);
        store_part(y + i, e, m);
        for (std::int64_t j = 0; j < m; ++j) totals[j] += e[j];
      });
  return sum(totals);
}

void conv_silu(const float* const* inputs, const float* weights, std::int64_t stride, std::int64_t taps,
               std::int64_t n, float* y) {
  auto finish = [](Vec v) { return v * sigmoid(v); };
  each(
      n,
      [&](std::int64_t i) {
        Vec total = {};
        for (std::int64_t j = 0; j < taps; ++j) total += load(inputs[j] + i) * load(weights + j * stride + i);
        store(y + i, finish(total));
      },
      [&](std::int64_t i, std::int64_t m) {
        Vec total = {};
        for (std::int64_t j = 0; j < taps; ++j) {
          total += load_part(inputs[j] + i, m) * load_part(weights + j * stride + i, m);
        }
        store_part(y + i, finish(total), m);
      });
}

void rotate(const float* cos, const float* sin, std::int64_t half, float* x) {
  float* first = x;
  float* second = x + half;
  auto turn = [](Vec& a, Vec& b, Vec c, Vec s) {
    Vec turned = a * c - b * s;
    b = b * c + a * s;
    a = turned;
  };
  each(
      half,
      [&](std::int64_t i) {
        Vec a = load(first + i), b = load(second + i);
        turn(a, b, load(cos + i), load(sin + i));
        store(first + i, a);
        store(second + i, b);
      },
      [&](std::int64_t i, std::int64_t m) {
        Vec a = load_part(first + i, m), b = load_part(second + i, m);
        turn(a, b, load_part(cos + i, m), load_part(sin + i, m));
        store_part(first + i, a, m);
        store_part(second + i, b, m);
      });
}

constexpr VectorOps table{rms_norm, add,       axpy,   scale,  silu_mul, sigmoid_mul,
                          softmax,  conv_silu, rotate, narrow, attend<Floats>, pack_lefts, attend<Bfloat16s>, delta_keys, delta};

}  // namespace
}  // namespace mixbit
