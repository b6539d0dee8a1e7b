// The interface of a set of kernels for one kind of processor, and its operands.

#pragma once

#include <cstdint>
#include <string_view>

namespace grok1 {

// Each set of kernels is compiled for another processor; the linker must not merge their inline functions.
#define GROK1_INLINE inline __attribute__((always_inline))

constexpr int64_t kPanelColumns = 16;
constexpr int64_t kQuadRows = 4;
constexpr int64_t kQuadBytes = kPanelColumns * kQuadRows;
constexpr int64_t kMaxGroupRows = 32768;  // of a packed matrix, so that sums of products fit in 32 bits

// A packed int8 matrix [groups * group_rows, columns]. 16 columns form a panel and 4 rows of a panel a quad, in which
// the 4 values of a column are adjacent. 128 is added to each value. A group of rows starts with a new quad; values of
// rows and columns beyond the matrix are undefined.
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

// Rows of activations to be multiplied by one matrix, as prepared by the kernels.
struct Rows {
  int64_t count;
  const uint8_t* data;  // [count, row_bytes]
  const float* step;    // [count]
  const double* bias;   // [count, groups]
};

constexpr int64_t kBlockPositions = 64;  // positions of the cache per iteration of attention

// Queries that attend to the same keys and values. With l = cap * tanh(q . k * multiplier / cap), the results are the
// sums of exp(l - cap) * values and of exp(l - cap). No maximum is needed, as l is at most cap.
struct AttentionTask {
  int64_t queries;
  const float* query;     // [queries, size]
  const int32_t* counts;  // [queries], number of positions visible to each query; may be negative
  const void* keys;       // [positions, size]
  const void* values;     // [positions, size]
  bool bfloat16;          // type of keys and values, otherwise float
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

  // Returns the size of a prepared row in bytes.
  int64_t (*row_bytes)(const Matrix& shape);

  // Prepares a row of activations [inner].
  void (*prepare)(const float* x, const Matrix& shape, uint8_t* data, float* step, double* bias);

  // Multiplies all rows by some panels: float [count, 16 * panels], with `stride` floats from row to row. The result of
  // a row does not depend on the other rows.
  void (*multiply)(const Rows& rows, const Matrix& matrix, int64_t first_panel, int64_t panels, float* out,
                   int64_t stride);

  // Computes gate[i] = gelu(gate[i]) * value[i], with the tanh approximation of GELU.
  void (*gelu_product)(float* gate, const float* value, int64_t count);

  // Adds the results of a task's queries to its `out` and `mass`.
  void (*attend)(const AttentionTask& task, float* scratch);

  // Multiplies rows of activations [rows, size] by `count` rows of a table [entries, size], starting at `first`:
  // float [rows, count], with `stride` floats from row to row. `scratch` has room for `size` floats.
  void (*multiply_transposed)(const float* x, int64_t rows, const void* table, bool bfloat16, int64_t first,
                              int64_t count, int64_t size, float* out, int64_t stride, float* scratch);
};

// Returns the kernels for this processor, fastest first; the last runs on every processor.
const Kernels* const* AllKernels();  // ends with nullptr

// Returns the kernels with this name, or the fastest if it is empty; nullptr if this processor cannot run them.
const Kernels* FindKernels(std::string_view name);

#ifdef __x86_64__
extern const Kernels kAmxKernels, kAvx512Kernels, kAvxVnniKernels, kAvx2Kernels;
#endif
#ifdef __aarch64__
extern const Kernels kDotProductKernels;
#endif
extern const Kernels kPortableKernels;

}  // namespace grok1
