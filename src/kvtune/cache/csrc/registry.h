// Every policy of the replay core by name: one line each.
#pragma once

#include <memory>
#include <string>

#include "policy.h"
#include "policy_fifo.h"
#include "policy_gdsf.h"
#include "policy_guarded.h"
#include "policy_hazard.h"
#include "policy_lfu.h"
#include "policy_lru.h"
#include "policy_optimal.h"

namespace kvtune::replay {

struct PolicyEntry {
  const char* name;
  std::unique_ptr<Policy> (*make)(Cache& cache, const Parameters& parameters);
};

template <class T>
std::unique_ptr<Policy> make_policy(Cache& cache, const Parameters& parameters) {
  return std::make_unique<T>(cache, parameters);
}

inline constexpr PolicyEntry POLICIES[] = {
    {"fifo", make_policy<Fifo>},
    {"lru", make_policy<Lru>},
    {"lfu", make_policy<Lfu>},
    {"gdsf", make_policy<Gdsf>},
    {"hazard", make_policy<Hazard>},
    {"guarded", make_policy<Guarded>},
    {"optimal", make_policy<Optimal>},
    {"optimal_pinned", make_policy<OptimalPinned>},
};

inline const PolicyEntry* find_policy(const std::string& name) {
  for (const PolicyEntry& entry : POLICIES) {
    if (name == entry.name) return &entry;
  }
  return nullptr;
}

}  // namespace kvtune::replay
