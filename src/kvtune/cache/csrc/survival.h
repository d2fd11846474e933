// Online survival curves of cached blocks, by class: when does a block that was used now get used again?
//
// Ages fall into half-octave buckets. For each class and bucket two numbers are kept: how many blocks came
// to the bucket's lower edge unused (at risk), and how many were used within it. Their ratio is the hazard;
// blocks still waiting count as at risk, so nothing is lost to censoring (Kaplan and Meier 1958). A class
// with few observations leans on the wider class it belongs to, that one on the next, the widest on a
// constant.
//
// The score of a block at an age is the best rate of hits for the room it takes, over all horizons:
// max_h P(used before h) / E[time in the cache until used or h] (the index of Gittins 1979; hit density of
// LHD, Beckmann et al., NSDI'18, without its horizon). Scores never rise with age: where the curve says
// otherwise, a block keeps its low score until it is used.
//
// Arithmetic is + - * / and comparisons alone, in the order of kvtune.cache.eviction_survival.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace kvtune::replay {

constexpr int NUM_AGES = 48;

// What a class is made of, widest split first: number of levels of each feature.
constexpr int CLASS_LEVELS[] = {3, 5, 8};
constexpr int NUM_CLASSES = 3 * 5 * 8;

class Survival {
 public:
  static constexpr double STRENGTH = 4;         // observations (releases, not blocks) a wider class is worth
  static constexpr double FIRST_HAZARD = 0.05;  // per bucket, before anything was seen
  static constexpr double KEPT = 0.97;          // share of the past that each full period leaves
  static constexpr int64_t PERIOD = 5000;       // block uses between two looks at the data, at most

  Survival()
      : edges_(NUM_AGES), used_(CELLS, 0), at_risk_(CELLS, 0), new_used_(CELLS, 0), new_at_risk_(CELLS, 0),
        scores_(CELLS, 0), is_scored_(NUM_CLASSES, 0) {
    edges_[0] = 0;
    for (int b = 1; b < NUM_AGES; ++b) edges_[b] = (b % 2 ? 16LL : 24LL) << ((b - 1) / 2);
    rebuild(1.0);
  }

  int64_t edge(int bucket) const { return edges_[bucket]; }

  int bucket(int64_t age) const {
    return static_cast<int>(std::upper_bound(edges_.begin(), edges_.end(), age) - edges_.begin()) - 1;
  }

  void add_used(int block_class, int bucket) { ++new_used_[block_class * NUM_AGES + bucket]; }
  void add_at_risk(int block_class, int bucket, int64_t num) {
    new_at_risk_[block_class * NUM_AGES + bucket] += num;
  }

  // Hits per block and use of the cache that a block of this class and age can still bring, at best.
  double score(int block_class, int64_t age) {
    if (!is_scored_[block_class]) {
      score_row(&hazards_[block_class * NUM_AGES], &scores_[block_class * NUM_AGES]);
      is_scored_[block_class] = 1;
    }
    const double* row = &scores_[block_class * NUM_AGES];
    const int b = bucket(age);
    const auto low = static_cast<double>(edges_[b]);
    if (b == NUM_AGES - 1) return row[b] * low / static_cast<double>(age);
    const double f = (static_cast<double>(age) - low) / (static_cast<double>(edges_[b + 1]) - low);
    return row[b] * (1 - f) + row[b + 1] * f;
  }

  // Looks at the data when it is time to: often at first, every PERIOD uses in the end.
  // `blocks_per_release`: mean number of blocks that were released as one observation.
  bool advance(int64_t clock, double blocks_per_release) {
    const int64_t wait = std::max<int64_t>(256, std::min(PERIOD, clock / 4));
    if (clock - last_ < wait) return false;
    last_ = clock;
    const double kept = wait == PERIOD ? KEPT : 1.0;
    for (int i = 0; i < CELLS; ++i) {
      used_[i] = used_[i] * kept + static_cast<double>(new_used_[i]);
      at_risk_[i] = at_risk_[i] * kept + static_cast<double>(new_at_risk_[i]);
      new_used_[i] = new_at_risk_[i] = 0;
    }
    rebuild(blocks_per_release);
    return true;
  }

  size_t bytes() const { return CELLS * (4 * sizeof(double) + 2 * sizeof(int64_t)); }

 private:
  static constexpr int CELLS = NUM_CLASSES * NUM_AGES;

  // Sums of neighbouring rows: [n * fan][NUM_AGES] -> [n][NUM_AGES].
  static std::vector<double> merged(const std::vector<double>& fine, int fan) {
    const int rows = static_cast<int>(fine.size()) / NUM_AGES / fan;
    std::vector<double> sums(static_cast<size_t>(rows) * NUM_AGES, 0);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < fan; ++j) {
        for (int b = 0; b < NUM_AGES; ++b) sums[i * NUM_AGES + b] += fine[(i * fan + j) * NUM_AGES + b];
      }
    }
    return sums;
  }

  void rebuild(double blocks_per_release) {
    constexpr int depth = sizeof(CLASS_LEVELS) / sizeof(CLASS_LEVELS[0]);
    std::vector<std::vector<double>> used(depth + 1), at_risk(depth + 1);
    used[depth] = used_;
    at_risk[depth] = at_risk_;
    for (int level = depth; level > 0; --level) {
      used[level - 1] = merged(used[level], CLASS_LEVELS[level - 1]);
      at_risk[level - 1] = merged(at_risk[level], CLASS_LEVELS[level - 1]);
    }
    const double strength = STRENGTH * blocks_per_release;
    std::vector<double> wide(NUM_AGES, FIRST_HAZARD);
    for (int level = 0; level <= depth; ++level) {
      const int fan = level == 0 ? 1 : CLASS_LEVELS[level - 1];
      std::vector<double> hazard(used[level].size());
      for (size_t i = 0; i < hazard.size(); ++i) {
        const size_t row = i / NUM_AGES, b = i % NUM_AGES;
        hazard[i] = (used[level][i] + wide[row / fan * NUM_AGES + b] * strength) / (at_risk[level][i] + strength);
      }
      wide = std::move(hazard);
    }
    hazards_ = std::move(wide);
    std::fill(is_scored_.begin(), is_scored_.end(), 0);  // few classes are asked for before the next look
  }

  void score_row(const double* hazard, double* scores) const {
    double lowest = 0;
    for (int b = 0; b < NUM_AGES; ++b) {
      double alive = 1, cost = 0, best = 0;
      for (int k = b; k < NUM_AGES - 1; ++k) {
        const double p = std::min(hazard[k], 0.999);
        cost += alive * (1 - p / 2) * static_cast<double>(edges_[k + 1] - edges_[k]);
        alive *= 1 - p;
        best = std::max(best, (1 - alive) / cost);
      }
      // The last bucket has no upper edge: it continues the one before.
      lowest = b == 0 ? best : b < NUM_AGES - 1 ? std::min(lowest, best) : lowest;
      scores[b] = lowest;
    }
  }

  std::vector<int64_t> edges_;
  std::vector<double> used_, at_risk_;
  std::vector<int64_t> new_used_, new_at_risk_;  // since the last look
  std::vector<double> hazards_, scores_;
  std::vector<uint8_t> is_scored_;  // by class: the scores are those of the hazards
  int64_t last_ = 0;
};

}  // namespace kvtune::replay
