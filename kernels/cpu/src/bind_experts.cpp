// The parts of the expert store by themselves: the policy, for tests, and reading, for measurements.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>

#include "pages.h"
#include "reader.h"
#include "residency.h"

namespace nb = nanobind;

namespace mixbit {
namespace {

using FilePartArg = std::tuple<int, std::int64_t, std::int64_t>;  // file, offset, bytes

// Seconds for reading experts, each by its parts, `together` at a time, as a step of a model does.
double read_seconds(std::vector<std::string> files, const std::vector<std::vector<FilePartArg>>& experts, bool direct,
                    int threads, std::int64_t together) {
  std::int64_t room = 0;
  for (const auto& expert : experts) {
    std::int64_t bytes = 0;
    for (const auto& [file, offset, size] : expert) bytes += Reader::room(size);
    room = std::max(room, bytes);
  }
  const Pages memory(room * together);
  std::fill_n(memory.data(), memory.size(), std::byte{});  // faults are not the disk's
  nb::gil_scoped_release unlocked;
  std::mutex mutex;
  std::condition_variable arrived;
  std::int64_t left = 0;
  std::string error;
  Reader reader(std::move(files), direct, threads, [&](std::int64_t, std::int64_t, const std::string* what) {
    std::lock_guard lock(mutex);
    if (what) error = *what;
    if (--left == 0) arrived.notify_one();
  });
  const auto start = std::chrono::steady_clock::now();
  for (std::size_t first = 0; first < experts.size(); first += static_cast<std::size_t>(together)) {
    std::unique_lock lock(mutex);
    std::byte* to = memory.data();
    const std::size_t end = std::min(first + static_cast<std::size_t>(together), experts.size());
    for (std::size_t i = first; i < end; ++i) {
      for (const auto& [file, offset, size] : experts[i]) {
        const FilePart part{file, offset, size};
        left += Reader::pieces(part);
        reader.read(part, to, 0);
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

  nb::class_<Residency>(m, "Residency")
      .def(nb::init<std::int64_t, std::int64_t>(), nb::kw_only(), nb::arg("keys"), nb::arg("slots"))
      .def("find", &Residency::find)
      .def("advance", &Residency::advance)
      .def("note", &Residency::note)
      .def("claim", &Residency::claim)
      .def("pin", &Residency::pin)
      .def("unpin", &Residency::unpin)
      .def("spoil", &Residency::spoil);

  m.def("read_seconds", &read_seconds, nb::kw_only(), nb::arg("files"), nb::arg("experts"), nb::arg("direct"),
        nb::arg("threads"), nb::arg("together"));
}

}  // namespace mixbit
