#include "residency.h"

#include <cmath>
#include <limits>

namespace mixbit {

Residency::Residency(std::int64_t keys, std::int64_t slots)
    : worth_(static_cast<std::size_t>(keys), -std::numeric_limits<double>::infinity()),
      where_(static_cast<std::size_t>(keys), -1),
      held_(static_cast<std::size_t>(slots)) {
  for (std::int64_t slot = slots; slot-- > 0;) free_.push_back(slot);
}

Residency::Rank Residency::rank(std::int64_t slot) const {
  const Slot& held = held_[static_cast<std::size_t>(slot)];
  return {worth_[static_cast<std::size_t>(held.key)], held.admitted, slot};
}

void Residency::list(std::int64_t slot) {
  if (held_.size() < where_.size()) evictable_.insert(rank(slot));
}

void Residency::unlist(std::int64_t slot) {
  if (held_.size() < where_.size()) evictable_.erase(rank(slot));
}

void Residency::note(std::int64_t key, double share) {
  const std::int64_t slot = find(key);
  const bool listed = slot >= 0 && held_[static_cast<std::size_t>(slot)].pins == 0;
  if (listed) unlist(slot);
  double& worth = worth_[static_cast<std::size_t>(key)];
  const double since = now_ / half_life;
  worth = std::log2(std::exp2(worth - since) + share) + since;
  if (listed) list(slot);
}

std::int64_t Residency::claim(std::int64_t key) {
  std::int64_t slot;
  if (!free_.empty()) {
    slot = free_.back();
    free_.pop_back();
  } else if (!evictable_.empty()) {
    slot = evictable_.begin()->slot;
    evictable_.erase(evictable_.begin());
    where_[static_cast<std::size_t>(key_in(slot))] = -1;
    --found_;
  } else {
    return -1;
  }
  held_[static_cast<std::size_t>(slot)] = {key, ++admissions_, 1};
  where_[static_cast<std::size_t>(key)] = slot;
  ++found_;
  return slot;
}

void Residency::pin(std::int64_t slot) {
  Slot& held = held_[static_cast<std::size_t>(slot)];
  if (held.pins == 0) unlist(slot);
  ++held.pins;
}

void Residency::unpin(std::int64_t slot) {
  Slot& held = held_[static_cast<std::size_t>(slot)];
  if (--held.pins > 0) return;
  if (held.key < 0) {
    free_.push_back(slot);
  } else {
    list(slot);
  }
}

void Residency::spoil(std::int64_t slot) {
  Slot& held = held_[static_cast<std::size_t>(slot)];
  if (held.key < 0) return;
  where_[static_cast<std::size_t>(held.key)] = -1;
  --found_;
  held.key = -1;
}

}  // namespace mixbit
