// Attention over a key/value cache, as an XLA custom call.

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string_view>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace grok1 {
namespace {

constexpr int64_t kTaskQueries = 64;      // of several tokens
constexpr int64_t kTaskPositions = 1024;  // that a task for one token attends to

// The arguments of a call, checked.
struct Call {
  const Kernels* kernels;
  const float* query;        // [batch, tokens, heads, size]
  const uint8_t* keys;       // [layers, sequences, kv_heads, capacity, size]
  const uint8_t* values;     // the same
  const int32_t* positions;  // [batch, tokens]
  const int32_t* slots;      // [batch], indices of sequences
  float* out;                // [batch, tokens, heads, size]
  bool bfloat16;             // type of keys and values, otherwise float
  int64_t batch, tokens, heads, size;
  int64_t sequences, kv_heads, capacity;
  int64_t layer;
  float multiplier, cap;

  // Query heads per key/value head.
  int64_t shared() const { return heads / kv_heads; }
  int64_t task_tokens() const { return std::max<int64_t>(1, kTaskQueries / shared()); }
  // Floats of a task's sums: values and mass of each query.
  int64_t result_floats() const { return task_tokens() * shared() * (size + 1); }
};

// Some tokens of a row, one key/value head, and a range of positions.
struct Task {
  int64_t row, head, first_token, tokens, first_position, positions;
};

ffi::ErrorOr<Call> CheckCall(const ffi::Buffer<ffi::F32>& query, const ffi::AnyBuffer& keys,
                             const ffi::AnyBuffer& values, const ffi::Buffer<ffi::S32>& layer,
                             const ffi::Buffer<ffi::S32>& positions, const ffi::Buffer<ffi::S32>& slots,
                             float multiplier, float cap, std::string_view kernel_name,
                             ffi::Result<ffi::Buffer<ffi::F32>>& y) {
  const auto invalid = [](const char* fault) { return ffi::Unexpected(ffi::Error::InvalidArgument(fault)); };
  const Kernels* kernels = FindKernels(kernel_name);
  if (kernels == nullptr) return invalid("this processor has no such kernels");
  const auto q = query.dimensions(), c = keys.dimensions(), v = values.dimensions();
  if (q.size() != 4 || c.size() != 5 || !std::equal(c.begin(), c.end(), v.begin(), v.end()) ||
      keys.element_type() != values.element_type() || q[3] != c[4] || c[2] < 1 || q[2] % c[2])
    return invalid("queries and cache do not fit together");
  const bool bfloat16 = keys.element_type() == ffi::BF16;
  if (!bfloat16 && keys.element_type() != ffi::F32) return invalid("the cache is neither float32 nor bfloat16");
  const int64_t of_layer = layer.typed_data()[0];
  if (of_layer < 0 || of_layer >= c[0] || static_cast<int64_t>(positions.element_count()) != q[0] * q[1] ||
      static_cast<int64_t>(slots.element_count()) != q[0])
    return invalid("layer, positions or slots do not fit the cache");
  return Call{kernels,
              query.typed_data(),
              static_cast<const uint8_t*>(keys.untyped_data()),
              static_cast<const uint8_t*>(values.untyped_data()),
              positions.typed_data(),
              slots.typed_data(),
              y->typed_data(),
              bfloat16,
              q[0],
              q[1],
              q[2],
              q[3],
              c[1],
              c[2],
              c[3],
              of_layer,
              multiplier,
              cap};
}

// Groups queries by tokens and key/value head; for single tokens, long ranges of positions are cut as well.
std::vector<Task> MakeTasks(const Call& call) {
  const int64_t task_tokens = call.task_tokens();
  std::vector<Task> tasks;
  for (int64_t row = 0; row < call.batch; ++row)
    for (int64_t token = 0; token < call.tokens; token += task_tokens) {
      const int64_t count = std::min(task_tokens, call.tokens - token);
      const int32_t* first = call.positions + row * call.tokens + token;
      const int64_t seen = std::min<int64_t>(call.capacity, *std::max_element(first, first + count) + 1);
      const int64_t range = call.tokens == 1 ? kTaskPositions : call.capacity;
      for (int64_t head = 0; head < call.kv_heads; ++head)
        for (int64_t start = 0; start == 0 || start < seen; start += range)
          tasks.push_back({row, head, token, count, start, std::min(range, seen - start)});
    }
  return tasks;
}

// Longest first, so that all threads finish at about the same time; equal ones keep their order.
std::vector<int64_t> LongestFirst(const std::vector<Task>& tasks) {
  std::vector<int64_t> order(tasks.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return tasks[a].positions > tasks[b].positions; });
  return order;
}

// Divides a task's sums of values by their mass and writes them to the result.
void WriteResult(const Call& call, const Task& task, const float* sums, const float* mass) {
  const int64_t shared = call.shared(), size = call.size;
  for (int64_t t = 0; t < task.tokens; ++t)
    for (int64_t h = 0; h < shared; ++h) {
      const int64_t i = t * shared + h, token = task.row * call.tokens + task.first_token + t;
      float* const to = call.out + (token * call.heads + task.head * shared + h) * size;
      const float inverse = mass[i] > 0 ? 1.0f / mass[i] : 0.0f;
      for (int64_t d = 0; d < size; ++d) to[d] = sums[i * size + d] * inverse;
    }
}

// Gathers a task's queries and attends with them. `sums` receives values and mass; if null, the result is written.
void RunTask(const Call& call, const Task& task, float* sums) {
  const int64_t shared = call.shared(), size = call.size, queries = task.tokens * shared;
  static thread_local std::vector<float> memory;
  static thread_local std::vector<int32_t> counts;
  AttentionTask attention;
  attention.queries = queries;
  attention.bfloat16 = call.bfloat16;
  attention.size = size;
  attention.multiplier = call.multiplier;
  attention.cap = call.cap;
  const int64_t wanted = queries * size + call.result_floats() + attention.scratch_floats();
  if (static_cast<int64_t>(memory.size()) < wanted) memory.resize(wanted);
  if (static_cast<int64_t>(counts.size()) < queries) counts.resize(queries);
  float* const gathered = memory.data();
  float* const result = sums ? sums : gathered + queries * size;
  float* const scratch = gathered + queries * size + call.result_floats();
  for (int64_t t = 0; t < task.tokens; ++t) {
    const int64_t token = task.row * call.tokens + task.first_token + t;
    std::memcpy(gathered + t * shared * size, call.query + (token * call.heads + task.head * shared) * size,
                shared * size * sizeof(float));
    const int64_t seen = call.positions[token] + 1 - task.first_position;
    std::fill_n(counts.begin() + t * shared, shared, static_cast<int32_t>(std::min(seen, task.positions)));
  }
  const int64_t slot = std::clamp<int64_t>(call.slots[task.row], 0, call.sequences - 1);
  const int64_t head = (call.layer * call.sequences + slot) * call.kv_heads + task.head;
  const int64_t start = (head * call.capacity + task.first_position) * size * (call.bfloat16 ? 2 : 4);
  attention.query = gathered;
  attention.counts = counts.data();
  attention.keys = call.keys + start;
  attention.values = call.values + start;
  attention.out = result;
  attention.mass = result + queries * size;
  std::fill_n(result, queries * (size + 1), 0.0f);
  call.kernels->attend(attention, scratch);
  if (!sums) WriteResult(call, task, attention.out, attention.mass);
}

// Adds the sums of consecutive ranges of positions, in their order, and writes the result.
void AddRanges(const Call& call, const std::vector<Task>& tasks, std::vector<float>& sums) {
  const int64_t result_floats = call.result_floats(), shared = call.shared();
  for (size_t i = 0; i < tasks.size();) {
    float* const whole = sums.data() + i * result_floats;
    size_t next = i + 1;
    for (; next < tasks.size() && tasks[next].first_position > 0; ++next)
      for (int64_t j = 0; j < shared * (call.size + 1); ++j) whole[j] += sums[next * result_floats + j];
    WriteResult(call, tasks[i], whole, whole + shared * call.size);
    i = next;
  }
}

ffi::Error Attention(ffi::Buffer<ffi::F32> query, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                     ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> slots,
                     float multiplier, float cap, std::string_view kernel_name, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  const auto call = CheckCall(query, keys, values, layer, positions, slots, multiplier, cap, kernel_name, y);
  if (call.has_error()) return call.error();
  const std::vector<Task> tasks = MakeTasks(*call);
  const std::vector<int64_t> order = LongestFirst(tasks);
  const bool in_ranges = call->tokens == 1;
  std::vector<float> sums(in_ranges ? tasks.size() * call->result_floats() : 0);
  Pool::OfProcess().ForEach(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    RunTask(*call, tasks[order[i]], in_ranges ? sums.data() + order[i] * call->result_floats() : nullptr);
  });
  if (in_ranges) AddRanges(*call, tasks, sums);
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
