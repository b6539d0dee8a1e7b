// What a set of kernels for one kind of processor is, and the matrices and rows that it works on.

#pragma once

#include <cstdint>
#include <string_view>

namespace grok1 {

// Each set of kernels is compiled for a processor of its own: no function of theirs may be taken from another's.
#define GROK1_INLINE inline __attribute__((always_inline))

constexpr int64_t kPanelColumns = 16;
constexpr int64_t kQuadRows = 4;
constexpr int64_t kQuadBytes = kPanelColumns * kQuadRows;
constexpr int64_t kMostGroupRows = 32768;  // of a packed matrix, so that 32 bits hold every sum of products

// An int8 matrix [groups * group_rows, columns], packed: 16 columns are a panel, 4 rows of a panel are a quad, and a
// quad's 4 values of a column stand side by side, each plus 128. A group of rows begins with a new quad; what
// stands where there is no row or column means nothing.
struct Matrix {
  const uint8_t* panels;   // [num_panels, groups, quads, 16, 4]
  const uint16_t* scales;  // bfloat16 [groups, columns]
  int64_t columns;
  int64_t groups;
  int64_t group_rows;

  GROK1_INLINE int64_t quads() const { return (group_rows + kQuadRows - 1) / kQuadRows; }
  GROK1_INLINE int64_t inner() const { return groups * group_rows; }
  GROK1_INLINE int64_t num_panels() const { return (columns + kPanelColumns - 1) / kPanelColumns; }
  GROK1_INLINE int64_t panel_bytes() const { return groups * quads() * kQuadBytes; }
  GROK1_INLINE const uint8_t* panel(int64_t index) const { return panels + index * panel_bytes(); }
};

// Rows of activations that are multiplied with one matrix, in the form that the kernels asked for.
struct Rows {
  int64_t count;
  const uint8_t* data;  // [count, row_bytes]
  const float* step;    // [count]
  const double* bias;   // [count, groups]
};

constexpr int64_t kBlockPositions = 64;  // of a cache that attention takes at a time

// Queries that look at the same keys and values: for l = cap * tanh(q . k * multiplier / cap), the sums of
// exp(l - cap) * values and of exp(l - cap). No maximum is needed, as l cannot pass the cap.
struct AttentionTask {
  int64_t queries;
  const float* query;     // [queries, size]
  const int32_t* counts;  // [queries], how many of the positions each one sees; may be negative
  const void* keys;       // [positions, size]
  const void* values;     // [positions, size]
  bool bfloat16;          // what keys and values are, otherwise float
  int64_t size;
  float multiplier;
  float cap;
  float* out;   // [queries, size]
  float* mass;  // [queries]

  GROK1_INLINE int64_t scratch_floats() const { return kBlockPositions * (queries + 2 * size); }
};

struct Kernels {
  const char* name;
  bool (*available)();

  // Bytes of one prepared row.
  int64_t (*row_bytes)(const Matrix& shape);

  // Brings a row of activations [inner] into the kernel's form.
  void (*prepare)(const float* x, const Matrix& shape, uint8_t* data, float* step, double* bias);

  // Products of all rows with some panels: float [count, 16 * panels], with `stride` floats from row to row. What a row
  // gives does not depend on the rows beside it.
  void (*multiply)(const Rows& rows, const Matrix& matrix, int64_t first_panel, int64_t panels, float* out,
                   int64_t stride);

  // gate[i] = gelu(gate[i]) * value[i], with the tanh approximation of GELU.
  void (*gelu_product)(float* gate, const float* value, int64_t count);

  // Adds what a task's queries find in a part of the cache to its `out` and `mass`.
  void (*attend)(const AttentionTask& task, float* scratch);

  // Products of rows of activations [rows, size] with `count` rows of a table [entries, size], from `first` on:
  // float [rows, count], with `stride` floats from row to row. `scratch` holds `size` floats.
  void (*multiply_transposed)(const float* x, int64_t rows, const void* table, bool bfloat16, int64_t first,
                              int64_t count, int64_t size, float* out, int64_t stride, float* scratch);
};

// The kernels for this processor, fastest first; the last runs on every processor.
const Kernels* const* AllKernels();  // ends with nullptr

// The kernels of that name, or the fastest if it is empty; nullptr if this processor cannot run such kernels.
const Kernels* FindKernels(std::string_view name);

#ifdef __x86_64__
extern const Kernels kAmxKernels, kAvx512Kernels, kAvxVnniKernels, kAvx2Kernels;
#endif
#ifdef __aarch64__
extern const Kernels kDotProductKernels;
#endif
extern const Kernels kPortableKernels;

}  // namespace grok1
