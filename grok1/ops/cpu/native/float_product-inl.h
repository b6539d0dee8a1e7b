// Products with floats, for processors that have no dot products of bytes. Included by kernels in a namespace of their
// own, after `floats-inl.h`.

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

typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef int8_t SignedBytes __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(32)));
typedef int32_t Words __attribute__((vector_size(64)));
typedef float Sixteen __attribute__((vector_size(64)));

// 16 weights as floats; widened step by step, as compilers have instructions for each.
inline void LoadWeights(const uint8_t* from, Floats* to) {
  Bytes bytes;
  __builtin_memcpy(&bytes, from, sizeof bytes);
  bytes ^= 0x80;  // without the 128 that packed values have too much
  const Shorts shorts = __builtin_convertvector((SignedBytes)bytes, Shorts);
  const Sixteen floats = __builtin_convertvector(__builtin_convertvector(shorts, Words), Sixteen);
  __builtin_memcpy(to, &floats, sizeof floats);
}

constexpr int kMaxRows = kWidth >= 8 ? 3 : 2;          // whose sums registers have room for
constexpr int kHalfVectors = kQuadBytes / 2 / kWidth;  // vectors of half a quad, so that sums stay in registers

template <int kRows>
inline void FloatPanel(const Rows& rows, int64_t first_row, const Matrix& matrix, int64_t panel, float* out,
                       int64_t stride) {
  const int64_t row_floats = FloatRowBytes(matrix) / static_cast<int64_t>(sizeof(float)), quads = matrix.quads();
  const float* x = reinterpret_cast<const float*>(rows.data) + first_row * row_floats;
  const uint8_t* weights = matrix.panel(panel);
  for (int64_t group = 0; group < matrix.groups; ++group) {
    const ColumnScales scales(matrix, panel, group);
    for (int half = 0; half < 2; ++half) {
      Floats total[kRows][kHalfVectors] = {};
      const uint8_t* from = weights + group * quads * kQuadBytes + half * (kQuadBytes / 2);
      const float* inputs = x + group * quads * kWidth;
      for (int64_t q = 0; q < quads; ++q)
        for (int v = 0; v < kHalfVectors; v += 16 / kWidth) {
          Floats weight[16 / kWidth];
          LoadWeights(from + q * kQuadBytes + v * kWidth, weight);
          for (int r = 0; r < kRows; ++r) {
            const Floats input = LoadFloats(inputs + r * row_floats + q * kWidth);
            for (int i = 0; i < 16 / kWidth; ++i) total[r][v + i] += input * weight[i];
          }
        }
      for (int r = 0; r < kRows; ++r) {
        float sums[kHalfVectors * kWidth];
        for (int v = 0; v < kHalfVectors; ++v) StoreFloats(sums + v * kWidth, total[r][v]);
        float* y = out + (first_row + r) * stride + half * (kPanelColumns / 2);
        for (int64_t n = 0; n < kPanelColumns / 2; ++n) {
          const float* s = sums + n * kQuadRows;
          const float value = ((s[0] + s[1]) + (s[2] + s[3])) * scales.of[half * (kPanelColumns / 2) + n];
          y[n] = group == 0 ? value : y[n] + value;
        }
      }
    }
  }
}

void MultiplyFloats(const Rows& rows, const Matrix& matrix, int64_t first_panel, int64_t panels, float* out,
                    int64_t stride) {
  for (int64_t p = 0; p < panels; ++p) {
    int64_t row = 0;
    for (; row + kMaxRows <= rows.count; row += kMaxRows)
      FloatPanel<kMaxRows>(rows, row, matrix, first_panel + p, out + p * kPanelColumns, stride);
    for (; row < rows.count; ++row) FloatPanel<1>(rows, row, matrix, first_panel + p, out + p * kPanelColumns, stride);
  }
}
