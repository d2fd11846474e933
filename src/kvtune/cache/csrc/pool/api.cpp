// The C ABI of the native block pool, the blocks in flight and block hashes. Handles are opaque; a function that
// can fail answers a status and writes a one-line message.
#include <exception>
#include <new>

#include "block_pool.h"
#include "in_flight.h"
#include "learned.h"
#include "sha256.h"

#define KVTUNE_API extern "C" __attribute__((visibility("default")))

namespace pool = kvtune::pool;
using pool::BlockPool;
using pool::Digest;

namespace {

enum Status : int32_t { OK = 0, MISUSE = 1, NO_MEMORY = 2 };

thread_local char message[256];  // of the thread's last call that failed

template <class Body>
int32_t guarded(Body body) {
  try {
    body();
    return OK;
  } catch (const std::bad_alloc&) {
    std::strncpy(message, "out of memory", sizeof(message) - 1);
    return NO_MEMORY;
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof(message) - 1);
    return MISUSE;
  }
}

const Digest* from(const uint8_t* digests, int64_t start) {
  return reinterpret_cast<const Digest*>(digests) + start;
}

BlockPool::Part part(int32_t is_first) { return is_first ? BlockPool::FIRST : BlockPool::BODY; }

struct Policy {
  const char* name;
  pool::MakeOrder make;
};

std::unique_ptr<pool::Order> make_lru(pool::Links& links, const pool::DigestIndex&, int64_t, int64_t) {
  return std::make_unique<pool::Lru>(links);
}

template <bool is_guarded>
std::unique_ptr<pool::Order> make_learned(pool::Links& links, const pool::DigestIndex& index, int64_t num_ids,
                                          int64_t capacity) {
  return std::make_unique<pool::Learned>(links, index, num_ids, capacity, is_guarded);
}

const Policy POLICIES[] = {
    {"lru", make_lru},
    {"hazard", make_learned<false>},
    {"guarded", make_learned<true>},
};
constexpr int32_t NUM_POLICIES = sizeof(POLICIES) / sizeof(POLICIES[0]);

}  // namespace

KVTUNE_API int32_t kvtune_cache_abi_version() { return 3; }
KVTUNE_API const char* kvtune_cache_message() { return message; }
KVTUNE_API int32_t kvtune_cache_num_policies() { return NUM_POLICIES; }
KVTUNE_API const char* kvtune_cache_policy_name(int32_t i) { return POLICIES[i].name; }

// --- block hashes

KVTUNE_API int32_t kvtune_has_sha_instructions() {
  return pool::sha::best_compress() != pool::sha::compress_portable;
}

KVTUNE_API void kvtune_hash_blocks(const uint8_t* parent, const uint8_t* data, int64_t width, int64_t num,
                                   int32_t is_portable, uint8_t* out) {
  static const pool::sha::Compress best = pool::sha::best_compress();
  pool::hash_chain(is_portable ? pool::sha::compress_portable : best, parent, data, static_cast<size_t>(width), num,
                   out);
}

// One block behind each of `num` parents.
KVTUNE_API void kvtune_hash_each(const uint8_t* parents, const uint8_t* data, int64_t width, int64_t num,
                                 uint8_t* out) {
  static const pool::sha::Compress best = pool::sha::best_compress();
  for (int64_t i = 0; i < num; ++i) {
    pool::hash_chain(best, parents + 32 * i, data + width * i, static_cast<size_t>(width), 1, out + 32 * i);
  }
}

// --- pools

KVTUNE_API int32_t kvtune_pool_new(int64_t num_body, int64_t num_first, int64_t budget, int64_t max_evicted,
                                   int32_t policy, void** out) {
  return guarded([&] { *out = new BlockPool(num_body, num_first, budget, max_evicted, POLICIES[policy].make); });
}

KVTUNE_API void kvtune_pool_free(BlockPool* p) { delete p; }

KVTUNE_API void kvtune_pool_counts(const BlockPool* p, int32_t is_first, BlockPool::Counts* out) {
  *out = p->counts(part(is_first));
}

KVTUNE_API int64_t kvtune_pool_find_run(const BlockPool* p, const uint8_t* digests, int64_t start, int64_t num,
                                        int32_t* out) {
  return p->find_run(from(digests, start), num, out);
}

KVTUNE_API int64_t kvtune_pool_last_gap(const BlockPool* p, const uint8_t* digests, int64_t start, int64_t end) {
  return p->last_gap(from(digests, 0), start, end);
}

KVTUNE_API void kvtune_pool_mark_seen(const BlockPool* p, const uint8_t* digests, int64_t start, int64_t num,
                                      uint8_t* seen) {
  p->each_seen(from(digests, start), num, [seen](int64_t i) { seen[i] = 1; });
}

// What `match` finds: blocks of the leading run, names behind it that were here before, who computes the first name
// that no block has (0: nobody), and the last one of those it computes.
struct Matched {
  int64_t run, num_seen, leader, awaited;
};

// `ids` takes the run's blocks. Names from `limit` on are not waited for.
KVTUNE_API void kvtune_pool_match(const BlockPool* p, const pool::InFlight* in_flight, const uint8_t* digests,
                                  int64_t start, int64_t num, int64_t limit, int32_t* ids, Matched* out) {
  const Digest* names = from(digests, start);
  *out = {p->find_run(names, num, ids), 0, 0, -1};
  p->each_seen(names + out->run, num - out->run, [out](int64_t) { ++out->num_seen; });
  const int64_t missing = std::min(out->run, limit);
  if (missing == limit) return;
  out->leader = in_flight->leader(names[missing]);
  if (out->leader != 0) out->awaited = missing + in_flight->run(names + missing, limit - missing) - 1;
}

// Whether each block holds the content at its place; `num_idle` takes how many are idle, by part.
KVTUNE_API int32_t kvtune_pool_holds(const BlockPool* p, const int32_t* ids, const uint8_t* digests, int64_t start,
                                     int64_t num, int64_t* num_idle) {
  p->num_idle(ids, num, num_idle);
  return p->holds(ids, from(digests, start), num);
}

KVTUNE_API void kvtune_pool_num_idle(const BlockPool* p, const int32_t* ids, int64_t num, int64_t* out) {
  p->num_idle(ids, num, out);
}

KVTUNE_API void kvtune_pool_num_released(const BlockPool* p, int32_t* ids, int64_t num, int64_t* out) {
  p->num_released(ids, num, out);
}

KVTUNE_API int32_t kvtune_pool_admit(BlockPool* p, const int32_t* ids, int64_t num_ids, const uint8_t* digests,
                                     int64_t start, int64_t num) {
  return guarded([&] {
    p->begin(from(digests, start), num);
    p->incref(ids, num_ids);
  });
}

KVTUNE_API int32_t kvtune_pool_take(BlockPool* p, int32_t is_first, int64_t num, int32_t* out) {
  return guarded([&] { p->take(part(is_first), num, out); });
}

KVTUNE_API int32_t kvtune_pool_incref(BlockPool* p, const int32_t* ids, int64_t num) {
  return guarded([&] { p->incref(ids, num); });
}

KVTUNE_API int32_t kvtune_pool_decref(BlockPool* p, const int32_t* ids, int64_t num) {
  return guarded([&] { p->decref(ids, num); });
}

KVTUNE_API int32_t kvtune_pool_publish(BlockPool* p, int32_t* table, const uint8_t* digests, int64_t offset,
                                       int64_t start, int64_t end) {
  return guarded([&] { p->publish(table, from(digests, offset), start, end); });
}

// ids[i] behind parents[i] (-1: none), under digest i; ids[i] becomes the block that holds the content.
KVTUNE_API int32_t kvtune_pool_publish_each(BlockPool* p, int32_t* ids, const int32_t* parents,
                                            const uint8_t* digests, int64_t start, int64_t num) {
  return guarded([&] {
    const Digest* names = from(digests, start);
    for (int64_t i = 0; i < num; ++i) ids[i] = p->publish_one(ids[i], parents[i], names[i], names[i].mixed());
  });
}

KVTUNE_API int32_t kvtune_pool_forget(BlockPool* p, const uint8_t* digests, int64_t start, int64_t num) {
  return guarded([&] { p->forget(from(digests, start), num); });
}

KVTUNE_API int32_t kvtune_pool_evict_idle(BlockPool* p, int32_t* has_evicted) {
  return guarded([&] { *has_evicted = p->evict_idle(BlockPool::BODY); });
}

KVTUNE_API int32_t kvtune_pool_unpublish_all(BlockPool* p) {
  return guarded([&] { p->unpublish_all(); });
}

KVTUNE_API int32_t kvtune_pool_set_budget(BlockPool* p, int64_t budget) {
  return guarded([&] { p->set_budget(budget); });
}

// out[i]: reference count of block i, its highest bit set where the block is published.
KVTUNE_API uint32_t kvtune_pool_state(const BlockPool* p, int32_t id) {
  return p->ref_count(id) | (p->is_published(id) ? 1u << 31 : 0);
}

KVTUNE_API void kvtune_pool_digest(const BlockPool* p, int32_t id, uint8_t* out) {
  std::memcpy(out, &p->index.digest(id), sizeof(Digest));
}

KVTUNE_API int64_t kvtune_pool_free_ids(const BlockPool* p, int32_t* out) { return p->free_ids(out); }
KVTUNE_API int32_t kvtune_pool_victim(BlockPool* p, int32_t is_first) { return p->victim(part(is_first)); }

// --- the index of a pool alone

KVTUNE_API int32_t kvtune_index_find(const BlockPool* p, const uint8_t* digest) {
  return p->index.find(*from(digest, 0));
}
KVTUNE_API int32_t kvtune_index_insert(BlockPool* p, const uint8_t* digest, int32_t id) {
  return p->index.insert(*from(digest, 0), from(digest, 0)->mixed(), id);
}
KVTUNE_API int32_t kvtune_index_evict(BlockPool* p, const uint8_t* digest) {
  const int32_t id = p->index.find(*from(digest, 0));
  return id != pool::NO_ID && p->index.evict(id, from(digest, 0)->mixed());
}
KVTUNE_API int32_t kvtune_index_forget(BlockPool* p, const uint8_t* digest) {
  const int32_t id = p->index.find(*from(digest, 0));
  return id != pool::NO_ID && p->index.forget(id, from(digest, 0)->mixed());
}
KVTUNE_API int32_t kvtune_index_was_evicted(const BlockPool* p, const uint8_t* digest) {
  return p->index.evicted.contains(from(digest, 0)->mixed());
}
KVTUNE_API void kvtune_index_clear(BlockPool* p) { p->index.clear(); }
KVTUNE_API int64_t kvtune_index_size(const BlockPool* p) { return p->index.size(); }
KVTUNE_API int64_t kvtune_index_ids(const BlockPool* p, int32_t* out) { return p->index.ids(out); }

// --- blocks in flight

KVTUNE_API int32_t kvtune_in_flight_new(void** out) {
  return guarded([&] { *out = new pool::InFlight(); });
}
KVTUNE_API void kvtune_in_flight_free(pool::InFlight* f) { delete f; }
KVTUNE_API int32_t kvtune_in_flight_lead(pool::InFlight* f, int64_t leader, const uint8_t* digests, int64_t start,
                                         int64_t num) {
  return guarded([&] { f->lead(leader, from(digests, start), num); });
}
KVTUNE_API void kvtune_in_flight_leave(pool::InFlight* f, int64_t leader, const uint8_t* digests, int64_t start,
                                       int64_t num) {
  f->leave(leader, from(digests, start), num);
}
KVTUNE_API int64_t kvtune_in_flight_leader(const pool::InFlight* f, const uint8_t* digests, int64_t start) {
  return f->leader(*from(digests, start));
}
KVTUNE_API int64_t kvtune_in_flight_run(const pool::InFlight* f, const uint8_t* digests, int64_t start, int64_t num) {
  return f->run(from(digests, start), num);
}
KVTUNE_API void kvtune_in_flight_clear(pool::InFlight* f) { f->clear(); }
KVTUNE_API int64_t kvtune_in_flight_leaders(const pool::InFlight* f, int64_t* out) { return f->leaders(out); }
