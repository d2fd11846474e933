// Numbers of the contents a policy remembers though they are gone, by 64 bits of their names: policies guess, so a
// collision in about 10^19 / n pairs does no harm.
#pragma once

#include "../trace.h"
#include "slot_table.h"

namespace kvtune::pool {

using replay::Block;
using replay::NO_BLOCK;

class KnownNames {
 public:
  KnownNames(int64_t max_numbers, int64_t max_names) : keys_(max_numbers), table_(max_names, max_numbers) {}

  int64_t size() const { return table_.size(); }

  // NO_BLOCK: unknown.
  Block find(uint64_t key) const {
    if (table_.size() == 0) return NO_BLOCK;
    const auto [slot, is_there] = slot_of(key);
    return is_there ? table_.number(slot) : NO_BLOCK;
  }

  void insert(uint64_t key, Block number) {
    auto [slot, is_there] = slot_of(key);
    if (is_there) {  // a collision: the older one is forgotten
      erase(table_.number(slot));
      slot = slot_of(key).first;
    }
    keys_[number] = key;
    table_.put(slot, key, number);
  }

  // If the number has a name here.
  void erase(Block number) {
    const auto [slot, is_there] = slot_of(keys_[number]);
    if (is_there && table_.number(slot) == number) table_.erase(slot, [this](Block n) { return keys_[n]; });
  }

  void prefetch(uint64_t key) const { table_.prefetch(key); }
  void prefetch_key(Block number) const { fetch(&keys_[number]); }
  uint64_t key(Block number) const { return keys_[number]; }
  int64_t bytes() const { return keys_.bytes() + table_.bytes(); }

 private:
  std::pair<int64_t, bool> slot_of(uint64_t key) const {
    return table_.find(key, [&](Block number) { return keys_[number] == key; });
  }

  LazyArray<uint64_t> keys_;
  SlotTable table_;
};

}  // namespace kvtune::pool
