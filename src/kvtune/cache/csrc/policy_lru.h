// Least recently used. Leaf-first by the order of use alone: see kvtune.cache.eviction.
#pragma once

#include <vector>

#include "block_list.h"
#include "policy.h"

namespace kvtune::replay {

class Lru : public PinnedPolicy {
 public:
  Lru(Cache& cache, const Parameters& parameters) : PinnedPolicy(cache), links_(cache.num_unique()) {
    refuse_unknown(parameters, {});
  }

  size_t bytes() const override { return links_.bytes(); }

 protected:
  void pin(const Request& request, int64_t k) override { order_.erase(links_, request.blocks[k]); }
  Block victim() override { return order_.front(); }
  void remove(Block block) override { order_.erase(links_, block); }
  void insert(const Request&, int64_t) override {}
  void unpin(const Request& request, int64_t k) override { order_.push_back(links_, request.blocks[k]); }

 private:
  BlockLinks links_;
  BlockList order_;  // oldest use first
};

}  // namespace kvtune::replay
