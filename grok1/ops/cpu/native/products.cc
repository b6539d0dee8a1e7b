// Products of rows with packed matrices, as XLA custom calls.
//
// Each row comes with the index of its matrix in a stack. Rows of the same matrix are multiplied together, so that the
// matrix is read once for all of them.

#include <algorithm>
#include <cstring>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace grok1 {
namespace {

constexpr int64_t kMaxTaskRows = 128;
constexpr int64_t kTaskRowBytes = 768 << 10;    // of prepared rows, which stay in the second-level cache
constexpr int64_t kTaskPanelBytes = 256 << 10;  // of weights
constexpr int64_t kTaskPanels = 16;
constexpr int64_t kStepPanels = 4;         // kernels process panels by fours
constexpr int64_t kAloneElements = 16384;  // up to this many, one thread prepares all rows

ffi::Error NoSuchKernels() { return ffi::Error::InvalidArgument("this processor has no such kernels"); }

using Panels = ffi::Buffer<ffi::U8>;
using Scales = ffi::Buffer<ffi::BF16>;

// A stack of packed matrices.
struct Stack {
  Matrix shape;
  int64_t matrices;
  int64_t matrix_bytes;
  const uint8_t* panels;
  const uint16_t* scales;

  static ffi::ErrorOr<Stack> Of(const Panels& panels, const Scales& scales, int64_t group_rows) {
    const auto packed = panels.dimensions(), scaled = scales.dimensions();
    if (packed.size() < 3 || scaled.size() < 2 || group_rows < 1 || group_rows > kMaxGroupRows)
      return ffi::Unexpected(ffi::Error::InvalidArgument("not a stack of packed matrices"));
    Stack stack;
    stack.shape = {nullptr, nullptr, scaled[scaled.size() - 1], scaled[scaled.size() - 2], group_rows};
    stack.matrix_bytes = stack.shape.num_panels() * stack.shape.panel_bytes();
    const int64_t scale_count = stack.shape.groups * stack.shape.columns;
    if (stack.matrix_bytes == 0) return ffi::Unexpected(ffi::Error::InvalidArgument("an empty matrix"));
    stack.matrices = static_cast<int64_t>(panels.element_count()) / stack.matrix_bytes;
    if (stack.matrices * stack.matrix_bytes != static_cast<int64_t>(panels.element_count()) ||
        stack.matrices * scale_count != static_cast<int64_t>(scales.element_count()))
      return ffi::Unexpected(ffi::Error::InvalidArgument("panels and scales do not fit together"));
    stack.panels = panels.typed_data();
    stack.scales = reinterpret_cast<const uint16_t*>(scales.untyped_data());
    return stack;
  }

  Matrix matrix(int64_t index) const {
    Matrix found = shape;
    found.panels = panels + index * matrix_bytes;
    found.scales = scales + index * shape.groups * shape.columns;
    return found;
  }
};

// Rows of the result that use the same matrix. Prepared, they are adjacent, from `first` on.
struct Group {
  int64_t matrix;
  int64_t first;
  std::vector<int64_t> rows;
};

// Row r of the result is row r / repeat of `x` times matrix `index[r]` of `stack`. With a second stack, it is gelu of
// that times the row's product with the same matrix of the second stack.
struct Product {
  const Kernels* kernels;
  const Stack* stack;
  const Stack* values;   // or null
  const float* x;        // [rows / repeat, inner]
  const int32_t* index;  // [rows]
  float* out;            // [rows, columns]
  int64_t rows;
  int64_t repeat;

  int64_t inner() const { return stack->shape.inner(); }
  int64_t columns() const { return stack->shape.columns; }
};

// Rows of activations, quantized for a set of kernels.
struct PreparedRows {
  int64_t row_bytes;
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* data;             // [count, row_bytes], aligned
  std::vector<float> step;   // [count]
  std::vector<double> bias;  // [count, groups]
};

// Rows of a group times panels of its matrix, computed by one thread.
struct Task {
  const Group* group;
  int64_t first_row, rows, first_panel, panels;
};

float* Scratch(int64_t floats) {
  static thread_local std::vector<float> scratch;
  if (static_cast<int64_t>(scratch.size()) < floats) scratch.resize(floats);
  return scratch.data();
}

ffi::ErrorOr<Product> CheckProduct(const ffi::Buffer<ffi::F32>& x, const Stack& stack, const Stack* values,
                                   const ffi::Buffer<ffi::S32>& index, std::string_view kernel_name,
                                   ffi::Result<ffi::Buffer<ffi::F32>>& y) {
  const Kernels* kernels = FindKernels(kernel_name);
  if (kernels == nullptr) return ffi::Unexpected(NoSuchKernels());
  const Matrix& shape = stack.shape;
  const auto dimensions = x.dimensions();
  const int64_t inputs = dimensions[0], inner = dimensions[1], rows = index.element_count();
  if (inner != shape.inner() || inputs < 1 || rows % inputs ||
      static_cast<int64_t>(y->element_count()) != rows * shape.columns)
    return ffi::Unexpected(ffi::Error::InvalidArgument("rows and matrices do not fit together"));
  if (values && (values->matrices != stack.matrices || values->shape.inner() != inner ||
                 values->shape.columns != shape.columns || values->shape.groups != shape.groups))
    return ffi::Unexpected(ffi::Error::InvalidArgument("the two stacks do not fit together"));
  return Product{kernels, &stack, values, x.typed_data(), index.typed_data(), y->typed_data(), rows, rows / inputs};
}

// Groups the rows by matrix. Rows without a matrix are set to zero and belong to no group.
std::vector<Group> GroupRows(const Product& product) {
  std::vector<Group> groups;
  for (int64_t row = 0; row < product.rows; ++row) {
    const int64_t matrix = product.index[row];
    if (matrix < 0 || matrix >= product.stack->matrices) {
      std::fill_n(product.out + row * product.columns(), product.columns(), 0.0f);
      continue;
    }
    auto found = std::find_if(groups.begin(), groups.end(), [&](const Group& g) { return g.matrix == matrix; });
    if (found == groups.end()) found = groups.insert(found, Group{matrix, 0, {}});
    found->rows.push_back(row);
  }
  int64_t first = 0;
  for (Group& group : groups) {
    group.first = first;
    first += static_cast<int64_t>(group.rows.size());
  }
  return groups;
}

PreparedRows PrepareRows(const Product& product, const std::vector<Group>& groups) {
  const Matrix& shape = product.stack->shape;
  std::vector<int64_t> sources;  // the row of `x` of each prepared row
  for (const Group& group : groups)
    for (const int64_t row : group.rows) sources.push_back(row / product.repeat);
  const int64_t count = static_cast<int64_t>(sources.size()), row_bytes = product.kernels->row_bytes(shape);
  constexpr int64_t kAlignment = 64;
  std::unique_ptr<uint8_t[]> memory(new uint8_t[count * row_bytes + kAlignment]);
  uint8_t* const data = memory.get() + (-reinterpret_cast<uintptr_t>(memory.get()) & (kAlignment - 1));
  PreparedRows rows = {row_bytes, std::move(memory), data, std::vector<float>(count),
                       std::vector<double>(count * shape.groups)};
  const auto prepare = [&](int64_t i) {
    product.kernels->prepare(product.x + sources[i] * product.inner(), shape, data + i * row_bytes, &rows.step[i],
                             &rows.bias[i * shape.groups]);
  };
  if (count * product.inner() <= kAloneElements)
    for (int64_t i = 0; i < count; ++i) prepare(i);
  else
    Pool::OfProcess().ForEach(count, prepare);
  return rows;
}

// Cuts each group's product into tasks whose rows and weights fit in a processor's caches.
std::vector<Task> MakeTasks(const Matrix& shape, const std::vector<Group>& groups, int64_t row_bytes) {
  const int64_t num_panels = shape.num_panels();
  const int64_t fitting = kTaskPanelBytes / shape.panel_bytes() / kStepPanels * kStepPanels;
  const int64_t task_panels = std::clamp(fitting, kStepPanels, kTaskPanels);
  const int64_t group_bytes = row_bytes / shape.groups;
  const int64_t task_rows = std::clamp<int64_t>(kTaskRowBytes / group_bytes / 32 * 32, 32, kMaxTaskRows);
  std::vector<Task> tasks;
  for (const Group& group : groups) {
    const int64_t count = static_cast<int64_t>(group.rows.size());
    for (int64_t row = 0; row < count; row += task_rows)
      for (int64_t panel = 0; panel < num_panels; panel += task_panels)
        tasks.push_back(
            {&group, row, std::min(task_rows, count - row), panel, std::min(task_panels, num_panels - panel)});
  }
  return tasks;
}

void RunTask(const Product& product, const PreparedRows& prepared, const Task& task) {
  const Group& group = *task.group;
  const int64_t first = group.first + task.first_row, width = task.panels * kPanelColumns;
  const Rows rows = {task.rows, prepared.data + first * prepared.row_bytes, &prepared.step[first],
                     &prepared.bias[first * product.stack->shape.groups]};
  float* const products = Scratch(2 * task.rows * width);
  product.kernels->multiply(rows, product.stack->matrix(group.matrix), task.first_panel, task.panels, products, width);
  if (product.values) {
    float* const second = products + task.rows * width;
    product.kernels->multiply(rows, product.values->matrix(group.matrix), task.first_panel, task.panels, second, width);
    product.kernels->gelu_product(products, second, task.rows * width);
  }
  const int64_t columns = product.columns(), column = task.first_panel * kPanelColumns;
  for (int64_t row = 0; row < task.rows; ++row)
    std::memcpy(product.out + group.rows[task.first_row + row] * columns + column, products + row * width,
                std::min(width, columns - column) * sizeof(float));
}

ffi::Error Multiply(const ffi::Buffer<ffi::F32>& x, const Stack& stack, const Stack* values,
                    const ffi::Buffer<ffi::S32>& index, std::string_view kernel_name,
                    ffi::Result<ffi::Buffer<ffi::F32>>& y) {
  const auto product = CheckProduct(x, stack, values, index, kernel_name, y);
  if (product.has_error()) return product.error();
  const std::vector<Group> groups = GroupRows(*product);
  if (groups.empty()) return ffi::Error::Success();
  const PreparedRows prepared = PrepareRows(*product, groups);
  const std::vector<Task> tasks = MakeTasks(stack.shape, groups, prepared.row_bytes);
  Pool::OfProcess().ForEach(static_cast<int64_t>(tasks.size()),
                            [&](int64_t i) { RunTask(*product, prepared, tasks[i]); });
  return ffi::Error::Success();
}

ffi::Error MultiplyPacked(ffi::Buffer<ffi::F32> x, Panels panels, Scales scales, ffi::Buffer<ffi::S32> index,
                          int64_t group_rows, std::string_view kernels, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  const auto stack = Stack::Of(panels, scales, group_rows);
  if (stack.has_error()) return stack.error();
  return Multiply(x, *stack, nullptr, index, kernels, y);
}

ffi::Error MultiplyGated(ffi::Buffer<ffi::F32> x, Panels panels, Scales scales, Panels value_panels,
                         Scales value_scales, ffi::Buffer<ffi::S32> index, int64_t group_rows, std::string_view kernels,
                         ffi::Result<ffi::Buffer<ffi::F32>> y) {
  const auto stack = Stack::Of(panels, scales, group_rows), values = Stack::Of(value_panels, value_scales, group_rows);
  if (stack.has_error()) return stack.error();
  if (values.has_error()) return values.error();
  return Multiply(x, *stack, &*values, index, kernels, y);
}

// Rows of `x` times the rows of a table: [rows, size] and [entries, size] to [rows, entries].
ffi::Error MultiplyTable(ffi::Buffer<ffi::F32> x, ffi::AnyBuffer table, std::string_view kernel_name,
                         ffi::Result<ffi::Buffer<ffi::F32>> y) {
  const Kernels* kernels = FindKernels(kernel_name);
  if (kernels == nullptr) return NoSuchKernels();
  const auto inputs = x.dimensions(), stored = table.dimensions();
  const bool bfloat16 = table.element_type() == ffi::BF16;
  if (inputs.size() != 2 || stored.size() != 2 || inputs[1] != stored[1] || inputs[1] < 1 ||
      (!bfloat16 && table.element_type() != ffi::F32))
    return ffi::Error::InvalidArgument("rows and table do not fit together");
  const int64_t rows = inputs[0], size = inputs[1], entries = stored[0];
  const int64_t chunk = std::max<int64_t>(16, kTaskPanelBytes / (size * (bfloat16 ? 2 : 4)));
  Pool::OfProcess().ForEach((entries + chunk - 1) / chunk, [&](int64_t i) {
    const int64_t first = i * chunk;
    kernels->multiply_transposed(x.typed_data(), rows, table.untyped_data(), bfloat16, first,
                                 std::min(chunk, entries - first), size, y->typed_data() + first, entries,
                                 Scratch(size));
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace grok1

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(Grok1Multiply, grok1::MultiplyPacked,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<grok1::Panels>()
                                  .Arg<grok1::Scales>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("group_rows")
                                  .Attr<std::string_view>("kernels")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(Grok1MultiplyGated, grok1::MultiplyGated,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<grok1::Panels>()
                                  .Arg<grok1::Scales>()
                                  .Arg<grok1::Panels>()
                                  .Arg<grok1::Scales>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("group_rows")
                                  .Attr<std::string_view>("kernels")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(Grok1MultiplyTransposed, grok1::MultiplyTable,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<std::string_view>("kernels")
                                  .Ret<ffi::Buffer<ffi::F32>>());

// The name of the kernels at an index in the list for this processor, fastest first; null past its end.
extern "C" const char* Grok1KernelsName(int64_t index) {
  const grok1::Kernels* const* kernels = grok1::AllKernels();
  while (*kernels && index > 0) ++kernels, --index;
  return *kernels ? (*kernels)->name : nullptr;
}

// Sets the number of threads that compute at a time, over all devices.
extern "C" void Grok1SetThreads(int64_t count) { grok1::Pool::OfProcess().SetThreads(count); }

#pragma GCC visibility pop
