// The two offline optima: Belady's rule (the block whose next use is furthest leaves) on prefix trees.
#pragma once

#include <vector>

#include "block_heap.h"
#include "policy.h"

namespace kvtune::replay {

// The request that uses each reference's block next, NEVER where none does. 4 bytes a reference.
inline std::vector<int32_t> next_uses(const TraceArrays& a) {
  std::vector<int32_t> next(static_cast<size_t>(a.num_references));
  std::vector<int32_t> upcoming(static_cast<size_t>(a.num_unique), NEVER);
  for (int64_t r = a.num_requests - 1; r >= 0; --r) {
    for (int64_t i = a.request_start[r]; i < a.request_start[r + 1]; ++i) {
      next[i] = upcoming[a.block_ids[i]];
      upcoming[a.block_ids[i]] = static_cast<int32_t>(r);
    }
  }
  return next;
}

// Furthest next use first, then deepest, then the higher number. A child is never used before its parent,
// so children leave before parents.
struct FurthestFirst {
  const Trace* trace;
  const std::vector<int32_t>* next_use;

  bool operator()(Block a, Block b) const {
    const int32_t use_a = (*next_use)[a], use_b = (*next_use)[b];
    if (use_a != use_b) return use_a > use_b;
    const int32_t depth_a = trace->depth(a), depth_b = trace->depth(b);
    return depth_a != depth_b ? depth_a > depth_b : a > b;
  }
};

// What both optima know: every reference's next use, and the residents in the order they leave.
class Foresight {
 public:
  explicit Foresight(const Cache& cache)
      : after_(next_uses(cache.trace().arrays())),
        next_use_(static_cast<size_t>(cache.num_unique()), NEVER),
        order_(cache.num_unique(), FurthestFirst{&cache.trace(), &next_use_}) {}

  Foresight(const Foresight&) = delete;
  Foresight& operator=(const Foresight&) = delete;

  void insert(const Request& request, int64_t k) {
    next_use_[request.blocks[k]] = after_[request.first_reference + k];
    order_.push(request.blocks[k]);
  }
  void erase(Block block) { order_.erase(block); }
  Block furthest() const { return order_.empty() ? NO_BLOCK : order_.top(); }
  size_t bytes() const { return (after_.size() + next_use_.size()) * sizeof(int32_t) + order_.bytes(); }

 private:
  std::vector<int32_t> after_;
  std::vector<int32_t> next_use_;
  BlockHeap<FurthestFirst> order_;
};

// Any block may leave, those of the current request included: no rule can serve more hit blocks.
class Optimal : public Policy {
 public:
  Optimal(Cache& cache, const Parameters& parameters) : Policy(cache), foresight_(cache) {
    refuse_unknown(parameters, {});
  }

  void serve(const Request& request) override {
    Cache& cache = this->cache();
    for (int64_t k = 0; k < request.num_blocks; ++k) {
      if (cache.is_resident(request.blocks[k])) {
        foresight_.erase(request.blocks[k]);
      } else {
        cache.admit(request.blocks[k]);
      }
      foresight_.insert(request, k);
    }
    while (cache.num_resident() > cache.capacity()) {
      const Block block = foresight_.furthest();
      foresight_.erase(block);
      cache.evict(block);
    }
  }

  size_t bytes() const override { return foresight_.bytes(); }

 private:
  Foresight foresight_;
};

// The current request's blocks must be admitted: what an engine can do.
class OptimalPinned : public PinnedPolicy {
 public:
  OptimalPinned(Cache& cache, const Parameters& parameters) : PinnedPolicy(cache), foresight_(cache) {
    refuse_unknown(parameters, {});
  }

  size_t bytes() const override { return foresight_.bytes(); }

 protected:
  void pin(const Request& request, int64_t k) override { foresight_.erase(request.blocks[k]); }
  Block victim() override { return foresight_.furthest(); }
  void remove(Block block) override { foresight_.erase(block); }
  void insert(const Request&, int64_t) override {}
  void unpin(const Request& request, int64_t k) override { foresight_.insert(request, k); }

 private:
  Foresight foresight_;
};

}  // namespace kvtune::replay
