// A trace of block references, checked once and shared by every replay of it.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace kvtune::replay {

using Block = int32_t;  // dense number of a block's content, its whole prefix included

constexpr Block NO_BLOCK = -1;
constexpr int32_t NEVER = std::numeric_limits<int32_t>::max();  // "no request uses this block again"

// What Python hands over; the arrays stay Python's and outlive every replay. Order is struct kvtune_trace's.
struct TraceArrays {
  const int64_t* block_ids;      // [num_references] dense, head to tail within a request
  const int64_t* request_start;  // [num_requests + 1] offsets into the references
  const int32_t* block_tokens;   // [num_references] tokens each block holds
  int64_t num_requests;
  int64_t num_references;
  int64_t num_unique;
};

enum class Fault : int32_t {
  NONE = 0,
  OFFSETS = 1,    // request_start does not rise from 0 to num_references
  BLOCK_ID = 2,   // an id outside 0..num_unique-1
  PREFIX = 3,     // a block with two depths or two parents: ids do not name whole prefixes
  TOO_LARGE = 4,  // more requests or unique blocks than 32 bits hold
};

// The prefix tree of a trace (8 bytes a distinct block) and its references in 32 bit (4 bytes each).
class Trace {
 public:
  explicit Trace(const TraceArrays& arrays) : arrays_(arrays) {}
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;

  // Builds the tree. On a fault, `where` is the request it was found in.
  Fault prepare(int64_t* where) {
    const TraceArrays& a = arrays_;
    *where = 0;
    if (a.num_unique < 0 || a.num_requests < 0 || a.num_references < 0) return Fault::OFFSETS;
    if (a.num_unique >= NEVER || a.num_requests >= NEVER) return Fault::TOO_LARGE;
    if (a.request_start[0] != 0 || a.request_start[a.num_requests] != a.num_references) return Fault::OFFSETS;
    blocks_.resize(static_cast<size_t>(a.num_references));
    parent_.assign(static_cast<size_t>(a.num_unique), NO_BLOCK);
    depth_.assign(static_cast<size_t>(a.num_unique), -1);
    for (int64_t r = 0; r < a.num_requests; ++r) {
      *where = r;
      const int64_t begin = a.request_start[r], end = a.request_start[r + 1];
      if (begin > end || end > a.num_references) return Fault::OFFSETS;
      Block parent = NO_BLOCK;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t id = a.block_ids[i];
        if (id < 0 || id >= a.num_unique) return Fault::BLOCK_ID;
        const auto depth = static_cast<int32_t>(i - begin);
        if (depth_[id] < 0) {
          depth_[id] = depth;
          parent_[id] = parent;
        } else if (depth_[id] != depth || parent_[id] != parent) {
          return Fault::PREFIX;
        }
        parent = static_cast<Block>(id);
        blocks_[i] = parent;
      }
    }
    return Fault::NONE;
  }

  const TraceArrays& arrays() const { return arrays_; }
  const Block* blocks() const { return blocks_.data(); }  // [num_references]
  Block parent(Block block) const { return parent_[block]; }
  int32_t depth(Block block) const { return depth_[block]; }
  size_t bytes() const {
    return parent_.size() * (sizeof(Block) + sizeof(int32_t)) + blocks_.size() * sizeof(Block);
  }

 private:
  TraceArrays arrays_;
  std::vector<Block> blocks_;
  std::vector<Block> parent_;   // NO_BLOCK for a head
  std::vector<int32_t> depth_;  // index in the sequence, 0 for the head
};

}  // namespace kvtune::replay
