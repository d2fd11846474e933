// Which blocks were evicted last: to tell "evicted" from "never seen". 4 bytes a place, 6 places of 16 in use.
#pragma once

#include <algorithm>

#include "digest.h"

namespace kvtune::pool {

// The last `max_evicted` evictions, to the 256th part of them. A bucket is a cache line of sixteen places; a name is
// kept as 21 bits beside its bucket: about three answers in a million are wrong. The oldest of sixteen leaves early
// where all of them are younger.
class EvictionMemory {
 public:
  explicit EvictionMemory(int64_t max_evicted)
      : max_evicted_(max_evicted), step_(std::max<int64_t>(1, (max_evicted + MOST_AGE - 1) / MOST_AGE)),
        num_buckets_(std::max<int64_t>(16, max_evicted / 6 + 1)), places_(num_buckets_ * BUCKET) {}

  void add(uint64_t mixed) {
    is_empty_ = false;
    if (++num_in_epoch_ >= step_) {
      num_in_epoch_ = 0;
      epoch_ = (epoch_ + 1) % NUM_EPOCHS;
    }
    *oldest(bucket(mixed)) = epoch_ << TAG_BITS | tag(mixed);
  }

  void remove(uint64_t mixed) {
    if (is_empty_) return;
    uint32_t* places = bucket(mixed);
    for (uint32_t* p = places; p < places + BUCKET; ++p) {
      if ((*p & TAG_MASK) == tag(mixed)) *p = 0;
    }
  }

  bool contains(uint64_t mixed) const {
    if (is_empty_) return false;
    const uint32_t* places = bucket(mixed);
    bool is_there = false;
    for (int i = 0; i < BUCKET; ++i) is_there |= (places[i] & TAG_MASK) == tag(mixed) && is_live(places[i]);
    return is_there;
  }

  void prefetch(uint64_t mixed) const {
    if (!is_empty_) fetch(bucket(mixed));
  }

  void clear() {
    places_ = LazyArray<uint32_t>(places_.size());
    is_empty_ = true;
  }
  int64_t bytes() const { return places_.bytes(); }

 private:
  static constexpr int BUCKET = 16;
  static constexpr int TAG_BITS = 22;
  static constexpr uint32_t TAG_MASK = (uint32_t{1} << TAG_BITS) - 1;
  static constexpr uint32_t NUM_EPOCHS = 1024;  // counted in a circle
  static constexpr int64_t MOST_AGE = 256;      // epochs that are remembered

  uint32_t* bucket(uint64_t mixed) { return places_.data() + BUCKET * place_of(mixed, num_buckets_); }
  const uint32_t* bucket(uint64_t mixed) const { return &places_[BUCKET * place_of(mixed, num_buckets_)]; }

  static uint32_t tag(uint64_t mixed) { return (static_cast<uint32_t>(mixed) & TAG_MASK) | 1; }  // 0: empty

  uint32_t age(uint32_t place) const { return (epoch_ - (place >> TAG_BITS)) % NUM_EPOCHS; }
  bool is_live(uint32_t place) const { return place != 0 && age(place) * step_ < max_evicted_; }

  uint32_t* oldest(uint32_t* places) const {
    int32_t most = 0;  // age and place
    for (int32_t i = 0; i < BUCKET; ++i) {
      const uint32_t own = places[i] == 0 ? NUM_EPOCHS : age(places[i]);
      most = std::max(most, static_cast<int32_t>(own) * BUCKET + i);
    }
    return places + most % BUCKET;
  }

  int64_t max_evicted_, step_;  // evictions an epoch lasts
  int64_t num_buckets_;
  int64_t num_in_epoch_ = 0;
  uint32_t epoch_ = 0;
  bool is_empty_ = true;
  LazyArray<uint32_t> places_;
};

}  // namespace kvtune::pool
