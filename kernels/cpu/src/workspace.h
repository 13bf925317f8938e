// Scratch memory that ops take turns to use: what one op leaves there means nothing to the next.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <tuple>

#include "buffer.h"
#include "matmul.h"

namespace mixbit {

class Workspace {
 public:
  Workspace(int threads, Isa isa) : threads_(threads), isa_(isa) {}

  // Inputs of matrices: one object for each shape, shared by the ops that need that shape; and within an op, by what
  // differs in `use`, if it needs several at once.
  Activations& activations(std::int64_t rows, std::int64_t dim, int use = 0) {
    auto& slot = activations_[{rows, dim, use}];
    if (!slot) slot = std::make_unique<Activations>(isa_, rows, dim);
    return *slot;
  }

  // Asks, at compile time, for floats that all threads see and for floats of each thread's own.
  void reserve(std::int64_t shared, std::int64_t each_thread) {
    shared_.reserve(shared);
    each_ = std::max(each_, (each_thread + 15) / 16 * 16);
    own_.reserve(each_ * threads_);
  }

  // Bytes of everything asked for.
  std::int64_t bytes() const {
    std::int64_t bytes = (shared_.size() + own_.size()) * std::int64_t{sizeof(float)};
    for (const auto& [shape, each] : activations_) bytes += each->bytes();
    return bytes;
  }

  float* shared() const { return shared_.data(); }
  float* own(int thread) const { return own_.data() + thread * each_; }

 private:
  int threads_;
  Isa isa_;
  std::int64_t each_ = 0;
  Buffer<float> shared_;
  Buffer<float> own_;
  std::map<std::tuple<std::int64_t, std::int64_t, int>, std::unique_ptr<Activations>> activations_;
};

}  // namespace mixbit
