// A small persistent thread pool: one call at a time, work taken by an atomic counter.
//
// Workers sleep between calls (a spinning pool would fight torch's own), one thread starts none, a forked
// child starts its own, and a second caller that finds the pool busy works alone.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <unistd.h>
#include <vector>

namespace kvtune {

class ThreadPool {
 public:
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
  void run(int64_t count, int num_threads, const std::function<void(int64_t)>& body) {
    std::unique_lock<std::mutex> busy(call_, std::try_to_lock);
    if (num_threads <= 1 || count <= 1 || !busy.owns_lock()) {
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

 private:
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
