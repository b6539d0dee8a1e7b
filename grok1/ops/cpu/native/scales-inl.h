// Conversion from bfloat16, and scales. Each set of kernels includes this file in its own namespace.

inline float FromBfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}

// The scales of a panel's columns for one group of rows.
struct ColumnScales {
  float of[kPanelColumns] = {};

  ColumnScales(const Matrix& matrix, int64_t panel, int64_t group) {
    const int64_t column = panel * kPanelColumns, left = matrix.columns - column;
    for (int64_t n = 0; n < kPanelColumns && n < left; ++n)
      of[n] = FromBfloat16(matrix.scales[group * matrix.columns + column + n]);
  }
};
