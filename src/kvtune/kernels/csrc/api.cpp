// C ABI of the native kernels: checks, instruction set, tasks and threads. No torch and no Python ABI.
#include <cstring>
#include <memory>
#include <new>

#include "kernels.h"
#include "pool.h"

namespace kvtune {
namespace {

struct Isa {
  const char* name;
  const AttentionTable* attention;
  const WriteTable* write;
};

// Best last. Callers hold an index into this array, so that nothing here is mutable.
const Isa ISAS[] = {
    {"portable", &portable::attention_table, &portable::write_table},
#ifdef KVTUNE_X86
    {"avx2", &avx2::attention_table, &avx2::write_table},
    {"avx512", &avx512::attention_table, &avx512::write_table},
#ifdef KVTUNE_BF16
    {"avx512_bf16", &avx512_bf16::attention_table, &avx512::write_table},
#endif
#endif
};
constexpr int NUM_ISAS = sizeof ISAS / sizeof ISAS[0];

bool is_supported(int index) {
#ifdef KVTUNE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (index == 1) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (index == 2) return avx512;
#ifdef KVTUNE_BF16
  if (index == 3) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#endif
  return index == 0;
}

const Isa* isa_at(int index) { return index >= 0 && index < NUM_ISAS ? &ISAS[index] : nullptr; }

Work* thread_work() {
  static thread_local std::unique_ptr<Work> work;
  if (!work) work.reset(new (std::nothrow) Work);
  return work.get();
}

void reset(Partial& p) {
  for (int r = 0; r < MAX_ROWS; r++) p.maximum[r] = -__builtin_inff(), p.total[r] = 0.0f;
  std::memset(p.acc, 0, sizeof p.acc);
}

int context_end(const KvAttention& a, const Task& t) {  // keys the last row of the task sees
  const int rows = a.query_start[t.seq + 1] - a.query_start[t.seq];
  const int G = a.num_heads / a.cache->num_kv_heads;
  return a.context_len[t.seq] - rows + (t.first_row + t.num_rows - 1) / G + 1;
}

int first_split(const KvAttention& a, const Task& t) {
  if (a.window <= 0) return 0;
  const int rows = a.query_start[t.seq + 1] - a.query_start[t.seq];
  const int G = a.num_heads / a.cache->num_kv_heads;
  const int lowest = a.context_len[t.seq] - rows + t.first_row / G - a.window + 1;
  return lowest > 0 ? lowest / SPLIT : 0;
}

std::vector<Task> list_tasks(const KvAttention& a) {
  std::vector<Task> tasks;
  const int G = a.num_heads / a.cache->num_kv_heads;
  for (int s = 0; s < a.num_seqs; s++) {
    const int rows = (a.query_start[s + 1] - a.query_start[s]) * G;
    for (int h = 0; h < a.cache->num_kv_heads; h++)
      for (int r = 0; r < rows; r += QUERY_TILE)
        tasks.push_back({s, h, r, rows - r < QUERY_TILE ? rows - r : QUERY_TILE});
  }
  return tasks;
}

// One task from end to end on one thread.
int run_task(const AttentionTable& table, const KvAttention& a, const Task& task) {
  Work* work = thread_work();
  if (work == nullptr) return KV_NO_MEMORY;
  const int dim = a.cache->body.v.head_dim, end = context_end(a, task), bands = num_bands(task);
  table.load_queries(a, task, *work);
  const int first = first_split(a, task), stop = (end + SPLIT - 1) / SPLIT;
  const bool has_parts = stop - first > 1;
  for (int b = 0; b < bands && has_parts; b++) reset(work->band[b].running);
  for (int split = first; split < stop; split++) {
    const int status = table.attend_split(a, task, split, *work);
    if (status != KV_OK) return status;
    for (int b = 0; b < bands && has_parts; b++)
      table.merge(work->band[b].split, work->band[b].running, band_rows(task, b), dim);
  }
  for (int b = 0; b < bands; b++)
    table.finish(a, task, b, has_parts ? work->band[b].running : work->band[b].split);
  return KV_OK;
}

// The state of a task whose splits run apart: one Partial per band.
using Parts = std::vector<Partial>;

struct SplitItem {
  size_t task;
  int split;
};

// Too few tasks for the threads: splits run by themselves, then are merged in order, so that the result has
// the same bits as run_task's. In waves, so that memory does not grow with the context.
int run_splits(const AttentionTable& table, const KvAttention& a, const std::vector<Task>& tasks) {
  const int dim = a.cache->body.v.head_dim;
  std::vector<SplitItem> items;
  std::vector<Parts> running;
  for (size_t i = 0; i < tasks.size(); i++) {
    const int stop = (context_end(a, tasks[i]) + SPLIT - 1) / SPLIT;
    for (int split = first_split(a, tasks[i]); split < stop; split++) items.push_back({i, split});
    running.emplace_back(static_cast<size_t>(num_bands(tasks[i])));
    for (Partial& part : running.back()) reset(part);
  }
  const size_t wave = static_cast<size_t>(WAVE) * static_cast<size_t>(a.num_threads);
  std::vector<Parts> parts(items.size() < wave ? items.size() : wave);
  std::atomic<int> status{KV_OK};
  for (size_t begin = 0; begin < items.size() && status.load() == KV_OK; begin += wave) {
    const size_t count = items.size() - begin < wave ? items.size() - begin : wave;
    ThreadPool::instance().run(static_cast<int64_t>(count), a.num_threads, [&](int64_t i) {
      Work* work = thread_work();
      if (work == nullptr) return status.store(KV_NO_MEMORY);
      const SplitItem& item = items[begin + static_cast<size_t>(i)];
      const Task& task = tasks[item.task];
      table.load_queries(a, task, *work);
      const int code = table.attend_split(a, task, item.split, *work);
      if (code != KV_OK) return status.store(code);
      Parts& part = parts[static_cast<size_t>(i)];
      part.resize(static_cast<size_t>(num_bands(task)));
      for (size_t b = 0; b < part.size(); b++) part[b] = work->band[b].split;
    });
    for (size_t i = 0; i < count && status.load() == KV_OK; i++) {
      const SplitItem& item = items[begin + i];
      for (size_t b = 0; b < parts[i].size(); b++)
        table.merge(parts[i][b], running[item.task][b], band_rows(tasks[item.task], static_cast<int>(b)), dim);
    }
  }
  if (status.load() != KV_OK) return status.load();
  for (size_t i = 0; i < tasks.size(); i++)
    for (int b = 0; b < num_bands(tasks[i]); b++) table.finish(a, tasks[i], b, running[i][static_cast<size_t>(b)]);
  return KV_OK;
}

bool valid(const KvCache* c) {
  const auto side = [](const KvSide& s) {
    return s.codec >= KV_FP32 && s.codec <= KV_N4_RH && (s.low == nullptr || s.low_row != nullptr) && s.head_dim > 0 && s.head_dim % 8 == 0 &&
           s.head_dim <= MAX_DIM;
  };
  return c != nullptr && c->block_size > 0 && c->block_size % GROUP == 0 && c->num_kv_heads > 0 &&
         side(c->body.k) && side(c->body.v) &&
         (c->first.num_blocks == 0 || (side(c->first.k) && side(c->first.v)));
}

// Everything that is used as an address must fit q and the block table.
bool fits(const KvAttention& a) {
  if (a.num_heads <= 0 || a.num_heads % a.cache->num_kv_heads != 0 || a.query_start[0] != 0) return false;
  for (int s = 0; s < a.num_seqs; s++) {
    const int rows = a.query_start[s + 1] - a.query_start[s];
    if (rows < 0 || a.query_start[s + 1] > a.num_rows || a.context_len[s] < rows ||
        a.context_len[s] > a.table_stride * a.cache->block_size)
      return false;
  }
  return true;
}

void clear_padding(const KvAttention& a) {
  const int64_t width = static_cast<int64_t>(a.num_heads) * a.cache->body.v.head_dim;
  const int64_t used = a.query_start[a.num_seqs];
  std::memset(a.out + used * width, 0, static_cast<size_t>((a.num_rows - used) * width) * sizeof(float));
}

int parallel(int64_t count, int num_threads, const std::function<int(int64_t)>& body) {
  std::atomic<int> status{KV_OK};
  ThreadPool::instance().run(count, num_threads, [&](int64_t i) {
    const int code = body(i);
    if (code != KV_OK) status.store(code);
  });
  return status.load();
}

// No C++ exception crosses the C ABI.
template <class F> int guarded(F&& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return KV_NO_MEMORY;
  } catch (...) {
    return KV_BAD_ARGUMENT;
  }
}

}  // namespace
}  // namespace kvtune

#define KV_EXPORT extern "C" __attribute__((visibility("default")))

KV_EXPORT int32_t kvtune_abi_version() { return 4; }

// Index of an instruction set by name, or of the best one for "auto"; -1 if this machine or build lacks it.
KV_EXPORT int32_t kvtune_find_isa(const char* name) {
  for (int i = kvtune::NUM_ISAS - 1; i >= 0; i--)
    if (kvtune::is_supported(i) && (!std::strcmp(name, "auto") || !std::strcmp(name, kvtune::ISAS[i].name)))
      return i;
  return -1;
}

KV_EXPORT const char* kvtune_isa_name(int32_t index) {
  const kvtune::Isa* isa = kvtune::isa_at(index);
  return isa == nullptr ? "" : isa->name;
}

KV_EXPORT int32_t kvtune_write(const KvWrite* a, int32_t isa_index) {
  const kvtune::Isa* isa = kvtune::isa_at(isa_index);
  if (isa == nullptr || !kvtune::valid(a->cache)) return KV_BAD_ARGUMENT;
  const int threads = a->num_tokens < 16 ? 1 : a->num_threads;
  // Over heads, not tokens: two tokens of int4 V share a byte.
  return kvtune::guarded([&] {
    return kvtune::parallel(2 * a->cache->num_kv_heads, threads, [&](int64_t i) {
      return isa->write->write_head(*a, static_cast<int>(i / 2), static_cast<int>(i % 2));
    });
  });
}

KV_EXPORT int32_t kvtune_attention(const KvAttention* a, int32_t isa_index) {
  const kvtune::Isa* isa = kvtune::isa_at(isa_index);
  if (isa == nullptr || !kvtune::valid(a->cache) || !kvtune::fits(*a)) return KV_BAD_ARGUMENT;
  kvtune::clear_padding(*a);
  return kvtune::guarded([&] {
    const std::vector<kvtune::Task> tasks = kvtune::list_tasks(*a);
    const int64_t count = static_cast<int64_t>(tasks.size());
    if (a->num_threads > 1 && count < 4 * a->num_threads)
      return kvtune::run_splits(*isa->attention, *a, tasks);
    return kvtune::parallel(count, a->num_threads, [&](int64_t i) {
      return kvtune::run_task(*isa->attention, *a, tasks[static_cast<size_t>(i)]);
    });
  });
}

KV_EXPORT int32_t kvtune_gather(const KvGather* a, int32_t isa_index) {
  const kvtune::Isa* isa = kvtune::isa_at(isa_index);
  if (isa == nullptr || !kvtune::valid(a->cache)) return KV_BAD_ARGUMENT;
  const int64_t B = a->cache->block_size;
  return kvtune::guarded([&] {
    return kvtune::parallel((a->num_tokens + B - 1) / B, a->num_threads,
                            [&](int64_t i) { return isa->write->gather_block(*a, i); });
  });
}
