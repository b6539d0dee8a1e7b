// Calls the pool from several threads, as several devices do, to be run with the thread sanitizer.

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

#include "parallel.h"

int main() {
  grok1::Pool& pool = grok1::Pool::OfProcess();
  std::atomic<int64_t> working{0}, most{0};
  std::atomic<bool> good{true};
  for (const int64_t threads : {1, 2, 4, 3}) {
    pool.SetThreads(threads);
    most = 0;
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; ++caller)
      callers.emplace_back([&] {
        for (int64_t count = 0; count < 200; ++count) {
          std::vector<int64_t> done(count);  // each element is written by one thread, then read by this one
          pool.ForEach(count, [&](int64_t i) {
            const int64_t now = ++working;
            for (int64_t seen = most; seen < now && !most.compare_exchange_weak(seen, now);) {
            }
            done[i] += i + 1;
            --working;
          });
          for (int64_t i = 0; i < count; ++i)
            if (done[i] != i + 1) good = false;
        }
      });
    for (std::thread& caller : callers) caller.join();
    if (most > threads) good = false;
  }
  std::printf(good ? "checked\n" : "wrong\n");
  return !good;
}
