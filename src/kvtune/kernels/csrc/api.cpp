// C ABI of the native kernels: checks, instruction set, tasks and threads. No torch and no Python ABI.
#include <cstring>
#include <memory>
#include <new>

#include "kernels.h"
#include "plan.h"
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

void reset(Partial& p, int rows, int dim) {
  for (int r = 0; r < rows; r++) {
    p.maximum[r] = -__builtin_inff(), p.total[r] = 0.0f;
    std::memset(p.acc + r * MAX_DIM, 0, static_cast<size_t>(dim) * sizeof(float));
  }
}

// A band's parts merged so far, to the task's state or from it.
void save_running(const Task& task, int b, int dim, const Partial& running) {
  for (int r = 0; r < band_rows(task, b); r++) {
    float* state = task.state + (b * MAX_ROWS + r) * state_size(dim);
    state[0] = running.maximum[r], state[1] = running.total[r];
    std::memcpy(state + 2, running.acc + r * MAX_DIM, static_cast<size_t>(dim) * 4);
  }
}
void begin_running(const Task& task, int b, int dim, Partial& running) {
  reset(running, band_rows(task, b), dim);
  if (task.state == nullptr || task.hands_over) return;
  for (int r = 0; r < band_rows(task, b); r++) {
    const float* state = task.state + (b * MAX_ROWS + r) * state_size(dim);
    running.maximum[r] = state[0], running.total[r] = state[1];
    std::memcpy(running.acc + r * MAX_DIM, state + 2, static_cast<size_t>(dim) * 4);
  }
}

int first_split(const Task& task) { return task.first_key / SPLIT; }
int num_splits(const Task& task) { return (task.stop_key + SPLIT - 1) / SPLIT - first_split(task); }
// Whether the one split of a task is all its rows see.
bool is_whole(const Task& task) {
  return num_splits(task) == 1 && !task.hands_over && (task.state == nullptr || first_split(task) == 0);
}

// One task from end to end on one thread.
int run_task(const AttentionTable& table, const KvAttention& a, const Task& task) {
  Work* work = thread_work();
  if (work == nullptr) return KV_NO_MEMORY;
  const int dim = a.cache->body.v.head_dim, bands = num_bands(task), first = first_split(task);
  table.load_queries(a, task, *work);
  const bool has_parts = !is_whole(task);
  for (int b = 0; b < bands && has_parts; b++) begin_running(task, b, dim, work->band[b].running);
  for (int split = first; split < first + num_splits(task); split++) {
    const int status = table.attend_split(a, task, split, *work);
    if (status != KV_OK) return status;
    for (int b = 0; b < bands && has_parts && !ends_open(task, split); b++)
      table.merge(work->band[b].split, work->band[b].running, band_rows(task, b), dim);
  }
  for (int b = 0; b < bands; b++) {
    if (task.hands_over) save_running(task, b, dim, work->band[b].running);
    else table.finish(a, task, b, has_parts ? work->band[b].running : work->band[b].split);
  }
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
    const Task& task = tasks[i];
    for (int n = 0; n < num_splits(task); n++) items.push_back({i, first_split(task) + n});
    running.emplace_back(static_cast<size_t>(num_bands(task)));
    for (int b = 0; b < num_bands(task); b++) begin_running(task, b, dim, running.back()[static_cast<size_t>(b)]);
  }
  const size_t wave = static_cast<size_t>(WAVE) * static_cast<size_t>(a.num_threads);
  std::vector<Parts> parts(items.size() < wave ? items.size() : wave);
  std::atomic<int> status{KV_OK};
  for (size_t begin = 0; begin < items.size() && status.load() == KV_OK; begin += wave) {
    const size_t count = items.size() - begin < wave ? items.size() - begin : wave;
    ThreadPool::run(static_cast<int64_t>(count), a.num_threads, [&](int64_t i) {
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
      const Task& task = tasks[item.task];
      for (size_t b = 0; b < parts[i].size() && !ends_open(task, item.split); b++)
        table.merge(parts[i][b], running[item.task][b], band_rows(task, static_cast<int>(b)), dim);
    }
  }
  if (status.load() != KV_OK) return status.load();
  for (size_t i = 0; i < tasks.size(); i++)
    for (int b = 0; b < num_bands(tasks[i]); b++) {
      const Partial& result = running[i][static_cast<size_t>(b)];
      if (tasks[i].hands_over) save_running(tasks[i], b, dim, result);
      else table.finish(a, tasks[i], b, result);
    }
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
  const int64_t row_bytes = static_cast<int64_t>(a.num_heads) * a.cache->body.v.head_dim * (a.q.is_bf16 ? 2 : 4);
  const int64_t used = a.query_start[a.num_seqs];
  std::memset(static_cast<char*>(a.out) + used * row_bytes, 0, static_cast<size_t>((a.num_rows - used) * row_bytes));
}

int parallel(int64_t count, int num_threads, const std::function<int(int64_t)>& body) {
  std::atomic<int> status{KV_OK};
  ThreadPool::run(count, num_threads, [&](int64_t i) {
    const int code = body(i);
    if (code != KV_OK) status.store(code);
  });
  return status.load();
}

int run_tasks(const AttentionTable& table, const KvAttention& a, const std::vector<Task>& tasks) {
  const int64_t count = static_cast<int64_t>(tasks.size());
  if (a.num_threads > 1 && count > 0 && count < 4 * a.num_threads) return run_splits(table, a, tasks);
  return parallel(count, a.num_threads, [&](int64_t i) { return run_task(table, a, tasks[static_cast<size_t>(i)]); });
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

KV_EXPORT int32_t kvtune_abi_version() { return 8; }

// GOMP_parallel of the OpenMP whose threads the kernels are to run on; null for threads of their own.
KV_EXPORT void kvtune_use_team(void* parallel) {
  kvtune::ThreadPool::use_team(reinterpret_cast<kvtune::ParallelFunction>(parallel));
}

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
    const kvtune::Plan plan = kvtune::make_plan(*a, isa->attention->has_byte_products);
    const int status = kvtune::run_tasks(*isa->attention, *a, plan.shared);
    return status != KV_OK ? status : kvtune::run_tasks(*isa->attention, *a, plan.own);
  });
}

// Tokens of K and V that kvtune_attention with these arguments reads once less, for being shared; -1 if refused.
KV_EXPORT int64_t kvtune_saved_tokens(const KvAttention* a, int32_t isa_index) {
  const kvtune::Isa* isa = kvtune::isa_at(isa_index);
  if (isa == nullptr || !kvtune::valid(a->cache) || !kvtune::fits(*a)) return -1;
  int64_t saved = -1;
  kvtune::guarded([&] {
    saved = kvtune::make_plan(*a, isa->attention->has_byte_products).saved_tokens;
    return KV_OK;
  });
  return saved;
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
