// The prefix tree of what a running pool knows: blocks that are resident or remembered, by number, one record each.
// Twin of the tree: kvtune.cache.eviction_tree.TreeBlock.
#pragma once

#include <vector>

#include "../hazard_order.h"
#include "../lazy_array.h"
#include "../trace.h"

namespace kvtune::pool {

using replay::Block;  // here the number of a content; used again once it is forgotten
using replay::NO_BLOCK;

// All that the learned policies keep of a content, in one place: most verbs touch all of it.
struct Content {
  replay::HazardFacts facts{};
  Block parent = NO_BLOCK;
  int32_t id = -1;                     // while it is resident
  uint32_t num_children : 30;          // resident
  uint32_t is_resident : 1;
  uint32_t is_in_shadow : 1;
  uint32_t num_pinned_children : 30;
  uint32_t is_pinned : 1;
  uint32_t is_passed : 1;
  Block previous = NO_BLOCK, next = NO_BLOCK;                // in a queue of candidates, or among the ghosts
  Block shadow_previous = NO_BLOCK, shadow_next = NO_BLOCK;  // in the shadow of the LRU guard

  Content() : num_children(0), is_resident(0), is_in_shadow(0), num_pinned_children(0), is_pinned(0), is_passed(0) {}
};
static_assert(sizeof(Content) == 44);

class PrefixTree {
 public:
  PrefixTree(int64_t max_numbers, int64_t capacity) : capacity_(capacity), contents_(max_numbers) {}

  int64_t num_unique() const { return contents_.size(); }
  int64_t capacity() const { return capacity_; }
  Block parent(Block block) const { return contents_[block].parent; }
  int32_t num_resident_children(Block block) const { return static_cast<int32_t>(contents_[block].num_children); }
  bool may_leave(Block block) const { return contents_[block].num_children == 0 || contents_[block].is_passed; }
  bool is_resident(Block block) const { return contents_[block].is_resident; }
  int64_t bytes() const { return contents_.bytes(); }

  Content& operator[](Block block) { return contents_[block]; }
  const Content& operator[](Block block) const { return contents_[block]; }

  Block new_number() {
    Block block = next_;
    if (free_.empty()) {
      ++next_;
    } else {
      block = free_.back();
      free_.pop_back();
    }
    contents_[block] = Content{};
    return block;
  }

  void give_back(Block block) { free_.push_back(block); }

  // The block became resident, pinned, below `above`. Returns the parent if that lets it leave, else NO_BLOCK.
  Block enter(Block block, Block above) {
    Content& content = contents_[block];
    content.parent = above;
    content.is_resident = true;
    if (above != NO_BLOCK) ++contents_[above].num_children;
    return pin(block);
  }

  Block pin(Block block) {
    Content& content = contents_[block];
    content.is_pinned = true;
    content.is_passed = false;
    if (content.parent == NO_BLOCK) return NO_BLOCK;
    Content& parent = contents_[content.parent];
    ++parent.num_pinned_children;
    if (parent.is_pinned || parent.is_passed) return NO_BLOCK;
    parent.is_passed = true;
    return content.parent;
  }

  void unpin(Block block) {
    Content& content = contents_[block];
    content.is_pinned = false;
    content.is_passed = content.num_pinned_children > 0;
    if (content.parent != NO_BLOCK) --contents_[content.parent].num_pinned_children;
  }

  // The block is not resident any more.
  void leave(Block block) {
    Content& content = contents_[block];
    content.is_resident = false;
    if (content.parent != NO_BLOCK) --contents_[content.parent].num_children;
  }

 private:
  int64_t capacity_;
  LazyArray<Content> contents_;
  std::vector<Block> free_;
  Block next_ = 0;
};

// The tree's records as the learned order sees them.
class TreeRecords {
 public:
  explicit TreeRecords(PrefixTree& tree) : tree_(&tree) {}
  replay::HazardFacts& facts(Block block) { return (*tree_)[block].facts; }
  const replay::HazardFacts& facts(Block block) const { return (*tree_)[block].facts; }
  TreeRecords& links() { return *this; }
  Block& previous(Block block) { return (*tree_)[block].previous; }
  Block& next(Block block) { return (*tree_)[block].next; }
  size_t bytes() const { return 0; }  // the tree counts them

 private:
  PrefixTree* tree_;
};

// Links of the shadow's list.
class ShadowLinks {
 public:
  explicit ShadowLinks(PrefixTree& tree) : tree_(tree) {}
  Block& previous(Block block) { return tree_[block].shadow_previous; }
  Block& next(Block block) { return tree_[block].shadow_next; }

 private:
  PrefixTree& tree_;
};

}  // namespace kvtune::pool
