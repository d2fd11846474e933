// The native twin of kvtune.cache.block_pool.BlockPool, for pools whose low planes stay: who is free, idle or
// referenced, and which block holds which content. Verbs take many blocks at once.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "digest_index.h"
#include "mixed_ahead.h"
#include "order.h"

namespace kvtune::pool {

// A caller's bug, told to Python as an InvariantError.
struct PoolError : std::logic_error {
  using std::logic_error::logic_error;
};

inline PoolError about(int32_t id, const char* what) {
  return PoolError("block " + std::to_string(id) + " " + what);
}

using MakeOrder = std::function<std::unique_ptr<Order>(Links& links, const DigestIndex& index, int64_t num_ids,
                                                       int64_t capacity)>;

class BlockPool {
 public:
  enum Part { BODY = 0, FIRST = 1 };

  struct Counts {
    int64_t free, idle, evicted, published, duplicates, bytes;
  };

  BlockPool(int64_t num_body, int64_t num_first, int64_t budget, int64_t max_evicted, MakeOrder make_order)
      : index(num_body + num_first, max_evicted), states_(num_body + num_first), links_(num_body + num_first),
        make_order_(std::move(make_order)) {
    parts_[BODY].end = parts_[FIRST].begin = parts_[FIRST].fresh = static_cast<int32_t>(num_body);
    parts_[FIRST].end = static_cast<int32_t>(num_body + num_first);
    parts_[BODY].budget = budget;
    parts_[FIRST].budget = num_first;
    renew_orders();
  }

  int64_t num_ids() const { return states_.size(); }
  uint32_t ref_count(int32_t id) const { return states_[id] & ~PUBLISHED; }
  bool is_published(int32_t id) const { return (states_[id] & PUBLISHED) != 0; }
  bool is_idle(int32_t id) const { return states_[id] == PUBLISHED; }
  Part part_of(int32_t id) const { return id >= parts_[FIRST].begin ? FIRST : BODY; }
  bool has_first() const { return parts_[FIRST].size() > 0; }

  Counts counts(Part part) const {
    const int64_t bytes = index.bytes() + states_.bytes() + links_.bytes() + parts_[BODY].order->bytes() +
                          parts_[FIRST].order->bytes();
    return {parts_[part].num_free(), parts_[part].order->num_candidates(), num_evicted_, num_published_,
            num_duplicates_, bytes};
  }

  // --- looking

  int64_t find_run(const Digest* digests, int64_t num, int32_t* out) const {
    MixedAhead ahead(digests, num, [this](uint64_t mixed) { index.prefetch(mixed); });
    for (int64_t i = 0; i < num; ++i) {
      out[i] = index.find(digests[i], ahead.take(i));
      if (i + SOON < num) index.prefetch_first(ahead.later(i + SOON));
      if (out[i] == NO_ID) return i;
    }
    return num;
  }

  // The last of digests start..end-1 without a block, start - 1 where all have one.
  int64_t last_gap(const Digest* digests, int64_t start, int64_t end) const {
    int64_t i = end - 1;
    while (i >= start && index.find(digests[i]) != NO_ID) --i;
    return i;
  }

  // `seen(i)` for each name that has a block, or whose eviction is remembered.
  template <class Seen>
  void each_seen(const Digest* digests, int64_t num, Seen seen) const {
    MixedAhead ahead(digests, num, [this](uint64_t mixed) {
      index.prefetch(mixed);
      index.evicted.prefetch(mixed);
    });
    for (int64_t i = 0; i < num; ++i) {
      const uint64_t mixed = ahead.take(i);
      if (index.evicted.contains(mixed) || index.find(digests[i], mixed) != NO_ID) seen(i);
    }
  }

  bool holds(const int32_t* ids, const Digest* digests, int64_t num) const {
    for (int64_t i = 0; i < num; ++i) {
      if (ids[i] >= 0 && !(is_published(ids[i]) && index.digest(ids[i]) == digests[i])) return false;
    }
    return true;
  }

  // Idle ones of these blocks, by part.
  void num_idle(const int32_t* ids, int64_t num, int64_t* out) const {
    out[BODY] = out[FIRST] = 0;
    for (int64_t i = 0; i < num; ++i) {
      if (ids[i] >= 0 && is_idle(ids[i])) ++out[part_of(ids[i])];
    }
  }

  // Blocks nobody would hold if these references were given back, by part. `ids` is sorted on return.
  void num_released(int32_t* ids, int64_t num, int64_t* out) const {
    out[BODY] = out[FIRST] = 0;
    std::sort(ids, ids + num);
    for (int64_t i = 0, same = 0; i < num; i += same) {
      for (same = 1; i + same < num && ids[i + same] == ids[i];) ++same;
      if (ids[i] >= 0 && ref_count(ids[i]) == same) ++out[part_of(ids[i])];
    }
  }

  // --- taking and giving back

  void begin(const Digest* digests, int64_t num) {
    const int64_t num_first = has_first() ? std::min<int64_t>(1, num) : 0;
    if (num_first > 0) parts_[FIRST].order->begin(digests, num_first);
    parts_[BODY].order->begin(digests + num_first, num - num_first);
  }

  void take(Part which, int64_t num, int32_t* out) {
    Part_& part = parts_[which];
    int64_t num_fetched = 0;
    for (int64_t i = 0; i < num; ++i) {
      while (part.num_free() == 0 || part.num_taken() >= part.budget) {
        if (num_fetched-- == 0) num_fetched = prefetch_evictions(*part.order, num - i) - 1;
        evict(part);
      }
      out[i] = pop_free(part);
      states_[out[i]] = 1;
    }
  }

  void incref(const int32_t* ids, int64_t num) {
    for (int64_t i = 0; i < num; ++i) {
      const int32_t id = ids[i];
      prefetch_ahead(ids, i, num);
      if (id < 0) continue;
      if (ref_count(id) == 0) {
        if (!is_published(id)) throw about(id, "is free and cannot be shared");
        order_of(id).pin(id);
      }
      ++states_[id];
    }
  }

  void decref(const int32_t* ids, int64_t num) {
    for (int64_t i = 0; i < num; ++i) {
      const int32_t id = ids[i];
      prefetch_ahead(ids, i, num);
      if (id < 0) continue;
      if (ref_count(id) == 0) throw about(id, "was given back more often than taken");
      --states_[id];
      if (states_[id] == 0) {
        push_free(part(id), id);
      } else if (is_idle(id)) {
        order_of(id).unpin(id);
      }
    }
  }

  // Makes table[start..end-1] findable under digests[start..end-1]; the canonical blocks replace second copies.
  void publish(int32_t* table, const Digest* digests, int64_t start, int64_t end) {
    MixedAhead ahead(digests + start, end - start, [this](uint64_t mixed) {
      index.prefetch(mixed);
      index.evicted.prefetch(mixed);
      parts_[BODY].order->prefetch_name(mixed);
    });
    for (int64_t i = start; i < end; ++i) {
      table[i] = publish_one(table[i], i > 0 ? table[i - 1] : NO_ID, digests[i], ahead.take(i - start));
    }
  }

  // Makes a block findable; `before` is the one before it in its table. Returns the canonical block.
  int32_t publish_one(int32_t id, int32_t before, const Digest& digest, uint64_t mixed) {
    if (is_published(id)) {
      if (!(index.digest(id) == digest)) throw about(id, "is published under another hash");
      return id;
    }
    if (!index.insert(digest, mixed, id)) {
      const int32_t canonical = index.find(digest, mixed);
      incref(&canonical, 1);
      decref(&id, 1);
      ++num_duplicates_;
      return canonical;
    }
    states_[id] |= PUBLISHED;
    ++num_published_;
    const bool is_apart = before < 0 || part_of(before) != part_of(id);
    order_of(id).insert(id, is_apart ? NO_ID : before, mixed);
    return id;
  }

  // Frees the idle blocks with these contents.
  void forget(const Digest* digests, int64_t num) {
    for (int64_t i = 0; i < num; ++i) {
      const uint64_t mixed = digests[i].mixed();
      const int32_t id = index.find(digests[i], mixed);
      if (id == NO_ID || ref_count(id) != 0) continue;
      order_of(id).remove(id, mixed);
      index.forget(id, mixed);
      states_[id] = 0;
      push_free(part(id), id);
    }
  }

  bool evict_idle(Part which) {
    if (parts_[which].order->num_candidates() == 0) return false;
    evict(parts_[which]);
    return true;
  }

  // In order of their ids, as if they had all been given back.
  void unpublish_all() {
    for (int32_t id = 0; id < num_ids(); ++id) {
      if (!is_published(id)) continue;
      states_[id] &= ~PUBLISHED;
      if (states_[id] == 0) push_free(part(id), id);
    }
    renew_orders();
    index.clear();
  }

  // Another purse for the body. The lowest free ids go first now.
  void set_budget(int64_t budget) {
    Part_& body = parts_[BODY];
    body.budget = budget;
    std::vector<int32_t> ids;
    for (int32_t id = body.free_head; body.num_returned > 0; id = links_.next[id], --body.num_returned) {
      ids.push_back(id);
    }
    std::sort(ids.begin(), ids.end(), std::greater<>());
    for (const int32_t id : ids) push_free(body, id);
  }

  // Body ids without content, the next to go last.
  int64_t free_ids(int32_t* out) const {
    const Part_& body = parts_[BODY];
    int64_t num = 0;
    for (int32_t id = body.end - 1; id >= body.fresh; --id) out[num++] = id;
    const int64_t num_fresh = num;
    for (int32_t id = body.free_head; num < num_fresh + body.num_returned; id = links_.next[id]) out[num++] = id;
    std::reverse(out + num_fresh, out + num);
    return num;
  }

  int32_t victim(Part which) { return parts_[which].order->victim(); }

  DigestIndex index;

 private:
  static constexpr uint32_t PUBLISHED = 1u << 31;
  static constexpr int64_t SOON = 6;    // places ahead, to fetch what was found through what was fetched before
  static constexpr int64_t WAVE = 16;  // evictions looked ahead to at once

  // One range of ids. Those from `fresh` on were never taken; those returned lie on a stack.
  struct Part_ {
    int32_t begin = 0, end = 0, fresh = 0;
    int32_t free_head = NO_ID;
    int64_t num_returned = 0, budget = 0;
    std::unique_ptr<Order> order;

    int64_t size() const { return end - begin; }
    int64_t num_free() const { return end - fresh + num_returned; }
    int64_t num_taken() const { return size() - num_free(); }
  };

  Part_& part(int32_t id) { return parts_[part_of(id)]; }
  Order& order_of(int32_t id) { return *part(id).order; }

  int32_t pop_free(Part_& part) {
    if (part.num_returned == 0) return part.fresh++;
    const int32_t id = part.free_head;
    part.free_head = links_.next[id];
    --part.num_returned;
    return id;
  }

  void push_free(Part_& part, int32_t id) {
    links_.next[id] = part.free_head;
    part.free_head = id;
    ++part.num_returned;
  }

  void evict(Part_& part) {
    const int32_t id = part.order->victim();
    if (id == NO_ID) throw PoolError("no block is free or idle; the caller must test for room first");
    if (!is_idle(id)) throw about(id, "was chosen by the eviction policy, and is not idle");
    const uint64_t mixed = index.digest(id).mixed();
    part.order->remove(id, mixed);
    index.evict(id, mixed);
    states_[id] = 0;
    push_free(part, id);
    ++num_evicted_;
  }

  void prefetch_ahead(const int32_t* ids, int64_t i, int64_t num) const {
    if (i + SOON < num && ids[i + SOON] >= 0) parts_[BODY].order->prefetch_block(ids[i + SOON]);
  }

  // Evictions come in runs: what the next ones will read, as far as they can be foreseen. How many those are.
  int64_t prefetch_evictions(Order& order, int64_t num) const {
    int32_t ids[WAVE];
    const int64_t num_likely = order.likely_victims(ids, std::min(num, WAVE));
    for (int64_t i = 0; i < num_likely; ++i) index.prefetch_name(ids[i]);
    for (int64_t i = 0; i < num_likely; ++i) {
      const uint64_t mixed = index.digest(ids[i]).mixed();
      index.prefetch(mixed);
      index.evicted.prefetch(mixed);
      order.prefetch_name(mixed);
    }
    return std::max<int64_t>(num_likely, 1);
  }

  void renew_orders() {
    for (Part_& part : parts_) {
      part.order = part.size() > 0 ? make_order_(links_, index, num_ids(), std::max<int64_t>(part.budget, 0))
                                   : std::make_unique<Lru>(links_);
    }
  }

  LazyArray<uint32_t> states_;  // reference count, and PUBLISHED where the content is in the index
  Links links_;
  MakeOrder make_order_;
  Part_ parts_[2];
  int64_t num_evicted_ = 0, num_published_ = 0, num_duplicates_ = 0;
};

}  // namespace kvtune::pool
