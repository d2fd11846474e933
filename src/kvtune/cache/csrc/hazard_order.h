// The order in which a hazard policy lets candidates go, and the memory it learns from.
//
// Each class of blocks keeps its candidates in the order of their last use. Within a class the one used
// longest ago scores lowest, so the victim is the lowest of the classes' fronts. The clock counts block
// references; no wall clock sways a decision.
//
//   class = (children seen: 0, 1, more) x (uses: 1, 2, 3-4, 5-8, more) x (gap: age of the deepest block of
//           its request that was still known, in eight steps relative to the capacity; 0: none was known)
//
// Evicted blocks are remembered, 8 capacities of them: a return counts as the use it is, and uses outlive
// an eviction. Twin: kvtune.cache.eviction_hazard.
//
// `Tree` says who descends from whom: the cache of a replay, or that of a running engine (pool/learned.h), where
// requests come in between each other and windows pass blocks. It needs num_unique(), capacity(), parent(b),
// num_resident_children(b) and may_leave(b).
#pragma once

#include <vector>

#include "block_list.h"
#include "lazy_array.h"
#include "survival.h"

namespace kvtune::replay {

template <class Tree>
class HazardOrder {
 public:
  static constexpr int64_t GHOSTS = 8;  // evicted blocks remembered, in capacities

  explicit HazardOrder(const Tree& tree)
      : tree_(tree), links_(tree.num_unique()), facts_(tree.num_unique()),
        queues_(NUM_CLASSES), open_(NUM_CLASSES, -1), waiting_(NUM_AGES), front_score_(NUM_CLASSES, 0),
        is_scored_(NUM_CLASSES, 0) {}

  size_t bytes() const {
    return links_.bytes() + static_cast<size_t>(facts_.bytes()) + releases_.capacity() * sizeof(Release) +
           survival_.bytes();
  }

  bool is_known(Block block) const { return facts_[block].state != UNKNOWN; }

  // The deepest of the leading blocks that are known; NO_BLOCK: none is.
  Block deepest_known(const Block* blocks, int64_t num) const {
    int64_t known = 0;
    while (known < num && is_known(blocks[known])) ++known;
    return known == 0 ? NO_BLOCK : blocks[known - 1];
  }

  // The clock moves on; what the request's known prefix tells is kept for its blocks.
  void begin(int64_t num_blocks, Block deepest) {
    now_ = clock_;
    clock_ += num_blocks;
    age_releases();
    if (survival_.advance(clock_, num_released_ ? static_cast<double>(num_released_) / num_releases_ : 1.0)) {
      scored_at_ = -1;
    }
    open_.assign(NUM_CLASSES, -1);
    gap_ = deepest == NO_BLOCK ? 0 : gap_step(idle_time(facts_[deepest]));
  }

  void pin(Block block) {
    Facts& facts = facts_[block];
    if (facts.state == CANDIDATE) leave_queue(block);
    use(facts, gap_);
  }

  // `above`: the resident block before it, NO_BLOCK where there is none.
  void insert(Block block, Block above) {
    Facts& facts = facts_[block];
    if (facts.state == UNKNOWN) {
      if (above != NO_BLOCK && facts_[above].children < 255) ++facts_[above].children;
      facts.uses = facts.children = 0;
    } else {
      ghosts_.erase(links_, block);
      --num_ghosts_;
    }
    use(facts, above == NO_BLOCK ? gap_ : facts_[above].gap);
  }

  void unpin(Block block) {
    Facts& facts = facts_[block];
    const int block_class = class_of(facts);
    int32_t& release = open_[block_class];
    if (release < 0) release = new_release(block_class);
    ++releases_[release].num_unused;
    ++num_released_;
    facts.release = release;
    facts.state = CANDIDATE;
    facts.queue = static_cast<uint8_t>(block_class);
    facts.queued = now_;
    queues_[block_class].push_back(links_, block);
    is_scored_[block_class] = 0;
  }

  Block victim() {
    for (;;) {
      const int queue = lowest_queue();
      if (queue < 0) return NO_BLOCK;
      const Block block = queues_[queue].front();
      if (tree_.may_leave(block)) return block;
      leave_queue(block);
      facts_[block].state = BLOCKED;
    }
  }

  // A window passed the block while it waited for its children to leave: it need not wait any more.
  void unblock(Block block) {
    Facts& facts = facts_[block];
    if (facts.state != BLOCKED) return;
    facts.state = CANDIDATE;
    facts.queue = static_cast<uint8_t>(class_of(facts));
    queues_[facts.queue].push_back(links_, block);
    is_scored_[facts.queue] = 0;
  }

  // Before the tree hears of it. A parent that was due before its last child follows at once. Returns the block
  // that is forgotten for it, NO_BLOCK if none is.
  Block remove(Block block) {
    Facts& facts = facts_[block];
    if (facts.state == CANDIDATE) {
      leave_queue(block);
    } else {
      facts.queue = static_cast<uint8_t>(class_of(facts));
    }
    facts.state = GHOST;
    ghosts_.push_back(links_, block);
    const Block forgotten = ++num_ghosts_ > GHOSTS * tree_.capacity() ? forget() : NO_BLOCK;
    const Block p = tree_.parent(block);
    if (p == NO_BLOCK || facts_[p].state != BLOCKED || tree_.num_resident_children(p) != 1) return forgotten;
    facts_[p].state = CANDIDATE;
    facts_[p].queue = facts.queue;
    facts_[p].queued = facts.queued;
    queues_[facts.queue].push_front(links_, p);
    is_scored_[facts.queue] = 0;
    return forgotten;
  }

 private:
  enum State : uint8_t { UNKNOWN, PINNED, CANDIDATE, BLOCKED, GHOST };  // blocked: a candidate with children

  struct Facts {  // zeros: unknown
    int64_t queued;   // time its place in the queue counts from
    int32_t release;  // the observation it is part of, but for blocks pinned since they were inserted
    uint8_t queue;
    uint8_t uses;
    uint8_t children;
    uint8_t gap : 4;
    uint8_t state : 4;
  };

  // Blocks of one class released at one time: one observation of a survival curve.
  struct Release {
    int64_t time;
    int32_t block_class;
    int32_t num_unused;  // blocks not used since and not forgotten
    int32_t next;        // in its list: waiting for the next age, or free
  };

  struct ReleaseQueue {
    int32_t front = -1, back = -1;
  };

  int class_of(const Facts& facts) const {
    const int children = facts.children < 2 ? facts.children : 2;
    const int uses = facts.uses <= 2 ? facts.uses - 1 : facts.uses <= 4 ? 2 : facts.uses <= 8 ? 3 : 4;
    return (children * CLASS_LEVELS[1] + uses) * CLASS_LEVELS[2] + facts.gap;
  }

  int gap_step(int64_t gap) const {
    int step = 1;
    while (step < CLASS_LEVELS[2] - 1 && 4 * gap >= tree_.capacity() << (step - 1)) ++step;
    return step;
  }

  int64_t idle_time(const Facts& facts) const {
    return facts.state == PINNED ? 0 : now_ - releases_[facts.release].time;
  }

  void use(Facts& facts, int gap) {
    if (facts.state != UNKNOWN) {
      Release& release = releases_[facts.release];
      survival_.add_used(release.block_class, survival_.bucket(now_ - release.time));
      --release.num_unused;
    }
    if (facts.uses < 255) ++facts.uses;
    facts.gap = static_cast<uint8_t>(gap);
    facts.state = PINNED;
  }

  Block forget() {
    const Block block = ghosts_.front();
    ghosts_.erase(links_, block);
    --num_ghosts_;
    --releases_[facts_[block].release].num_unused;
    facts_[block].state = UNKNOWN;
    return block;
  }

  void leave_queue(Block block) {
    queues_[facts_[block].queue].erase(links_, block);
    is_scored_[facts_[block].queue] = 0;
  }

  // Lowest score; then queued first; then the lower class.
  int lowest_queue() {
    if (scored_at_ != now_) std::fill(is_scored_.begin(), is_scored_.end(), 0);
    scored_at_ = now_;
    int lowest = -1;
    for (int c = 0; c < NUM_CLASSES; ++c) {
      if (queues_[c].empty()) continue;
      if (!is_scored_[c]) front_score_[c] = survival_.score(c, now_ - facts_[queues_[c].front()].queued);
      is_scored_[c] = 1;
      if (lowest < 0 || front_score_[c] < front_score_[lowest] ||
          (front_score_[c] == front_score_[lowest] && queued_of(c) < queued_of(lowest))) {
        lowest = c;
      }
    }
    return lowest;
  }

  int64_t queued_of(int queue) const { return facts_[queues_[queue].front()].queued; }

  int32_t new_release(int block_class) {
    int32_t release = free_release_;
    if (release < 0) {
      release = static_cast<int32_t>(releases_.size());
      releases_.push_back({});
    } else {
      free_release_ = releases_[release].next;
    }
    releases_[release] = {now_, block_class, 0, -1};
    ++num_releases_;
    append(fresh_, release);
    return release;
  }

  void append(ReleaseQueue& queue, int32_t release) {
    releases_[release].next = -1;
    (queue.back < 0 ? queue.front : releases_[queue.back].next) = release;
    queue.back = release;
  }

  int32_t pop(ReleaseQueue& queue) {
    const int32_t release = queue.front;
    queue.front = releases_[release].next;
    if (queue.front < 0) queue.back = -1;
    return release;
  }

  // Releases that reach the next age: their unused blocks are at risk there. Those without any are dropped.
  void age_releases() {
    while (fresh_.front >= 0) enter(pop(fresh_), 0);
    for (int b = 1; b < NUM_AGES; ++b) {
      ReleaseQueue& younger = waiting_[b - 1];
      while (younger.front >= 0 && now_ - releases_[younger.front].time >= survival_.edge(b)) enter(pop(younger), b);
    }
  }

  void enter(int32_t release, int bucket) {
    const Release& r = releases_[release];
    if (r.num_unused == 0) {
      releases_[release].next = free_release_;
      free_release_ = release;
      return;
    }
    survival_.add_at_risk(r.block_class, bucket, r.num_unused);
    append(waiting_[bucket], release);
  }

  const Tree& tree_;
  BlockLinks links_;  // of the queues and of the ghosts
  LazyArray<Facts> facts_;
  std::vector<BlockList> queues_;
  BlockList ghosts_;  // evicted first in front
  int64_t num_ghosts_ = 0;
  int64_t clock_ = 0, now_ = 0;
  int gap_ = 0;  // of the request being served
  Survival survival_;
  std::vector<Release> releases_;
  int32_t free_release_ = -1;
  std::vector<int32_t> open_;  // the release of this moment, by class
  ReleaseQueue fresh_;
  std::vector<ReleaseQueue> waiting_;  // by the age reached
  int64_t num_released_ = 0, num_releases_ = 0;
  std::vector<double> front_score_;
  std::vector<uint8_t> is_scored_;
  int64_t scored_at_ = -1;
};

}  // namespace kvtune::replay
