// From a name to the block that holds it, with full comparison of names.
#pragma once

#include "digest.h"
#include "eviction_memory.h"
#include "slot_table.h"

namespace kvtune::pool {

// Names of `num_ids` blocks, 32 bytes each and owned here, 6 bytes of table each.
class DigestIndex {
 public:
  DigestIndex(int64_t num_ids, int64_t max_evicted)
      : evicted(max_evicted), digests_(num_ids), table_(num_ids, num_ids) {}

  // -1: nobody. `mixed`: of the name, here and below.
  int32_t find(const Digest& digest, uint64_t mixed) const {
    const auto [slot, is_there] = slot_of(digest, mixed);
    return is_there ? table_.number(slot) : -1;
  }
  int32_t find(const Digest& digest) const { return find(digest, digest.mixed()); }

  // False where the name has a block already.
  bool insert(const Digest& digest, uint64_t mixed, int32_t id) {
    const auto [slot, is_there] = slot_of(digest, mixed);
    if (is_there) return false;
    table_.put(slot, mixed, id);
    digests_[id] = digest;
    evicted.remove(mixed);
    return true;
  }

  bool evict(int32_t id, uint64_t mixed) {
    if (!forget(id, mixed)) return false;
    evicted.add(mixed);
    return true;
  }

  bool forget(int32_t id, uint64_t mixed) {
    const auto [slot, is_there] = table_.find(mixed, [id](int32_t other) { return other == id; });
    if (is_there) table_.erase(slot, [this](int32_t other) { return digests_[other].mixed(); });
    return is_there;
  }

  const Digest& digest(int32_t id) const { return digests_[id]; }
  int64_t size() const { return table_.size(); }
  int64_t bytes() const { return digests_.bytes() + table_.bytes() + evicted.bytes(); }
  int64_t ids(int32_t* out) const { return table_.numbers(out); }  // of all findable blocks, in no order

  // What a search will read first; then, once that is there, what it will compare; what an eviction will read first.
  void prefetch(uint64_t mixed) const { table_.prefetch(mixed); }
  void prefetch_first(uint64_t mixed) const {
    const int32_t id = table_.first(mixed);
    if (id >= 0) prefetch_name(id);
  }
  void prefetch_name(int32_t id) const { fetch(&digests_[id]); }

  void clear() {
    table_.clear();
    evicted.clear();
  }

  EvictionMemory evicted;

 private:
  std::pair<int64_t, bool> slot_of(const Digest& digest, uint64_t mixed) const {
    return table_.find(mixed, [&](int32_t id) { return digests_[id] == digest; });
  }

  LazyArray<Digest> digests_;
  SlotTable table_;
};

}  // namespace kvtune::pool
