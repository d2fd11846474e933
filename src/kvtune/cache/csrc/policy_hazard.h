// Lowest learned rate of hits leaves first: online survival curves by class (hazard_order.h, survival.h).
#pragma once

#include "hazard_order.h"
#include "policy.h"

namespace kvtune::replay {

class Hazard : public PinnedPolicy {
 public:
  Hazard(Cache& cache, const Parameters& parameters) : PinnedPolicy(cache), order_(cache) {
    refuse_unknown(parameters, {});
  }

  size_t bytes() const override { return order_.bytes(); }

 protected:
  void begin(const Request& request) override {
    order_.begin(request.num_blocks, order_.deepest_known(request.blocks, request.num_blocks));
  }
  void pin(const Request& request, int64_t k) override { order_.pin(request.blocks[k]); }
  Block victim() override { return order_.victim(); }
  void remove(Block block) override { order_.remove(block); }
  void insert(const Request& request, int64_t k) override {
    order_.insert(request.blocks[k], cache().parent(request.blocks[k]));
  }
  void unpin(const Request& request, int64_t k) override { order_.unpin(request.blocks[k]); }

 private:
  HazardOrder<Cache> order_;
};

}  // namespace kvtune::replay
