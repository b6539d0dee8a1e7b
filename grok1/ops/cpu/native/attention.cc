// Attention over a key/value cache, as a call that XLA makes.

#include <algorithm>
#include <cstring>
#include <string_view>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace grok1 {
namespace {

constexpr int64_t kTaskQueries = 64;      // of several tokens
constexpr int64_t kTaskPositions = 1024;  // that a task for one token looks at

ffi::Error Attention(ffi::Buffer<ffi::F32> query, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                     ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> slots,
                     float multiplier, float cap, std::string_view kernel_name, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  const Kernels* kernels = FindKernels(kernel_name);
  if (kernels == nullptr) return ffi::Error::InvalidArgument("this processor has no such kernels");
  const auto q = query.dimensions(), c = keys.dimensions(), v = values.dimensions();
  if (q.size() != 4 || c.size() != 5 || !std::equal(c.begin(), c.end(), v.begin(), v.end()) ||
      keys.element_type() != values.element_type() || q[3] != c[4] || c[2] < 1 || q[2] % c[2])
    return ffi::Error::InvalidArgument("queries and cache do not fit together");
  const bool bfloat16 = keys.element_type() == ffi::BF16;
  if (!bfloat16 && keys.element_type() != ffi::F32)
    return ffi::Error::InvalidArgument("the cache is neither float32 nor bfloat16");
  const int64_t batch = q[0], tokens = q[1], heads = q[2], size = q[3];
  const int64_t layers = c[0], sequences = c[1], kv_heads = c[2], capacity = c[3], shared = heads / kv_heads;
  const int64_t of_layer = layer.typed_data()[0];
  if (of_layer < 0 || of_layer >= layers || static_cast<int64_t>(positions.element_count()) != batch * tokens ||
      static_cast<int64_t>(slots.element_count()) != batch)
    return ffi::Error::InvalidArgument("layer, positions or slots do not fit the cache");

  struct Task {
    int64_t row, head, first_token, tokens, first_position, positions;
  };
  const int64_t task_tokens = std::max<int64_t>(1, kTaskQueries / shared);
  std::vector<Task> tasks;
  for (int64_t row = 0; row < batch; ++row)
    for (int64_t token = 0; token < tokens; token += task_tokens) {
      const int64_t count = std::min(task_tokens, tokens - token);
      const int32_t* first = positions.typed_data() + row * tokens + token;
      const int64_t seen = std::min<int64_t>(capacity, *std::max_element(first, first + count) + 1);
      const int64_t part = tokens == 1 ? kTaskPositions : capacity;
      for (int64_t head = 0; head < kv_heads; ++head)
        for (int64_t start = 0; start == 0 || start < seen; start += part)
          tasks.push_back({row, head, token, count, start, std::min(part, seen - start)});
    }
  // Longest first, so that no thread is left with one when the others are done; equal ones stay in their order.
  std::vector<int64_t> order(tasks.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return tasks[a].positions > tasks[b].positions; });

  const int64_t result_floats = task_tokens * shared * (size + 1);
  std::vector<float> results(tokens == 1 ? tasks.size() * result_floats : 0);
  const auto write = [&](const Task& task, const float* out, const float* mass) {
    for (int64_t t = 0; t < task.tokens; ++t)
      for (int64_t h = 0; h < shared; ++h) {
        const int64_t i = t * shared + h;
        float* to =
            y->typed_data() + (((task.row * tokens) + task.first_token + t) * heads + task.head * shared + h) * size;
        const float inverse = mass[i] > 0 ? 1.0f / mass[i] : 0.0f;
        for (int64_t d = 0; d < size; ++d) to[d] = out[i * size + d] * inverse;
      }
  };

  Pool::OfProcess().ForEach(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[order[i]];
    const int64_t queries = task.tokens * shared;
    static thread_local std::vector<float> memory;
    static thread_local std::vector<int32_t> counts;
    AttentionTask attention;
    attention.queries = queries;
    attention.bfloat16 = bfloat16;
    attention.size = size;
    attention.multiplier = multiplier;
    attention.cap = cap;
    const int64_t wanted = queries * size + result_floats + attention.scratch_floats();
    if (static_cast<int64_t>(memory.size()) < wanted) memory.resize(wanted);
    if (static_cast<int64_t>(counts.size()) < queries) counts.resize(queries);
    float* const gathered = memory.data();
    float* const result = tokens == 1 ? results.data() + order[i] * result_floats : gathered + queries * size;
    float* const scratch = gathered + queries * size + result_floats;
    for (int64_t t = 0; t < task.tokens; ++t) {
      const int64_t token = task.row * tokens + task.first_token + t;
      std::memcpy(gathered + t * shared * size, query.typed_data() + (token * heads + task.head * shared) * size,
                  shared * size * sizeof(float));
      const int64_t seen = positions.typed_data()[token] + 1 - task.first_position;
      for (int64_t h = 0; h < shared; ++h)
        counts[t * shared + h] = static_cast<int32_t>(std::min(seen, task.positions));
    }
    const int64_t slot = std::clamp<int64_t>(slots.typed_data()[task.row], 0, sequences - 1);
    const int64_t start =
        (((of_layer * sequences + slot) * kv_heads + task.head) * capacity + task.first_position) * size;
    const int64_t item = bfloat16 ? 2 : 4;
    attention.query = gathered;
    attention.counts = counts.data();
    attention.keys = static_cast<const uint8_t*>(keys.untyped_data()) + start * item;
    attention.values = static_cast<const uint8_t*>(values.untyped_data()) + start * item;
    attention.out = result;
    attention.mass = result + queries * size;
    std::fill_n(result, queries * (size + 1), 0.0f);
    kernels->attend(attention, scratch);
    if (tokens > 1) write(task, attention.out, attention.mass);
  });

  if (tokens == 1)  // the parts of what each token sees, added in their order
    for (size_t i = 0; i < tasks.size();) {
      float* whole = results.data() + i * result_floats;
      size_t next = i + 1;
      for (; next < tasks.size() && tasks[next].first_position > 0; ++next)
        for (int64_t j = 0; j < shared * (size + 1); ++j) whole[j] += results[next * result_floats + j];
      write(tasks[i], whole, whole + shared * size);
      i = next;
    }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace grok1

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(Grok1Attention, grok1::Attention,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<float>("multiplier")
                                  .Attr<float>("cap")
                                  .Attr<std::string_view>("kernels")
                                  .Ret<ffi::Buffer<ffi::F32>>());

#pragma GCC visibility pop
