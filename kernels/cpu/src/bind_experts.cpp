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

// Seconds for reading experts, each by its parts, `together` at a time, as a step of a model does. use: each part, once it
// is there, has its bytes summed by a thread that reads.
double read_seconds(std::vector<std::string> files, const std::vector<std::vector<FilePartArg>>& experts, Access access,
                    int threads, std::int64_t together, bool use) {
  struct Read {
    FilePart part;
    std::byte* to;
    std::atomic<std::int64_t> pieces;
  };
  std::int64_t room = 0;
  std::size_t most = 0;
  for (const auto& expert : experts) {
    std::int64_t bytes = 0;
    for (const auto& [file, offset, size] : expert) bytes += Reader::room(size);
    room = std::max(room, bytes);
    most = std::max(most, expert.size());
  }
  const Pages memory(room * together);
  std::fill_n(memory.data(), memory.size(), std::byte{});  // faults are not the disk's
  std::vector<Read> reads(most * static_cast<std::size_t>(together));
  nb::gil_scoped_release unlocked;
  std::mutex mutex;
  std::condition_variable arrived;
  std::int64_t left = 0;
  std::string error;
  const Reader* own = nullptr;
  Reader reader(std::move(files), access, threads, [&](std::int64_t tag, std::int64_t, const std::string* what) {
    Read& read = reads[static_cast<std::size_t>(tag)];
    if (--read.pieces == 0 && use && !what) {
      sum(own->mapped() ? own->at(read.part.file, read.part.offset) : read.to + Reader::lead(read.part.offset),
          read.part.bytes);
    }
    std::lock_guard lock(mutex);
    if (what) error = *what;
    if (--left == 0) arrived.notify_one();
  });
  own = &reader;
  const auto start = std::chrono::steady_clock::now();
  for (std::size_t first = 0; first < experts.size(); first += static_cast<std::size_t>(together)) {
    std::unique_lock lock(mutex);
    std::byte* to = memory.data();
    std::int64_t tag = 0;
    const std::size_t end = std::min(first + static_cast<std::size_t>(together), experts.size());
    for (std::size_t i = first; i < end; ++i) {
      for (const auto& [file, offset, size] : experts[i]) {
        Read& read = reads[static_cast<std::size_t>(tag)];
        read.part = {file, offset, size};
        read.to = to;
        read.pieces = Reader::pieces(read.part);
        left += read.pieces;
        reader.read(read.part, to, tag++);
        to += Reader::room(size);
      }
    }
    arrived.wait(lock, [&] { return left == 0; });
    if (!error.empty()) throw ReadError(error);
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

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

  m.def("read_seconds", &read_seconds, nb::kw_only(), nb::arg("files"), nb::arg("experts"), nb::arg("access"),
        nb::arg("threads"), nb::arg("together"), nb::arg("use") = false);
}

}  // namespace mixbit
