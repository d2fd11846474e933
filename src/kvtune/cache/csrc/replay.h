// Drives one policy over a trace, request by request.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "policy.h"

namespace kvtune::replay {

// How KVCacheManager limits each request; null pointers where a plain trace replay is asked for.
struct EngineLimits {
  const int32_t* num_blocks;  // [num_requests] full blocks, which alone are cached
  const int32_t* num_slots;   // [num_requests] blocks the prompt occupies while it runs
  const int32_t* max_hit;     // [num_requests] blocks that leave a token to compute
};

// Written by the replay, owned by the caller.
struct Outcome {
  int32_t* hit_blocks;   // [num_requests]
  int64_t* hit_tokens;   // [num_requests]
  int32_t* num_evicted;  // [num_requests] blocks that left while the request was served
  uint8_t* is_rejected;  // [num_requests] it needs more blocks than there are (engine only)
};

class Replay {
 public:
  Replay(const Trace& trace, int64_t capacity, const EngineLimits& limits, const Outcome& outcome, bool keep_log)
      : trace_(trace), limits_(limits), outcome_(outcome),
        cache_(trace, capacity, limits.num_blocks != nullptr, keep_log) {}

  Cache& cache() { return cache_; }
  void set_policy(std::unique_ptr<Policy> policy) { policy_ = std::move(policy); }
  int64_t position() const { return position_; }
  size_t bytes() const { return trace_.bytes() + cache_.bytes() + policy_->bytes(); }

  // Serve the requests from where the last call stopped up to, not including, `until`.
  void run(int64_t until) {
    until = std::min(until, trace_.arrays().num_requests);
    for (; position_ < until; ++position_) serve(position_);
  }

 private:
  void serve(int64_t r) {
    Request request = request_at(r);
    const bool is_too_large = cache_.is_engine() && request.num_slots > cache_.capacity();
    outcome_.is_rejected[r] = is_too_large;
    if (is_too_large) return;
    request.num_hit = cache_.lookup(request);
    const int64_t before = cache_.num_evicted();
    policy_->serve(request);
    outcome_.hit_blocks[r] = static_cast<int32_t>(request.num_hit);
    outcome_.hit_tokens[r] = tokens(request);
    outcome_.num_evicted[r] = static_cast<int32_t>(cache_.num_evicted() - before);
  }

  Request request_at(int64_t r) const {
    const TraceArrays& a = trace_.arrays();
    const int64_t first = a.request_start[r], length = a.request_start[r + 1] - first;
    const bool is_engine = cache_.is_engine();
    return Request{r,
                   trace_.blocks() + first,
                   is_engine ? limits_.num_blocks[r] : length,
                   is_engine ? limits_.num_slots[r] : length,
                   is_engine ? limits_.max_hit[r] : length,
                   first,
                   0};
  }

  int64_t tokens(const Request& request) const {
    const int32_t* held = trace_.arrays().block_tokens + request.first_reference;
    int64_t sum = 0;
    for (int64_t k = 0; k < request.num_hit; ++k) sum += held[k];
    return sum;
  }

  const Trace& trace_;
  EngineLimits limits_;
  Outcome outcome_;
  Cache cache_;
  std::unique_ptr<Policy> policy_;
  int64_t position_ = 0;
};

}  // namespace kvtune::replay
