// Which blocks were evicted last: to tell "evicted" from "never seen". 8 bytes a place, 3 places of 4 in use.
#pragma once

#include <algorithm>

#include "digest.h"

namespace kvtune::pool {

// The last `max_evicted` evictions. Buckets of eight, two for each name; what is too old counts as empty. A name
// is kept as 32 bits beside its bucket: one answer in about a billion is wrong. The oldest of sixteen leaves early
// where both buckets are full of younger ones.
class EvictionMemory {
 public:
  explicit EvictionMemory(int64_t max_evicted)
      : max_evicted_(max_evicted), num_buckets_(std::max<int64_t>(16, max_evicted / 6 + 1)),
        places_(num_buckets_ * BUCKET) {}

  void add(uint64_t mixed) {
    ++now_;
    const Oldest first = oldest(bucket(mixed)), second = oldest(other_bucket(mixed));
    uint64_t* place = first.num_live <= second.num_live ? first.place : second.place;
    *place = uint64_t{now_} << 32 | (mixed & 0xffffffff);
  }

  void remove(uint64_t mixed) {
    if (uint64_t* place = find(mixed)) *place = 0;
  }

  bool contains(uint64_t mixed) const { return const_cast<EvictionMemory*>(this)->find(mixed) != nullptr; }

  void prefetch(uint64_t mixed) const {
    auto* self = const_cast<EvictionMemory*>(this);
    __builtin_prefetch(self->bucket(mixed));
    __builtin_prefetch(self->other_bucket(mixed));
  }

  void clear() { now_ += static_cast<uint32_t>(max_evicted_); }  // all are too old now
  int64_t bytes() const { return places_.bytes(); }

 private:
  static constexpr int BUCKET = 8;  // a cache line
  static constexpr int64_t NEVER = int64_t{1} << 32;

  uint64_t* bucket(uint64_t mixed) { return places_.data() + BUCKET * place_of(mixed, num_buckets_); }
  uint64_t* other_bucket(uint64_t mixed) {
    return places_.data() + BUCKET * place_of((mixed ^ mixed >> 29) * 0x9e3779b97f4a7c15, num_buckets_);
  }

  // Of what never was: older than all.
  int64_t age(uint64_t entry) const { return entry == 0 ? NEVER : now_ - static_cast<uint32_t>(entry >> 32); }
  bool is_live(uint64_t entry) const { return age(entry) < max_evicted_; }

  struct Oldest {
    uint64_t* place;
    int num_live;
  };

  Oldest oldest(uint64_t* places) const {
    int64_t most = -1;
    Oldest found{places, 0};
    for (uint64_t* p = places; p < places + BUCKET; ++p) {
      const int64_t own = age(*p);
      found.num_live += own < max_evicted_;
      found.place = own > most ? p : found.place;
      most = std::max(most, own);
    }
    return found;
  }

  uint64_t* find(uint64_t mixed) {
    if (now_ == 0) return nullptr;
    uint64_t* first = bucket(mixed);
    uint64_t* second = other_bucket(mixed);
    if (!holds(first, mixed) && !holds(second, mixed)) return nullptr;
    for (uint64_t* places : {first, second}) {
      for (uint64_t* p = places; p < places + BUCKET; ++p) {
        if (static_cast<uint32_t>(*p) == static_cast<uint32_t>(mixed) && is_live(*p)) return p;
      }
    }
    return nullptr;
  }

  // Whether an entry of this name lies there, too old or not.
  static bool holds(const uint64_t* places, uint64_t mixed) {
    bool is_there = false;
    for (int i = 0; i < BUCKET; ++i) is_there |= static_cast<uint32_t>(places[i]) == static_cast<uint32_t>(mixed);
    return is_there;
  }

  int64_t max_evicted_, num_buckets_;
  uint32_t now_ = 0;
  LazyArray<uint64_t> places_;
};

}  // namespace kvtune::pool
