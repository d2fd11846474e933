// An indexed binary heap of blocks: the top is the block that no other one precedes. O(log n) verbs.
#pragma once

#include <utility>
#include <vector>

#include "trace.h"

namespace kvtune::replay {

// `Before(a, b)`: a leaves before b; a strict order that may change only for blocks outside the heap.
template <class Before>
class BlockHeap {
 public:
  BlockHeap(int64_t num_unique, Before before)
      : before_(std::move(before)), place_(static_cast<size_t>(num_unique), NO_PLACE) {}

  bool empty() const { return heap_.empty(); }
  size_t size() const { return heap_.size(); }
  Block top() const { return heap_.front(); }
  bool contains(Block block) const { return place_[block] != NO_PLACE; }
  size_t bytes() const { return place_.size() * sizeof(int32_t) + heap_.capacity() * sizeof(Block); }

  void push(Block block) {
    heap_.push_back(block);
    rise(heap_.size() - 1, block);
  }

  void erase(Block block) {
    const auto place = static_cast<size_t>(place_[block]);
    const Block last = heap_.back();
    heap_.pop_back();
    place_[block] = NO_PLACE;
    if (last == block) return;
    if (place > 0 && before_(last, heap_[(place - 1) / 2])) {
      rise(place, last);
    } else {
      sink(place, last);
    }
  }

 private:
  static constexpr int32_t NO_PLACE = -1;

  void put(size_t place, Block block) {
    heap_[place] = block;
    place_[block] = static_cast<int32_t>(place);
  }

  void rise(size_t place, Block block) {
    while (place > 0) {
      const size_t up = (place - 1) / 2;
      if (!before_(block, heap_[up])) break;
      put(place, heap_[up]);
      place = up;
    }
    put(place, block);
  }

  void sink(size_t place, Block block) {
    for (size_t child = 2 * place + 1; child < heap_.size(); child = 2 * place + 1) {
      if (child + 1 < heap_.size() && before_(heap_[child + 1], heap_[child])) ++child;
      if (!before_(heap_[child], block)) break;
      put(place, heap_[child]);
      place = child;
    }
    put(place, block);
  }

  Before before_;
  std::vector<Block> heap_;
  std::vector<int32_t> place_;
};

}  // namespace kvtune::replay
