// The thread pool of the kernels.

#pragma once

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace grok1 {

// A pool of threads for all devices of a process. An idle thread polls for work for a moment before it sleeps, because
// a step is a sequence of short calls and waking a thread takes as long as one of them.
class Pool {
 public:
  static Pool& OfProcess();  // never destroyed: its threads end with the process

  // Sets the number of threads that compute at a time, including callers; at least 1.
  void SetThreads(int64_t count);

  // Calls `body(i)` for each i below `count`, in this thread and others, and returns when all calls are done.
  template <class Body>
  void ForEach(int64_t count, const Body& body) {
    if (count < 1) return;
    Run(count, &body, [](const void* of_call, int64_t i) { (*static_cast<const Body*>(of_call))(i); });
  }

 private:
  struct Job {
    int64_t count;
    const void* body;
    void (*call)(const void* body, int64_t i);
    std::fenv_t environment;  // of the caller: XLA's threads flush denormals to zero, and so must all others
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };

  void Run(int64_t count, const void* body, void (*call)(const void*, int64_t));
  void Work(Job& job);
  void ServeJobs();
  std::shared_ptr<Job> FindJob();
  template <class Condition>
  void WaitFor(std::condition_variable& signal, const Condition& condition);

  std::mutex mutex_;
  std::condition_variable posted_signal_, done_signal_, released_signal_;
  std::vector<std::shared_ptr<Job>> jobs_;
  std::atomic<uint64_t> posted_{0};  // number of jobs so far
  int64_t threads_ = 1;
  int64_t helpers_ = 0;  // threads started
  int64_t working_ = 0;  // threads that compute; with several devices, there may be more callers than `threads_`
};

}  // namespace grok1
