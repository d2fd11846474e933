// Greedy dual size frequency with frequency remembered after eviction (Cherkasova 1998), for prefix trees.
//
// At each use a block's priority becomes H = L + uses * (1 + depth / 256) ^ 0.25: L is the priority of the
// last victim, so that old popularity fades; the root of the recompute cost favours deep blocks mildly (its
// full weight costs hits); depth 256 stands for the context at which attention costs as much as the rest.
// The leaf with the lowest priority leaves, of equals the one released first. Uses of the last 8 capacities
// of evicted blocks are remembered. Twin: kvtune.cache.eviction_gdsf.
#pragma once

#include <cmath>
#include <vector>

#include "block_heap.h"
#include "block_list.h"
#include "policy.h"

namespace kvtune::replay {

class Gdsf : public PinnedPolicy {
 public:
  static constexpr int64_t GHOSTS = 8;       // evicted blocks remembered, in capacities
  static constexpr double COST_DEPTH = 256;  // blocks of context that double a block's recompute cost

  Gdsf(Cache& cache, const Parameters& parameters)
      : PinnedPolicy(cache), facts_(static_cast<size_t>(cache.num_unique())), links_(cache.num_unique()),
        leaves_(cache.num_unique(), Before{&facts_}) {
    refuse_unknown(parameters, {});
  }

  size_t bytes() const override { return facts_.size() * sizeof(Facts) + links_.bytes() + leaves_.bytes(); }

 protected:
  void pin(const Request& request, int64_t k) override {
    const Block block = request.blocks[k];
    if (leaves_.contains(block)) leaves_.erase(block);
    facts_[block].is_candidate = false;
    use(block);
  }

  void insert(const Request& request, int64_t k) override {
    const Block block = request.blocks[k];
    Facts& facts = facts_[block];
    if (facts.is_ghost) {
      ghosts_.erase(links_, block);
      --num_ghosts_;
      facts.is_ghost = false;
    }
    use(block);
  }

  void unpin(const Request& request, int64_t k) override {
    const Block block = request.blocks[k];
    facts_[block].order = num_unpinned_++;
    facts_[block].is_candidate = true;
    if (cache().num_resident_children(block) == 0) leaves_.push(block);
  }

  Block victim() override { return leaves_.empty() ? NO_BLOCK : leaves_.top(); }

  void remove(Block block) override {
    if (leaves_.contains(block)) leaves_.erase(block);
    Facts& facts = facts_[block];
    inflation_ = std::max(inflation_, facts.priority);
    facts.is_candidate = false;
    facts.is_ghost = true;
    ghosts_.push_back(links_, block);
    if (++num_ghosts_ > GHOSTS * cache().capacity()) forget();
    const Block p = cache().parent(block);
    if (p != NO_BLOCK && facts_[p].is_candidate && cache().num_resident_children(p) == 1) leaves_.push(p);
  }

 private:
  struct Facts {
    double priority = 0;
    int64_t order = 0;
    int32_t uses = 0;
    bool is_candidate = false;
    bool is_ghost = false;
  };

  struct Before {
    const std::vector<Facts>* facts;
    bool operator()(Block a, Block b) const {
      const Facts &x = (*facts)[a], &y = (*facts)[b];
      return x.priority != y.priority ? x.priority < y.priority : x.order < y.order;
    }
  };

  void use(Block block) {
    Facts& facts = facts_[block];
    ++facts.uses;
    const double cost = std::sqrt(std::sqrt(1 + cache().depth(block) / COST_DEPTH));
    facts.priority = inflation_ + facts.uses * cost;
  }

  void forget() {
    const Block block = ghosts_.front();
    ghosts_.erase(links_, block);
    --num_ghosts_;
    facts_[block].is_ghost = false;
    facts_[block].uses = 0;
  }

  std::vector<Facts> facts_;
  BlockLinks links_;  // of the ghosts
  BlockHeap<Before> leaves_;
  BlockList ghosts_;  // evicted first in front
  int64_t num_ghosts_ = 0, num_unpinned_ = 0;
  double inflation_ = 0;
};

}  // namespace kvtune::replay
