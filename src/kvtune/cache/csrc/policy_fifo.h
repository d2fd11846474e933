// First inserted, first out.
#pragma once

#include <vector>

#include "block_list.h"
#include "policy.h"

namespace kvtune::replay {

// Two bodies of one order. In a trace replay fifo is textbook fifo: room is made before each insert and the
// current request's blocks may leave. In an engine they are pinned, and the oldest candidate leaves.
class Fifo : public PinnedPolicy {
 public:
  Fifo(Cache& cache, const Parameters& parameters)
      : PinnedPolicy(cache),
        links_(cache.num_unique()),
        is_pinned_(cache.is_engine() ? static_cast<size_t>(cache.num_unique()) : 0, 0) {
    refuse_unknown(parameters, {});
  }

  void serve(const Request& request) override {
    Cache& cache = this->cache();
    if (cache.is_engine()) return PinnedPolicy::serve(request);
    for (int64_t k = 0; k < request.num_blocks; ++k) {
      const Block block = request.blocks[k];
      if (cache.is_resident(block)) continue;
      if (cache.num_resident() == cache.capacity()) {
        const Block oldest = order_.front();
        order_.erase(links_, oldest);
        cache.evict(oldest);
      }
      cache.admit(block);
      order_.push_back(links_, block);
    }
  }

  size_t bytes() const override { return links_.bytes() + is_pinned_.size(); }

 protected:
  void begin(const Request&) override { cursor_ = NO_BLOCK; }
  void pin(const Request& request, int64_t k) override { is_pinned_[request.blocks[k]] = 1; }
  void unpin(const Request& request, int64_t k) override { is_pinned_[request.blocks[k]] = 0; }

  void insert(const Request& request, int64_t k) override {
    order_.push_back(links_, request.blocks[k]);
    is_pinned_[request.blocks[k]] = 1;
  }

  // Pins come before victims, so what the cursor has passed stays pinned until the request's end.
  Block victim() override {
    if (cursor_ == NO_BLOCK) cursor_ = order_.front();
    while (cursor_ != NO_BLOCK && is_pinned_[cursor_]) cursor_ = links_.next(cursor_);
    return cursor_;
  }

  void remove(Block block) override {
    if (block == cursor_) cursor_ = links_.next(block);
    order_.erase(links_, block);
  }

 private:
  BlockLinks links_;
  BlockList order_;  // oldest insertion first
  std::vector<uint8_t> is_pinned_;
  Block cursor_ = NO_BLOCK;
};

}  // namespace kvtune::replay
