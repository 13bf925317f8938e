// Memory that files are read into.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>

namespace mixbit {

// Anonymous pages, zero at first, aligned for direct reads; huge ones where the system has them: fewer to fault in, and a
// read past the page cache takes as few requests as its bytes lie in pieces.
class Pages {
 public:
  explicit Pages(std::int64_t bytes) : bytes_(static_cast<std::size_t>(bytes)) {
    void* data = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<std::byte*>(data);
#if defined(MADV_HUGEPAGE)
    madvise(data, bytes_, MADV_HUGEPAGE);
#endif
  }
  ~Pages() { munmap(data_, bytes_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  std::byte* data() const { return data_; }
  std::int64_t size() const { return static_cast<std::int64_t>(bytes_); }

  // Has the system give the memory of a piece, the first one first, without a change to what it holds. False if there
  // is no such piece any more, or the system does not do that.
  bool populate_next() {
#if defined(MADV_POPULATE_WRITE)
    const std::size_t piece = std::min(bytes_ - populated_, populated_piece);
    std::byte* start = data_ + populated_;
    populated_ += piece;
    return piece > 0 && madvise(start, piece, MADV_POPULATE_WRITE) == 0;
#else
    return false;
#endif
  }

 private:
  static constexpr std::size_t populated_piece = 2 << 20;  // a huge page: of 4 KB each, takes 7 ms at worst

  std::size_t bytes_;
  std::byte* data_;
  std::size_t populated_ = 0;  // bytes at the start, where slots are taken first
};

}  // namespace mixbit
