#include "expert_store.h"

#include <algorithm>
#include <numeric>
#include <set>

#include "checks.h"

namespace mixbit {
namespace {

constexpr std::chrono::milliseconds quiet_time{200};  // without a read: nobody is using the store

// Scales and biases so short that the request takes as much of the disk's time as their bytes do stay in memory once they
// were read, if those of all experts take no more than this share of it: as many bytes are then read for a token, but in
// a third of the requests.
constexpr std::int64_t lasting_bytes = 64 << 10;
constexpr double lasting_share = 0.3;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Stacks with one expert each, whose arrays are in `parts` order.
template <typename Visit>
void for_each_array(MlpWeights& w, const Visit& visit) {
  for (Matrix* m : {&w.gate, &w.up, &w.down}) {
    visit(m->weight);
    if (m->bits == 0) continue;
    visit(m->scales);
    visit(m->biases);
  }
}

struct Array {
  std::int64_t bytes;
  bool codes;  // or dense values
};

std::vector<Array> arrays_of(const MlpWeights& w) {
  std::vector<Array> arrays;
  for (const Matrix* m : {&w.gate, &w.up, &w.down}) {
    arrays.push_back({m->rows * m->row_bytes(), true});
    if (m->bits != 0) arrays.insert(arrays.end(), 2, {m->rows * m->groups() * size_of(m->dtype), false});
  }
  return arrays;
}

constexpr std::int64_t to_page(std::int64_t n) { return n / Reader::alignment * Reader::alignment; }

}  // namespace

ExpertStore::ExpertStore(StoreOptions options) : options_(std::move(options)) {}

ExpertStore::~ExpertStore() {
  stop_ = true;
  if (populating_.joinable()) populating_.join();
}

int ExpertStore::add(const MlpWeights& stacks, std::vector<FilePart> parts, Rows rows) {
  const std::vector<Array> arrays = arrays_of(stacks);
  require_equal("arrays of streamed experts", static_cast<std::int64_t>(parts.size()),
                static_cast<std::int64_t>(arrays.size()));
  Layer layer{.stacks = stacks, .parts = std::move(parts), .places = {}, .lasting = {}, .experts = stacks.gate.experts,
              .slot_bytes = 0, .rows = rows};
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    require_equal("bytes of an expert's array", layer.parts[i].bytes, arrays[i].bytes);
    require_equal("a file", layer.parts[i].file >= 0 && layer.parts[i].file < static_cast<int>(options_.files.size()),
                  true);
    layer.lasting.push_back(arrays[i].codes || arrays[i].bytes > lasting_bytes ? -1 : 0);
  }
  for (Matrix* m : {&layer.stacks.gate, &layer.stacks.up, &layer.stacks.down}) m->experts = 1;
  layers_.push_back(std::move(layer));
  return static_cast<int>(layers_.size()) - 1;
}

// Decides what lasts, and where every part goes. Returns the bytes that last.
std::int64_t ExpertStore::place_lasting() {
  const auto each_lasting = [&](auto visit) {
    for (Layer& layer : layers_)
      for (std::size_t i = 0; i < layer.parts.size(); ++i)
        if (layer.lasting[i] >= 0) visit(layer, i);
  };
  std::int64_t bytes = 0;
  each_lasting([&](Layer& layer, std::size_t i) {
    const FilePart& part = layer.parts[i];
    layer.lasting[i] = bytes;
    bytes += to_page(part.offset + layer.experts * part.bytes - 1) - to_page(part.offset) + Reader::alignment;
  });
  std::set<std::int64_t> sizes;  // of slots with all parts
  for (const Layer& layer : layers_) {
    std::int64_t size = 0;
    for (const FilePart& part : layer.parts) size += Reader::room(part.bytes);
    sizes.insert(size);
  }
  const std::int64_t room = options_.bytes - std::accumulate(sizes.begin(), sizes.end(), std::int64_t{0});
  const double most = std::min(lasting_share * static_cast<double>(options_.bytes), static_cast<double>(room));
  if (options_.access != Access::direct || static_cast<double>(bytes) > most) {
    each_lasting([](Layer& layer, std::size_t i) { layer.lasting[i] = -1; });
    bytes = 0;
  }
  if (bytes > 0) lasting_ = std::make_unique<Pages>(bytes);
  for (Layer& layer : layers_) {
    layer.lasts.assign(static_cast<std::size_t>(layer.experts), bytes == 0);
    for (std::size_t i = 0; i < layer.parts.size(); ++i) {
      layer.places.push_back(layer.slot_bytes);
      if (layer.lasting[i] < 0) layer.slot_bytes += Reader::room(layer.parts[i].bytes);
    }
  }
  return bytes;
}

// Neighbours share pages: a direct read for one writes to the other what the file has there, which is what is there.
std::byte* ExpertStore::lasting(const Layer& layer, std::size_t part, std::int64_t expert) const {
  const std::int64_t first = layer.parts[part].offset;
  return lasting_->data() + layer.lasting[part] + to_page(first + expert * layer.parts[part].bytes) - to_page(first);
}

void ExpertStore::finish() {
  const std::int64_t for_slots = options_.bytes - place_lasting();
  reader_ = std::make_unique<Reader>(options_.files, options_.access, options_.threads,
                                     [this](std::int64_t tag, std::int64_t bytes, const std::string* error) {
                                       done(tag, bytes, error);
                                     });
  double total = 0;
  for (Layer& layer : layers_) {
    const auto same = [&](const Pool& pool) { return pool.slot_bytes == layer.slot_bytes; };
    auto pool = std::find_if(pools_.begin(), pools_.end(), same);
    if (pool == pools_.end()) pool = pools_.insert(pool, {.slot_bytes = layer.slot_bytes, .keys = 0});
    layer.pool = static_cast<std::size_t>(pool - pools_.begin());
    layer.first_key = pool->keys;
    pool->keys += layer.experts;
    total += static_cast<double>(layer.experts * layer.slot_bytes);
  }
  // Each pool its share, and none less than one slot.
  std::int64_t least = 0, left = for_slots;
  for (const Pool& pool : pools_) least += pool.slot_bytes;
  if (least > left) {
    throw std::invalid_argument("memory for experts: " + std::to_string(left) +
                                " bytes, but one expert of each size needs " + std::to_string(least));
  }
  for (Pool& pool : pools_) {
    const double share = static_cast<double>(for_slots) * static_cast<double>(pool.keys * pool.slot_bytes) / total;
    least -= pool.slot_bytes;
    const std::int64_t bytes = std::min(static_cast<std::int64_t>(share), left - least);
    const std::int64_t count = std::clamp<std::int64_t>(bytes / pool.slot_bytes, 1, pool.keys);
    left -= count * pool.slot_bytes;
    if (!reader_->mapped()) pool.memory = std::make_unique<Pages>(count * pool.slot_bytes);
    pool.residency = std::make_unique<Residency>(pool.keys, count);
    pool.slots.resize(static_cast<std::size_t>(count));
  }
  if (!reader_->mapped()) populating_ = std::thread([this] { populate(); });
}

// Slots are first written to by reads, which then wait for the system to clear memory, and in virtual machines for the
// host to find it: 6 ms for an expert, longer than its read. Done before, while nothing is being read.
void ExpertStore::populate() {
  const auto fill = [&](Pages& memory) {
    bool more = true;
    while (more && !stop_) {
      if (Clock::now() - last_read_.load() > quiet_time) {
        more = memory.populate_next();
      } else {
        std::this_thread::sleep_for(quiet_time / 2);
      }
    }
  };
  if (lasting_) fill(*lasting_);
  for (Pool& pool : pools_) fill(*pool.memory);
}

std::int64_t ExpertStore::bytes() const {
  std::int64_t bytes = lasting_ ? lasting_->size() : 0;
  for (const Pool& pool : pools_) bytes += pool.residency->slots() * pool.slot_bytes;
  return bytes;
}

std::int64_t ExpertStore::slots() const {
  std::int64_t count = 0;
  for (const Pool& pool : pools_) count += pool.residency->slots();
  return count;
}

std::vector<ExpertCounts> ExpertStore::counts() const {
  std::lock_guard lock(mutex_);
  std::vector<ExpertCounts> all;
  for (const Layer& layer : layers_) all.push_back(layer.counts);
  return all;
}

// Tags of reads: the pool in the low byte, the slot above.
std::int64_t ExpertStore::request(int number, std::int64_t expert, Urgency urgency) {
  Layer& layer = layers_[static_cast<std::size_t>(number)];
  Pool& pool = pools_[layer.pool];
  const std::int64_t place = pool.residency->claim(layer.first_key + expert);
  if (place < 0) return -1;
  pool.residency->pin(place);  // the readers' own
  Slot& slot = pool.slots[static_cast<std::size_t>(place)];
  slot = {.layer = number, .expert = expert, .ahead = urgency != Urgency::now};
  if (slot.ahead) {
    ahead_.emplace_back(layer.pool, place);
  } else {
    ++layer.counts.misses;
  }
  std::byte* base = pool.memory ? pool.memory->data() + place * pool.slot_bytes : nullptr;
  if (layer.reading++ == 0) layer.since = Clock::now();
  for (std::size_t i = 0; i < layer.parts.size(); ++i) {
    const bool stays = layer.lasting[i] >= 0;
    if (stays && layer.lasts[static_cast<std::size_t>(expert)]) continue;
    FilePart part = layer.parts[i];
    part.offset += expert * part.bytes;
    slot.pieces += Reader::pieces(part);
    std::byte* to = stays ? lasting(layer, i, expert) : base ? base + layer.places[i] : nullptr;
    reader_->read(part, to, place * 256 + static_cast<std::int64_t>(layer.pool), urgency == Urgency::idle);
  }
  return place;
}

void ExpertStore::done(std::int64_t tag, std::int64_t bytes, const std::string* error) {
  last_read_ = Clock::now();
  std::lock_guard lock(mutex_);
  Pool& pool = pools_[static_cast<std::size_t>(tag % 256)];
  const std::int64_t place = tag / 256;
  Slot& slot = pool.slots[static_cast<std::size_t>(place)];
  if (error) {
    slot.error = *error;
    slot.whole = false;
    pool.residency->spoil(place);
  } else {
    slot.begun = true;
    layers_[static_cast<std::size_t>(slot.layer)].counts.bytes += bytes;
  }
  end_piece(pool, place);
}

void ExpertStore::end_piece(Pool& pool, std::int64_t place) {
  Slot& slot = pool.slots[static_cast<std::size_t>(place)];
  if (--slot.pieces > 0) return;
  Layer& layer = layers_[static_cast<std::size_t>(slot.layer)];
  if (slot.whole) layer.lasts[static_cast<std::size_t>(slot.expert)] = true;
  if (--layer.reading == 0) layer.counts.read += seconds_since(layer.since);
  pool.residency->unpin(place);
  arrived_.notify_one();
}

// A layer that does not come after the last one: a step has begun.
void ExpertStore::advance(int layer) {
  if (layer <= last_layer_) {
    for (Pool& pool : pools_) pool.residency->advance();
  }
  last_layer_ = layer;
}

// Mapped experts that a file does not reach to any more: to touch them would end the process, to ask for them again tells
// what is wrong.
void ExpertStore::drop_cut_off(int number) {
  if (!reader_->mapped()) return;
  const Layer& layer = layers_[static_cast<std::size_t>(number)];
  std::int64_t whole = layer.experts, size = 0;
  for (int file = -1; const FilePart& part : layer.parts) {
    if (part.file != file) size = reader_->size(file = part.file);
    whole = std::clamp<std::int64_t>((size - part.offset) / part.bytes, 0, whole);
  }
  Residency& residency = *pools_[layer.pool].residency;
  for (std::int64_t expert = whole; expert < layer.experts; ++expert) {
    const std::int64_t place = residency.find(layer.first_key + expert);
    if (place < 0) continue;
    residency.pin(place);
    residency.spoil(place);
    residency.unpin(place);
  }
}

void ExpertStore::expect(int number, std::span<const std::int32_t> experts) {
  std::lock_guard lock(mutex_);
  const Layer& layer = layers_[static_cast<std::size_t>(number)];
  Residency& residency = *pools_[layer.pool].residency;
  drop_idle([&](const Pool& pool, std::int64_t place) {
    const auto expert = static_cast<std::int32_t>(pool.residency->key_in(place) - layer.first_key);
    return std::find(experts.begin(), experts.end(), expert) != experts.end();
  });
  for (std::int32_t expert : experts) {
    if (static_cast<std::int64_t>(ahead_.size()) >= residency.slots() / 4) return;
    if (const std::int64_t place = residency.find(layer.first_key + expert); place >= 0) {
      residency.pin(place);  // or it might make room for the others
      ahead_.emplace_back(layer.pool, place);
    } else if (request(number, expert, Urgency::idle) < 0) {
      return;
    }
  }
}

void ExpertStore::guess(int number, const Step& step) const {
  const Guess& guess = layers_[static_cast<std::size_t>(number)].guess;
  if (guess) guess(step);
}

void ExpertStore::drop_idle(const std::function<bool(const Pool&, std::int64_t)>& wanted) {
  const std::vector<std::int64_t> dropped = reader_->drop_idle(
      [&](std::int64_t tag) { return wanted(pools_[static_cast<std::size_t>(tag % 256)], tag / 256); });
  for (std::int64_t tag : dropped) {
    Pool& pool = pools_[static_cast<std::size_t>(tag % 256)];
    pool.residency->spoil(tag / 256);
    pool.slots[static_cast<std::size_t>(tag / 256)].whole = false;
    end_piece(pool, tag / 256);
  }
}

// The layer has asked: what else was read ahead for it is not waited for.
void ExpertStore::settle_ahead() {
  drop_idle([](const Pool& pool, std::int64_t place) { return !pool.slots[static_cast<std::size_t>(place)].ahead; });
  reader_->hasten_idle();
  for (const auto& [pool, place] : ahead_) {
    Slot& slot = pools_[pool].slots[static_cast<std::size_t>(place)];
    const bool begun = slot.begun || slot.pieces > 0;  // a piece was read, or is being read
    layers_[static_cast<std::size_t>(slot.layer)].counts.unused += slot.ahead && begun;
    slot.ahead = false;
    pools_[pool].residency->unpin(place);
  }
  ahead_.clear();
}

bool ExpertStore::misses(int number) const {
  std::lock_guard lock(mutex_);
  const Layer& layer = layers_[static_cast<std::size_t>(number)];
  const Residency& residency = *pools_[layer.pool].residency;
  if (residency.all_found()) return false;
  for (std::int64_t expert = 0; expert < layer.experts; ++expert) {
    if (residency.find(layer.first_key + expert) < 0) return true;
  }
  return false;
}

MlpWeights ExpertStore::weights(int number, std::int64_t expert, std::int64_t place) const {
  const Layer& layer = layers_[static_cast<std::size_t>(number)];
  const Pool& pool = pools_[layer.pool];
  MlpWeights one = layer.stacks;
  std::size_t i = 0;
  for_each_array(one, [&](const std::byte*& array) {
    const FilePart& part = layer.parts[i];
    const std::int64_t offset = part.offset + expert * part.bytes;
    if (layer.lasting[i] >= 0) {
      array = lasting(layer, i, expert) + Reader::lead(offset);
    } else if (pool.memory) {
      array = pool.memory->data() + place * pool.slot_bytes + layer.places[i] + Reader::lead(offset);
    } else {
      array = reader_->at(part.file, offset);
    }
    ++i;
  });
  return one;
}

}  // namespace mixbit
