// Which idle block of a pool leaves first. The native side of kvtune.cache.eviction.EvictionPolicy: the same verbs,
// called in the same order. `mixed`: of the name of the block's content.
#pragma once

#include <cstdint>

#include "digest.h"

namespace kvtune::pool {

constexpr int32_t NO_ID = -1;

// Links of the lists that blocks are in, one at a time: free, or idle by last use.
struct Links {
  explicit Links(int64_t num_ids) : previous(num_ids), next(num_ids) {}
  int64_t bytes() const { return previous.bytes() + next.bytes(); }

  LazyArray<int32_t> previous;
  LazyArray<int32_t> next;
};

class LinkedIds {
 public:
  int32_t front() const { return front_; }
  int64_t size() const { return size_; }

  // The first `num` of them, or all; how many those are.
  int64_t first(const Links& links, int32_t* ids, int64_t num) const {
    int64_t n = 0;
    for (int32_t id = front_; id != NO_ID && n < num; id = links.next[id]) ids[n++] = id;
    return n;
  }

  void push_back(Links& links, int32_t id) {
    links.previous[id] = back_;
    links.next[id] = NO_ID;
    (back_ == NO_ID ? front_ : links.next[back_]) = id;
    back_ = id;
    ++size_;
  }

  void erase(Links& links, int32_t id) {
    const int32_t before = links.previous[id], after = links.next[id];
    (before == NO_ID ? front_ : links.next[before]) = after;
    (after == NO_ID ? back_ : links.previous[after]) = before;
    --size_;
  }

 private:
  int32_t front_ = NO_ID, back_ = NO_ID;
  int64_t size_ = 0;
};

class Order {
 public:
  virtual ~Order() = default;
  Order() = default;
  Order(const Order&) = delete;
  Order& operator=(const Order&) = delete;

  virtual void begin(const Digest* digests, int64_t num) = 0;
  virtual void insert(int32_t id, int32_t parent, uint64_t mixed) = 0;  // parent: NO_ID if it has none
  virtual void pin(int32_t id) = 0;
  virtual void unpin(int32_t id) = 0;
  virtual int32_t victim() = 0;  // NO_ID: there are no candidates
  virtual void remove(int32_t id, uint64_t mixed) = 0;
  virtual int64_t likely_victims(int32_t* ids, int64_t num) = 0;  // the next ones, up to `num`; a guess
  // What is about to be asked for; a block, or what a name is looked for by.
  virtual void prefetch_block(int32_t) const {}
  virtual void prefetch_name(uint64_t) const {}
  virtual int64_t num_candidates() const = 0;
  virtual int64_t bytes() const = 0;  // the pool's links apart
};

// Least recently used.
class Lru final : public Order {
 public:
  explicit Lru(Links& links) : links_(links) {}
  void begin(const Digest*, int64_t) override {}
  void insert(int32_t, int32_t, uint64_t) override {}
  void pin(int32_t id) override { idle_.erase(links_, id); }
  void unpin(int32_t id) override { idle_.push_back(links_, id); }
  int32_t victim() override { return idle_.front(); }
  void remove(int32_t id, uint64_t) override { idle_.erase(links_, id); }
  int64_t likely_victims(int32_t* ids, int64_t num) override { return idle_.first(links_, ids, num); }
  int64_t num_candidates() const override { return idle_.size(); }
  int64_t bytes() const override { return 0; }

 private:
  Links& links_;
  LinkedIds idle_;  // oldest use first
};

}  // namespace kvtune::pool
