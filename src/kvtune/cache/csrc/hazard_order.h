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
// num_resident_children(b) and may_leave(b). `Records` keeps what the order knows of each block: facts(b), and
// the links of the list it is in.
#pragma once

#include <array>
#include <vector>

#include "block_list.h"
#include "lazy_array.h"
#include "survival.h"

namespace kvtune::replay {

// Twelve bytes; zeros: unknown. Counts stop where no class asks further.
struct HazardFacts {
  static constexpr uint32_t MOST_USES = 15, MOST_CHILDREN = 3;

  uint32_t queued_low;
  uint32_t queued_high : 8;
  uint32_t queue : 7;
  uint32_t uses : 4;
  uint32_t children : 2;
  uint32_t gap : 3;
  uint32_t state : 3;
  int32_t release;  // the observation it is part of, but for blocks pinned since they were inserted

  // Time its place in the queue counts from: block uses, up to a trillion.
  int64_t queued() const { return int64_t{queued_high} << 32 | queued_low; }
  void set_queued(int64_t time) {
    queued_low = static_cast<uint32_t>(time);
    queued_high = static_cast<uint32_t>(time >> 32) & 0xff;
  }
};
static_assert(sizeof(HazardFacts) == 12);
static_assert(NUM_CLASSES <= 1 << 7 && CLASS_LEVELS[2] <= 8);

class OwnRecords {
 public:
  explicit OwnRecords(int64_t num_unique) : facts_(num_unique), links_(num_unique) {}
  HazardFacts& facts(Block block) { return facts_[block]; }
  const HazardFacts& facts(Block block) const { return facts_[block]; }
  BlockLinks& links() { return links_; }
  size_t bytes() const { return static_cast<size_t>(facts_.bytes()) + links_.bytes(); }

 private:
  LazyArray<HazardFacts> facts_;
  BlockLinks links_;
};

template <class Tree, class Records = OwnRecords>
class HazardOrder {
  using Facts = HazardFacts;

 public:
  static constexpr int64_t GHOSTS = 8;  // evicted blocks remembered, in capacities

  explicit HazardOrder(const Tree& tree) : HazardOrder(tree, OwnRecords(tree.num_unique())) {}
  HazardOrder(const Tree& tree, Records records)
      : tree_(tree), records_(std::move(records)), queues_(NUM_CLASSES), open_(NUM_CLASSES, -1), waiting_(NUM_AGES), front_score_(NUM_CLASSES, 0),
        is_scored_(NUM_CLASSES, 0) {}

  size_t bytes() const {
    return records_.bytes() + releases_.capacity() * sizeof(Release) + survival_.bytes();
  }

  bool is_known(Block block) const { return records_.facts(block).state != UNKNOWN; }

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
    gap_ = deepest == NO_BLOCK ? 0 : gap_step(idle_time(facts(deepest)));
  }

  void pin(Block block) {
    Facts& own = facts(block);
    if (own.state == CANDIDATE) leave_queue(block);
    use(own, gap_);
  }

  // `above`: the resident block before it, NO_BLOCK where there is none.
  void insert(Block block, Block above) {
    Facts& own = facts(block);
    if (own.state == UNKNOWN) {
      if (above != NO_BLOCK && facts(above).children < Facts::MOST_CHILDREN) ++facts(above).children;
      own.uses = own.children = 0;
    } else {
      ghosts_.erase(records_.links(), block);
      --num_ghosts_;
    }
    use(own, above == NO_BLOCK ? gap_ : static_cast<int>(facts(above).gap));
  }

  void unpin(Block block) {
    Facts& own = facts(block);
    const int block_class = class_of(own);
    int32_t& release = open_[block_class];
    if (release < 0) release = new_release(block_class);
    ++releases_[release].num_unused;
    ++num_released_;
    own.release = release;
    own.state = CANDIDATE;
    own.queue = static_cast<uint32_t>(block_class);
    own.set_queued(now_);
    enter_back(block_class, block);
  }

  Block victim() {
    for (;;) {
      const int queue = lowest_queue();
      if (queue < 0) return NO_BLOCK;
      const Block block = queues_[queue].front();
      if (tree_.may_leave(block)) return block;
      leave_queue(block);
      facts(block).state = BLOCKED;
    }
  }

  // The next victims as far as one queue tells: each candidate, and those before it that wait for nothing else.
  // `visit(block)`: whether to go on.
  template <class Visit>
  void each_likely_victim(Visit visit) {
    for (Block first = victim(); first != NO_BLOCK; first = records_.links().next(first)) {
      for (Block block = first; block != NO_BLOCK; block = blocked_for(block)) {
        if (!visit(block)) return;
      }
    }
  }

  // The remembered blocks that so many removals would forget, in this order.
  template <class Visit>
  void each_forgotten_for(int64_t num, Visit visit) {
    int64_t left = num_ghosts_ + num - GHOSTS * tree_.capacity();
    for (Block block = ghosts_.front(); block != NO_BLOCK && left > 0; block = records_.links().next(block), --left) {
      visit(block);
    }
  }

  // A window passed the block while it waited for its children to leave: it need not wait any more.
  void unblock(Block block) {
    Facts& own = facts(block);
    if (own.state != BLOCKED) return;
    own.state = CANDIDATE;
    own.queue = static_cast<uint32_t>(class_of(own));
    enter_back(static_cast<int>(own.queue), block);
  }

  // Before the tree hears of it. A parent that was due before its last child follows at once. Returns the block
  // that is forgotten for it, NO_BLOCK if none is.
  Block remove(Block block) {
    Facts& own = facts(block);
    if (own.state == CANDIDATE) {
      leave_queue(block);
    } else {
      own.queue = static_cast<uint32_t>(class_of(own));
    }
    own.state = GHOST;
    ghosts_.push_back(records_.links(), block);
    const Block p = blocked_for(block);
    const Block forgotten = ++num_ghosts_ > GHOSTS * tree_.capacity() ? forget() : NO_BLOCK;
    if (p == NO_BLOCK) return forgotten;
    facts(p).state = CANDIDATE;
    facts(p).queue = own.queue;
    facts(p).set_queued(own.queued());
    enter_front(static_cast<int>(own.queue), p);
    return forgotten;
  }

 private:
  enum State : uint32_t { UNKNOWN, PINNED, CANDIDATE, BLOCKED, GHOST };  // blocked: a candidate with children

  Facts& facts(Block block) { return records_.facts(block); }
  const Facts& facts(Block block) const { return records_.facts(block); }

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

  // The parent, if it was due and this is its last child: NO_BLOCK if not.
  Block blocked_for(Block block) const {
    const Block p = tree_.parent(block);
    return p != NO_BLOCK && facts(p).state == BLOCKED && tree_.num_resident_children(p) == 1 ? p : NO_BLOCK;
  }

  int class_of(const Facts& own) const {
    const int children = std::min<int>(own.children, 2), times = static_cast<int>(own.uses);
    const int uses = times <= 2 ? times - 1 : times <= 4 ? 2 : times <= 8 ? 3 : 4;
    return (children * CLASS_LEVELS[1] + uses) * CLASS_LEVELS[2] + static_cast<int>(own.gap);
  }

  int gap_step(int64_t gap) const {
    int step = 1;
    while (step < CLASS_LEVELS[2] - 1 && 4 * gap >= tree_.capacity() << (step - 1)) ++step;
    return step;
  }

  int64_t idle_time(const Facts& own) const {
    return own.state == PINNED ? 0 : now_ - releases_[own.release].time;
  }

  void use(Facts& own, int gap) {
    if (own.state != UNKNOWN) {
      Release& release = releases_[own.release];
      survival_.add_used(release.block_class, survival_.bucket(now_ - release.time));
      --release.num_unused;
    }
    if (own.uses < Facts::MOST_USES) ++own.uses;
    own.gap = static_cast<uint32_t>(gap);
    own.state = PINNED;
  }

  Block forget() {
    const Block block = ghosts_.front();
    ghosts_.erase(records_.links(), block);
    --num_ghosts_;
    --releases_[facts(block).release].num_unused;
    facts(block).state = UNKNOWN;
    return block;
  }

  void enter_back(int queue, Block block) {
    if (queues_[queue].empty()) new_front(queue);
    queues_[queue].push_back(records_.links(), block);
    in_use_[queue >> 6] |= uint64_t{1} << (queue & 63);
  }

  void enter_front(int queue, Block block) {
    new_front(queue);
    queues_[queue].push_front(records_.links(), block);
    in_use_[queue >> 6] |= uint64_t{1} << (queue & 63);
  }

  // The front of a queue changes. That of the lowest one often does without another score.
  void new_front(int queue) {
    is_scored_[queue] = 0;
    if (queue != lowest_) lowest_ = -1;
  }

  void leave_queue(Block block) {
    const int queue = static_cast<int>(facts(block).queue);
    if (queues_[queue].front() == block) new_front(queue);
    queues_[queue].erase(records_.links(), block);
    if (queues_[queue].empty()) in_use_[queue >> 6] &= ~(uint64_t{1} << (queue & 63));
  }

  // Lowest score; then queued first; then the lower class. Blocks queued at one time score alike.
  int lowest_queue() {
    const bool is_same = lowest_ >= 0 && scored_at_ == now_ && !queues_[lowest_].empty() &&
                         queued_of(lowest_) == lowest_queued_;
    if (!is_same) {
      lowest_ = find_lowest();
      if (lowest_ >= 0) lowest_queued_ = queued_of(lowest_);
    }
    return lowest_;
  }

  int find_lowest() {
    if (scored_at_ != now_) std::fill(is_scored_.begin(), is_scored_.end(), 0);
    scored_at_ = now_;
    int lowest = -1;
    for (int word = 0; word < 2; ++word) {
      for (uint64_t left = in_use_[word]; left != 0; left &= left - 1) {
        const int c = 64 * word + __builtin_ctzll(left);
        if (!is_scored_[c]) front_score_[c] = survival_.score(c, now_ - queued_of(c));
        is_scored_[c] = 1;
        if (lowest < 0 || front_score_[c] < front_score_[lowest] ||
            (front_score_[c] == front_score_[lowest] && queued_of(c) < queued_of(lowest))) {
          lowest = c;
        }
      }
    }
    return lowest;
  }

  int64_t queued_of(int queue) const { return facts(queues_[queue].front()).queued(); }

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
  Records records_;  // the links are those of the queues and of the ghosts
  std::vector<BlockList> queues_;
  std::array<uint64_t, 2> in_use_{};  // queues that are not empty, a bit each
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
  int lowest_ = -1;  // as far as nothing but its front has changed since
  int64_t lowest_queued_ = 0;
};

}  // namespace kvtune::replay
