// The prefix tree of what a running pool knows: blocks that are resident or remembered, by number. Twin:
// kvtune.cache.eviction_tree.TreeBlock.
#pragma once

#include <vector>

#include "../lazy_array.h"
#include "../trace.h"

namespace kvtune::pool {

using replay::Block;  // here the number of a content; used again once it is forgotten
using replay::NO_BLOCK;

class PrefixTree {
 public:
  PrefixTree(int64_t max_numbers, int64_t capacity) : capacity_(capacity), nodes_(max_numbers) {}

  int64_t num_unique() const { return nodes_.size(); }
  int64_t capacity() const { return capacity_; }
  Block parent(Block block) const { return nodes_[block].parent; }
  int32_t num_resident_children(Block block) const { return nodes_[block].num_children; }
  bool may_leave(Block block) const { return nodes_[block].num_children == 0 || nodes_[block].is_passed; }
  bool is_resident(Block block) const { return nodes_[block].is_resident; }
  int64_t bytes() const { return nodes_.bytes(); }

  Block new_number() {
    Block block = next_;
    if (free_.empty()) {
      ++next_;
    } else {
      block = free_.back();
      free_.pop_back();
    }
    nodes_[block] = Node{};
    return block;
  }

  void give_back(Block block) { free_.push_back(block); }

  // The block became resident, pinned, below `above`. Returns the parent if that lets it leave, else NO_BLOCK.
  Block enter(Block block, Block above) {
    Node& node = nodes_[block];
    node.parent = above;
    node.is_resident = true;
    if (above != NO_BLOCK) ++nodes_[above].num_children;
    return pin(block);
  }

  Block pin(Block block) {
    Node& node = nodes_[block];
    node.is_pinned = true;
    node.is_passed = false;
    if (node.parent == NO_BLOCK) return NO_BLOCK;
    Node& parent = nodes_[node.parent];
    ++parent.num_pinned_children;
    if (parent.is_pinned || parent.is_passed) return NO_BLOCK;
    parent.is_passed = true;
    return node.parent;
  }

  void unpin(Block block) {
    Node& node = nodes_[block];
    node.is_pinned = false;
    node.is_passed = node.num_pinned_children > 0;
    if (node.parent != NO_BLOCK) --nodes_[node.parent].num_pinned_children;
  }

  // The block is not resident any more.
  void leave(Block block) {
    Node& node = nodes_[block];
    node.is_resident = false;
    if (node.parent != NO_BLOCK) --nodes_[node.parent].num_children;
  }

 private:
  struct Node {
    Block parent = NO_BLOCK;
    int32_t num_children = 0;  // resident
    int32_t num_pinned_children = 0;
    bool is_pinned = false;
    bool is_passed = false;
    bool is_resident = false;
  };

  int64_t capacity_;
  LazyArray<Node> nodes_;
  std::vector<Block> free_;
  Block next_ = 0;
};

}  // namespace kvtune::pool
