// Products with floats, for processors that have no dot products of bytes. Included by kernels in a namespace of their
// own, after `floats.h`.

static_assert(kWidth % 4 == 0, "a vector holds whole quads");

inline int64_t FloatRowBytes(const Matrix& shape) {
  return shape.groups * shape.quads() * kWidth * static_cast<int64_t>(sizeof(float));
}

// Each quad of activations as often as a vector has room for.
void PrepareFloats(const float* x, const Matrix& shape, uint8_t* data, float*, double*) {
  float* out = reinterpret_cast<float*>(data);
  for (int64_t group = 0; group < shape.groups; ++group)
    for (int64_t q = 0; q < shape.quads(); ++q, out += kWidth)
      for (int64_t i = 0; i < kWidth; ++i) {
        const int64_t k = q * kQuadRows + i % kQuadRows;
        out[i] = k < shape.group_rows ? x[group * shape.group_rows + k] : 0.0f;
      }
}

typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
typedef int8_t SignedBytes __attribute__((vector_size(kWidth)));

inline Floats LoadWeights(const uint8_t* from) {
  Bytes bytes;
  __builtin_memcpy(&bytes, from, sizeof bytes);
  bytes ^= 0x80;  // without the 128 that packed values have too much
  return __builtin_convertvector(__builtin_convertvector((SignedBytes)bytes, Ints), Floats);
}

constexpr int kHalfVectors = kQuadBytes / 2 / kWidth;  // vectors of half a quad, so that sums stay in registers

template <int kRows>
inline void FloatPanel(const Rows& rows, int64_t first_row, const Matrix& matrix, int64_t panel, float* out,
                       int64_t stride) {
  const int64_t row_floats = FloatRowBytes(matrix) / static_cast<int64_t>(sizeof(float)), quads = matrix.quads();
  const float* x = reinterpret_cast<const float*>(rows.data) + first_row * row_floats;
  const uint8_t* weights = matrix.panel(panel);
  for (int64_t group = 0; group < matrix.groups; ++group)
    for (int half = 0; half < 2; ++half) {
      Floats total[kRows][kHalfVectors] = {};
      const uint8_t* from = weights + group * quads * kQuadBytes + half * (kQuadBytes / 2);
      const float* inputs = x + group * quads * kWidth;
      for (int64_t q = 0; q < quads; ++q)
        for (int v = 0; v < kHalfVectors; ++v) {
          const Floats w = LoadWeights(from + q * kQuadBytes + v * kWidth);
          for (int r = 0; r < kRows; ++r) total[r][v] += LoadFloats(inputs + r * row_floats + q * kWidth) * w;
        }
      for (int r = 0; r < kRows; ++r) {
        float sums[kHalfVectors * kWidth];
        for (int v = 0; v < kHalfVectors; ++v) StoreFloats(sums + v * kWidth, total[r][v]);
        float* y = out + (first_row + r) * stride + half * (kPanelColumns / 2);
        for (int64_t n = 0; n < kPanelColumns / 2; ++n) {
          const int64_t column = panel * kPanelColumns + half * (kPanelColumns / 2) + n;
          uint32_t bits = 0;
          if (column < matrix.columns) bits = matrix.scales[group * matrix.columns + column] << 16;
          float scale;
          __builtin_memcpy(&scale, &bits, sizeof scale);
          const float* s = sums + n * kQuadRows;
          const float value = ((s[0] + s[1]) + (s[2] + s[3])) * scale;
          y[n] = group == 0 ? value : y[n] + value;
        }
      }
    }
}

void MultiplyFloats(const Rows& rows, const Matrix& matrix, int64_t first_panel, int64_t panels, float* out,
                    int64_t stride) {
  for (int64_t p = 0; p < panels; ++p) {
    int64_t row = 0;
    for (; row + 2 <= rows.count; row += 2)
      FloatPanel<2>(rows, row, matrix, first_panel + p, out + p * kPanelColumns, stride);
    if (row < rows.count) FloatPanel<1>(rows, row, matrix, first_panel + p, out + p * kPanelColumns, stride);
  }
}
