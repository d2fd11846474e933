// Numbers of the contents a policy remembers, by 64 bits of their names: policies guess, so a collision in about
// 10^19 / n pairs does no harm.
#pragma once

#include "digest.h"
#include "prefix_tree.h"

namespace kvtune::pool {

// Open addressing, at most 60 % full; deleting moves later entries back.
class KnownNames {
 public:
  explicit KnownNames(int64_t max_numbers) : keys_(max_numbers), slots_(max_numbers * 5 / 3 + 16) {}

  Block find(uint64_t key) const { return slots_[slot_of(key)] - 1; }  // NO_BLOCK: unknown

  void insert(uint64_t key, Block number) {
    keys_[number] = key;
    slots_[slot_of(key)] = number + 1;
  }

  void erase(Block number) {
    int64_t hole = slot_of(keys_[number]);
    if (slots_[hole] != number + 1) return;
    for (int64_t slot = next(hole); slots_[slot] != 0; slot = next(slot)) {
      if (distance(home(keys_[slots_[slot] - 1]), slot) >= distance(hole, slot)) {
        slots_[hole] = slots_[slot];
        hole = slot;
      }
    }
    slots_[hole] = 0;
  }

  void prefetch(uint64_t key) const { __builtin_prefetch(&slots_[home(key)]); }
  int64_t bytes() const { return keys_.bytes() + slots_.bytes(); }

 private:
  int64_t home(uint64_t key) const { return place_of(key, slots_.size()); }
  int64_t next(int64_t slot) const { return slot + 1 == slots_.size() ? 0 : slot + 1; }
  int64_t distance(int64_t from, int64_t to) const { return to >= from ? to - from : to - from + slots_.size(); }

  int64_t slot_of(uint64_t key) const {
    int64_t slot = home(key);
    while (slots_[slot] != 0 && keys_[slots_[slot] - 1] != key) slot = next(slot);
    return slot;
  }

  LazyArray<uint64_t> keys_;
  LazyArray<int32_t> slots_;  // number + 1, 0: empty
};

}  // namespace kvtune::pool
