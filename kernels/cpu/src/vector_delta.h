// The gated delta rule of one head. Included once for each instruction set (see vector_math.h).
#pragma once

#include "vector_math.h"
#include "vector_ops.h"
#include "vector_product.h"

namespace mixbit {
namespace {

// Token by token, on `width` vectors of value columns. Before token t the state S holds what came before it,
// undecayed, and recalled = S k_t, asked = S q_t are known, so that with delta = beta (v - g recalled) the output
// (g S + k delta) q = g asked + (k.q) delta, and one pass over S both updates it and reads it for the next token.
template <int width>
void delta_columns(const DeltaRun& run, std::int64_t column) {
  float* state = run.state + column;
  Vec recalled[width] = {}, asked[width] = {};
  for (std::int64_t d = 0; d < run.key_dim; ++d) {
    for (int w = 0; w < width; ++w) {
      Vec s = load(state + d * run.value_stride + w * lanes);
      recalled[w] += s * run.k[d];
      asked[w] += s * run.q[d];
    }
  }
  for (std::int64_t t = 0; t < run.tokens; ++t) {
    const float* k = run.k + t * run.key_dim;
    const float* q = run.q + t * run.key_dim;
    const float g = run.decay[t];
    float kq = 0;
    for (std::int64_t d = 0; d < run.key_dim; ++d) kq += k[d] * q[d];
    Vec delta[width];
    for (int w = 0; w < width; ++w) {
      delta[w] = run.beta[t] * (load(run.v + t * run.v_stride + column + w * lanes) - g * recalled[w]);
      store(run.out + t * run.value_stride + column + w * lanes, g * asked[w] + kq * delta[w]);
      recalled[w] = asked[w] = Vec{};
    }
    if (t + 1 == run.tokens) {
      for (std::int64_t d = 0; d < run.key_dim; ++d) {
        for (int w = 0; w < width; ++w) {
          float* place = state + d * run.value_stride + w * lanes;
          store(place, load(place) * g + delta[w] * k[d]);
        }
      }
      return;
    }
    for (std::int64_t d = 0; d < run.key_dim; ++d) {
      for (int w = 0; w < width; ++w) {
        float* place = state + d * run.value_stride + w * lanes;
        Vec s = load(place) * g + delta[w] * k[d];
        store(place, s);
        recalled[w] += s * k[run.key_dim + d];
        asked[w] += s * q[run.key_dim + d];
      }
    }
  }
}

// The parts of a run's scratch; the first three are for all value heads of a key head.
struct DeltaScratch {
  std::int64_t columns;  // tokens, padded
  float* keys;           // [key_dim, columns]: k of every token
  float *kk, *qk;        // [tokens, columns]: k.k and q.k of tokens t, j
  float* faded;          // [key_dim, columns]: keys times what is left of each at the end
  float *recall, *ask;   // [tokens, columns]: kk and qk times what is left of token j at t
  float* delta;          // [tokens, value_stride]
};

inline DeltaScratch divide(const DeltaRun& run) {
  DeltaScratch s;
  s.columns = (run.tokens + lane_pad - 1) / lane_pad * lane_pad;  // not padded(): the linker might share it
  s.keys = run.scratch;
  s.kk = s.keys + run.key_dim * s.columns;
  s.qk = s.kk + run.tokens * s.columns;
  s.faded = s.qk + run.tokens * s.columns;
  s.recall = s.faded + run.key_dim * s.columns;
  s.ask = s.recall + run.tokens * s.columns;
  s.delta = s.ask + run.tokens * s.columns;
  return s;
}

struct Pair {
  const float* rows;
  float* out;
};

inline bool in_chunk(const DeltaRun& run) { return run.tokens >= delta_chunk_least; }

void delta_keys(const DeltaRun& run) {
  if (!in_chunk(run)) return;
  const DeltaScratch s = divide(run);
  for (std::int64_t d = 0; d < run.key_dim; ++d) {
    float* row = s.keys + d * s.columns;
    for (std::int64_t t = 0; t < s.columns; ++t) row[t] = t < run.tokens ? run.k[t * run.key_dim + d] : 0.0f;
  }
  for (const auto& [rows, out] : {Pair{run.k, s.kk}, Pair{run.q, s.qk}}) {
    multiply(Product<Floats>{rows, run.key_dim, 0, s.keys, s.columns, 0, one_part, run.key_dim, run.key_dim, 0, out,
                             s.columns, run.tokens, s.columns});
  }
}

// delta_t and the outputs, row after row: what S recalled and answered before the chunk, in s.delta and run.out, and
// what the tokens of the chunk add.
template <int width>
void solve_columns(const DeltaRun& run, const DeltaScratch& s, const float* left, std::int64_t column) {
  for (std::int64_t t = 0; t < run.tokens; ++t) {
    float* delta = s.delta + t * run.value_stride + column;
    float* out = run.out + t * run.value_stride + column;
    Vec recalled[width], asked[width];
    for (int w = 0; w < width; ++w) {
      recalled[w] = load(delta + w * lanes) * left[t];
      asked[w] = load(out + w * lanes) * left[t];
    }
    for (std::int64_t j = 0; j < t; ++j) {
      const Vec recall = splat(s.recall[t * s.columns + j]), ask = splat(s.ask[t * s.columns + j]);
      for (int w = 0; w < width; ++w) {
        const Vec earlier = load(s.delta + j * run.value_stride + column + w * lanes);
        recalled[w] += recall * earlier;
        asked[w] += ask * earlier;
      }
    }
    for (int w = 0; w < width; ++w) {
      const Vec d = run.beta[t] * (load(run.v + t * run.v_stride + column + w * lanes) - recalled[w]);
      store(delta + w * lanes, d);
      store(out + w * lanes, asked[w] + s.ask[t * s.columns + t] * d);
    }
  }
}

// All tokens of the run at once (the chunked form of arXiv:2412.06464): with G_t the product of the decays up to t,
// delta_t = beta_t (v_t - G_t S k_t - sum over j < t of G_t / G_j (k_t.k_j) delta_j) by forward substitution,
// out_t = G_t S q_t + sum over j <= t of G_t / G_j (q_t.k_j) delta_j, and S becomes G S + sum of G / G_j k_j delta_j.
void delta_chunk(const DeltaRun& run) {
  const DeltaScratch s = divide(run);
  const std::int64_t n = run.tokens, stride = run.value_stride;
  float faded[delta_chunk_most], left[delta_chunk_most];  // what is left of each token at t; of the state at each
  float all = 1;
  for (std::int64_t t = 0; t < n; ++t) {
    left[t] = all *= run.decay[t];
    for (std::int64_t j = 0; j < t; ++j) faded[j] *= run.decay[t];
    faded[t] = 1;
    for (std::int64_t j = 0; j <= t; ++j) {
      s.recall[t * s.columns + j] = s.kk[t * s.columns + j] * faded[j];
      s.ask[t * s.columns + j] = s.qk[t * s.columns + j] * faded[j];
    }
  }
  for (const auto& [rows, out] : {Pair{run.k, s.delta}, Pair{run.q, run.out}}) {
    multiply(Product<Floats>{rows, run.key_dim, 0, run.state, stride, 0, one_part, run.key_dim, run.key_dim, 0, out,
                             stride, n, stride});
  }
  constexpr int width = 4;
  std::int64_t column = 0;
  for (; column + width * lanes <= stride; column += width * lanes) solve_columns<width>(run, s, left, column);
  for (; column < stride; column += lanes) solve_columns<1>(run, s, left, column);
  for (std::int64_t d = 0; d < run.key_dim; ++d) {
    for (std::int64_t j = 0; j < n; ++j) s.faded[d * s.columns + j] = s.keys[d * s.columns + j] * faded[j];
  }
  multiply(Product<Floats>{s.faded, s.columns, 0, s.delta, stride, 0, one_part, n, n, all, run.state, stride,
                           run.key_dim, stride});
}

void delta(const DeltaRun& run) {
  if (in_chunk(run)) return delta_chunk(run);
  constexpr int width = 4;
  std::int64_t column = 0;
  for (; column + width * lanes <= run.value_stride; column += width * lanes) delta_columns<width>(run, column);
  for (; column < run.value_stride; column += lanes) delta_columns<1>(run, column);
}

}  // namespace
}  // namespace mixbit
