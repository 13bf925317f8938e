// Experts that are read from their files when they are chosen, into slots of a bounded size in memory. Of experts
// that are mapped a slot has no memory: it stands for one that has been brought to where it is mapped.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "ops.h"
#include "pages.h"
#include "reader.h"
#include "residency.h"
#include "route.h"

namespace mixbit {

struct StoreOptions {
  std::vector<std::string> files;
  std::int64_t bytes;  // for all slots together
  Access access;
  int threads;         // that read
};

// Since the start. ahead: misses of which something had been read before they were asked for; unused: experts of which
// something was read, and that were not asked for. Seconds: while anything was being read for the layer; while its op had
// nothing to compute; while it computed experts.
struct ExpertCounts {
  std::int64_t hits = 0, misses = 0, ahead = 0, unused = 0, bytes = 0;
  double read = 0, wait = 0, compute = 0;
};

class ExpertStore {
 public:
  explicit ExpertStore(StoreOptions options);
  ~ExpertStore();

  // The stacks of one op's experts, and where expert 0 of each of their arrays lies: weight, then scales and biases of
  // quantized ones, of gate, up and down; expert e lies e times as many bytes further. rows: of the op. Returns the layer's
  // number; ops are added in the order in which they run.
  int add(const MlpWeights& stacks, std::vector<FilePart> parts, Rows rows);

  // All layers are known: takes memory for slots. Layers whose experts have one size share slots. Throws
  // std::invalid_argument if there is not room for one expert of each size.
  void finish();

  // What `layer` will probably ask for next, the most probable first, in place of what was expected of it before: is read
  // while the disk has nothing else to do.
  void expect(int layer, std::span<const std::int32_t> experts);

  // `guess` may call expect for the layer after `layer`; it is called while experts of `layer` are being read.
  using Guess = std::function<void(const Step& step)>;
  void guess_during(int layer, Guess guess) { layers_[static_cast<std::size_t>(layer)].guess = std::move(guess); }
  void guess(int layer, const Step& step) const;

  // Whether any expert of it is not in memory.
  bool misses(int layer) const;

  std::int64_t bytes() const;  // of all slots, and of what lasts
  std::int64_t slots() const;
  std::vector<ExpertCounts> counts() const;

 private:
  friend class ExpertFetch;
  using Clock = std::chrono::steady_clock;

  struct Layer {
    MlpWeights stacks;
    std::vector<FilePart> parts;
    std::vector<std::int64_t> places;   // of each part's room in a slot
    std::vector<std::int64_t> lasting;  // of each part in `lasting_`, laid out as in the file; -1: it comes with the slot
    std::vector<bool> lasts{};          // experts whose lasting parts have been read
    std::int64_t experts, slot_bytes;
    Rows rows;
    std::size_t pool = 0;
    std::int64_t first_key = 0;
    Guess guess{};
    ExpertCounts counts{};
    std::int64_t reading = 0;  // experts of it that are being read
    Clock::time_point since{};
  };
  struct Slot {
    std::int64_t pieces = 0;  // still to be read
    int layer = -1;
    std::int64_t expert = -1;
    bool whole = true;   // all pieces so far were read
    bool ahead = false;  // being read before it was asked for, and not asked for since
    bool begun = false;  // a piece has been read
    std::string error{};
  };
  struct Pool {
    std::int64_t slot_bytes, keys;
    std::unique_ptr<Pages> memory{};  // none: experts stay where they are mapped
    std::unique_ptr<Residency> residency{};
    std::vector<Slot> slots{};
  };

  enum class Urgency : std::uint8_t { now, ahead, idle };  // ahead: after what is wanted now

  void populate();  // a thread of its own
  std::int64_t place_lasting();
  std::byte* lasting(const Layer& layer, std::size_t part, std::int64_t expert) const;

  // All need the mutex.
  std::int64_t request(int layer, std::int64_t expert, Urgency urgency);  // a slot, pinned; -1: none to be had
  void advance(int layer);
  void drop_cut_off(int layer);
  void settle_ahead();
  void drop_idle(const std::function<bool(const Pool& pool, std::int64_t place)>& wanted);
  void end_piece(Pool& pool, std::int64_t place);

  void done(std::int64_t tag, std::int64_t bytes, const std::string* error);
  MlpWeights weights(int layer, std::int64_t expert, std::int64_t slot) const;

  StoreOptions options_;
  std::vector<Layer> layers_;
  std::vector<Pool> pools_;
  std::unique_ptr<Pages> lasting_;  // null: nothing lasts
  int last_layer_ = -1;
  std::vector<std::pair<std::size_t, std::int64_t>> ahead_;  // pool and slot: pinned until the next layer has asked
  mutable std::mutex mutex_;
  std::condition_variable arrived_;
  std::atomic<bool> stop_ = false;
  std::atomic<Clock::time_point> last_read_ = Clock::now();
  std::thread populating_;
  std::unique_ptr<Reader> reader_;  // last: its threads end first
};

// What one op of one step needs: experts in memory at once, the others as they are read.
class ExpertFetch {
 public:
  // groups: see Grouping. tokens: of the step. in_order: waves follow the order of groups, as a sum that is made in
  // place asks for; else whatever is ready comes first.
  ExpertFetch(ExpertStore& store, int layer, std::span<const Grouping::Group> groups, std::int64_t tokens,
              bool in_order);
  ~ExpertFetch();
  ExpertFetch(const ExpertFetch&) = delete;
  ExpertFetch& operator=(const ExpertFetch&) = delete;

  // Waits for the next groups, by number, whose experts are in memory; empty when all were given. Those given before
  // may leave memory. Throws ReadError.
  std::span<const std::size_t> next();

  // Of a group of the last wave.
  MlpWeights weights(std::size_t group) const;

 private:
  enum class State : std::uint8_t { pending, held, given };
  struct Need {
    State state = State::pending;
    bool read = false;  // for this fetch
    std::int64_t slot = -1;
  };

  void release_wave();
  void request_pending();
  void request_ahead();
  void collect();
  bool yield_one();
  bool ready(const Need& need) const;

  ExpertStore& store_;
  int layer_;
  std::span<const Grouping::Group> groups_;
  bool in_order_, scan_;
  std::vector<Need> needs_;
  std::vector<std::size_t> wave_;
  std::size_t first_pending_ = 0, first_kept_ = 0;  // before them none is pending; all were given
  ExpertStore::Clock::time_point since_;
};

}  // namespace mixbit
