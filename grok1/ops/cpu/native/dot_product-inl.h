// Integer products with a vector instruction that sums four products of bytes. Each set of kernels includes this file
// in its own namespace, after `prepare-inl.h`.
//
// `V` describes the processor: `Vector` of `kColumns` 32-bit sums, `Load` of as many columns of a quad, `Prefetch`,
// `Broadcast` of a quad of activations, `Dot`, `Add`, `Store`, and `kAccumulators`, the number of sums that fit in
// registers.

template <class V, int kRows, int kVectors>
inline void SumBlock(const int8_t* rows, int64_t plane, const uint8_t* const* panels, int64_t quads, int32_t* sums) {
  // For few rows, successive quads have separate sums, so that no instruction waits for the one before.
  constexpr int kSums = kRows * kPlanes * kVectors, kSteps = kSums >= 10 ? 1 : kSums >= 5 ? 2 : 4;
  typename V::Vector total[kSteps][kRows * kPlanes][kVectors];
  for (int s = 0; s < kSteps; ++s)
    for (int r = 0; r < kRows * kPlanes; ++r)
      for (int v = 0; v < kVectors; ++v) total[s][r][v] = V::Zero();
  const auto add = [&](int64_t q, int s) {
    typename V::Vector weights[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      V::Prefetch(panels[v] + q * kQuadBytes);
      weights[v] = V::Load(panels[v] + q * kQuadBytes);
    }
    for (int r = 0; r < kRows * kPlanes; ++r) {
      const auto x = V::Broadcast(rows + r * plane + q * kQuadRows);
      for (int v = 0; v < kVectors; ++v) total[s][r][v] = V::Dot(total[s][r][v], weights[v], x);
    }
  };
  int64_t q = 0;
  for (; q + kSteps <= quads; q += kSteps)
    for (int s = 0; s < kSteps; ++s) add(q + s, s);
  for (; q < quads; ++q) add(q, 0);
  for (int r = 0; r < kRows * kPlanes; ++r)
    for (int v = 0; v < kVectors; ++v) {
      for (int s = 1; s < kSteps; ++s) total[0][r][v] = V::Add(total[0][r][v], total[s][r][v]);
      V::Store(sums + (r * kVectors + v) * V::kColumns, total[0][r][v]);
    }
}

// Multiplies `kRows` rows by `kPanels` panels; if vectors are shorter than a panel, by one part of a panel at a time.
template <class V, int kRows, int kPanels>
inline void MultiplyBlock(const Rows& rows, int64_t first_row, const Matrix& matrix, int64_t first_panel, float* out,
                          int64_t stride) {
  constexpr int kParts = kPanelColumns / V::kColumns;         // of a panel
  constexpr int kFit = V::kAccumulators / (kRows * kPlanes);  // vectors that fit in registers
  constexpr int kVectors = kFit < 1 ? 1 : kFit < kParts ? kFit : kParts * kPanels;
  constexpr int kAtOnce = kVectors > kParts * kPanels ? kParts * kPanels : kVectors;
  const int64_t plane = PlaneBytes(matrix), quads = matrix.quads(), row_bytes = PlanesRowBytes(matrix);
  const int8_t* base = reinterpret_cast<const int8_t*>(rows.data + first_row * row_bytes);
  int32_t block[kRows * kPlanes * kAtOnce * V::kColumns];
  int32_t sums[kRows * kPlanes][kPanels * kPanelColumns];
  for (int64_t group = 0; group < matrix.groups; ++group) {
    for (int part = 0; part < kParts * kPanels; part += kAtOnce) {
      const uint8_t* starts[kAtOnce];
      for (int v = 0; v < kAtOnce; ++v)
        starts[v] = matrix.panel(first_panel + (part + v) / kParts) + group * quads * kQuadBytes +
                    (part + v) % kParts * V::kColumns * kQuadRows;
      SumBlock<V, kRows, kAtOnce>(base + group * quads * kQuadRows, plane, starts, quads, block);
      for (int r = 0; r < kRows * kPlanes; ++r)
        __builtin_memcpy(sums[r] + part * V::kColumns, block + r * kAtOnce * V::kColumns, kAtOnce * V::kColumns * 4);
    }
    for (int p = 0; p < kPanels; ++p) {
      const ColumnScales scales(matrix, first_panel + p, group);
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = first_row + r;
        const int32_t* high = sums[kPlanes * r] + p * kPanelColumns;
        AddGroup(high, high + kPanels * kPanelColumns, high + 2 * kPanels * kPanelColumns,
                 rows.bias[row * matrix.groups + group], rows.step[row], scales, group == 0,
                 out + row * stride + p * kPanelColumns);
      }
    }
  }
}

template <class V, int kRows>
inline void MultiplyPanels(const Rows& rows, int64_t first_row, const Matrix& matrix, int64_t first_panel,
                           int64_t panels, float* out, int64_t stride) {
  constexpr int kParts = kPanelColumns / V::kColumns;
  constexpr int kFit = V::kAccumulators / (kRows * kPlanes * kParts);
  constexpr int kPanels = kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  int64_t p = 0;
  for (; p + kPanels <= panels; p += kPanels)
    MultiplyBlock<V, kRows, kPanels>(rows, first_row, matrix, first_panel + p, out + p * kPanelColumns, stride);
  for (; p < panels; ++p)
    MultiplyBlock<V, kRows, 1>(rows, first_row, matrix, first_panel + p, out + p * kPanelColumns, stride);
}

template <class V>
void MultiplyRows(const Rows& rows, const Matrix& matrix, int64_t first_panel, int64_t panels, float* out,
                  int64_t stride) {
  int64_t row = 0;
  for (; row + 4 <= rows.count; row += 4) MultiplyPanels<V, 4>(rows, row, matrix, first_panel, panels, out, stride);
  for (; row + 2 <= rows.count; row += 2) MultiplyPanels<V, 2>(rows, row, matrix, first_panel, panels, out, stride);
  for (; row < rows.count; ++row) MultiplyPanels<V, 1>(rows, row, matrix, first_panel, panels, out, stride);
}
