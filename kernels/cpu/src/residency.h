// Which experts are in memory: bookkeeping of slots, without memory or files of its own.
#pragma once

#include <cstdint>
#include <set>
#include <vector>

namespace mixbit {

// An expert (a key) is worth what a token is likely to choose it: each step adds the share of its tokens that did,
// and what was added is halved every `half_life` steps. So a long prompt, which chooses nearly all experts once, counts
// as one token does, and does not flush those that decoding keeps choosing. Between experts of equal worth the one
// that came last goes first: a scan larger than memory then finds at its next round what it left at its start.
class Residency {
 public:
  static constexpr double half_life = 256;

  Residency(std::int64_t keys, std::int64_t slots);

  std::int64_t slots() const { return static_cast<std::int64_t>(held_.size()); }
  std::int64_t find(std::int64_t key) const { return where_[static_cast<std::size_t>(key)]; }  // its slot, or -1
  bool all_found() const { return found_ == static_cast<std::int64_t>(where_.size()); }  // every key has a slot
  std::int64_t key_in(std::int64_t slot) const { return held_[static_cast<std::size_t>(slot)].key; }  // or -1

  // A step begins: a unit of time has passed.
  void advance() { ++now_; }

  // share: of the step's tokens, those that chose `key`. Experts that are not in memory are remembered too.
  void note(std::int64_t key, double share);

  // A slot for `key`, which has none: a free one, else that of the unpinned expert of the least worth, which leaves
  // memory. -1 if all are pinned. The slot comes pinned once.
  std::int64_t claim(std::int64_t key);

  // Pins are counted; a slot with pins keeps its expert.
  void pin(std::int64_t slot);
  void unpin(std::int64_t slot);

  // What the slot holds is of no use: it is free once its pins are gone.
  void spoil(std::int64_t slot);

 private:
  // By worth, then the latest first. Worth is a logarithm that grows with the time of the last note, so that no order
  // between two experts changes while neither is noted.
  struct Rank {
    double worth;
    std::int64_t admitted, slot;
    bool operator<(const Rank& other) const {
      return worth != other.worth ? worth < other.worth : admitted > other.admitted;
    }
  };
  struct Slot {
    std::int64_t key = -1, admitted = 0;
    int pins = 0;
  };

  Rank rank(std::int64_t slot) const;

  // Of a slot without pins. Where there is a slot for every key none is ever turned out, and no order is kept.
  void list(std::int64_t slot);
  void unlist(std::int64_t slot);

  std::int64_t found_ = 0;  // keys that have a slot
  double now_ = 0;
  std::int64_t admissions_ = 0;
  std::vector<double> worth_;        // by key
  std::vector<std::int64_t> where_;  // by key
  std::vector<Slot> held_;           // by slot
  std::vector<std::int64_t> free_;
  std::set<Rank> evictable_;
};

}  // namespace mixbit
