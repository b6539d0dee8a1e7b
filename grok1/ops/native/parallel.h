// Work that the threads of XLA's pool take from, a task at a time.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace grok1 {

// How many threads work at a time, over all devices of the process: with several devices on one processor each has a
// thread that calls, beside those of the pool that they share.
class Permits {
 public:
  // At least 1; until it is called, as many as the pool has.
  void SetMost(int64_t most) {
    std::lock_guard<std::mutex> lock(mutex_);
    most_ = most > 1 ? most : 1;
    released_.notify_all();
  }

  int64_t Most(int64_t pool_threads) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (most_ == 0) most_ = pool_threads > 1 ? pool_threads : 1;
    return most_;
  }

  void Take() {
    std::unique_lock<std::mutex> lock(mutex_);
    released_.wait(lock, [&] { return taken_ < most_; });
    ++taken_;
  }

  void Return() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      --taken_;
    }
    released_.notify_one();
  }

  static Permits& OfProcess();

 private:
  std::mutex mutex_;
  std::condition_variable released_;
  int64_t most_ = 0;
  int64_t taken_ = 0;
};

// Calls `body(i)` for each i below `count`, in this thread and those of the pool, and returns when all are done.
template <class Body>
void ParallelFor(const xla::ffi::ThreadPool& pool_of_call, int64_t count, const Body& body) {
  struct State {
    const Body* body;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
    std::mutex mutex;
    std::condition_variable finished;

    void Work() {
      if (next.load() >= count) return;
      Permits::OfProcess().Take();
      for (int64_t i; (i = next.fetch_add(1)) < count;) {
        (*body)(i);
        if (done.fetch_add(1) + 1 == count) {
          std::lock_guard<std::mutex> lock(mutex);
          finished.notify_all();
        }
      }
      Permits::OfProcess().Return();
    }
  };
  if (count <= 0) return;
  xla::ffi::ThreadPool pool = pool_of_call;
  auto state = std::make_shared<State>();
  state->body = &body;
  state->count = count;
  const int64_t threads = Permits::OfProcess().Most(pool.num_threads());
  const int64_t helpers = (count < threads ? count : threads) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([state] { state->Work(); });
  state->Work();
  // Helpers that have not begun find nothing left; those that have are waited for.
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done.load() == count; });
}

}  // namespace grok1
