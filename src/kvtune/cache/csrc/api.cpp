// The C ABI of the replay core. Handles are opaque; every function that can fail writes a one-line message.
#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <new>

#include "lru_curve.h"
#include "registry.h"
#include "replay.h"

#define KVTUNE_API extern "C" __attribute__((visibility("default")))

namespace replay = kvtune::replay;

namespace {

enum Status : int32_t { OK = 0, BAD_TRACE = 1, BAD_ARGUMENT = 2, POLICY_BUG = 3, NO_MEMORY = 4 };

struct Message {
  char* text;
  int64_t size;

  int32_t say(Status status, const char* what) const {
    std::strncpy(text, what, static_cast<size_t>(size - 1));
    text[size - 1] = '\0';
    return status;
  }
};

template <class Body>
int32_t guarded(Message message, Body body) {
  try {
    return body();
  } catch (const replay::BadParameter& error) {
    return message.say(BAD_ARGUMENT, error.what());
  } catch (const std::bad_alloc&) {
    return message.say(NO_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return message.say(POLICY_BUG, error.what());
  }
}

}  // namespace

struct kvtune_trace {
  const int64_t* block_ids;
  const int64_t* request_start;
  const int32_t* block_tokens;
  int64_t num_requests;
  int64_t num_references;
  int64_t num_unique;
};

struct kvtune_replay_options {
  const char* policy;
  int64_t capacity;
  const int32_t* num_blocks;  // null: a plain trace replay
  const int32_t* num_slots;
  const int32_t* max_hit;
  int32_t* hit_blocks;
  int64_t* hit_tokens;
  int32_t* num_evicted;
  uint8_t* is_rejected;
  const char* const* parameter_names;
  const double* parameter_values;
  int32_t num_parameters;
  int32_t keep_log;
};

KVTUNE_API int32_t kvtune_replay_abi_version() { return 1; }

// `where`: the request a BAD_TRACE fault was found in; `fault` its number (replay::Fault).
KVTUNE_API int32_t kvtune_trace_new(const kvtune_trace* given, void** out, int32_t* fault, int64_t* where,
                                    char* text, int64_t text_size) {
  return guarded({text, text_size}, [&]() -> int32_t {
    auto trace = std::make_unique<replay::Trace>(
        replay::TraceArrays{given->block_ids, given->request_start, given->block_tokens, given->num_requests,
                            given->num_references, given->num_unique});
    const replay::Fault found = trace->prepare(where);
    *fault = static_cast<int32_t>(found);
    if (found != replay::Fault::NONE) return BAD_TRACE;
    *out = trace.release();
    return OK;
  });
}

KVTUNE_API void kvtune_trace_free(void* trace) { delete static_cast<replay::Trace*>(trace); }

KVTUNE_API int32_t kvtune_replay_num_policies() {
  return static_cast<int32_t>(sizeof(replay::POLICIES) / sizeof(replay::POLICIES[0]));
}

KVTUNE_API const char* kvtune_replay_policy_name(int32_t index) { return replay::POLICIES[index].name; }

KVTUNE_API int32_t kvtune_replay_new(const void* trace, const kvtune_replay_options* options, void** out,
                                     char* text, int64_t text_size) {
  const Message message{text, text_size};
  return guarded(message, [&]() -> int32_t {
    const replay::PolicyEntry* entry = replay::find_policy(options->policy);
    if (entry == nullptr) return message.say(BAD_ARGUMENT, "the replay core does not know this policy");
    if (options->capacity < 1) return message.say(BAD_ARGUMENT, "the capacity must be at least 1 block");
    const auto& known = *static_cast<const replay::Trace*>(trace);
    const replay::TraceArrays& a = known.arrays();
    for (int64_t r = 0; options->num_blocks != nullptr && r < a.num_requests; ++r) {
      const int64_t length = a.request_start[r + 1] - a.request_start[r];
      const int32_t blocks = options->num_blocks[r];
      if (blocks < 0 || blocks > length || options->num_slots[r] < blocks || options->max_hit[r] < 0) {
        return message.say(BAD_ARGUMENT, "an engine's limits do not fit a request's blocks");
      }
    }
    replay::Parameters parameters;
    for (int32_t i = 0; i < options->num_parameters; ++i) {
      parameters[options->parameter_names[i]] = options->parameter_values[i];
    }
    auto made = std::make_unique<replay::Replay>(
        known, options->capacity,
        replay::EngineLimits{options->num_blocks, options->num_slots, options->max_hit},
        replay::Outcome{options->hit_blocks, options->hit_tokens, options->num_evicted, options->is_rejected},
        options->keep_log != 0);
    made->set_policy(entry->make(made->cache(), parameters));
    *out = made.release();
    return OK;
  });
}

KVTUNE_API int32_t kvtune_replay_run(void* handle, int64_t until, char* text, int64_t text_size) {
  return guarded({text, text_size}, [&]() -> int32_t {
    static_cast<replay::Replay*>(handle)->run(until);
    return OK;
  });
}

KVTUNE_API int64_t kvtune_replay_bytes(const void* handle) {
  return static_cast<int64_t>(static_cast<const replay::Replay*>(handle)->bytes());
}

// The blocks that left, in order: `out` null asks for their number. Kept only where keep_log was set.
KVTUNE_API int64_t kvtune_replay_log(void* handle, int32_t* out) {
  const auto& log = static_cast<replay::Replay*>(handle)->cache().log();
  if (out != nullptr) std::copy(log.begin(), log.end(), out);
  return static_cast<int64_t>(log.size());
}

KVTUNE_API void kvtune_replay_free(void* handle) { delete static_cast<replay::Replay*>(handle); }

KVTUNE_API int32_t kvtune_lru_curve_new(const void* trace, int64_t* hit_blocks, int64_t* hit_tokens, void** out,
                                        char* text, int64_t text_size) {
  return guarded({text, text_size}, [&]() -> int32_t {
    *out = new replay::LruCurve(*static_cast<const replay::Trace*>(trace), hit_blocks, hit_tokens);
    return OK;
  });
}

KVTUNE_API int32_t kvtune_lru_curve_run(void* handle, int64_t until, int64_t from, char* text,
                                        int64_t text_size) {
  return guarded({text, text_size}, [&]() -> int32_t {
    static_cast<replay::LruCurve*>(handle)->run(until, from);
    return OK;
  });
}

KVTUNE_API int64_t kvtune_lru_curve_bytes(const void* handle) {
  return static_cast<int64_t>(static_cast<const replay::LruCurve*>(handle)->bytes());
}

KVTUNE_API void kvtune_lru_curve_free(void* handle) { delete static_cast<replay::LruCurve*>(handle); }
