// Attention: write the step's keys and values, then attend a tile of queries of one KV head at a time. Keys are
// taken in runs of fixed length whose results are merged in order, so that a row's result is the same whether
// its runs are computed by one thread or by several, and whatever else is in the batch.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "checks.h"
#include "kv_pool.h"
#include "ops.h"

namespace mixbit {
namespace {

constexpr std::int64_t tile_rows = 48;   // queries of a tile, about
constexpr std::int64_t pass_keys = 128;  // scores of a row kept at a time, about
constexpr std::int64_t run_keys = 512;   // keys of a run, about
constexpr std::int64_t write_values = 512;  // keys of tokens that are written together, about: lines that nobody has near
constexpr float log2_e = 1.44269504f;

// Those of VectorOps that go with a storage.
void attend(const VectorOps& ops, const AttentionTile<float>& tile) { ops.attend(tile); }
void attend(const VectorOps& ops, const AttentionTile<Bfloat16>& tile) { ops.attend_bfloat16(tile); }

template <typename Storage>
class Attention final : public Op {
 public:
  Attention(Context& context, Columns q, Columns k, Columns v, std::optional<Columns> gate, AttentionSpec spec,
            Value out)
      : context_(context),
        q_(q),
        k_(k),
        v_(v),
        gate_(gate),
        spec_(std::move(spec)),
        out_(out),
        group_(spec_.heads / spec_.kv_heads),
        tile_tokens_(std::max<std::int64_t>(1, tile_rows / group_)),
        blocks_per_pass_(std::max<std::int64_t>(1, pass_keys / context.limits.block_size)),
        run_(blocks_per_pass_ * context.limits.block_size),
        q_stride_(KvPool<Storage>::steps(spec_.head_dim) * KvPool<Storage>::depth),
        pool_(context.limits.blocks, context.limits.block_size, spec_.kv_heads, spec_.head_dim) {
    run_ *= std::max<std::int64_t>(1, run_keys / run_);
    context.workspace.reserve(0, scratch(nullptr).size);
    pool_.list(context.blocks);
  }

  void run(const Step& step) override {
    write(step);
    list_tiles(step);
    const auto tiles = static_cast<std::int64_t>(tiles_.size());
    if (longest_ <= run_ || tiles >= 4 * context_.machine.pool.size()) {
      context_.machine.pool.run(tiles, [&](std::int64_t i, int thread) { attend_whole(step, i, thread); });
    } else {
      attend_split(step, tiles);
    }
  }

  std::int64_t bytes() const { return pool_.bytes(); }

 private:
  // Tokens [begin, end) of a sequence and a KV head. runs: of the keys that its last token sees.
  struct QueryTile {
    std::int32_t sequence, head;
    std::int64_t begin, end, runs;
  };

  // What a tile's rows have gathered: see AttentionTile.
  struct Partial {
    float *out, *peak, *total;
  };

  // A thread's own memory.
  struct Scratch {
    float *q, *scores;  // q also holds a key and a value on their way to the cache
    Partial sum, next;
    std::int64_t size;
  };

  static std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

  std::int64_t max_rows() const { return padded(tile_tokens_ * group_); }
  std::int64_t partial_size() const { return max_rows() * (pool_.value_stride + 2); }

  Partial partial(float* base) const {
    float* peak = base + max_rows() * pool_.value_stride;
    return {base, peak, peak + max_rows()};
  }

  Scratch scratch(float* base) const {
    const std::int64_t scores = max_rows() * q_stride_;
    const std::int64_t sum = scores + max_rows() * blocks_per_pass_ * pool_.key_stride;
    const std::int64_t size = sum + 2 * partial_size();
    if (base == nullptr) return {nullptr, nullptr, {}, {}, size};
    return {base, base + scores, partial(base + sum), partial(base + sum + partial_size()), size};
  }

  // Norm and rotation of one head, in place.
  void transform(const std::optional<Norm>& norm, std::int64_t token, float* head) const {
    const VectorOps& ops = context_.machine.ops;
    if (norm) ops.rms_norm(head, norm->weight.data(), norm->eps, 1, spec_.head_dim, head);
    if (spec_.rope) ops.rotate(spec_.rope->cos(token), spec_.rope->sin(token), spec_.rope->half(), head);
  }

  // A head, and zeros up to q_stride_.
  void load(const float* head, float* to) const {
    std::memcpy(to, head, static_cast<std::size_t>(spec_.head_dim) * sizeof(float));
    std::fill(to + spec_.head_dim, to + q_stride_, 0.0f);
  }

  // A key and a value as they are stored. key: followed by scratch for 3 * q_stride_ floats.
  std::pair<const Storage*, const Storage*> stored(float* key, const float* value) const {
    if constexpr (std::is_same_v<Storage, float>) {
      return {key, value};
    } else {
      Storage* narrow_key = reinterpret_cast<Storage*>(key + q_stride_);
      Storage* narrow_value = narrow_key + q_stride_;
      context_.machine.ops.narrow(key, q_stride_, narrow_key);
      context_.machine.ops.narrow(value, spec_.head_dim, narrow_value);
      return {narrow_key, narrow_value};
    }
  }

  void write(const Step& step) {
    const std::int64_t grain = std::max<std::int64_t>(1, write_values / (spec_.kv_heads * spec_.head_dim));
    context_.machine.pool.run_ranges(step.tokens, grain, [&](auto begin, auto end, int thread) {
      const Scratch s = scratch(context_.workspace.own(thread));
      for (auto t = begin; t < end; ++t) {
        const bool last = t + 1 == step.tokens || step.blocks[t + 1] != step.blocks[t];
        for (std::int64_t h = 0; h < spec_.kv_heads; ++h) {
          load(step.head(k_, t, h), s.q);
          transform(spec_.k_norm, t, s.q);
          const auto [key, value] = stored(s.q, step.head(v_, t, h));
          pool_.write(step.blocks[t], step.positions[t] % context_.limits.block_size, h, key, value, last);
        }
      }
    });
  }

  // The longest contexts come first, so that no thread is left with a long one at the end.
  void list_tiles(const Step& step) {
    tiles_.clear();
    longest_ = 0;
    for (std::int64_t s = 0; s < step.sequences; ++s) {
      const std::int64_t first = step.query_starts[s], last = step.query_starts[s + 1];
      longest_ = std::max(longest_, step.positions[last - 1] + std::int64_t{1});
      for (std::int64_t end = last; end > first; end -= tile_tokens_) {
        const std::int64_t begin = std::max(first, end - tile_tokens_);
        const std::int64_t runs = (step.positions[end - 1] + run_) / run_;
        for (std::int64_t h = 0; h < spec_.kv_heads; ++h) {
          tiles_.push_back({static_cast<std::int32_t>(s), static_cast<std::int32_t>(h), begin, end, runs});
        }
      }
    }
    std::stable_sort(tiles_.begin(), tiles_.end(), [](const auto& a, const auto& b) { return a.runs > b.runs; });
  }

  void load_queries(const Step& step, const QueryTile& tile, float* first) const {
    const VectorOps& ops = context_.machine.ops;
    float* q = first;
    for (std::int64_t t = tile.begin; t < tile.end; ++t) {
      for (std::int64_t g = 0; g < group_; ++g, q += q_stride_) {
        load(step.head(q_, t, tile.head * group_ + g), q);
        transform(spec_.q_norm, t, q);
        ops.scale(spec_.scale * log2_e, spec_.head_dim, q);
      }
    }
    if constexpr (!std::is_same_v<Storage, float>) ops.pack_lefts(first, q - first);
  }

  // A run of the keys of a tile.
  struct Run {
    const QueryTile* tile;  // null: none
    std::int64_t number;
  };

  void attend_run(const Step& step, const Run& run, const Run& next, const Scratch& s, const Partial& to) const {
    const QueryTile& tile = *run.tile;
    AttentionTile<Storage> t;
    t.q = s.q;
    t.rows = (tile.end - tile.begin) * group_;
    t.head_dim = spec_.head_dim;
    t.q_stride = q_stride_;
    t.value_stride = pool_.value_stride;
    t.group = group_;
    t.visible = step.positions[tile.begin] + 1;
    t.keys = pool_.keys(tile.head);
    t.values = pool_.values(tile.head);
    t.key_block_stride = pool_.key_block_stride;
    t.value_block_stride = pool_.value_block_stride;
    t.blocks = step.block_tables + tile.sequence * step.table_width;
    t.block_size = context_.limits.block_size;
    t.key_stride = pool_.key_stride;
    t.blocks_per_pass = blocks_per_pass_;
    t.begin = run.number * run_;
    t.end = std::min(t.begin + run_, step.positions[tile.end - 1] + std::int64_t{1});
    t.scores = s.scores;
    t.out = to.out;
    t.peak = to.peak;
    t.total = to.total;
    if (next.tile != nullptr) {
      const std::int32_t* blocks = step.block_tables + next.tile->sequence * step.table_width;
      const std::int64_t size = context_.limits.block_size, first = next.number * run_ / size;
      const std::int64_t end = step.positions[next.tile->end - 1] / size + 1;
      for (std::int64_t i = first; i < std::min(first + 2, end); ++i) {
        t.next[i - first] = pool_.keys(next.tile->head) + blocks[i] * pool_.key_block_stride;
      }
    }
    attend(context_.machine.ops, t);
  }

  // Adds what `from` gathered from later keys to `sum`.
  void merge(const Partial& sum, const Partial& from, std::int64_t rows) const {
    const std::int64_t n = pool_.value_stride;
    for (std::int64_t r = 0; r < rows; ++r) {
      if (from.total[r] == 0) continue;
      const float peak = std::max(sum.peak[r], from.peak[r]);
      const float keep = std::exp2(sum.peak[r] - peak), take = std::exp2(from.peak[r] - peak);
      context_.machine.ops.scale(keep, n, sum.out + r * n);
      context_.machine.ops.axpy(take, from.out + r * n, n, sum.out + r * n);
      sum.total[r] = sum.total[r] * keep + from.total[r] * take;
      sum.peak[r] = peak;
    }
  }

  void finish(const Step& step, const QueryTile& tile, const Partial& sum) const {
    const VectorOps& ops = context_.machine.ops;
    const std::int64_t dim = spec_.head_dim;
    std::int64_t r = 0;
    for (std::int64_t t = tile.begin; t < tile.end; ++t) {
      for (std::int64_t g = 0; g < group_; ++g, ++r) {
        const std::int64_t h = tile.head * group_ + g;
        const float* from = sum.out + r * pool_.value_stride;
        float* out = step.row(out_, t) + h * dim;
        if (gate_) {
          ops.sigmoid_mul(step.head(*gate_, t, h), from, 1 / sum.total[r], dim, out);
        } else {
          std::memcpy(out, from, static_cast<std::size_t>(dim) * sizeof(float));
          ops.scale(1 / sum.total[r], dim, out);
        }
      }
    }
  }

  void attend_whole(const Step& step, std::int64_t i, int thread) const {
    const QueryTile& tile = tiles_[index(i)];
    const Scratch s = scratch(context_.workspace.own(thread));
    load_queries(step, tile, s.q);
    const QueryTile* next = index(i) + 1 < tiles_.size() ? &tile + 1 : nullptr;  // of the same thread, mostly
    const auto after = [&](std::int64_t run) { return run + 1 < tile.runs ? Run{&tile, run + 1} : Run{next, 0}; };
    attend_run(step, {&tile, 0}, after(0), s, s.sum);
    for (std::int64_t run = 1; run < tile.runs; ++run) {
      attend_run(step, {&tile, run}, after(run), s, s.next);
      merge(s.sum, s.next, (tile.end - tile.begin) * group_);
    }
    finish(step, tile, s.sum);
  }

  // Few tiles with long contexts: threads share the runs of a tile.
  void attend_split(const Step& step, std::int64_t tiles) {
    const std::int64_t most = tiles_.front().runs;
    context_.workspace.reserve(tiles * most * partial_size(), 0);
    auto place = [&](std::int64_t i, std::int64_t run) {
      return partial(context_.workspace.shared() + (i * most + run) * partial_size());
    };
    context_.machine.pool.run(tiles * most, [&](std::int64_t task, int thread) {
      const std::int64_t i = task % tiles, run = task / tiles;
      const QueryTile& tile = tiles_[index(i)];
      if (run >= tile.runs) return;
      const Scratch s = scratch(context_.workspace.own(thread));
      load_queries(step, tile, s.q);
      attend_run(step, {&tile, run}, {}, s, place(i, run));
    });
    for (std::int64_t i = 0; i < tiles; ++i) {
      const QueryTile& tile = tiles_[index(i)];
      for (std::int64_t run = 1; run < tile.runs; ++run) {
        merge(place(i, 0), place(i, run), (tile.end - tile.begin) * group_);
      }
      finish(step, tile, place(i, 0));
    }
  }

  Context& context_;
  Columns q_, k_, v_;
  std::optional<Columns> gate_;
  AttentionSpec spec_;
  Value out_;
  std::int64_t group_, tile_tokens_, blocks_per_pass_, run_, q_stride_;
  KvPool<Storage> pool_;
  std::vector<QueryTile> tiles_;
  std::int64_t longest_ = 0;
};

void check(const Columns& q, const Columns& k, const Columns& v, const std::optional<Columns>& gate,
           const AttentionSpec& spec, Value out) {
  if (spec.heads < 1 || spec.kv_heads < 1 || spec.head_dim < 1 || spec.heads % spec.kv_heads != 0) {
    throw std::invalid_argument("attention: " + std::to_string(spec.heads) + " heads over " +
                                std::to_string(spec.kv_heads) + " KV heads of " + std::to_string(spec.head_dim));
  }
  require_columns("attention q", q, spec.heads, spec.head_dim);
  require_columns("attention k", k, spec.kv_heads, spec.head_dim);
  require_columns("attention v", v, spec.kv_heads, spec.head_dim);
  if (gate) require_columns("attention gate", *gate, spec.heads, spec.head_dim);
  require_equal("attention output", out.dim, spec.heads * spec.head_dim);
  for (const auto* norm : {&spec.q_norm, &spec.k_norm}) {
    if (*norm) require_equal("attention norm", static_cast<std::int64_t>((*norm)->weight.size()), spec.head_dim);
  }
  if (spec.rope && 2 * spec.rope->half() > spec.head_dim) {
    throw std::invalid_argument("attention: " + std::to_string(2 * spec.rope->half()) + " rotated values in heads of " +
                                std::to_string(spec.head_dim));
  }
}

}  // namespace

std::unique_ptr<Op> make_attention(Context& context, Columns q, Columns k, Columns v, std::optional<Columns> gate,
                                   AttentionSpec spec, Value out, std::int64_t& bytes) {
  check(q, k, v, gate, spec, out);
  auto make = [&]<typename Storage>() -> std::unique_ptr<Op> {
    auto op = std::make_unique<Attention<Storage>>(context, q, k, v, gate, std::move(spec), out);
    bytes += op->bytes();
    return op;
  };
  return context.limits.precision == Precision::fast ? make.template operator()<Bfloat16>()
                                                     : make.template operator()<float>();
}

}  // namespace mixbit
