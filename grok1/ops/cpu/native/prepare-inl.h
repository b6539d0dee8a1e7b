// Activations as three signed bytes each. Kernels that multiply integers include this file in their own namespace,
// after `scales-inl.h`.
//
// A row is rounded to 24 bits, the precision of a float, and a product is three integer dot products. Integer sums are
// exact, so that all these kernels give the same bits.

constexpr int kPlanes = 3;
constexpr int64_t kPlanePadding = 64;   // avoids row distances of a power of two, and allows reading entire vectors
constexpr float kLargest = 8355700.0f;  // largest value in three balanced bytes, minus a margin for rounding

inline int64_t PlaneBytes(const Matrix& shape) { return shape.groups * shape.quads() * kQuadRows + kPlanePadding; }

inline int64_t PlanesRowBytes(const Matrix& shape) { return kPlanes * PlaneBytes(shape); }

// Writes the planes of a row, upper bytes first, and for each group 128 times the sum of its integers. The kernels
// subtract this, because 128 is added to the values of a packed matrix.
template <bool kBiased>
void PreparePlanes(const float* x, const Matrix& shape, uint8_t* data, float* step, double* bias) {
  const int64_t inner = shape.inner(), plane = PlaneBytes(shape), padded = shape.quads() * kQuadRows;
  int32_t largest = 0;
  for (int64_t k = 0; k < inner; ++k) {
    int32_t bits;
    __builtin_memcpy(&bits, x + k, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  const bool finite = largest < 0x7f800000;
  float top;
  __builtin_memcpy(&top, &largest, sizeof top);
  const float inverse = finite && top > 0 ? kLargest / top : 0.0f;
  *step = finite ? top / kLargest : __builtin_nanf("");
  int8_t* high = reinterpret_cast<int8_t*>(data);
  int8_t* middle = high + plane;
  int8_t* low = middle + plane;
  __builtin_memset(data, 0, kPlanes * plane);
  if (!(inverse < __builtin_inff())) *step = 0.0f;  // all values are too small: zeros
  for (int64_t group = 0; group < shape.groups; ++group) {
    int64_t sum = 0;
    if (finite && inverse < __builtin_inff()) {
      const float* values = x + group * shape.group_rows;
      const int64_t at = group * padded;
      for (int64_t k = 0; k < shape.group_rows; ++k) {
        const float scaled = values[k] * inverse;
        const int32_t whole = static_cast<int32_t>(scaled + (scaled < 0 ? -0.5f : 0.5f));
        const int32_t upper = (whole + 128) >> 8;
        high[at + k] = static_cast<int8_t>((upper + 128) >> 8);
        middle[at + k] = static_cast<int8_t>(upper);
        low[at + k] = static_cast<int8_t>(whole);
        sum += whole;
      }
    }
    bias[group] = kBiased ? 128.0 * static_cast<double>(sum) : 0.0;
  }
}

// Combines the sums of the three planes of one group, scales them, and adds them to a row of 16 columns.
inline void AddGroup(const int32_t* high, const int32_t* middle, const int32_t* low, double bias, double step,
                     const ColumnScales& scales, bool first, float* out) {
  float values[kPanelColumns];
  for (int64_t n = 0; n < kPanelColumns; ++n) {
    const double whole = (static_cast<double>(high[n]) * 256 + middle[n]) * 256 + low[n] - bias;
    values[n] = static_cast<float>(whole * step * scales.of[n]);
  }
  for (int64_t n = 0; n < kPanelColumns; ++n) out[n] = first ? values[n] : out[n] + values[n];
}
