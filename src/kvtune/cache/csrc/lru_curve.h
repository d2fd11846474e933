// Exact hits of an LRU cache of every capacity in one pass (Mattson et al. 1970, stack distances).
//
// A request looks its blocks up first and touches them deepest first afterwards, so on the recency stack a
// head lies above its tail, and what a cache of C blocks holds is the top C of the stack, whatever C is. A
// reference hits from the capacity on that equals its distance: the blocks touched since its last touch,
// itself included. Along a request distances rise, so the leading run of hits needs no extra care.
//
// Distances are counted on a bitmap over touch times with a Fenwick tree over its 64-bit words.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "trace.h"

namespace kvtune::replay {

class TouchTimes {
 public:
  explicit TouchTimes(int64_t size)
      : words_(static_cast<size_t>(size / 64 + 1), 0), tree_(words_.size() + 1, 0) {}

  int64_t size() const { return static_cast<int64_t>(words_.size()) * 64; }

  void set(int64_t time) {
    words_[time / 64] |= uint64_t{1} << (time % 64);
    add(time / 64, 1);
  }
  void clear(int64_t time) {
    words_[time / 64] &= ~(uint64_t{1} << (time % 64));
    add(time / 64, -1);
  }

  // Set bits before `time`.
  int64_t rank(int64_t time) const {
    int64_t sum = __builtin_popcountll(words_[time / 64] & ((uint64_t{1} << (time % 64)) - 1));
    for (int64_t i = time / 64; i > 0; i &= i - 1) sum += tree_[i];
    return sum;
  }

  // Bits 0..count-1 set, all others clear.
  void fill(int64_t count) {
    for (size_t w = 0; w < words_.size(); ++w) {
      const int64_t left = count - static_cast<int64_t>(w) * 64;
      words_[w] = left >= 64 ? ~uint64_t{0} : left > 0 ? (uint64_t{1} << left) - 1 : 0;
    }
    tree_.assign(tree_.size(), 0);
    for (size_t i = 1; i < tree_.size(); ++i) {
      tree_[i] += __builtin_popcountll(words_[i - 1]);
      const size_t up = i + (i & (~i + 1));
      if (up < tree_.size()) tree_[up] += tree_[i];
    }
  }

  size_t bytes() const { return words_.size() * sizeof(uint64_t) + tree_.size() * sizeof(int32_t); }

 private:
  void add(int64_t word, int32_t change) {
    for (int64_t i = word + 1; i < static_cast<int64_t>(tree_.size()); i += i & -i) tree_[i] += change;
  }

  std::vector<uint64_t> words_;
  std::vector<int32_t> tree_;
};

class LruCurve {
 public:
  // The histograms are the caller's, [num_unique + 1], zeroed: references and tokens that hit from each
  // capacity on.
  LruCurve(const Trace& trace, int64_t* hit_blocks, int64_t* hit_tokens)
      : trace_(trace),
        hit_blocks_(hit_blocks),
        hit_tokens_(hit_tokens),
        touched_(static_cast<size_t>(trace.arrays().num_unique), UNTOUCHED),
        times_(2 * trace.arrays().num_unique + 4096) {}

  int64_t position() const { return position_; }
  size_t bytes() const { return trace_.bytes() + touched_.size() * sizeof(int64_t) + times_.bytes(); }

  // Requests up to, not including, `until`; those before `from` warm the cache and are not counted.
  void run(int64_t until, int64_t from) {
    until = std::min(until, trace_.arrays().num_requests);
    for (; position_ < until; ++position_) serve(position_, position_ >= from);
  }

 private:
  static constexpr int64_t UNTOUCHED = -1;

  void serve(int64_t r, bool is_counted) {
    const TraceArrays& a = trace_.arrays();
    const int64_t begin = a.request_start[r], end = a.request_start[r + 1];
    const Block* blocks = trace_.blocks();
    if (is_counted) {
      for (int64_t i = begin; i < end && touched_[blocks[i]] != UNTOUCHED; ++i) {
        const int64_t distance = num_touched_ - times_.rank(touched_[blocks[i]]);
        ++hit_blocks_[distance];
        hit_tokens_[distance] += a.block_tokens[i];
      }
    }
    for (int64_t i = end - 1; i >= begin; --i) touch(blocks[i]);
  }

  void touch(Block block) {
    if (now_ == times_.size()) compact();
    if (touched_[block] == UNTOUCHED) {
      ++num_touched_;
    } else {
      times_.clear(touched_[block]);
    }
    times_.set(now_);
    touched_[block] = now_++;
  }

  // Number the touches anew from 0 in the order they have.
  void compact() {
    for (int64_t& time : touched_) {
      if (time != UNTOUCHED) time = times_.rank(time);
    }
    times_.fill(num_touched_);
    now_ = num_touched_;
  }

  const Trace& trace_;
  int64_t* hit_blocks_;
  int64_t* hit_tokens_;
  std::vector<int64_t> touched_;
  TouchTimes times_;
  int64_t now_ = 0;
  int64_t num_touched_ = 0;
  int64_t position_ = 0;
};

}  // namespace kvtune::replay
