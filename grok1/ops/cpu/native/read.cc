// Measures the memory bandwidth available to the kernels.

#include <cstdint>
#include <cstring>

#include "parallel.h"

namespace grok1 {
namespace {

constexpr int64_t kTaskBytes = 4 << 20;
typedef uint64_t Words __attribute__((vector_size(64)));

Words OrOf(const uint8_t* from, int64_t count) {
  Words all[4] = {};
  for (int64_t i = 0; i + 256 <= count; i += 256)
    for (int v = 0; v < 4; ++v) {
      Words some;
      std::memcpy(&some, from + i + v * 64, sizeof some);
      __builtin_prefetch(from + i + v * 64 + 1024);
      all[v] |= some;
    }
  return (all[0] | all[1]) | (all[2] | all[3]);
}

}  // namespace
}  // namespace grok1

#pragma GCC visibility push(default)

// Reads `count` bytes, a multiple of 256, with all threads; the result depends on every byte.
extern "C" uint64_t Grok1Read(const uint8_t* from, int64_t count) {
  using namespace grok1;
  std::atomic<uint64_t> all{0};
  Pool::OfProcess().ForEach((count + kTaskBytes - 1) / kTaskBytes, [&](int64_t i) {
    const int64_t begin = i * kTaskBytes, left = count - begin;
    const Words found = OrOf(from + begin, left < kTaskBytes ? left : kTaskBytes);
    uint64_t bits = 0;
    for (int v = 0; v < 8; ++v) bits |= found[v];
    all.fetch_or(bits);
  });
  return all.load();
}

#pragma GCC visibility pop
