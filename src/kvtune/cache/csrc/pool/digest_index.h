// From a name to the block that holds it: open addressing, linear probing, full comparison of names.
#pragma once

#include "digest.h"
#include "eviction_memory.h"

namespace kvtune::pool {

// Names of `num_ids` blocks (32 bytes each, owned here) and a table of ids at most 60 % full (6.7 bytes each).
// Deleting moves later entries back: there are no tombstones, and the table never grows.
class DigestIndex {
 public:
  DigestIndex(int64_t num_ids, int64_t max_evicted)
      : evicted(max_evicted), digests_(num_ids), slots_(num_ids * 5 / 3 + 16) {}

  int32_t find(const Digest& digest) const { return slots_[slot_of(digest)] - 1; }  // -1: nobody

  // False where the name has a block already.
  bool insert(const Digest& digest, int32_t id) {
    const int64_t slot = slot_of(digest);
    if (slots_[slot] != 0) return false;
    slots_[slot] = id + 1;
    digests_[id] = digest;
    evicted.remove(digest.mixed());
    ++size_;
    return true;
  }

  bool evict(const Digest& digest) {
    if (!forget(digest)) return false;
    evicted.add(digest.mixed());
    return true;
  }

  bool forget(const Digest& digest) {
    int64_t hole = slot_of(digest);
    if (slots_[hole] == 0) return false;
    for (int64_t slot = next(hole); slots_[slot] != 0; slot = next(slot)) {
      // An entry may fill the hole unless its home lies behind the hole on its way here.
      if (distance(home(digests_[slots_[slot] - 1]), slot) >= distance(hole, slot)) {
        slots_[hole] = slots_[slot];
        hole = slot;
      }
    }
    slots_[hole] = 0;
    --size_;
    return true;
  }

  const Digest& digest(int32_t id) const { return digests_[id]; }
  void prefetch(const Digest& digest) const { __builtin_prefetch(&slots_[home(digest)]); }
  int64_t size() const { return size_; }
  int64_t bytes() const { return digests_.bytes() + slots_.bytes() + evicted.bytes(); }

  void clear() {
    slots_.clear();
    evicted.clear();
    size_ = 0;
  }

  // Ids of all findable blocks, in no order.
  int64_t ids(int32_t* out) const {
    int64_t num = 0;
    for (int64_t slot = 0; slot < slots_.size(); ++slot) {
      if (slots_[slot] != 0) out[num++] = slots_[slot] - 1;
    }
    return num;
  }

  EvictionMemory evicted;

 private:
  int64_t home(const Digest& digest) const { return place_of(digest.mixed(), slots_.size()); }
  int64_t next(int64_t slot) const { return slot + 1 == slots_.size() ? 0 : slot + 1; }
  int64_t distance(int64_t from, int64_t to) const { return to >= from ? to - from : to - from + slots_.size(); }

  // Where the name is, or the empty slot where it would be.
  int64_t slot_of(const Digest& digest) const {
    int64_t slot = home(digest);
    while (slots_[slot] != 0 && !(digests_[slots_[slot] - 1] == digest)) slot = next(slot);
    return slot;
  }

  LazyArray<Digest> digests_;
  LazyArray<int32_t> slots_;  // id + 1, 0: empty
  int64_t size_ = 0;
};

}  // namespace kvtune::pool
