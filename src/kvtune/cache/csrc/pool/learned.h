// The policies "hazard" and "guarded" of a running pool: ../hazard_order.h over the tree of what the pool knows, and
// the LRU guard. Twins: kvtune.cache.eviction_hazard, kvtune.cache.eviction_guarded.
//
// Contents are numbered while they are resident or remembered. Memory: 44 bytes a content and 4 a block, and 14 more
// for the name of a content that is not resident: the pool's own index knows the others.
#pragma once

#include <algorithm>

#include "../hazard_order.h"
#include "digest_index.h"
#include "known_names.h"
#include "mixed_ahead.h"
#include "order.h"
#include "prefix_tree.h"

namespace kvtune::pool {

class Learned final : public Order {
 public:
  Learned(Links& links, const DigestIndex& index, int64_t num_ids, int64_t capacity, bool is_guarded)
      : links_(links), index_(index), number_of_(num_ids), tree_(max_numbers(num_ids, capacity), capacity),
        names_(tree_.num_unique(), max_names(capacity)), shadow_links_(tree_), order_(tree_, TreeRecords(tree_)),
        wait_(std::max<int64_t>(5000, 4 * capacity)), is_guarded_(is_guarded) {}

  void begin(const Digest* digests, int64_t num) override {
    int64_t known = 0, in_shadow = 0, resident = 0;
    Block deepest = NO_BLOCK;
    MixedAhead ahead(digests, num, [this](uint64_t mixed) { index_.prefetch(mixed); });
    for (; known < num; ++known) {
      const uint64_t mixed = ahead.take(known);
      const int32_t id = index_.find(digests[known], mixed);
      const Block number = id == NO_ID ? names_.find(mixed) : number_of_[id];
      if (number == NO_BLOCK || !order_.is_known(number)) break;
      deepest = number;
      // What is resident, not what was hit: an engine computes the last token of a prompt it knows.
      resident += resident == known && tree_.is_resident(number);
      in_shadow += in_shadow == known && tree_[number].is_in_shadow;
    }
    order_.begin(num, deepest);
    behind_ += in_shadow - resident;
    num_references_ += num;
    decide();
  }

  void insert(int32_t id, int32_t parent, uint64_t mixed) override {
    Block number = names_.find(mixed);
    if (number == NO_BLOCK) {
      number = tree_.new_number();
    } else {
      names_.erase(number);  // the index knows it from now on
    }
    const Block above = parent == NO_ID ? NO_BLOCK : number_of_[parent];
    number_of_[id] = number;
    tree_[number].id = id;
    order_.insert(number, above);
    unblock(tree_.enter(number, above));
  }

  void pin(int32_t id) override {
    const Block number = number_of_[id];
    recency_.erase(links_, id);
    order_.pin(number);
    unblock(tree_.pin(number));
  }

  void unpin(int32_t id) override {
    const Block number = number_of_[id];
    tree_.unpin(number);
    order_.unpin(number);
    recency_.push_back(links_, id);
    if (is_guarded_) use_in_shadow(number);
  }

  int32_t victim() override {
    if (is_lru_) return recency_.front();
    const Block number = order_.victim();
    return number == NO_BLOCK ? NO_ID : tree_[number].id;
  }

  // Before the index hears of it.
  void remove(int32_t id, uint64_t mixed) override {
    const Block number = number_of_[id], parent = tree_.parent(number);
    recency_.erase(links_, id);
    names_.insert(mixed, number);
    const Block forgotten = order_.remove(number);
    tree_.leave(number);
    if (forgotten != NO_BLOCK) {
      if (!tree_[forgotten].is_in_shadow) names_.erase(forgotten);
      drop_if_gone(forgotten);
    }
    if (parent != NO_BLOCK && parent != forgotten) drop_if_gone(parent);
  }

  int64_t likely_victims(int32_t* ids, int64_t num) override {
    if (is_lru_) return recency_.first(links_, ids, num);
    int64_t n = 0;
    order_.each_likely_victim([&](Block number) {
      ids[n++] = tree_[number].id;
      return n < num;
    });
    fetch_forgotten(n);
    return n;
  }

  void prefetch_block(int32_t id) const override { fetch(&tree_[number_of_[id]]); }
  void prefetch_name(uint64_t mixed) const override { names_.prefetch(mixed); }

  int64_t num_candidates() const override { return recency_.size(); }

  int64_t bytes() const override {
    return number_of_.bytes() + tree_.bytes() + names_.bytes() + static_cast<int64_t>(order_.bytes());
  }

 private:
  using Hazard = replay::HazardOrder<PrefixTree, TreeRecords>;

  // Remembered ones, the shadow's, and the one that is about to be forgotten.
  static int64_t max_names(int64_t capacity) { return (Hazard::GHOSTS + 1) * capacity + 1; }

  // Resident ones, those with a name, and those whose children alone are resident.
  static int64_t max_numbers(int64_t num_ids, int64_t capacity) { return 2 * num_ids + max_names(capacity) + 16; }

  // What so many removals will read of the contents they push out of memory.
  void fetch_forgotten(int64_t num) {
    order_.each_forgotten_for(num, [this](Block number) { names_.prefetch_key(number); });
    order_.each_forgotten_for(num, [this](Block number) { names_.prefetch(names_.key(number)); });
  }

  void unblock(Block parent) {
    if (parent != NO_BLOCK) order_.unblock(parent);
  }

  // The number of what nobody remembers can be used again once no child or list names it.
  void drop_if_gone(Block number) {
    if (order_.is_known(number) || tree_[number].is_in_shadow || tree_.num_resident_children(number) > 0) return;
    names_.erase(number);
    tree_.give_back(number);
  }

  void decide() {
    if (!is_guarded_) return;
    if (!is_lru_) {
      is_lru_ = behind_ > num_references_ / 400 + 32 + tree_.capacity() / 200;
      if (is_lru_) since_ = num_references_;
    } else if (num_references_ - since_ > wait_ && behind_ < num_references_ / 800) {
      is_lru_ = false;
      wait_ *= 2;
    }
  }

  void use_in_shadow(Block number) {
    if (tree_[number].is_in_shadow) {
      shadow_.erase(shadow_links_, number);
    } else {
      tree_[number].is_in_shadow = true;
      ++num_in_shadow_;
    }
    shadow_.push_back(shadow_links_, number);
    if (num_in_shadow_ <= tree_.capacity()) return;
    const Block oldest = shadow_.front();
    shadow_.erase(shadow_links_, oldest);
    tree_[oldest].is_in_shadow = false;
    --num_in_shadow_;
    drop_if_gone(oldest);
  }

  Links& links_;
  const DigestIndex& index_;
  LazyArray<Block> number_of_;  // by id
  PrefixTree tree_;
  KnownNames names_;  // of contents that are not resident
  ShadowLinks shadow_links_;
  Hazard order_;
  LinkedIds recency_;         // candidates, oldest use first
  replay::BlockList shadow_;  // a pure LRU cache of the same size: names only
  int64_t num_in_shadow_ = 0;
  int64_t behind_ = 0;  // hits of the shadow more than of the cache
  int64_t num_references_ = 0, since_ = 0, wait_;
  bool is_guarded_, is_lru_ = false;
};

}  // namespace kvtune::pool
