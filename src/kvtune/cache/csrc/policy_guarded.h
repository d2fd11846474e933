// hazard, guarded by LRU: the default. As long as it has not fallen behind a pure LRU cache of the same size
// on this very traffic, hazard decides; once it has, LRU does.
//
// The pure LRU cache is a shadow: names only, its last `capacity` blocks by use. Hits of both are counted for
// each request. The allowance is what may be lost before the guard acts: a quarter of a percent of all
// references and a little to begin with. Then LRU decides, for at least four capacities of references (each
// time twice as long) and until half the percentage is made good. Eviction by last use turns the
// cache into the shadow's copy, so that what is lost stays within the allowance and that change.
// hazard goes on learning. Twin: kvtune.cache.eviction_guarded.
#pragma once

#include <algorithm>

#include "hazard_order.h"
#include "policy.h"

namespace kvtune::replay {

class Guarded : public PinnedPolicy {
 public:
  Guarded(Cache& cache, const Parameters& parameters)
      : PinnedPolicy(cache), order_(cache), links_(cache.num_unique()), shadow_links_(cache.num_unique()),
        is_in_shadow_(static_cast<size_t>(cache.num_unique()), 0), wait_(std::max<int64_t>(5000, 4 * cache.capacity())) {
    refuse_unknown(parameters, {});
  }

  size_t bytes() const override {
    return order_.bytes() + links_.bytes() + shadow_links_.bytes() + is_in_shadow_.size();
  }

 protected:
  void begin(const Request& request) override {
    order_.begin(request.num_blocks, order_.deepest_known(request.blocks, request.num_blocks));
    int64_t hit = 0, shadow_hit = 0;
    while (hit < request.num_blocks && cache().is_resident(request.blocks[hit])) ++hit;
    while (shadow_hit < request.num_blocks && is_in_shadow_[request.blocks[shadow_hit]]) ++shadow_hit;
    behind_ += shadow_hit - hit;
    num_references_ += request.num_blocks;
    decide();
  }

  void pin(const Request& request, int64_t k) override {
    recency_.erase(links_, request.blocks[k]);
    order_.pin(request.blocks[k]);
  }

  Block victim() override { return is_lru_ ? recency_.front() : order_.victim(); }

  void remove(Block block) override {
    recency_.erase(links_, block);
    order_.remove(block);
  }

  void insert(const Request& request, int64_t k) override {
    order_.insert(request.blocks[k], cache().parent(request.blocks[k]));
  }

  void unpin(const Request& request, int64_t k) override {
    const Block block = request.blocks[k];
    order_.unpin(block);
    recency_.push_back(links_, block);
    use_in_shadow(block);
  }

 private:
  void decide() {
    if (!is_lru_) {
      is_lru_ = behind_ > num_references_ / 400 + 32 + cache().capacity() / 200;
      if (is_lru_) since_ = num_references_;
    } else if (num_references_ - since_ > wait_ && behind_ < num_references_ / 800) {
      is_lru_ = false;
      wait_ *= 2;
    }
  }

  void use_in_shadow(Block block) {
    if (is_in_shadow_[block]) {
      shadow_.erase(shadow_links_, block);
    } else {
      is_in_shadow_[block] = 1;
      ++num_in_shadow_;
    }
    shadow_.push_back(shadow_links_, block);
    if (num_in_shadow_ <= cache().capacity()) return;
    const Block oldest = shadow_.front();
    shadow_.erase(shadow_links_, oldest);
    is_in_shadow_[oldest] = 0;
    --num_in_shadow_;
  }

  HazardOrder<Cache> order_;
  BlockLinks links_;
  BlockList recency_;  // candidates, oldest use first
  BlockLinks shadow_links_;
  BlockList shadow_;
  std::vector<uint8_t> is_in_shadow_;
  int64_t num_in_shadow_ = 0;
  int64_t behind_ = 0;  // hits of the shadow more than of the cache
  int64_t num_references_ = 0, since_ = 0, wait_;
  bool is_lru_ = false;
};

}  // namespace kvtune::replay
