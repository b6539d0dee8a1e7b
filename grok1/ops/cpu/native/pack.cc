// Packing of int8 matrices.

#include <cstring>

#include "kernels.h"

namespace grok1 {
namespace {

constexpr int64_t kBlockQuads = 64;  // quads per panel at a time, so that the rows stay in the cache

// Packs four entire rows of a panel, `stride` bytes apart.
void PackQuad(const uint8_t* row, int64_t stride, uint8_t* quad) {
  uint32_t out[kPanelColumns];
  for (int64_t n = 0; n < kPanelColumns; ++n)
    out[n] = (row[n] | uint32_t{row[stride + n]} << 8 | uint32_t{row[2 * stride + n]} << 16 |
              uint32_t{row[3 * stride + n]} << 24) ^
             0x80808080u;
  if constexpr (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__)
    for (uint32_t& four : out) four = __builtin_bswap32(four);
  std::memcpy(quad, out, sizeof out);
}

}  // namespace
}  // namespace grok1

#pragma GCC visibility push(default)

// Writes a box of a matrix, [rows, columns] with `stride` bytes from row to row, into a packed matrix of `groups`
// groups of `group_rows` rows. Threads may write disjoint boxes at the same time.
extern "C" void Grok1Pack(const uint8_t* box, int64_t stride, int64_t first_row, int64_t rows, int64_t first_column,
                          int64_t columns, uint8_t* packed, int64_t groups, int64_t group_rows) {
  using namespace grok1;
  const Matrix matrix = {packed, nullptr, first_column + columns, groups, group_rows};
  const int64_t quads = matrix.quads(), end_row = first_row + rows, end_column = first_column + columns;
  for (int64_t group = first_row / group_rows; group * group_rows < end_row; ++group) {
    // The rows of the group that are in the box, relative to the group.
    const int64_t offset = group * group_rows;
    const int64_t begin = first_row > offset ? first_row - offset : 0;
    const int64_t end = end_row - offset < group_rows ? end_row - offset : group_rows;
    for (int64_t block = begin / kQuadRows; block * kQuadRows < end; block += kBlockQuads)
      for (int64_t panel = first_column / kPanelColumns; panel * kPanelColumns < end_column; ++panel) {
        const int64_t column = panel * kPanelColumns;
        uint8_t* const to = packed + panel * matrix.panel_bytes() + group * quads * kQuadBytes;
        for (int64_t q = block; q < block + kBlockQuads && q * kQuadRows < end; ++q) {
          const int64_t k = q * kQuadRows;
          const uint8_t* from = box + (offset + k - first_row) * stride + column - first_column;
          if (k >= begin && k + kQuadRows <= end && column >= first_column && column + kPanelColumns <= end_column) {
            PackQuad(from, stride, to + q * kQuadBytes);
            continue;
          }
          for (int64_t i = 0; i < kQuadRows; ++i)
            for (int64_t n = 0; n < kPanelColumns; ++n)
              if (k + i >= begin && k + i < end && column + n >= first_column && column + n < end_column)
                to[q * kQuadBytes + n * kQuadRows + i] = from[i * stride + n] ^ 0x80;
        }
      }
  }
}

#pragma GCC visibility pop
