// What a call computes: tasks of query rows and the keys they pass over. Included by api.cpp.
//
// Sequences whose block tables begin alike read that beginning together: their rows attend it as rows of one task,
// like those of a prefill chunk, and each sequence goes on from the state its rows have reached (cascade attention:
// Hydragen, Juravsky et al., 2024; relay attention, Zhu et al., 2024). Those merge two results; here a row takes
// over maximum, sums and values as they stand, so that sharing changes no bit.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace kvtune {
namespace {

constexpr int MAX_SHARED_ROWS = QUERY_TILE / 2;  // a sequence with more fills passes over the keys by itself
constexpr int MIN_SHARED_TOKENS = 4 * TILE;
// Products of bytes take as long for a row beside this many others as beside more: for rows that share a KV head
// anyway, another pass over a prefix costs nothing but its reading, and that little while a cache holds it.
constexpr int64_t FULL_ROWS = 4;
constexpr int64_t CACHED_BYTES = int64_t{48} << 20;  // more than most cores find in a last-level cache

struct Plan {
  std::vector<QueryRow> rows;
  std::vector<Task> shared;  // to be done before `own`
  std::vector<Task> own;
  std::vector<float> states;  // one per shared row and KV head
  int64_t saved_tokens = 0;   // that sequences do not read, as another did
};

// Sequences [begin, end) of an order, which share the keys [0, num_tokens).
struct SharedPrefix {
  int begin, end, num_tokens;
};

// Sequences in lexicographical order of their block tables, and how many blocks each shares with its predecessor.
struct OrderedTables {
  std::vector<int> seqs, same;
};

int num_query_rows(const KvAttention& a, int seq) { return a.query_start[seq + 1] - a.query_start[seq]; }
int heads_of_group(const KvAttention& a) { return a.num_heads / a.cache->num_kv_heads; }

// Blocks full of keys that every row of the sequence sees; never all a row sees, so that each has keys left.
int num_common_blocks(const KvAttention& a, int seq) {
  return (a.context_len[seq] - num_query_rows(a, seq)) / a.cache->block_size;
}

int count_same(const KvAttention& a, int one, int other) {
  const int32_t *x = a.block_table + one * a.table_stride, *y = a.block_table + other * a.table_stride;
  const int limit = std::min(num_common_blocks(a, one), num_common_blocks(a, other));
  return static_cast<int>(std::mismatch(x, x + limit, y).first - x);
}

OrderedTables order_tables(const KvAttention& a) {
  OrderedTables order;
  for (int s = 0; s < a.num_seqs; s++) {
    const int rows = num_query_rows(a, s) * heads_of_group(a);
    if (rows > 0 && rows <= MAX_SHARED_ROWS && num_common_blocks(a, s) * a.cache->block_size >= MIN_SHARED_TOKENS)
      order.seqs.push_back(s);
  }
  std::sort(order.seqs.begin(), order.seqs.end(), [&](int one, int other) {
    const int32_t *x = a.block_table + one * a.table_stride, *y = a.block_table + other * a.table_stride;
    const int m = num_common_blocks(a, one), n = num_common_blocks(a, other);
    const auto at = std::mismatch(x, x + std::min(m, n), y);
    if (at.first != x + std::min(m, n)) return *at.first < *at.second;
    return m != n ? m < n : one < other;
  });
  for (size_t i = 0; i < order.seqs.size(); i++)
    order.same.push_back(i == 0 ? 0 : count_same(a, order.seqs[i - 1], order.seqs[i]));
  return order;
}

bool is_integer_codec(int codec) { return codec >= KV_INT8 && codec != KV_FP8; }

// Whether these sequences gain by attending their first `num_tokens` keys together. Measured on Zen 5, one thread, head
// dim 128, 8 sequences: in 16 bit 1.1 times from 256 tokens on and 1.8 at 4k; int8 1.2 to 2 with one or two query heads
// to a KV head; with four 0.93 to 1.02 up to 34 MB of prefix (the L3 has 32) and 1.5 at 68 MB.
bool pays(const KvAttention& a, bool has_byte_products, const int* seqs, int num_seqs, int num_tokens) {
  if (num_tokens < MIN_SHARED_TOKENS) return false;
  const KvArena& body = a.cache->body;
  if (!has_byte_products || !is_integer_codec(body.k.codec) || !is_integer_codec(body.v.codec)) return true;
  if ((num_seqs - 1) * int64_t{num_tokens} < 2 * MIN_SHARED_TOKENS) return false;  // as fast, or a little slower
  int64_t rows = 0;
  for (int i = 0; i < num_seqs; i++) rows += num_query_rows(a, seqs[i]) * heads_of_group(a);
  if (rows < FULL_ROWS * num_seqs) return true;
  const int64_t low = (body.k.low == nullptr ? 0 : body.k.low_bytes) + (body.v.low == nullptr ? 0 : body.v.low_bytes);
  return num_tokens / a.cache->block_size * (body.block_bytes + low) >= CACHED_BYTES;
}

// The prefixes in [begin, end) that save most: what all of it shares, or what its parts share, whichever is more.
int64_t choose_prefixes(const KvAttention& a, bool has_byte_products, const OrderedTables& order, int begin, int end,
                        std::vector<SharedPrefix>& chosen) {
  if (end - begin < 2) return 0;
  const auto first = order.same.begin();
  const int least = *std::min_element(first + begin + 1, first + end);
  const int tokens = least * a.cache->block_size / TILE * TILE;
  const int64_t saved = static_cast<int64_t>(end - begin - 1) * tokens;
  const int64_t here = pays(a, has_byte_products, order.seqs.data() + begin, end - begin, tokens) ? saved : 0;
  const size_t before = chosen.size();
  int64_t parts = 0;
  for (int i = begin; i < end;) {
    int stop = i + 1;
    while (stop < end && order.same[static_cast<size_t>(stop)] > least) stop++;
    parts += choose_prefixes(a, has_byte_products, order, i, stop, chosen);
    i = stop;
  }
  if (here == 0 || parts > here) return parts;
  chosen.resize(before);
  chosen.push_back({begin, end, tokens});
  return here;
}

// Query rows of a sequence, in order of their positions.
void add_rows(const KvAttention& a, int seq, std::vector<QueryRow>& rows) {
  const int num_rows = num_query_rows(a, seq), G = heads_of_group(a);
  for (int i = 0; i < num_rows; i++)
    for (int g = 0; g < G; g++) rows.push_back({a.query_start[seq] + i, g, a.context_len[seq] - num_rows + i});
}

// A task of a part of the plan's rows: keys from what its first row sees to what its last does.
Task make_task(const KvAttention& a, int seq, int kv_head, const QueryRow* rows, int count) {
  const int position = rows[0].position;
  const int first = a.window > 0 && position >= a.window ? position - a.window + 1 : 0;
  return {seq, kv_head, count, first, rows[count - 1].position + 1, rows, nullptr, false};
}

// Adds the tasks of `count` rows from `first_row` on, QUERY_TILE at a time for each KV head; `change(task, row)`
// makes them what else they are.
template <class F>
void add_tasks(const KvAttention& a, const Plan& plan, std::vector<Task>& tasks, int seq, size_t first_row, int count,
               F&& change) {
  for (int h = 0; h < a.cache->num_kv_heads; h++)
    for (int r = 0; r < count; r += QUERY_TILE) {
      tasks.push_back(make_task(a, seq, h, plan.rows.data() + first_row + static_cast<size_t>(r),
                                std::min(count - r, QUERY_TILE)));
      change(tasks.back(), r);
    }
}

// The rows of all sequences of a prefix as tasks over it, and those of each over the rest. `states`: room for the
// group's, KV heads before rows.
void add_prefix(const KvAttention& a, const int* seqs, int num_seqs, int num_tokens, float* states, Plan& plan) {
  const int G = heads_of_group(a), size = state_size(a.cache->body.v.head_dim);
  const size_t first = plan.rows.size();
  for (int i = 0; i < num_seqs; i++) add_rows(a, seqs[i], plan.rows);
  const int count = static_cast<int>(plan.rows.size() - first);
  const auto state = [&](const Task& task, int row) {
    return states + (static_cast<int64_t>(task.kv_head) * count + row) * size;
  };
  add_tasks(a, plan, plan.shared, seqs[0], first, count, [&](Task& task, int row) {
    task.stop_key = num_tokens;
    task.state = state(task, row);
    task.hands_over = true;
  });
  int before = 0;
  for (int i = 0; i < num_seqs; i++) {
    const int rows = num_query_rows(a, seqs[i]) * G;
    add_tasks(a, plan, plan.own, seqs[i], first + static_cast<size_t>(before), rows, [&](Task& task, int row) {
      task.first_key = num_tokens;
      task.state = state(task, before + row);
    });
    before += rows;
  }
}

Plan make_plan(const KvAttention& a, bool has_byte_products) {
  Plan plan;
  std::vector<SharedPrefix> prefixes;
  OrderedTables order;
  if (a.window <= 0 && a.num_seqs > 1) {
    order = order_tables(a);
    plan.saved_tokens =
        choose_prefixes(a, has_byte_products, order, 0, static_cast<int>(order.seqs.size()), prefixes);
  }
  std::vector<bool> is_shared(static_cast<size_t>(a.num_seqs));
  int64_t num_shared = 0;  // query rows
  for (const SharedPrefix& p : prefixes)
    for (int i = p.begin; i < p.end; i++) {
      const int seq = order.seqs[static_cast<size_t>(i)];
      is_shared[static_cast<size_t>(seq)] = true;
      num_shared += num_query_rows(a, seq) * heads_of_group(a);
    }
  const int64_t state_rows = a.cache->num_kv_heads * state_size(a.cache->body.v.head_dim);
  plan.states.resize(static_cast<size_t>(num_shared * state_rows));
  plan.rows.reserve(static_cast<size_t>(a.query_start[a.num_seqs]) * static_cast<size_t>(heads_of_group(a)));
  for (const SharedPrefix& p : prefixes) {
    float* states = plan.states.data() + static_cast<int64_t>(plan.rows.size()) * state_rows;
    add_prefix(a, order.seqs.data() + p.begin, p.end - p.begin, p.num_tokens, states, plan);
  }
  for (int s = 0; s < a.num_seqs; s++) {
    if (is_shared[static_cast<size_t>(s)]) continue;
    const size_t first = plan.rows.size();
    add_rows(a, s, plan.rows);
    add_tasks(a, plan, plan.own, s, first, static_cast<int>(plan.rows.size() - first), [](Task&, int) {});
  }
  return plan;
}

}  // namespace
}  // namespace kvtune
