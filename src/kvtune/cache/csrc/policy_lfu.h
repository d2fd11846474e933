// Textbook least frequently used: fewest uses since insertion, then the least recent request, then deepest.
#pragma once

#include <map>
#include <vector>

#include "block_list.h"
#include "policy.h"

namespace kvtune::replay {

// One list for each number of uses. Unpinning comes request by request and deepest first, so appending
// orders each list as ties are broken.
class Lfu : public PinnedPolicy {
 public:
  Lfu(Cache& cache, const Parameters& parameters)
      : PinnedPolicy(cache), links_(cache.num_unique()), uses_(static_cast<size_t>(cache.num_unique()), 0) {
    refuse_unknown(parameters, {});
  }

  size_t bytes() const override { return links_.bytes() + uses_.size() * sizeof(int32_t); }

 protected:
  void pin(const Request& request, int64_t k) override {
    const Block block = request.blocks[k];
    erase(block);
    ++uses_[block];
  }

  void insert(const Request& request, int64_t k) override { uses_[request.blocks[k]] = 1; }

  void unpin(const Request& request, int64_t k) override {
    const Block block = request.blocks[k];
    by_uses_[uses_[block]].push_back(links_, block);
  }

  Block victim() override { return by_uses_.empty() ? NO_BLOCK : by_uses_.begin()->second.front(); }
  void remove(Block block) override { erase(block); }

 private:
  void erase(Block block) {
    const auto list = by_uses_.find(uses_[block]);
    list->second.erase(links_, block);
    if (list->second.empty()) by_uses_.erase(list);
  }

  BlockLinks links_;
  std::vector<int32_t> uses_;
  std::map<int32_t, BlockList> by_uses_;  // lists that are not empty
};

}  // namespace kvtune::replay
