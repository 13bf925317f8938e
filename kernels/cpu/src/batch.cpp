// Batches are checked before anything is touched: an index out of range must never reach an op.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "program.h"

namespace mixbit {
namespace {

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::string message = "batch: ";
  auto append = [&](const auto& part) {
    if constexpr (std::is_convertible_v<decltype(part), std::string>) message += part;
    else message += std::to_string(part);
  };
  (append(parts), ...);
  throw std::invalid_argument(message);
}

}  // namespace

void Program::check(const Batch& batch) const {
  if (logits_ < 0) throw std::invalid_argument("the program is not finished");
  const std::size_t tokens = batch.tokens.size(), sequences = batch.context_lengths.size();
  const auto limit = static_cast<std::size_t>(context_.limits.max_tokens);
  require(tokens > 0, "it has no tokens");
  require(tokens <= limit, tokens, " tokens, but the program was compiled for at most ", limit);
  require(batch.query_starts.size() == sequences + 1, "query_starts has ", batch.query_starts.size(),
          " entries, expected ", sequences + 1, " for ", sequences, " sequences");
  require(batch.query_starts.front() == 0 && static_cast<std::size_t>(batch.query_starts.back()) == tokens,
          "query_starts run from ", batch.query_starts.front(), " to ", batch.query_starts.back(), ", expected 0 to ",
          tokens);
  for (std::size_t t = 0; t < tokens; ++t) {
    require(batch.tokens[t] >= 0 && batch.tokens[t] < token_limit_, "token ", batch.tokens[t], " at row ", t,
            " is outside of the vocabulary of ", token_limit_);
  }
  if (has_attention_) {
    require(batch.block_tables.size() == sequences * static_cast<std::size_t>(batch.table_width),
            "block_tables has ", batch.block_tables.size(), " entries for ", sequences, " sequences");
  }
  if (has_state_) {
    require(batch.state_slots.size() == sequences, "state_slots has ", batch.state_slots.size(), " entries for ",
            sequences, " sequences");
  }
  for (std::size_t s = 0; s < sequences; ++s) check_sequence(batch, s);
  require(batch.logit_rows.size() <= limit, batch.logit_rows.size(), " logit_rows, at most ", limit);
  for (std::int32_t row : batch.logit_rows) {
    require(row >= 0 && static_cast<std::size_t>(row) < tokens, "logit row ", row, " of ", tokens, " rows");
  }
}

void Program::check_sequence(const Batch& batch, std::size_t s) const {
  const Limits& limits = context_.limits;
  const std::int64_t begin = batch.query_starts[s], end = batch.query_starts[s + 1];
  require(begin < end, "sequence ", s, " has no new token (rows ", begin, " to ", end, ")");
  require(batch.context_lengths[s] >= 0, "sequence ", s, " has context length ", batch.context_lengths[s]);
  const std::int64_t length = batch.context_lengths[s] + end - begin;
  require(length <= INT32_MAX, "sequence ", s, " has ", length, " tokens");
  if (has_attention_) {
    const std::int64_t used = (length + limits.block_size - 1) / limits.block_size;
    require(used <= batch.table_width, "sequence ", s, " needs ", used, " blocks for ", length,
            " tokens, but block_tables holds ", batch.table_width);
    const std::int32_t* table = batch.block_tables.data() + static_cast<std::int64_t>(s) * batch.table_width;
    for (std::int64_t i = 0; i < used; ++i) {
      require(table[i] >= 0 && table[i] < limits.blocks, "block ", table[i], " at entry ", i, " of sequence ", s,
              " is not one of ", limits.blocks);
    }
  }
  if (has_state_) {
    const std::int32_t slot = batch.state_slots[s];
    require(slot >= 0 && slot < limits.state_slots, "state slot ", slot, " of sequence ", s, " is not one of ",
            limits.state_slots);
    const auto before = batch.state_slots.first(s);
    require(std::find(before.begin(), before.end(), slot) == before.end(), "state slot ", slot,
            " is used by two sequences");
  }
}

}  // namespace mixbit
