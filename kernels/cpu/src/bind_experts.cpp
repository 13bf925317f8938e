// The parts of the expert store by themselves: the policy, for tests, and reading, for measurements.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <span>

#include "checks.h"
#include "pages.h"
#include "reader.h"
#include "residency.h"

namespace nb = nanobind;

namespace mixbit {
namespace {

using FilePartArg = std::tuple<int, std::int64_t, std::int64_t>;  // file, offset, bytes

// So that it is not left out.
std::atomic<std::uint64_t> sums;

void sum(const std::byte* data, std::int64_t bytes) {
  std::uint64_t total = 0, word;
  for (std::int64_t i = 0; i + 8 <= bytes; i += 8) {
    std::memcpy(&word, data + i, sizeof word);
    total += word;
  }
  sums += total;
}

// Times reads of experts, as a step of a model does them. Its memory is taken once: later there may be none in huge pages,
// and a direct read into scattered ones is cut up.
class ReadTimer {
 public:
  ReadTimer(std::vector<std::string> files, Access access, int threads, std::int64_t bytes)
      : memory_(bytes), reader_(std::move(files), access, threads, [this](auto tag, auto, auto error) { done(tag, error); }) {
    std::fill_n(memory_.data(), memory_.size(), std::byte{});  // faults are not the disk's
  }

  // Seconds for experts, each by its parts, `together` at a time, which must have room in memory. use: each part, once it is
  // there, has its bytes summed by a thread that reads.
  double seconds(const std::vector<std::vector<FilePartArg>>& experts, std::int64_t together, bool use) {
    nb::gil_scoped_release unlocked;
    use_ = use;
    error_.clear();
    const auto start = std::chrono::steady_clock::now();
    const auto step = static_cast<std::size_t>(together);
    for (std::size_t first = 0; first < experts.size(); first += step) {
      read(std::span(experts).subspan(first, std::min(step, experts.size() - first)));
      if (!error_.empty()) throw ReadError(error_);
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

 private:
  struct Read {
    FilePart part;
    std::byte* to;
    std::int64_t pieces;
  };

  void read(std::span<const std::vector<FilePartArg>> experts) {
    std::unique_lock lock(mutex_);
    reads_.clear();
    std::byte* to = memory_.data();
    std::int64_t pieces = 0;
    for (const auto& parts : experts) {
      for (const auto& [file, offset, size] : parts) {
        const FilePart part{file, offset, size};
        reads_.push_back({part, to, Reader::pieces(part)});
        pieces += reads_.back().pieces;
        to += Reader::room(size);
      }
    }
    require_equal("room for reads", std::max<std::int64_t>(0, to - memory_.data() - memory_.size()), 0);
    left_ = pieces;
    for (std::size_t i = 0; i < reads_.size(); ++i) {
      reader_.read(reads_[i].part, reads_[i].to, static_cast<std::int64_t>(i));
    }
    arrived_.wait(lock, [&] { return left_ == 0; });
  }

  void done(std::int64_t tag, const std::string* error) {
    std::unique_lock lock(mutex_);
    Read& read = reads_[static_cast<std::size_t>(tag)];
    if (error) error_ = *error;
    if (--read.pieces == 0 && use_ && !error) {
      lock.unlock();
      sum(reader_.mapped() ? reader_.at(read.part.file, read.part.offset) : read.to + Reader::lead(read.part.offset),
          read.part.bytes);
      lock.lock();
    }
    if (--left_ == 0) arrived_.notify_one();
  }

  Pages memory_;
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::vector<Read> reads_;
  std::int64_t left_ = 0;  // of all pieces
  bool use_ = false;
  std::string error_;
  Reader reader_;  // last: its threads end first
};

}  // namespace

void bind_experts(nb::module_& m) {
  nb::exception<ReadError>(m, "ReadError", PyExc_OSError);

  nb::enum_<Access>(m, "Access").value("direct", Access::direct).value("cached", Access::cached)
      .value("mapped", Access::mapped);

  nb::class_<Residency>(m, "Residency")
      .def(nb::init<std::int64_t, std::int64_t>(), nb::kw_only(), nb::arg("keys"), nb::arg("slots"))
      .def("find", &Residency::find)
      .def("advance", &Residency::advance)
      .def("note", &Residency::note)
      .def("claim", &Residency::claim)
      .def("pin", &Residency::pin)
      .def("unpin", &Residency::unpin)
      .def("spoil", &Residency::spoil);

  nb::class_<ReadTimer>(m, "ReadTimer")
      .def(nb::init<std::vector<std::string>, Access, int, std::int64_t>(), nb::kw_only(), nb::arg("files"),
           nb::arg("access"), nb::arg("threads"), nb::arg("bytes"))
      .def("seconds", &ReadTimer::seconds, nb::arg("experts"), nb::kw_only(), nb::arg("together"),
           nb::arg("use") = false);
}

}  // namespace mixbit
