#include "parallel.h"

#include <algorithm>
#include <chrono>
#include <thread>

namespace grok1 {
namespace {

constexpr auto kWatch = std::chrono::microseconds(100);

inline void Pause() {
#ifdef __x86_64__
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Pool& Pool::OfProcess() {
  static Pool* const pool = new Pool;
  return *pool;
}

void Pool::SetThreads(int64_t count) {
  std::lock_guard<std::mutex> lock(mutex_);
  threads_ = std::max<int64_t>(1, count);
  for (; helpers_ < threads_ - 1; ++helpers_) std::thread([this] { ServeJobs(); }).detach();
  released_signal_.notify_all();
}

// Waits for a condition on an atomic: polls for a moment, then sleeps until the signal.
template <class Condition>
void Pool::WaitFor(std::condition_variable& signal, const Condition& condition) {
  const auto end = std::chrono::steady_clock::now() + kWatch;
  do {
    for (int i = 0; i < 32; ++i) {
      if (condition()) return;
      Pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  std::unique_lock<std::mutex> lock(mutex_);
  signal.wait(lock, condition);
}

void Pool::Run(int64_t count, const void* body, void (*call)(const void*, int64_t)) {
  const auto job = std::make_shared<Job>();
  job->count = count;
  job->body = body;
  job->call = call;
  const bool shared = count > 1 && [&] {
    std::lock_guard<std::mutex> lock(mutex_);
    if (threads_ == 1) return false;
    std::fegetenv(&job->environment);
    jobs_.push_back(job);
    posted_.fetch_add(1);
    return true;
  }();
  if (shared) posted_signal_.notify_all();
  Work(*job);
  if (!shared) return;
  // Helpers that start now find no work; wait for those that already work.
  WaitFor(done_signal_, [&] { return job->done.load() == count; });
  std::lock_guard<std::mutex> lock(mutex_);
  jobs_.erase(std::find(jobs_.begin(), jobs_.end(), job));
}

void Pool::Work(Job& job) {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    released_signal_.wait(lock, [&] { return working_ < threads_; });
    ++working_;
  }
  bool last = false;
  for (int64_t i; (i = job.next.fetch_add(1)) < job.count;) {
    job.call(job.body, i);
    last = job.done.fetch_add(1) + 1 == job.count;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    --working_;
  }
  released_signal_.notify_one();
  if (last) done_signal_.notify_all();
}

std::shared_ptr<Pool::Job> Pool::FindJob() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& job : jobs_)
    if (job->next.load() < job->count) return job;
  return nullptr;
}

void Pool::ServeJobs() {
  for (;;) {
    const uint64_t seen = posted_.load();
    if (const auto job = FindJob()) {
      std::fesetenv(&job->environment);
      Work(*job);
    } else
      WaitFor(posted_signal_, [&] { return posted_.load() != seen; });
  }
}

}  // namespace grok1
