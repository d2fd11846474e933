// Threads for a call, work taken by an atomic counter: those of torch's OpenMP, or a small persistent pool.
//
// OpenMP's workers spin for milliseconds after each of torch's operations, on the cores that others would need: where
// torch's team is known (`use_team`), it works for us, too. (Measured with two threads on two cores, decode attention
// after a product of torch's: 1.8 times as fast.) It does not outlive a fork.
// The pool's workers sleep between calls, one thread starts none, a forked child starts its own, and a second caller
// that finds the pool busy works alone.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <unistd.h>
#include <vector>

namespace kvtune {

// GNU OpenMP's entry point: calls fn(data) on every thread of a team, this one among them.
using ParallelFunction = void (*)(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags);

class ThreadPool {
 public:
  static void use_team(ParallelFunction parallel) {
    team_owner_ = getpid();
    team_ = parallel;
  }

  static ThreadPool& instance() {
    static std::mutex creation;
    static ThreadPool* pool = nullptr;
    static pid_t owner = 0;
    std::lock_guard<std::mutex> lock(creation);
    if (pool == nullptr || owner != getpid()) {  // after fork() the old pool's threads do not exist: leave it
      pool = new ThreadPool;
      owner = getpid();
    }
    return *pool;
  }

  // Run body(i) for i in [0, count) on at most num_threads threads, the caller's included.
  static void run(int64_t count, int num_threads, const std::function<void(int64_t)>& body) {
    if (num_threads <= 1 || count <= 1) {
      for (int64_t i = 0; i < count; i++) body(i);
    } else if (team_ != nullptr && team_owner_ == getpid()) {
      run_in_team(count, num_threads, body);
    } else {
      instance().run_in_pool(count, num_threads, body);
    }
  }

 private:
  struct TeamWork {
    const std::function<void(int64_t)>& body;
    int64_t count;
    std::atomic<int64_t> next{0};
  };

  static void run_in_team(int64_t count, int num_threads, const std::function<void(int64_t)>& body) {
    TeamWork work{body, count};
    const auto drain = [](void* data) {
      TeamWork& own = *static_cast<TeamWork*>(data);
      for (int64_t i = own.next.fetch_add(1); i < own.count; i = own.next.fetch_add(1)) own.body(i);
    };
    // always the size torch uses: OpenMP ends threads that a smaller team leaves over
    team_(drain, &work, static_cast<unsigned>(num_threads), 0);
  }

  void run_in_pool(int64_t count, int num_threads, const std::function<void(int64_t)>& body) {
    std::unique_lock<std::mutex> busy(call_, std::try_to_lock);
    if (!busy.owns_lock()) {
      for (int64_t i = 0; i < count; i++) body(i);
      return;
    }
    const int helpers = static_cast<int>(count < num_threads ? count : num_threads) - 1;
    {
      std::lock_guard<std::mutex> lock(state_);
      while (static_cast<int>(workers_.size()) < helpers) {
        const int index = static_cast<int>(workers_.size());
        workers_.emplace_back([this, index, seen = round_] { work(index, seen); });
        workers_.back().detach();
      }
      body_ = &body;
      count_ = count;
      next_.store(0);
      wanted_ = pending_ = helpers;
      round_++;
    }
    wake_.notify_all();
    drain();
    std::unique_lock<std::mutex> lock(state_);
    done_.wait(lock, [this] { return pending_ == 0; });
  }

  void drain() {
    for (int64_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) (*body_)(i);
  }

  void work(int index, uint64_t seen) {
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(state_);
        wake_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
        if (index >= wanted_) continue;
      }
      drain();
      std::lock_guard<std::mutex> lock(state_);
      if (--pending_ == 0) done_.notify_one();
    }
  }

  static inline ParallelFunction team_ = nullptr;
  static inline pid_t team_owner_ = 0;
  std::mutex call_, state_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(int64_t)>* body_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  int wanted_ = 0, pending_ = 0;
  uint64_t round_ = 0;
};

}  // namespace kvtune
