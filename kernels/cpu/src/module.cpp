// The Python face of the native program: what kernels/cpu/backend.py calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "cores.h"
#include "program.h"
#include "weight.h"

namespace nb = nanobind;

namespace mixbit {
namespace {

using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntTable = nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using NormArg = std::tuple<Floats, float>;                                // weight, eps
using ColumnsArg = std::tuple<int, std::int64_t, std::int64_t>;           // value, offset, stride
using MlpArg = std::tuple<const Weight*, const Weight*, const Weight*>;  // gate, up, down
using FilePartArg = std::tuple<int, std::int64_t, std::int64_t>;          // file, offset, bytes

std::vector<float> vector(const Floats& array) { return {array.data(), array.data() + array.size()}; }
std::span<const std::int32_t> span(const Ints& array) { return {array.data(), array.size()}; }

Norm norm(const NormArg& arg) { return {vector(std::get<0>(arg)), std::get<1>(arg)}; }

std::optional<Norm> norm(const std::optional<NormArg>& arg) {
  return arg ? std::optional(norm(*arg)) : std::nullopt;
}

Columns columns(const Program& p, const ColumnsArg& arg) {
  const auto& [value, offset, stride] = arg;
  return {p.value(value), offset, stride};
}

// As the program applies it.
Matrix matrix(const Program& p, const Weight& weight, Precision most = Precision::fast) {
  Matrix m = weight.matrix();
  m.precision = p.context().limits.precision == Precision::exact ? Precision::exact : most;
  return m;
}

MlpWeights mlp_weights(const Program& p, const MlpArg& arg) {
  const auto& [gate, up, down] = arg;
  return {matrix(p, *gate), matrix(p, *up), matrix(p, *down)};
}

void embed(Program& p, const Weight& table, int out) {
  p.uses_vocabulary(table.matrix().rows);
  p.add("embed", make_embed(p.context(), table.matrix(), p.value(out)), {}, {out});
}

void rms_norm(Program& p, int x, const NormArg& weight, int out) {
  p.add("rms_norm", make_rms_norm(p.context(), p.value(x), norm(weight), p.value(out)), {x}, {out});
}

void add_norm(Program& p, int x, int delta, const NormArg& weight, int total, int out) {
  auto op = make_add_norm(p.context(), p.value(x), p.value(delta), norm(weight), p.value(total), p.value(out));
  p.add("add_norm", std::move(op), {x, delta}, {total, out});
}

void batch_matvec(Program& p, int x, const std::vector<std::tuple<const Weight*, std::optional<Floats>>>& specs,
                  const std::vector<int>& outs) {
  std::vector<Linear> parts;
  for (const auto& [weight, bias] : specs) {
    parts.push_back({matrix(p, *weight), bias ? vector(*bias) : std::vector<float>()});
  }
  std::vector<Value> values;
  for (int out : outs) values.push_back(p.value(out));
  p.add("batch_matvec", make_batch_matvec(p.context(), p.value(x), std::move(parts), std::move(values)), {x}, outs);
}

void mlp(Program& p, int x, const MlpArg& weights, int out) {
  p.add("mlp", make_mlp(p.context(), p.value(x), mlp_weights(p, weights), p.value(out)), {x}, {out});
}

// stored: where expert 0 of each array lies, if experts are to be streamed.
void moe(Program& p, int x, const Weight& router, const MlpArg& experts, std::int64_t top_k, bool normalize,
         const std::optional<MlpArg>& shared, const Weight* shared_gate,
         const std::optional<std::vector<FilePartArg>>& stored, int out) {
  MoeWeights weights{matrix(p, router, Precision::fine), mlp_weights(p, experts), top_k, normalize, std::nullopt, std::nullopt};
  if (shared) weights.shared = mlp_weights(p, *shared);
  if (shared_gate) weights.shared_gate = matrix(p, *shared_gate, Precision::fine);
  if (stored && p.store()) {
    std::vector<FilePart> parts;
    for (const auto& [file, offset, bytes] : *stored) parts.push_back({file, offset, bytes});
    weights.store = p.store();
    weights.layer = p.store()->add(weights.experts, std::move(parts), p.value(x).rows);
  }
  p.add("moe", make_moe(p.context(), p.value(x), weights, p.value(out)), {x}, {out});
}

// x: what the mixer before the moe of streamed layer `layer` will add to. norm: of the sum. before: x without the output of
// the streamed layer before, if that is what x has besides.
void read_ahead(Program& p, int x, const NormArg& weight, const Weight& router, std::int64_t top_k, int layer,
                std::optional<int> before) {
  if (!p.store()) throw std::invalid_argument("read_ahead: no experts are streamed");
  const Matrix of_router = matrix(p, router, Precision::fine);
  std::optional<Value> sooner;
  if (before) sooner = p.value(*before);
  p.add("read_ahead",
        make_read_ahead(p.context(), p.value(x), norm(weight), of_router, top_k, *p.store(), layer, sooner), {x}, {});
}

void attention(Program& p, const ColumnsArg& q, const ColumnsArg& k, const ColumnsArg& v,
               const std::optional<ColumnsArg>& gate, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim,
               float scale, std::optional<int> rope, const std::optional<NormArg>& q_norm,
               const std::optional<NormArg>& k_norm, int out) {
  AttentionSpec spec{heads, kv_heads, head_dim, scale, rope ? p.rope(*rope) : nullptr, norm(q_norm), norm(k_norm)};
  std::vector<int> inputs{std::get<0>(q), std::get<0>(k), std::get<0>(v)};
  std::optional<Columns> gate_columns;
  if (gate) {
    gate_columns = columns(p, *gate);
    inputs.push_back(std::get<0>(*gate));
  }
  p.uses_blocks();
  auto op = make_attention(p.context(), columns(p, q), columns(p, k), columns(p, v), gate_columns, std::move(spec),
                           p.value(out), p.cache_bytes());
  p.add("attention", std::move(op), std::move(inputs), {out});
}

void gated_delta(Program& p, const std::vector<ColumnsArg>& in, std::int64_t key_heads, std::int64_t value_heads,
                 std::int64_t key_dim, std::int64_t value_dim, const Floats& conv, const Floats& a_log,
                 const Floats& dt_bias, const NormArg& weight, int out) {
  if (in.size() != 6 || conv.ndim() != 2) throw std::invalid_argument("gated_delta: six inputs, a conv matrix");
  std::vector<int> inputs;
  for (const ColumnsArg& c : in) inputs.push_back(std::get<0>(c));
  GatedDeltaInputs from{columns(p, in[0]), columns(p, in[1]), columns(p, in[2]),
                        columns(p, in[3]), columns(p, in[4]), columns(p, in[5])};
  const auto kernel = static_cast<std::int64_t>(conv.shape(1));
  GatedDeltaSpec spec{key_heads,    value_heads,   key_dim,         value_dim,   kernel,
                      vector(conv), vector(a_log), vector(dt_bias), norm(weight)};
  p.uses_state();
  auto op = make_gated_delta(p.context(), from, std::move(spec), p.value(out), p.cache_bytes());
  p.add("gated_delta", std::move(op), std::move(inputs), {out});
}

nb::ndarray<nb::numpy, float, nb::ndim<2>> run(Program& p, const Ints& tokens, const Ints& query_starts,
                                               const Ints& context_lengths, const IntTable& block_tables,
                                               const Ints& state_slots, const Ints& logit_rows, bool hidden) {
  const Output output = hidden ? Output::hidden : Output::logits;
  const std::size_t rows = logit_rows.size(), cols = static_cast<std::size_t>(p.width(output));
  std::unique_ptr<float[]> out(new float[rows * cols]);
  const Batch batch{span(tokens),
                    span(query_starts),
                    span(context_lengths),
                    {block_tables.data(), block_tables.size()},
                    static_cast<std::int64_t>(block_tables.shape(1)),
                    span(state_slots),
                    span(logit_rows)};
  {
    nb::gil_scoped_release unlocked;
    p.run(batch, output, out.get());
  }
  float* data = out.release();
  nb::capsule owner(data, [](void* memory) noexcept { delete[] static_cast<float*>(memory); });
  return {data, {rows, cols}, owner};
}

// Of each streamed layer: hits, misses, those read ahead, reads ahead that were unused, bytes; seconds of reading,
// waiting, computing.
using CountsArg =
    std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, double, double, double>;

std::vector<CountsArg> expert_counts(const Program& p) {
  std::vector<CountsArg> all;
  if (!p.store()) return all;
  for (const ExpertCounts& c : p.store()->counts()) {
    all.emplace_back(c.hits, c.misses, c.ahead, c.unused, c.bytes, c.read, c.wait, c.compute);
  }
  return all;
}

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>> read(const Pieces& pieces, std::int64_t number) {
  std::unique_ptr<std::uint8_t[]> out(new std::uint8_t[pieces.bytes()]);
  pieces.read(number, reinterpret_cast<char*>(out.get()));
  std::uint8_t* data = out.release();
  nb::capsule owner(data, [](void* memory) noexcept { delete[] static_cast<std::uint8_t*>(memory); });
  return {data, {pieces.bytes()}, owner};
}

void write(const Pieces& pieces, std::int64_t number, const Bytes& data) {
  pieces.write(number, reinterpret_cast<const char*>(data.data()), data.size());
}

}  // namespace

void bind_matmul(nb::module_& m);   // bind_matmul.cpp
void bind_experts(nb::module_& m);  // bind_experts.cpp

}  // namespace mixbit

NB_MODULE(_cpu, m) {
  using namespace mixbit;
  m.doc() = "The op table on CPUs: a native program, recorded by backend.py and run in one call a step.";

  m.def("usable_cores", &usable_cores);
  m.def("best_isa", [] { return std::string(name(best_isa())); });
  m.def("supported_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : all_isas) {
      if (supported(isa)) names.emplace_back(name(isa));
    }
    return names;
  });

  nb::enum_<DType>(m, "DType").value("f32", DType::f32).value("f16", DType::f16).value("bf16", DType::bf16);

  nb::enum_<Precision>(m, "Precision").value("exact", Precision::exact).value("fast", Precision::fast)
      .value("fine", Precision::fine);

  nb::class_<Weight>(m, "Weight")
      .def(nb::init<nb::handle, nb::object, nb::object, DType, int, int, std::int64_t, std::int64_t, std::int64_t>(),
           nb::arg("weight"), nb::arg("scales").none(), nb::arg("biases").none(), nb::arg("dtype"), nb::arg("bits"),
           nb::arg("group_size"), nb::arg("experts"), nb::arg("rows"), nb::arg("cols"));

  bind_matmul(m);
  bind_experts(m);

  nb::class_<Program>(m, "Program")
      .def(
          "__init__",
          [](Program* self, std::int64_t max_tokens, std::int64_t blocks, std::int64_t block_size,
             std::int64_t state_slots, Precision precision, int threads, const std::string& isa,
             bool profile) {
            const Limits limits{max_tokens, blocks, block_size, state_slots, precision};
            new (self) Program(limits, threads, isa_named(isa), profile);
          },
          nb::kw_only(), nb::arg("max_tokens"), nb::arg("blocks"), nb::arg("block_size"), nb::arg("state_slots"),
          nb::arg("precision"), nb::arg("threads"), nb::arg("isa"), nb::arg("profile"))
      .def(
          "stream_experts",
          [](Program& p, std::vector<std::string> files, std::int64_t bytes, Access access, int threads) {
            p.stream_experts({std::move(files), bytes, access, threads});
          },
          nb::kw_only(), nb::arg("files"), nb::arg("bytes"), nb::arg("access"), nb::arg("threads"))
      .def("value",
           [](Program& p, std::int64_t dim, bool selected) {
             p.add_value(dim, selected ? Rows::selected : Rows::tokens);
           })
      .def("rope", [](Program& p, const Floats& inv_freq, float scale) { p.add_rope(vector(inv_freq), scale); })
      .def("embed", &embed)
      .def("select_rows",
           [](Program& p, int x, int out) {
             p.add("select_rows", make_select_rows(p.context(), p.value(x), p.value(out)), {x}, {out});
           })
      .def("rms_norm", &rms_norm)
      .def("add_norm", &add_norm)
      .def("batch_matvec", &batch_matvec)
      .def("mlp", &mlp)
      .def("moe", &moe, nb::arg(), nb::arg(), nb::arg(), nb::kw_only(), nb::arg("top_k"), nb::arg("normalize"),
           nb::arg("shared").none(), nb::arg("shared_gate").none(), nb::arg("stored").none(), nb::arg("out"))
      .def("read_ahead", &read_ahead, nb::arg(), nb::arg(), nb::arg(), nb::kw_only(), nb::arg("top_k"), nb::arg("layer"),
           nb::arg("before").none())
      .def("attention", &attention, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::kw_only(), nb::arg("heads"),
           nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("scale"), nb::arg("rope").none(),
           nb::arg("q_norm").none(), nb::arg("k_norm").none(), nb::arg("out"))
      .def("gated_delta", &gated_delta, nb::arg(), nb::kw_only(), nb::arg("key_heads"), nb::arg("value_heads"),
           nb::arg("key_dim"), nb::arg("value_dim"), nb::arg("conv"), nb::arg("a_log"), nb::arg("dt_bias"),
           nb::arg("norm"), nb::arg("out"))
      .def("finish", &Program::finish)
      .def("run", &run)
      .def("copy_block", [](Program& p, std::int64_t source, std::int64_t to) { p.context().blocks.copy(source, to); })
      .def("copy_state", [](Program& p, std::int64_t source, std::int64_t to) { p.context().states.copy(source, to); })
      .def("export_block", [](Program& p, std::int64_t number) { return read(p.context().blocks, number); })
      .def("export_state", [](Program& p, std::int64_t number) { return read(p.context().states, number); })
      .def("import_block",
           [](Program& p, std::int64_t number, const Bytes& data) { write(p.context().blocks, number, data); })
      .def("import_state",
           [](Program& p, std::int64_t number, const Bytes& data) { write(p.context().states, number, data); })
      .def("seconds", &Program::seconds)
      .def("expert_counts", &expert_counts)
      .def_prop_ro("expert_bytes", [](Program& p) { return p.store() ? p.store()->bytes() : 0; })
      .def_prop_ro("expert_slots", [](Program& p) { return p.store() ? p.store()->slots() : 0; })
      .def_prop_ro("step_bytes", &Program::step_bytes)
      .def_prop_ro("threads", [](Program& p) { return p.context().machine.pool.size(); })
      .def_prop_ro("cache_bytes", [](Program& p) { return p.cache_bytes(); });
}
