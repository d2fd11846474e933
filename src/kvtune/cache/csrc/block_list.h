// Doubly linked lists of blocks over two shared arrays: a block is in at most one list. O(1) verbs.
#pragma once

#include "lazy_array.h"
#include "trace.h"

namespace kvtune::replay {

class BlockLinks {
 public:
  explicit BlockLinks(int64_t num_unique) : previous(num_unique), next(num_unique) {}

  size_t bytes() const { return static_cast<size_t>(previous.bytes() + next.bytes()); }

  LazyArray<Block> previous;
  LazyArray<Block> next;
};

class BlockList {
 public:
  Block front() const { return front_; }
  bool empty() const { return front_ == NO_BLOCK; }

  void push_back(BlockLinks& links, Block block) {
    links.previous[block] = back_;
    links.next[block] = NO_BLOCK;
    (back_ == NO_BLOCK ? front_ : links.next[back_]) = block;
    back_ = block;
  }

  void push_front(BlockLinks& links, Block block) {
    links.previous[block] = NO_BLOCK;
    links.next[block] = front_;
    (front_ == NO_BLOCK ? back_ : links.previous[front_]) = block;
    front_ = block;
  }

  void erase(BlockLinks& links, Block block) {
    const Block before = links.previous[block], after = links.next[block];
    (before == NO_BLOCK ? front_ : links.next[before]) = after;
    (after == NO_BLOCK ? back_ : links.previous[after]) = before;
  }

 private:
  Block front_ = NO_BLOCK;
  Block back_ = NO_BLOCK;
};

}  // namespace kvtune::replay
