// Who computes a block for the first time. A table of its own that grows with the blocks being computed.
#pragma once

#include <utility>
#include <vector>

#include "digest.h"

namespace kvtune::pool {

class InFlight {
 public:
  InFlight() : entries_(1024) {}

  // The request computes these blocks, but for those that have a leader. Numbers of requests are above 0.
  void lead(int64_t leader, const Digest* digests, int64_t num) {
    for (int64_t i = 0; i < num; ++i) {
      if (2 * (size_ + 1) > static_cast<int64_t>(entries_.size())) grow();
      Entry& entry = entries_[slot_of(digests[i])];
      if (entry.leader != 0) continue;
      entry = {digests[i], leader};
      ++size_;
    }
  }

  void leave(int64_t leader, const Digest* digests, int64_t num) {
    for (int64_t i = 0; i < num && size_ > 0; ++i) {
      const size_t slot = slot_of(digests[i]);
      if (entries_[slot].leader == leader) erase(slot);
    }
  }

  int64_t leader(const Digest& digest) const { return entries_[slot_of(digest)].leader; }  // 0: nobody

  // How many leading ones of these blocks the leader of the first one leads.
  int64_t run(const Digest* digests, int64_t num) const {
    const int64_t first = leader(digests[0]);
    int64_t i = 0;
    while (i < num && leader(digests[i]) == first) ++i;
    return i;
  }

  void clear() {
    entries_.assign(1024, Entry{});
    size_ = 0;
  }

  // The leaders of all blocks, repeated; `out` null asks how many.
  int64_t leaders(int64_t* out) const {
    int64_t num = 0;
    for (const Entry& entry : entries_) {
      if (entry.leader == 0) continue;
      if (out != nullptr) out[num] = entry.leader;
      ++num;
    }
    return num;
  }

 private:
  struct Entry {
    Digest digest{};
    int64_t leader = 0;  // 0: empty
  };

  size_t mask() const { return entries_.size() - 1; }

  size_t slot_of(const Digest& digest) const {
    size_t slot = digest.mixed() & mask();
    while (entries_[slot].leader != 0 && !(entries_[slot].digest == digest)) slot = (slot + 1) & mask();
    return slot;
  }

  void erase(size_t hole) {
    for (size_t slot = (hole + 1) & mask(); entries_[slot].leader != 0; slot = (slot + 1) & mask()) {
      const size_t home = entries_[slot].digest.mixed() & mask();
      if (((slot - home) & mask()) >= ((slot - hole) & mask())) {
        entries_[hole] = entries_[slot];
        hole = slot;
      }
    }
    entries_[hole] = Entry{};
    --size_;
  }

  void grow() {
    std::vector<Entry> old(2 * entries_.size());
    std::swap(old, entries_);
    for (const Entry& entry : old) {
      if (entry.leader != 0) entries_[slot_of(entry.digest)] = entry;
    }
  }

  std::vector<Entry> entries_;  // a power of two of them, half empty at least
  int64_t size_ = 0;
};

}  // namespace kvtune::pool
