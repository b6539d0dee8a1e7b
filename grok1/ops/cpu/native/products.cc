// Products of rows with packed matrices, as calls that XLA makes.
//
// Each row is given the index of its matrix in a stack; rows of one matrix are multiplied together, so that the matrix
// is read once for all of them.

#include <algorithm>
#include <cstring>
#include <memory>
#include <string_view>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace grok1 {
namespace {

constexpr int64_t kMostTaskRows = 128;
constexpr int64_t kTaskRowBytes = 768 << 10;    // of prepared rows, which stay in a second cache
constexpr int64_t kTaskPanelBytes = 256 << 10;  // of weights
constexpr int64_t kTaskPanels = 16;
constexpr int64_t kStepPanels = 4;         // that kernels like to take together
constexpr int64_t kAloneElements = 16384;  // so few are prepared by one thread

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
    if (packed.size() < 3 || scaled.size() < 2 || group_rows < 1 || group_rows > kMostGroupRows)
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

// Rows that share a matrix: places `first` to `first + rows.size()` among the prepared rows.
struct Share {
  int64_t matrix;
  int64_t first;
  std::vector<int64_t> rows;  // of the result
};

float* Scratch(int64_t floats) {
  static thread_local std::vector<float> scratch;
  if (static_cast<int64_t>(scratch.size()) < floats) scratch.resize(floats);
  return scratch.data();
}

// Row r of the result is row r / repeat of `x` times the matrix that `index[r]` names in `stack`; where there is a
// second stack, gelu of that times the row's product with the second stack's matrix.
ffi::Error Multiply(const ffi::Buffer<ffi::F32>& x, const Stack& stack, const Stack* values,
                    const ffi::Buffer<ffi::S32>& index, std::string_view kernel_name,
                    ffi::Result<ffi::Buffer<ffi::F32>>& y) {
  const Kernels* kernels = FindKernels(kernel_name);
  if (kernels == nullptr) return ffi::Error::InvalidArgument("this processor has no such kernels");
  const Matrix& shape = stack.shape;
  const auto dimensions = x.dimensions();
  const int64_t inputs = dimensions[0], inner = dimensions[1], rows = index.element_count(), columns = shape.columns;
  if (inner != shape.inner() || inputs < 1 || rows % inputs ||
      static_cast<int64_t>(y->element_count()) != rows * columns)
    return ffi::Error::InvalidArgument("rows and matrices do not fit together");
  if (values && (values->matrices != stack.matrices || values->shape.inner() != inner ||
                 values->shape.columns != columns || values->shape.groups != shape.groups))
    return ffi::Error::InvalidArgument("the two stacks do not fit together");
  const int64_t repeat = rows / inputs;
  float* const out = y->typed_data();

  std::vector<Share> shares;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t matrix = index.typed_data()[row];
    if (matrix < 0 || matrix >= stack.matrices) {
      std::fill_n(out + row * columns, columns, 0.0f);
      continue;
    }
    auto found = std::find_if(shares.begin(), shares.end(), [&](const Share& s) { return s.matrix == matrix; });
    if (found == shares.end()) found = shares.insert(found, Share{matrix, 0, {}});
    found->rows.push_back(row);
  }
  std::vector<int64_t> sources;  // the row of `x` of each prepared row
  for (Share& share : shares) {
    share.first = static_cast<int64_t>(sources.size());
    for (const int64_t row : share.rows) sources.push_back(row / repeat);
  }
  if (sources.empty()) return ffi::Error::Success();

  const int64_t prepared = static_cast<int64_t>(sources.size()), row_bytes = kernels->row_bytes(shape);
  constexpr int64_t kAlignment = 64;
  const std::unique_ptr<uint8_t[]> memory(new uint8_t[prepared * row_bytes + kAlignment]);
  uint8_t* const data = memory.get() + (-reinterpret_cast<uintptr_t>(memory.get()) & (kAlignment - 1));
  std::vector<float> step(prepared);
  std::vector<double> bias(prepared * shape.groups);
  const auto prepare = [&](int64_t i) {
    kernels->prepare(x.typed_data() + sources[i] * inner, shape, data + i * row_bytes, &step[i],
                     &bias[i * shape.groups]);
  };
  if (prepared * inner <= kAloneElements)
    for (int64_t i = 0; i < prepared; ++i) prepare(i);
  else
    Pool::OfProcess().ForEach(prepared, prepare);

  struct Task {
    const Share* share;
    int64_t first_row, rows, first_panel, panels;
  };
  const int64_t num_panels = shape.num_panels();
  const int64_t fitting = kTaskPanelBytes / shape.panel_bytes() / kStepPanels * kStepPanels;
  const int64_t task_panels = std::clamp(fitting, kStepPanels, kTaskPanels);
  const int64_t group_bytes = row_bytes / shape.groups;
  const int64_t task_rows = std::clamp<int64_t>(kTaskRowBytes / group_bytes / 32 * 32, 32, kMostTaskRows);
  std::vector<Task> tasks;
  for (const Share& share : shares) {
    const int64_t count = static_cast<int64_t>(share.rows.size());
    for (int64_t row = 0; row < count; row += task_rows)
      for (int64_t panel = 0; panel < num_panels; panel += task_panels)
        tasks.push_back(
            {&share, row, std::min(task_rows, count - row), panel, std::min(task_panels, num_panels - panel)});
  }
  Pool::OfProcess().ForEach(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[i];
    const int64_t place = task.share->first + task.first_row, width = task.panels * kPanelColumns;
    const Rows of_task = {task.rows, data + place * row_bytes, &step[place], &bias[place * shape.groups]};
    float* const products = Scratch(2 * task.rows * width);
    kernels->multiply(of_task, stack.matrix(task.share->matrix), task.first_panel, task.panels, products, width);
    if (values) {
      float* const second = products + task.rows * width;
      kernels->multiply(of_task, values->matrix(task.share->matrix), task.first_panel, task.panels, second, width);
      kernels->gelu_product(products, second, task.rows * width);
    }
    const int64_t column = task.first_panel * kPanelColumns, taken = std::min(width, columns - column);
    for (int64_t row = 0; row < task.rows; ++row)
      std::memcpy(out + task.share->rows[task.first_row + row] * columns + column, products + row * width,
                  taken * sizeof(float));
  });
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
ffi::Error MultiplyTransposed(ffi::Buffer<ffi::F32> x, ffi::AnyBuffer table, std::string_view kernel_name,
                              ffi::Result<ffi::Buffer<ffi::F32>> y) {
  const Kernels* kernels = FindKernels(kernel_name);
  if (kernels == nullptr) return ffi::Error::InvalidArgument("this processor has no such kernels");
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(Grok1MultiplyTransposed, grok1::MultiplyTransposed,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<std::string_view>("kernels")
                                  .Ret<ffi::Buffer<ffi::F32>>());

// The name of the kernels in this place of the list for this processor, fastest first; null past its end.
extern "C" const char* Grok1KernelsName(int64_t place) {
  const grok1::Kernels* const* kernels = grok1::AllKernels();
  while (*kernels && place > 0) ++kernels, --place;
  return *kernels ? (*kernels)->name : nullptr;
}

// How many threads compute at a time from now on, over all devices.
extern "C" void Grok1SetThreads(int64_t count) { grok1::Pool::OfProcess().SetThreads(count); }

#pragma GCC visibility pop
