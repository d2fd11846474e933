// Names some places ahead of the one at hand: what a walk over many of them will read is fetched early.
#pragma once

#include "digest.h"

namespace kvtune::pool {

// Each name is mixed once. `fetch(mixed)` is called AHEAD places before its turn; `digests[i]` must be asked for in
// order, from 0 on.
template <class Fetch>
class MixedAhead {
 public:
  static constexpr int64_t AHEAD = 16;

  MixedAhead(const Digest* digests, int64_t num, Fetch fetch) : digests_(digests), num_(num), fetch_(fetch) {
    for (int64_t i = 0; i < AHEAD && i < num; ++i) enter(i);
  }

  // Of name i; moves on.
  uint64_t take(int64_t i) {
    const uint64_t mixed = ring_[i % AHEAD];
    if (i + AHEAD < num_) enter(i + AHEAD);
    return mixed;
  }

  // Of a name fewer than AHEAD places behind the one taken last.
  uint64_t later(int64_t i) const { return ring_[i % AHEAD]; }

 private:
  void enter(int64_t i) {
    ring_[i % AHEAD] = digests_[i].mixed();
    fetch_(ring_[i % AHEAD]);
  }

  const Digest* digests_;
  int64_t num_;
  Fetch fetch_;
  uint64_t ring_[AHEAD];
};

}  // namespace kvtune::pool
