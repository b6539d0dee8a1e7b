// Kernels for x86 processors with AMX int8 tile products.

#include <cpuid.h>
#include <immintrin.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace grok1 {
namespace {

constexpr int kWidth = 16;

#include "scales-inl.h"
#include "prepare-inl.h"
#include "floats-inl.h"

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 64;                      // bytes per row of a tile
constexpr int64_t kTileQuads = kTileBytes / kQuadRows;  // quads of a panel per tile
constexpr int64_t kMaxRows = 128;                       // rows whose sums are kept at a time
constexpr int64_t kSumColumns = 4 * kPanelColumns;

bool Available() {
#ifdef __linux__
  unsigned a, b, c, d;
  if (!kAvx512Kernels.available() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = d >> 24 & 1, bytes = d >> 25 & 1;
  if (!tiles || !bytes) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold sums, 4 and 5 planes of activations, 6 and 7 weights. With two tiles of planes, sums 0 and 1 belong
// to the first and two panels, 2 and 3 to the second; with one tile of planes, sums 0 to 3 belong to four panels.
void Configure(int64_t first_rows, int64_t second_rows) {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) shapes.row_bytes[tile] = kTileBytes;
  for (int tile = 0; tile < 4; ++tile)
    shapes.rows[tile] = static_cast<uint8_t>(second_rows && tile >= 2 ? second_rows : first_rows);
  shapes.rows[4] = static_cast<uint8_t>(first_rows);
  shapes.rows[5] = static_cast<uint8_t>(second_rows ? second_rows : 1);
  shapes.rows[6] = shapes.rows[7] = kTileRows;
  _tile_loadconfig(&shapes);
}

// Prefetches the weights of the iteration after the next.
inline void Prefetch(const uint8_t* from) {
  for (int64_t i = 0; i < kTileRows; ++i) _mm_prefetch(from + 2 * kTileRows * kTileBytes + i * kTileBytes, _MM_HINT_T0);
}

void ZeroSums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Multiplies one tile of planes by a tile of each of four panels.
GROK1_INLINE void AddOne(const uint8_t* x, int64_t plane, const uint8_t* const* panels, int64_t at) {
  _tile_loadd(4, x, plane);
  _tile_loadd(6, panels[0] + at, kTileBytes);
  _tile_dpbsud(0, 4, 6);
  _tile_loadd(7, panels[1] + at, kTileBytes);
  _tile_dpbsud(1, 4, 7);
  _tile_loadd(6, panels[2] + at, kTileBytes);
  _tile_dpbsud(2, 4, 6);
  _tile_loadd(7, panels[3] + at, kTileBytes);
  _tile_dpbsud(3, 4, 7);
}

// Multiplies two tiles of planes by a tile of each of two panels.
GROK1_INLINE void AddTwo(const uint8_t* x, int64_t plane, const uint8_t* const* panels, int64_t at) {
  _tile_loadd(4, x, plane);
  _tile_loadd(6, panels[0] + at, kTileBytes);
  _tile_loadd(7, panels[1] + at, kTileBytes);
  _tile_dpbsud(0, 4, 6);
  _tile_dpbsud(1, 4, 7);
  _tile_loadd(5, x + kTileRows * plane, plane);
  _tile_dpbsud(2, 5, 6);
  _tile_dpbsud(3, 5, 7);
}

constexpr int64_t kSumStride = kSumColumns * sizeof(int32_t);

// Multiplies planes of up to 16 rows by four panels: `tiles` tiles of each and the remainder.
void OneTile(const uint8_t* x, int64_t plane, const uint8_t* const* panels, int64_t tiles, const uint8_t* const* tails,
             int32_t* sums) {
  ZeroSums();
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t at = t * kTileRows * kTileBytes;
    for (int i = 0; i < 4; ++i) Prefetch(panels[i] + at);
    AddOne(x + t * kTileBytes, plane, panels, at);
  }
  if (tails) AddOne(x + tiles * kTileBytes, plane, tails, 0);
  _tile_stored(0, sums, kSumStride);
  _tile_stored(1, sums + kPanelColumns, kSumStride);
  _tile_stored(2, sums + 2 * kPanelColumns, kSumStride);
  _tile_stored(3, sums + 3 * kPanelColumns, kSumStride);
}

// Multiplies planes of up to 32 rows by two panels.
void TwoTiles(const uint8_t* x, int64_t plane, const uint8_t* const* panels, int64_t tiles, const uint8_t* const* tails,
              int32_t* sums) {
  ZeroSums();
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t at = t * kTileRows * kTileBytes;
    for (int i = 0; i < 2; ++i) Prefetch(panels[i] + at);
    AddTwo(x + t * kTileBytes, plane, panels, at);
  }
  if (tails) AddTwo(x + tiles * kTileBytes, plane, tails, 0);
  _tile_stored(0, sums, kSumStride);
  _tile_stored(1, sums + kPanelColumns, kSumStride);
  _tile_stored(2, sums + kTileRows * kSumColumns, kSumStride);
  _tile_stored(3, sums + kTileRows * kSumColumns + kPanelColumns, kSumStride);
}

void MultiplyTiles(const Rows& rows, const Matrix& matrix, int64_t first_panel, int64_t panels, float* out,
                   int64_t stride) {
  if (rows.count < 2) {  // limited by memory, where vectors are as fast
    kAvx512Kernels.multiply(rows, matrix, first_panel, panels, out, stride);
    return;
  }
  alignas(64) int32_t sums[kMaxRows * kPlanes * kSumColumns];
  // The quads of a group after the last entire tile, padded with zeros.
  alignas(64) uint8_t tails[4][kTileRows * kTileBytes] = {};
  const uint8_t* const tail_starts[4] = {tails[0], tails[1], tails[2], tails[3]};
  const int64_t plane = PlaneBytes(matrix), quads = matrix.quads();
  const int64_t tiles = quads / kTileQuads, tail_bytes = quads % kTileQuads * kQuadBytes;
  int64_t configured[2] = {0, 0};
  const auto configure = [&](int64_t first, int64_t second) {
    if (configured[0] == first && configured[1] == second) return;
    Configure(first, second);
    configured[0] = first;
    configured[1] = second;
  };
  for (int64_t first_row = 0; first_row < rows.count; first_row += kMaxRows) {
    const int64_t left_rows = rows.count - first_row, count = left_rows < kMaxRows ? left_rows : kMaxRows;
    for (int64_t group = 0; group < matrix.groups; ++group) {
      const uint8_t* x = rows.data + first_row * kPlanes * plane + group * quads * kQuadRows;
      for (int64_t p = 0; p < panels; p += 4) {
        const uint8_t* starts[4];
        for (int i = 0; i < 4; ++i) {  // beyond the end, the last one again, whose sums are not read
          const int64_t panel = p + i < panels ? p + i : panels - 1;
          starts[i] = matrix.panel(first_panel + panel) + group * quads * kQuadBytes;
          if (tail_bytes) __builtin_memcpy(tails[i], starts[i] + tiles * kTileRows * kTileBytes, tail_bytes);
        }
        const uint8_t* const* rest = tail_bytes ? tail_starts : nullptr;
        const int64_t planes = count * kPlanes;
        int64_t row = 0;
        for (; row + kTileRows < planes; row += 2 * kTileRows) {
          const int64_t second = planes - row - kTileRows;
          configure(kTileRows, second < kTileRows ? second : kTileRows);
          for (int half = 0; half < 4; half += 2)
            if (p + half < panels)
              TwoTiles(x + row * plane, plane, starts + half, tiles, rest ? rest + half : nullptr,
                       sums + row * kSumColumns + half * kPanelColumns);
        }
        if (row < planes) {
          configure(planes - row, 0);
          OneTile(x + row * plane, plane, starts, tiles, rest, sums + row * kSumColumns);
        }
        for (int64_t i = 0; i < 4 && p + i < panels; ++i) {
          const ColumnScales scales(matrix, first_panel + p + i, group);
          for (int64_t r = 0; r < count; ++r) {
            const int64_t m = first_row + r;
            const int32_t* of_row = sums + r * kPlanes * kSumColumns + i * kPanelColumns;
            AddGroup(of_row, of_row + kSumColumns, of_row + 2 * kSumColumns, rows.bias[m * matrix.groups + group],
                     rows.step[m], scales, group == 0, out + m * stride + (p + i) * kPanelColumns);
          }
        }
      }
    }
  }
  _tile_release();
}

}  // namespace

const Kernels kAmxKernels = {
    "amx-int8", Available, PlanesRowBytes, PreparePlanes<true>, MultiplyTiles, GeluProducts, Attend, MultiplyTransposed,
};

}  // namespace grok1
