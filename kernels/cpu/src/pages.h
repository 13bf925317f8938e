// Memory that files are read into.
#pragma once

#include <sys/mman.h>

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

 private:
  std::size_t bytes_;
  std::byte* data_;
};

}  // namespace mixbit
