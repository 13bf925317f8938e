// One matrix product as a function of Python, for tests.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "matmul.h"
#include "weight.h"

namespace nb = nanobind;

namespace mixbit {
namespace {

using Inputs = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Index = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// [count, rows]: NaN outside rows [row_begin, row_end).
nb::ndarray<nb::numpy, float, nb::ndim<2>> matmul(const Weight& weight, const Inputs& x, const std::string& isa_name,
                                                  std::int64_t expert, const std::optional<Index>& index,
                                                  std::int64_t row_begin, std::int64_t row_end, Precision precision) {
  const Isa isa = isa_named(isa_name);
  Matrix stack = weight.matrix();
  stack.precision = precision;
  const auto tokens = static_cast<std::int64_t>(x.shape(0)), cols = static_cast<std::int64_t>(x.shape(1));
  if (cols != stack.cols) throw std::invalid_argument("x does not have the columns of the matrix");
  if (expert < 0 || expert >= stack.experts) throw std::invalid_argument("no such expert");
  if (row_begin < 0 || row_end > stack.rows) throw std::invalid_argument("rows outside of the matrix");
  const auto count = index ? static_cast<std::int64_t>(index->size()) : tokens;
  for (std::int64_t i = 0; index && i < count; ++i)
    if (index->data()[i] < 0 || index->data()[i] >= tokens) throw std::invalid_argument("index outside of x");

  Activations ready(isa, tokens, cols);
  ready.serve(stack);
  ready.begin(tokens, true);
  for (std::int64_t i = 0; i < tokens; ++i) ready.prepare(i, x.data() + i * cols, cols);
  ready.line_up(0, tokens, cols);
  const auto size = static_cast<std::size_t>(count * stack.rows);
  float* y = new float[size];
  nb::capsule owner(y, [](void* memory) noexcept { delete[] static_cast<float*>(memory); });
  std::fill_n(y, size, std::numeric_limits<float>::quiet_NaN());
  matmul_rows(stack.expert(expert), ready, index ? index->data() : nullptr, count, row_begin, row_end, y, stack.rows);
  return {y, {static_cast<std::size_t>(count), static_cast<std::size_t>(stack.rows)}, owner};
}

}  // namespace

void bind_matmul(nb::module_& m) {
  m.def("matmul_rows", &matmul, nb::arg("weight"), nb::arg("x"), nb::kw_only(), nb::arg("isa"), nb::arg("expert"),
        nb::arg("index").none(), nb::arg("row_begin"), nb::arg("row_end"), nb::arg("precision") = Precision::exact);
}

}  // namespace mixbit
