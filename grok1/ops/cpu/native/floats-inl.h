// Operations on floats: GELU, and attention over a cache. Each set of kernels includes this file in its own namespace,
// after `scales-inl.h`, with `kWidth` set to the number of floats in a vector of its processor.

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));

inline Floats LoadFloats(const float* from) {
  Floats x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

inline void StoreFloats(float* to, Floats x) { __builtin_memcpy(to, &x, sizeof x); }

inline Floats Spread(float x) { return x - Floats{}; }

// Returns e to the x, within 2 units in the last place; x is clamped to [-87, 88].
inline Floats Exp(Floats x) {
  const Floats least = Spread(-87.0f), most = Spread(88.0f);
  x = x < least ? least : x;
  x = x > most ? most : x;
  const Floats magic = Spread(12582912.0f);  // adding it rounds to an integer in the last bits
  const Floats shifted = x * 1.44269504f + magic;
  const Floats whole = shifted - magic;
  const Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats p = Spread(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints power = ((Ints)shifted << 23) + (127 << 23);
  return p * (Floats)power;
}

inline Floats GeluProduct(Floats gate, Floats value) {
  const Floats inner = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);
  return gate * value / (1.0f + Exp(-2.0f * inner));  // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u))
}

void GeluProducts(float* gate, const float* value, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth)
    StoreFloats(gate + i, GeluProduct(LoadFloats(gate + i), LoadFloats(value + i)));
  if (i < count) {
    float gates[kWidth] = {}, values[kWidth] = {};
    __builtin_memcpy(gates, gate + i, (count - i) * sizeof(float));
    __builtin_memcpy(values, value + i, (count - i) * sizeof(float));
    StoreFloats(gates, GeluProduct(LoadFloats(gates), LoadFloats(values)));
    __builtin_memcpy(gate + i, gates, (count - i) * sizeof(float));
  }
}

// Computes logits of queries and `kBlockPositions` transposed keys, [size, kBlockPositions].
template <int kQueries>
inline void TransposedLogits(const float* const* queries, const float* keys, int64_t size, float* const* logits) {
  constexpr int kVectors = kBlockPositions / kWidth, kAtOnce = kVectors < 4 ? kVectors : 4;
  for (int part = 0; part < kVectors; part += kAtOnce) {
    Floats total[kQueries][kAtOnce] = {};
    for (int64_t d = 0; d < size; ++d)
      for (int v = 0; v < kAtOnce; ++v) {
        const Floats k = LoadFloats(keys + d * kBlockPositions + (part + v) * kWidth);
        for (int i = 0; i < kQueries; ++i) total[i][v] += queries[i][d] * k;
      }
    for (int i = 0; i < kQueries; ++i)
      for (int v = 0; v < kAtOnce; ++v) StoreFloats(logits[i] + (part + v) * kWidth, total[i][v]);
  }
}

inline float Sum(Floats x) {
  float lanes[kWidth];
  StoreFloats(lanes, x);
  for (int half = kWidth / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Computes dot products of `kRows` rows, `stride` floats apart, with another row. The order of summation does not
// depend on `kRows`.
template <int kRows>
inline void Dots(const float* rows, int64_t stride, const float* other, int64_t size, float* out, int64_t out_stride) {
  Floats total[kRows][2] = {};
  int64_t d = 0;
  for (; d + 2 * kWidth <= size; d += 2 * kWidth)
    for (int i = 0; i < 2; ++i) {
      const Floats x = LoadFloats(other + d + i * kWidth);
      for (int r = 0; r < kRows; ++r) total[r][i] += LoadFloats(rows + r * stride + d + i * kWidth) * x;
    }
  for (int r = 0; r < kRows; ++r) {
    float sum = Sum(total[r][0] + total[r][1]);
    for (int64_t rest = d; rest < size; ++rest) sum += rows[r * stride + rest] * other[rest];
    out[r * out_stride] = sum;
  }
}

inline float Dot(const float* a, const float* b, int64_t size) {
  float sum;
  Dots<1>(a, size, b, size, &sum, 1);
  return sum;
}

template <int kQueries>
inline void AddValues(const float* const* weights, const float* values, int64_t positions, int64_t size,
                      float* const* out) {
  constexpr int kAtOnce = 4;
  int64_t d = 0;
  for (; d + kAtOnce * kWidth <= size; d += kAtOnce * kWidth) {
    Floats total[kQueries][kAtOnce];
    for (int i = 0; i < kQueries; ++i)
      for (int v = 0; v < kAtOnce; ++v) total[i][v] = LoadFloats(out[i] + d + v * kWidth);
    for (int64_t s = 0; s < positions; ++s)
      for (int v = 0; v < kAtOnce; ++v) {
        const Floats value = LoadFloats(values + s * size + d + v * kWidth);
        for (int i = 0; i < kQueries; ++i) total[i][v] += weights[i][s] * value;
      }
    for (int i = 0; i < kQueries; ++i)
      for (int v = 0; v < kAtOnce; ++v) StoreFloats(out[i] + d + v * kWidth, total[i][v]);
  }
  for (; d < size; ++d)
    for (int i = 0; i < kQueries; ++i) {
      float total = out[i][d];
      for (int64_t s = 0; s < positions; ++s) total += weights[i][s] * values[s * size + d];
      out[i][d] = total;
    }
}

// Returns a block of the cache as floats, which is in the cache itself if that holds floats.
inline const float* AsFloats(const void* cache, bool bfloat16, int64_t start, int64_t count, float* scratch) {
  if (!bfloat16) return static_cast<const float*>(cache) + start;
  const uint16_t* from = static_cast<const uint16_t*>(cache) + start;
  for (int64_t i = 0; i < count; ++i) scratch[i] = FromBfloat16(from[i]);
  return scratch;
}

void Attend(const AttentionTask& task, float* scratch) {
  const int64_t size = task.size;
  float* logits = scratch;                                      // [queries, kBlockPositions]
  float* transposed = logits + task.queries * kBlockPositions;  // [size, kBlockPositions]
  float* converted = transposed + size * kBlockPositions;       // [kBlockPositions, size]
  int64_t most = 0;
  for (int64_t i = 0; i < task.queries; ++i) most = task.counts[i] > most ? task.counts[i] : most;
  const bool many = task.queries >= 8;
  for (int64_t start = 0; start < most; start += kBlockPositions) {
    const int64_t positions = most - start < kBlockPositions ? most - start : kBlockPositions;
    const float* keys = AsFloats(task.keys, task.bfloat16, start * size, positions * size, converted);
    if (many) {
      for (int64_t s = 0; s < positions; ++s)
        for (int64_t d = 0; d < size; ++d) transposed[d * kBlockPositions + s] = keys[s * size + d];
      for (int64_t s = positions; s < kBlockPositions; ++s)
        for (int64_t d = 0; d < size; ++d) transposed[d * kBlockPositions + s] = 0;
    }
    constexpr int kQueries = 4;
    for (int64_t i = 0; many && i < task.queries; i += kQueries) {
      const float* queries[kQueries];
      float* rows[kQueries];
      float unused[kBlockPositions];
      for (int j = 0; j < kQueries; ++j) {
        const bool there = i + j < task.queries;
        queries[j] = task.query + (there ? i + j : i) * size;
        rows[j] = there ? logits + (i + j) * kBlockPositions : unused;
      }
      TransposedLogits<kQueries>(queries, transposed, size, rows);
    }
    for (int64_t i = 0; !many && i < task.queries; ++i)
      for (int64_t s = 0; s < kBlockPositions; ++s)
        logits[i * kBlockPositions + s] = s < positions ? Dot(task.query + i * size, keys + s * size, size) : 0;

    const Floats slope = Spread(task.multiplier / task.cap), cap = Spread(task.cap);
    for (int64_t i = 0; i < task.queries; ++i) {
      float* row = logits + i * kBlockPositions;
      Floats mass = {};
      for (int64_t s = 0; s < kBlockPositions; s += kWidth) {
        // cap * tanh(z) - cap = -2 cap / (exp(2 z) + 1)
        const Floats z = LoadFloats(row + s) * slope;
        float weights[kWidth];
        StoreFloats(weights, Exp(-2.0f * cap / (Exp(2.0f * z) + 1.0f)));
        for (int j = 0; j < kWidth; ++j)
          if (start + s + j >= task.counts[i]) weights[j] = 0;
        mass += LoadFloats(weights);
        StoreFloats(row + s, LoadFloats(weights));
      }
      task.mass[i] += Sum(mass);
    }

    const float* values = AsFloats(task.values, task.bfloat16, start * size, positions * size, converted);
    int64_t i = 0;
    for (; i + kQueries <= task.queries; i += kQueries) {
      const float* weights[kQueries];
      float* out[kQueries];
      for (int j = 0; j < kQueries; ++j) {
        weights[j] = logits + (i + j) * kBlockPositions;
        out[j] = task.out + (i + j) * size;
      }
      AddValues<kQueries>(weights, values, positions, size, out);
    }
    for (; i < task.queries; ++i) {
      const float* weights[1] = {logits + i * kBlockPositions};
      float* out[1] = {task.out + i * size};
      AddValues<1>(weights, values, positions, size, out);
    }
  }
}

void MultiplyTransposed(const float* x, int64_t rows, const void* table, bool bfloat16, int64_t first, int64_t count,
                        int64_t size, float* out, int64_t stride, float* scratch) {
  for (int64_t n = 0; n < count; ++n) {
    const float* entry = AsFloats(table, bfloat16, (first + n) * size, size, scratch);
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) Dots<4>(x + row * size, size, entry, size, out + row * stride + n, stride);
    for (; row < rows; ++row) Dots<1>(x + row * size, size, entry, size, out + row * stride + n, stride);
  }
}
