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
#pragma once

#include <vector>

#include "block_list.h"
#include "policy.h"
#include "survival.h"

namespace kvtune::replay {

class HazardOrder {
 public:
  static constexpr int64_t GHOSTS = 8;  // evicted blocks remembered, in capacities

  explicit HazardOrder(const Cache& cache)
      : cache_(cache), links_(cache.num_unique()), facts_(static_cast<size_t>(cache.num_unique())),
        queues_(NUM_CLASSES), open_(NUM_CLASSES, -1), waiting_(NUM_AGES), front_score_(NUM_CLASSES, 0),
        is_scored_(NUM_CLASSES, 0) {}

  size_t bytes() const {
    return links_.bytes() + facts_.size() * sizeof(Facts) + releases_.capacity() * sizeof(Release) +
           survival_.bytes();
  }

  // The clock moves on; what the request's known prefix tells is kept for its blocks.
  void begin(const Request& request) {
    now_ = clock_;
    clock_ += request.num_blocks;
    age_releases();
    if (survival_.advance(clock_, num_released_ ? static_cast<double>(num_released_) / num_releases_ : 1.0)) {
      scored_at_ = -1;
    }
    open_.assign(NUM_CLASSES, -1);
    int64_t known = 0;
    while (known < request.num_blocks && facts_[request.blocks[known]].state != UNKNOWN) ++known;
    gap_ = known == 0 ? 0 : gap_step(now_ - releases_[facts_[request.blocks[known - 1]].release].time);
  }

  void pin(Block block) {
    Facts& facts = facts_[block];
    if (facts.state == CANDIDATE) leave_queue(block);
    use(facts);
  }

  void insert(Block block) {
    Facts& facts = facts_[block];
    if (facts.state == UNKNOWN) {
      if (const Block p = cache_.parent(block); p != NO_BLOCK && facts_[p].children < 255) ++facts_[p].children;
      facts.uses = facts.children = 0;
    } else {
      ghosts_.erase(links_, block);
      --num_ghosts_;
    }
    use(facts);
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
      if (cache_.num_resident_children(block) == 0) return block;
      leave_queue(block);
      facts_[block].state = BLOCKED;
    }
  }

  // Before cache.evict(block). A parent that was due before its last child follows at once.
  void remove(Block block) {
    Facts& facts = facts_[block];
    if (facts.state == CANDIDATE) leave_queue(block);
    facts.state = GHOST;
    ghosts_.push_back(links_, block);
    if (++num_ghosts_ > GHOSTS * cache_.capacity()) forget();
    const Block p = cache_.parent(block);
    if (p == NO_BLOCK || facts_[p].state != BLOCKED || cache_.num_resident_children(p) != 1) return;
    facts_[p].state = CANDIDATE;
    facts_[p].queue = facts.queue;
    facts_[p].queued = facts.queued;
    queues_[facts.queue].push_front(links_, p);
    is_scored_[facts.queue] = 0;
  }

 private:
  enum State : uint8_t { UNKNOWN, PINNED, CANDIDATE, BLOCKED, GHOST };  // blocked: a candidate with children

  struct Facts {
    int64_t queued = 0;    // time its place in the queue counts from
    int32_t release = -1;  // the observation it is part of
    uint8_t queue = 0;
    uint8_t uses = 0;
    uint8_t children = 0;
    uint8_t gap : 4;
    uint8_t state : 4;
    Facts() : gap(0), state(UNKNOWN) {}
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
    while (step < CLASS_LEVELS[2] - 1 && 4 * gap >= cache_.capacity() << (step - 1)) ++step;
    return step;
  }

  void use(Facts& facts) {
    if (facts.state != UNKNOWN) {
      Release& release = releases_[facts.release];
      survival_.add_used(release.block_class, survival_.bucket(now_ - release.time));
      --release.num_unused;
    }
    if (facts.uses < 255) ++facts.uses;
    facts.gap = static_cast<uint8_t>(gap_);
    facts.state = PINNED;
  }

  void forget() {
    const Block block = ghosts_.front();
    ghosts_.erase(links_, block);
    --num_ghosts_;
    --releases_[facts_[block].release].num_unused;
    facts_[block].state = UNKNOWN;
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

  const Cache& cache_;
  BlockLinks links_;  // of the queues and of the ghosts
  std::vector<Facts> facts_;
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
