// Doubly linked lists of blocks over shared links: a block is in at most one list of the same links. O(1) verbs.
#pragma once

#include "lazy_array.h"
#include "trace.h"

namespace kvtune::replay {

// Links of all blocks, in two arrays. Whoever keeps them elsewhere has the same two members.
class BlockLinks {
 public:
  explicit BlockLinks(int64_t num_unique) : previous_(num_unique), next_(num_unique) {}

  Block& previous(Block block) { return previous_[block]; }
  Block& next(Block block) { return next_[block]; }
  size_t bytes() const { return static_cast<size_t>(previous_.bytes() + next_.bytes()); }

 private:
  LazyArray<Block> previous_;
  LazyArray<Block> next_;
};

class BlockList {
 public:
  Block front() const { return front_; }
  bool empty() const { return front_ == NO_BLOCK; }

  template <class Links>
  void push_back(Links&& links, Block block) {
    links.previous(block) = back_;
    links.next(block) = NO_BLOCK;
    (back_ == NO_BLOCK ? front_ : links.next(back_)) = block;
    back_ = block;
  }

  template <class Links>
  void push_front(Links&& links, Block block) {
    links.previous(block) = NO_BLOCK;
    links.next(block) = front_;
    (front_ == NO_BLOCK ? back_ : links.previous(front_)) = block;
    front_ = block;
  }

  template <class Links>
  void erase(Links&& links, Block block) {
    const Block before = links.previous(block), after = links.next(block);
    (before == NO_BLOCK ? front_ : links.next(before)) = after;
    (after == NO_BLOCK ? back_ : links.previous(after)) = before;
  }

 private:
  Block front_ = NO_BLOCK;
  Block back_ = NO_BLOCK;
};

}  // namespace kvtune::replay
