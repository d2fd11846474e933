// What an eviction policy of the replay core sees, may do and must promise.
//
// ADD A POLICY
//   1. Write csrc/policy_<name>.h with a class that derives from PinnedPolicy. (Only fifo and the bypassing
//      optimum derive from Policy: by their definition the current request's blocks may leave.)
//   2. Add one line to POLICIES in csrc/registry.h.
//   3. Give it its pure-Python twin: an EvictionPolicy (kvtune.cache.eviction), which KVCacheManager runs too,
//      and name it in PYTHON_POLICIES of replay_python.py. tests/cache/test_replay*.py then hold core, twin
//      and manager equal, hit by hit and eviction by eviction.
//
// ONE REQUEST, as PinnedPolicy::serve drives it. Twin and manager see the same calls in the same order:
//
//   C++                                  EvictionPolicy
//   begin(request)                       begin(contents, num_hit)
//   pin(request, k)      head to tail    pin(block_id)               block k < num_hit is used again
//   victim(), remove(b)  as often as     victim(), remove(block_id)  the candidate that leaves
//                        room is needed
//   insert(request, k)   head to tail    insert(block_id, depth=, content=, parent=)  became resident, pinned
//   unpin(request, k)    deepest first   unpin(block_id)             nobody uses it: this is its last use
//   end(request)                         (no counterpart: do nothing there that a decision depends on)
//
// A block is named here by its content, a dense number below num_unique(); a twin's block_id is a place in
// the pool and used again, its `content` is what lasts. Between requests the core's cache is the same as the
// twin's. Nothing else may sway a decision: no arrival time, no tenant, no look into the trace's future.
//
// PROMISES
//   - victim() answers a candidate (resident, not pinned) without resident children. Unpinning comes deepest
//     first and whoever uses a block uses its ancestors, so an order that a parent's use also refreshes (lru,
//     lfu) keeps this promise by itself; others ask cache().num_resident_children(b) and parent(b): when the
//     last child of a candidate leaves, the parent becomes a leaf. (remove(b) comes before cache().evict(b):
//     b still counts as its parent's child there.)
//   - The same calls give the same answers: no clock, no random device. Draw from a seeded generator of one's
//     own, in integer or correctly rounded arithmetic that the twin repeats bit for bit (no std::exp: libm
//     differs; + - * / sqrt and comparisons do not).
//   - Memory is at most about 100 bytes a distinct block, allocated in the constructor; bytes() says how much.
//   - Amortised O(log n) a call. One thread.
//
// A policy that shadows others (a guarded selector) owns one Cache and one Policy for each: both are plain
// objects without globals. On begin(request) it copies the request, sets num_hit = shadow.lookup(request)
// and calls serve() of the shadow's policy.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "trace.h"

namespace kvtune::replay {

// One request as a policy sees it.
struct Request {
  int64_t index;            // position in the trace, 0 upwards
  const Block* blocks;      // [num_blocks] that may be cached, head to tail: block k has depth k
  int64_t num_blocks;
  int64_t num_slots;        // blocks it occupies while it runs; more than num_blocks where its partial last
                            // block takes room but is never cached
  int64_t max_hit;          // blocks a lookup may answer: an engine always computes the last token
  int64_t first_reference;  // index of blocks[0] among all references of the trace (for the offline optima)
  int64_t num_hit;          // longest leading run of resident blocks, at most max_hit, before anything changes
};

// Named numbers given to a policy, e.g. alpha = 0.25. Constructors take what they know and refuse the rest.
using Parameters = std::map<std::string, double>;

// What the user got wrong, told to Python as a UsageError.
struct BadParameter : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

inline void refuse_unknown(const Parameters& parameters, std::initializer_list<const char*> known) {
  for (const auto& [name, value] : parameters) {
    bool is_known = false;
    std::string names;
    for (const char* one : known) {
      is_known = is_known || name == one;
      names += (names.empty() ? "" : ", ") + std::string(one);
    }
    if (!is_known) {
      throw BadParameter("no policy parameter '" + name + "'; known here: " + (names.empty() ? "none" : names));
    }
  }
}

// A bug in a policy, told to Python as an InvariantError.
struct PolicyError : std::logic_error {
  using std::logic_error::logic_error;
};

// Who is resident, and the record of every block that left. 5 bytes a distinct block.
class Cache {
 public:
  Cache(const Trace& trace, int64_t capacity, bool is_engine, bool keep_log)
      : trace_(&trace), capacity_(capacity), is_engine_(is_engine), keep_log_(keep_log),
        is_resident_(static_cast<size_t>(trace.arrays().num_unique), 0),
        num_children_(static_cast<size_t>(trace.arrays().num_unique), 0) {}

  const Trace& trace() const { return *trace_; }
  int64_t capacity() const { return capacity_; }
  bool is_engine() const { return is_engine_; }  // KVCacheManager's rules, not a trace replay's
  int64_t num_resident() const { return num_resident_; }
  int64_t num_evicted() const { return num_evicted_; }
  int64_t num_unique() const { return static_cast<int64_t>(is_resident_.size()); }
  bool is_resident(Block block) const { return is_resident_[block] != 0; }
  Block parent(Block block) const { return trace_->parent(block); }
  int32_t depth(Block block) const { return trace_->depth(block); }
  int32_t num_resident_children(Block block) const { return num_children_[block]; }
  bool may_leave(Block block) const { return num_children_[block] == 0; }

  // What num_hit of a request would be in this cache.
  int64_t lookup(const Request& request) const {
    const int64_t end = request.num_blocks < request.max_hit ? request.num_blocks : request.max_hit;
    int64_t hit = 0;
    while (hit < end && is_resident_[request.blocks[hit]]) ++hit;
    return hit;
  }

  void admit(Block block) {
    is_resident_[block] = 1;
    ++num_resident_;
    if (const Block p = parent(block); p != NO_BLOCK) ++num_children_[p];
  }

  void evict(Block block) {
    if (!is_resident_[block]) throw PolicyError("the policy evicted a block that is not resident");
    is_resident_[block] = 0;
    --num_resident_;
    if (const Block p = parent(block); p != NO_BLOCK) --num_children_[p];
    count_eviction(block);
  }

  // Inserted and trimmed at once: a block of a request that alone exceeds the capacity.
  void bypass(Block block) { count_eviction(block); }

  // Blocks in the order in which they left since the last clear_log().
  const std::vector<Block>& log() const { return log_; }
  void clear_log() { log_.clear(); }
  size_t bytes() const { return is_resident_.size() * (sizeof(uint8_t) + sizeof(int32_t)); }

 private:
  void count_eviction(Block block) {
    ++num_evicted_;
    if (keep_log_) log_.push_back(block);
  }

  const Trace* trace_;
  int64_t capacity_;
  bool is_engine_;
  bool keep_log_;
  int64_t num_resident_ = 0;
  int64_t num_evicted_ = 0;
  std::vector<uint8_t> is_resident_;
  std::vector<int32_t> num_children_;
  std::vector<Block> log_;
};

class Policy {
 public:
  explicit Policy(Cache& cache) : cache_(&cache) {}
  virtual ~Policy() = default;
  Policy(const Policy&) = delete;
  Policy& operator=(const Policy&) = delete;

  // After the lookup: bring in all blocks of the request and keep at most capacity() of them and the others.
  virtual void serve(const Request& request) = 0;

  // Bytes allocated, the cache's own apart.
  virtual size_t bytes() const = 0;

 protected:
  Cache& cache() const { return *cache_; }

 private:
  Cache* cache_;
};

// Blocks of the current request leave only if it alone exceeds the capacity, deepest first.
class PinnedPolicy : public Policy {
 public:
  using Policy::Policy;

  void serve(const Request& request) override {
    Cache& cache = this->cache();
    const int64_t kept = request.num_blocks < cache.capacity() ? request.num_blocks : cache.capacity();
    const int64_t slots = request.num_slots < cache.capacity() ? request.num_slots : cache.capacity();
    begin(request);
    for (int64_t k = 0; k < request.num_hit; ++k) pin(request, k);
    make_room(slots - request.num_hit);
    for (int64_t k = request.num_hit; k < kept; ++k) {
      if (cache.is_resident(request.blocks[k])) {  // computed again although it is here: the copy is dropped
        pin(request, k);
      } else {
        cache.admit(request.blocks[k]);
        insert(request, k);
      }
    }
    for (int64_t k = request.num_blocks - 1; k >= kept; --k) cache.bypass(request.blocks[k]);
    for (int64_t k = kept - 1; k >= 0; --k) unpin(request, k);
    end(request);
  }

 protected:
  virtual void begin(const Request&) {}
  virtual void pin(const Request& request, int64_t k) = 0;
  virtual Block victim() = 0;
  virtual void remove(Block block) = 0;
  virtual void insert(const Request& request, int64_t k) = 0;
  virtual void unpin(const Request& request, int64_t k) = 0;
  virtual void end(const Request&) {}

 private:
  void make_room(int64_t num_new) {
    Cache& cache = this->cache();
    for (int64_t room = cache.capacity() - cache.num_resident(); room < num_new; ++room) {
      const Block block = victim();
      if (block < 0) throw PolicyError("the policy names no victim though candidates are left");
      remove(block);
      cache.evict(block);
    }
  }
};

}  // namespace kvtune::replay
