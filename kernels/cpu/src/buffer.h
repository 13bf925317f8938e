// Uninitialised, cache-line aligned memory for activations. Pages that are never touched cost nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace mixbit {

template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t size)
      : data_(static_cast<T*>(::operator new[](static_cast<std::size_t>(size) * sizeof(T), alignment))), size_(size) {}

  T* data() const { return data_.get(); }
  std::int64_t size() const { return size_; }
  T& operator[](std::int64_t i) const { return data_.get()[i]; }

  // Makes room for at least `size` values; what it held may be lost.
  void reserve(std::int64_t size) {
    if (size > size_) *this = Buffer(size);
  }

 private:
  static constexpr std::align_val_t alignment{64};
  struct Free {
    void operator()(T* p) const { ::operator delete[](p, alignment); }
  };

  std::unique_ptr<T[], Free> data_;
  std::int64_t size_ = 0;
};

}  // namespace mixbit
