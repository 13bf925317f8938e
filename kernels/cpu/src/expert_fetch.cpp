// The order in which a step gets its experts.
#include <algorithm>

#include "expert_store.h"

namespace mixbit {
namespace {

constexpr std::int64_t scan_window = 64;   // experts that a scan holds: enough to keep the disk and all threads busy
constexpr std::int64_t ahead_window = 1024;  // and those of the next layer: the disk has its mixer's time for them
constexpr std::size_t scan_wave = 16;

}  // namespace

ExpertFetch::ExpertFetch(ExpertStore& store, int layer, std::span<const Grouping::Group> groups, std::int64_t tokens,
                         bool in_order)
    : store_(store), layer_(layer), groups_(groups), in_order_(in_order), needs_(groups.size()) {
  std::lock_guard lock(store.mutex_);
  store.advance(layer);
  store.drop_cut_off(layer);
  ExpertStore::Layer& own = store.layers_[static_cast<std::size_t>(layer)];
  Residency& residency = *store.pools_[own.pool].residency;
  // What follows will hardly be different: as good as all experts of the next layer too.
  scan_ = in_order && 10 * static_cast<std::int64_t>(groups.size()) >= 9 * own.experts;
  for (std::size_t i = 0; i < groups.size(); ++i) {
    const std::int64_t key = own.first_key + groups[i].expert;
    residency.note(key, static_cast<double>(groups[i].count) / static_cast<double>(tokens));
    const std::int64_t slot = residency.find(key);
    if (slot < 0) continue;
    residency.pin(slot);
    needs_[i] = {State::held, false, slot};
    ExpertStore::Slot& place = store.pools_[own.pool].slots[static_cast<std::size_t>(slot)];
    own.counts.hits += !place.ahead;
    own.counts.misses += place.ahead;
    own.counts.ahead += place.ahead && place.begun;
    place.ahead = false;
  }
  store.settle_ahead();
  request_pending();
  since_ = ExpertStore::Clock::now();
}

ExpertFetch::~ExpertFetch() {
  std::lock_guard lock(store_.mutex_);
  Residency& residency = *store_.pools_[store_.layers_[static_cast<std::size_t>(layer_)].pool].residency;
  for (const Need& need : needs_) {
    if (need.slot >= 0) residency.unpin(need.slot);
  }
}

std::span<const std::size_t> ExpertFetch::next() {
  std::unique_lock lock(store_.mutex_);
  ExpertCounts& counts = store_.layers_[static_cast<std::size_t>(layer_)].counts;
  const auto asked = ExpertStore::Clock::now();
  if (!wave_.empty()) counts.compute += std::chrono::duration<double>(asked - since_).count();
  release_wave();
  while (first_kept_ < needs_.size()) {
    request_pending();
    if (scan_ && first_pending_ == needs_.size()) request_ahead();
    collect();
    if (!wave_.empty()) break;
    const bool reading = std::any_of(needs_.begin(), needs_.end(), [&](const Need& need) {
      return need.state == State::held && !ready(need);
    });
    if (reading || !yield_one()) store_.arrived_.wait(lock);
  }
  since_ = ExpertStore::Clock::now();
  counts.wait += std::chrono::duration<double>(since_ - asked).count();
  return wave_;
}

MlpWeights ExpertFetch::weights(std::size_t group) const {
  return store_.weights(layer_, groups_[group].expert, needs_[group].slot);
}

void ExpertFetch::release_wave() {
  Residency& residency = *store_.pools_[store_.layers_[static_cast<std::size_t>(layer_)].pool].residency;
  for (std::size_t i : wave_) {
    residency.unpin(needs_[i].slot);
    needs_[i] = {State::given, false, -1};
  }
  wave_.clear();
  while (first_kept_ < needs_.size() && needs_[first_kept_].state == State::given) ++first_kept_;
}

// In the order of groups, as far as there are slots. Who needs many takes few at a time: they must not turn out what
// others come back for.
void ExpertFetch::request_pending() {
  std::int64_t taken = std::count_if(needs_.begin(), needs_.begin() + static_cast<std::ptrdiff_t>(first_pending_),
                                     [](const Need& need) { return need.read && need.state == State::held; });
  for (; first_pending_ < needs_.size(); ++first_pending_) {
    Need& need = needs_[first_pending_];
    if (need.state != State::pending) continue;
    if (in_order_ && taken >= scan_window) return;
    const std::int64_t slot = store_.request(layer_, groups_[first_pending_].expert, ExpertStore::Urgency::now);
    if (slot < 0) return;
    need = {State::held, true, slot};
    ++taken;
  }
}

// While this layer is computed, the disk goes on with the next, but not for selected rows: those are few.
void ExpertFetch::request_ahead() {
  const auto next = static_cast<std::size_t>(layer_) + 1;
  if (next >= store_.layers_.size()) return;
  const ExpertStore::Layer& layer = store_.layers_[next];
  if (layer.rows == Rows::selected) return;
  Residency& residency = *store_.pools_[layer.pool].residency;
  const std::int64_t limit = std::min(ahead_window, residency.slots() / 4);
  for (std::int64_t expert = 0; expert < layer.experts; ++expert) {
    if (static_cast<std::int64_t>(store_.ahead_.size()) >= limit) return;
    if (residency.find(layer.first_key + expert) >= 0) continue;
    if (store_.request(static_cast<int>(next), expert, ExpertStore::Urgency::ahead) < 0) return;
  }
}

bool ExpertFetch::ready(const Need& need) const {
  const auto& pool = store_.pools_[store_.layers_[static_cast<std::size_t>(layer_)].pool];
  return pool.slots[static_cast<std::size_t>(need.slot)].pieces == 0;
}

void ExpertFetch::collect() {
  const auto& pool = store_.pools_[store_.layers_[static_cast<std::size_t>(layer_)].pool];
  for (std::size_t i = first_kept_; i < needs_.size(); ++i) {
    const Need& need = needs_[i];
    if (need.state == State::held && ready(need)) {
      const std::string& error = pool.slots[static_cast<std::size_t>(need.slot)].error;
      if (!error.empty()) throw ReadError(error);
      wave_.push_back(i);
      if (in_order_ && wave_.size() == scan_wave) return;
    } else if (in_order_ && need.state != State::given) {
      return;
    }
  }
}

// Nothing to compute, nothing on its way: the slots are held by experts whose turn comes later. The last gives way.
bool ExpertFetch::yield_one() {
  for (std::size_t i = needs_.size(); i-- > first_kept_;) {
    if (needs_[i].state != State::held) continue;
    store_.pools_[store_.layers_[static_cast<std::size_t>(layer_)].pool].residency->unpin(needs_[i].slot);
    needs_[i] = {};
    first_pending_ = std::min(first_pending_, i);
    return true;
  }
  return false;
}

}  // namespace mixbit
