// The policy of the expert store, for tests.
#include <nanobind/nanobind.h>

#include "residency.h"

namespace nb = nanobind;

namespace mixbit {

void bind_residency(nb::module_& m) {
  nb::class_<Residency>(m, "Residency")
      .def(nb::init<std::int64_t, std::int64_t>(), nb::kw_only(), nb::arg("keys"), nb::arg("slots"))
      .def("find", &Residency::find)
      .def("advance", &Residency::advance)
      .def("note", &Residency::note)
      .def("claim", &Residency::claim)
      .def("pin", &Residency::pin)
      .def("unpin", &Residency::unpin)
      .def("spoil", &Residency::spoil);
}

}  // namespace mixbit
