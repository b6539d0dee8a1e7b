// Products of rows with int8 matrices that have grouped scales, for processors.
//
// Each row is given the index of its matrix in a stack; rows of one matrix are multiplied together, so that the matrix
// is read once for all of them. Nothing is repacked: weights are read row by row as the checkpoint has them.
//
// With AVX-512 VNNI a row of activations is rounded to 24 bits, as many as a float has, and split into three bytes, so
// that a product is three integer dot products. Integer sums are exact: what a row gives does not depend on the rows
// beside it. Elsewhere weights are converted to float and multiplied, which compilers vectorise.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define GROK1_X86 1
#include <immintrin.h>
#endif

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kMostColumns = 2048;  // of a task: wide ones read longer runs, until the sums fill the cache
constexpr int64_t kTileRows = 32;      // rows of activations that a task works on at a time
constexpr int64_t kStep = 16;          // rows of a matrix that are read side by side
constexpr int kPlanes = 3;             // bytes of an activation
constexpr float kLargest = 8388600.0f;  // that they hold, with a margin for the rounding of the division

// One product: `rows` of `x` with one matrix.
struct Product {
  const int8_t* weight;    // [inner, columns]
  const uint16_t* scales;  // bfloat16 [groups, columns]
  int64_t inner;
  int64_t columns;
  int64_t groups;
  std::vector<const float*> x;  // each [inner]
  std::vector<float*> y;        // each [columns]
  // Of the integer path:
  std::vector<const uint8_t*> bytes;  // each [kPlanes, inner + kStep]: the upper byte plus 128, the middle, the lower
  std::vector<float> step;            // what one unit of a row is
};

float FromBfloat16(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

using Kernel = void (*)(const Product&, int64_t begin, int64_t end);

// Columns `begin` to `end` of a product, in float.
void MultiplyFloat(const Product& product, int64_t begin, int64_t end) {
  const int64_t group_rows = product.inner / product.groups, width = end - begin;
  std::vector<float> weight(width);
  for (size_t m = 0; m < product.x.size(); ++m) {
    float* y = product.y[m] + begin;
    std::fill(y, y + width, 0.0f);
  }
  std::vector<float> sums(product.x.size() * width);
  for (int64_t group = 0; group < product.groups; ++group) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t k = group * group_rows; k < (group + 1) * group_rows; ++k) {
      const int8_t* row = product.weight + k * product.columns + begin;
      for (int64_t n = 0; n < width; ++n) weight[n] = static_cast<float>(row[n]);
      for (size_t m = 0; m < product.x.size(); ++m) {
        const float x = product.x[m][k];
        float* sum = sums.data() + m * width;
        for (int64_t n = 0; n < width; ++n) sum[n] += x * weight[n];
      }
    }
    const uint16_t* scales = product.scales + group * product.columns + begin;
    for (size_t m = 0; m < product.x.size(); ++m) {
      const float* sum = sums.data() + m * width;
      float* y = product.y[m] + begin;
      for (int64_t n = 0; n < width; ++n) y[n] += sum[n] * FromBfloat16(scales[n]);
    }
  }
}

#ifdef GROK1_X86

#define GROK1_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

// 16 rows by 64 columns of a matrix as 4 x 4 vectors: vector [s][v] has, for 16 columns, rows 4 s to 4 s + 3 of each.
// Its columns are 4 v to 4 v + 3 of each quarter of the 64.
GROK1_VNNI inline void Interleave(const int8_t* weight, int64_t stride, int64_t rows, __mmask64 mask,
                                  __m512i out[4][4]) {
  for (int s = 0; s < 4; ++s) {
    __m512i r[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t k = 4 * s + i;
      r[i] = k < rows ? _mm512_maskz_loadu_epi8(mask, weight + k * stride) : _mm512_setzero_si512();
    }
    const __m512i a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
    const __m512i c = _mm512_unpacklo_epi8(r[2], r[3]), d = _mm512_unpackhi_epi8(r[2], r[3]);
    out[s][0] = _mm512_unpacklo_epi16(a, c);
    out[s][1] = _mm512_unpackhi_epi16(a, c);
    out[s][2] = _mm512_unpacklo_epi16(b, d);
    out[s][3] = _mm512_unpackhi_epi16(b, d);
  }
}

GROK1_VNNI inline void Accumulate(const __m512i weights[4][4], const uint8_t* x, int32_t* sums) {
  __m512i acc[4];
  for (int v = 0; v < 4; ++v) acc[v] = _mm512_load_si512(sums + 16 * v);
  for (int s = 0; s < 4; ++s) {
    int32_t four;
    std::memcpy(&four, x + 4 * s, 4);
    const __m512i broadcast = _mm512_set1_epi32(four);
    for (int v = 0; v < 4; ++v) acc[v] = _mm512_dpbusd_epi32(acc[v], broadcast, weights[s][v]);
  }
  for (int v = 0; v < 4; ++v) _mm512_store_si512(sums + 16 * v, acc[v]);
}

// Columns `begin` to `end` of a product, in integers; the activations' bytes are padded with `kStep` zeros.
GROK1_VNNI void MultiplyVnni(const Product& product, int64_t begin, int64_t end) {
  const int64_t group_rows = product.inner / product.groups;
  const int64_t blocks = (end - begin + 63) / 64;
  const int64_t rows = static_cast<int64_t>(product.x.size());
  alignas(64) uint8_t offsets[kStep];
  std::memset(offsets, 128, kStep);
  const int64_t tile = std::min(rows, kTileRows), padded = product.inner + kStep;
  // Sums of a block of columns: of 128 times the weights, and of each plane of the rows.
  const int64_t block_sums = (kPlanes * tile + 1) * 64;
  std::vector<int32_t> storage(blocks * block_sums + 16);
  int32_t* all = storage.data();
  while (reinterpret_cast<uintptr_t>(all) % 64) ++all;
  for (int64_t first = 0; first < rows; first += tile) {
    const int64_t count = std::min(tile, rows - first);
    for (int64_t group = 0; group < product.groups; ++group) {
      std::memset(all, 0, blocks * block_sums * sizeof(int32_t));
      const int64_t group_end = (group + 1) * group_rows;
      for (int64_t k = group * group_rows; k < group_end; k += kStep) {
        const int8_t* weight = product.weight + k * product.columns + begin;
        const int64_t here = std::min(kStep, group_end - k);
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t left = end - begin - 64 * block;
          const __mmask64 mask = left >= 64 ? ~0ull : (1ull << left) - 1;
          if (k + 2 * kStep <= product.inner)
            for (int64_t i = 0; i < kStep; ++i)
              _mm_prefetch(weight + 64 * block + (kStep + i) * product.columns, _MM_HINT_T0);
          __m512i weights[4][4];
          Interleave(weight + 64 * block, product.columns, here, mask, weights);
          int32_t* sums = all + block * block_sums;
          Accumulate(weights, offsets, sums);
          for (int64_t m = 0; m < count; ++m)
            for (int plane = 0; plane < kPlanes; ++plane)
              Accumulate(weights, product.bytes[first + m] + plane * padded + k, sums += 64);
        }
      }
      const uint16_t* scales = product.scales + group * product.columns + begin;
      for (int64_t block = 0; block < blocks; ++block) {
        const int32_t* offset = all + block * block_sums;
        const int64_t width = std::min<int64_t>(64, end - begin - 64 * block);
        double scale[64];
        for (int64_t n = 0; n < width; ++n) scale[n] = FromBfloat16(scales[64 * block + n]);
        for (int64_t m = 0; m < count; ++m) {
          const int32_t* sums = offset + 64 * (1 + kPlanes * m);
          double exact[64];
          for (int n = 0; n < 64; ++n) exact[n] = static_cast<double>(sums[n]) - offset[n];
          for (int plane = 1; plane < kPlanes; ++plane)
            for (int n = 0; n < 64; ++n) exact[n] = 256 * exact[n] + sums[64 * plane + n];
          float* y = product.y[first + m] + begin + 64 * block;
          double ordered[64];
          for (int q = 0; q < 4; ++q)  // see Interleave
            for (int v = 0; v < 4; ++v) std::memcpy(ordered + 16 * q + 4 * v, exact + 16 * v + 4 * q, 32);
          const double step = product.step[first + m];
          for (int64_t n = 0; n < width; ++n) {
            const float value = static_cast<float>(ordered[n] * step * scale[n]);
            y[n] = group == 0 ? value : y[n] + value;
          }
        }
      }
    }
  }
}

// Rounds `count` values to whole steps and writes the planes of their bytes; gives the step.
GROK1_VNNI float Split(const float* values, int64_t count, int64_t padded, uint8_t* bytes) {
  __m512 largest = _mm512_setzero_ps(), difference = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 mask = count - k >= 16 ? 0xffff : (1u << (count - k)) - 1;
    const __m512 x = _mm512_maskz_loadu_ps(mask, values + k);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
    difference = _mm512_add_ps(difference, _mm512_sub_ps(x, x));
  }
  if (_mm512_reduce_add_ps(difference) != 0.0f)  // a value is infinite or none
    return std::numeric_limits<float>::quiet_NaN();
  const float top = _mm512_reduce_max_ps(largest);
  const __m512 inverse = _mm512_set1_ps(top > 0 ? kLargest / top : 0.0f);
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 mask = count - k >= 16 ? 0xffff : (1u << (count - k)) - 1;
    const __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, values + k), inverse));
    const __m512i high = _mm512_add_epi32(_mm512_srai_epi32(x, 16), _mm512_set1_epi32(128));
    _mm512_mask_cvtepi32_storeu_epi8(bytes + k, mask, high);
    _mm512_mask_cvtepi32_storeu_epi8(bytes + padded + k, mask, _mm512_srai_epi32(x, 8));
    _mm512_mask_cvtepi32_storeu_epi8(bytes + 2 * padded + k, mask, x);
  }
  return top / kLargest;
}

#endif  // GROK1_X86

// The fastest kernel that this processor has.
Kernel ChooseKernel() {
#ifdef GROK1_X86
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    return MultiplyVnni;
#endif
  return MultiplyFloat;
}

const Kernel kKernel = ChooseKernel();

// Work that several threads take from, a task at a time.
struct Tasks {
  std::vector<std::pair<size_t, int64_t>> list;  // product, first column
  std::vector<Product> products;
  std::vector<uint8_t> bytes;
  Kernel kernel;
  int64_t tile_columns;
  std::atomic<size_t> next{0};
  std::atomic<size_t> done{0};
  std::mutex mutex;
  std::condition_variable finished;

  void Work() {
    for (;;) {
      const size_t i = next.fetch_add(1);
      if (i >= list.size()) return;
      const Product& product = products[list[i].first];
      const int64_t begin = list[i].second;
      kernel(product, begin, std::min(product.columns, begin + tile_columns));
      if (done.fetch_add(1) + 1 == list.size()) {
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  }
};

ffi::Error QuantizedMatmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S8> weight,
                           ffi::Buffer<ffi::BF16> scales, ffi::Buffer<ffi::S32> index, bool portable,
                           ffi::ResultBuffer<ffi::F32> y) {
  const auto shape = weight.dimensions();
  const size_t rank = shape.size();
  const int64_t inner = shape[rank - 2], columns = shape[rank - 1];
  const int64_t groups = scales.dimensions()[rank - 2];
  const int64_t rows = x.dimensions()[0];
  const int64_t matrices = weight.element_count() / (inner * columns);
  if (x.dimensions()[1] != inner || inner % groups) return ffi::Error::InvalidArgument("shapes do not fit");

  auto tasks = std::make_shared<Tasks>();
  tasks->kernel = portable ? MultiplyFloat : kKernel;
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  tasks->tile_columns = std::min(kMostColumns, (columns + 64 * threads - 1) / (64 * threads) * 64);
  const bool integers = tasks->kernel != MultiplyFloat;
  std::vector<std::vector<int64_t>> of_matrix;
  std::vector<int64_t> used;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t matrix = index.typed_data()[row];
    if (matrix < 0 || matrix >= matrices) {
      std::fill_n(y->typed_data() + row * columns, columns, 0.0f);
      continue;
    }
    const auto found = std::find(used.begin(), used.end(), matrix);
    const size_t place = found - used.begin();
    if (found == used.end()) {
      used.push_back(matrix);
      of_matrix.emplace_back();
    }
    of_matrix[place].push_back(row);
  }

  const int64_t padded = inner + kStep;
  if (integers) tasks->bytes.assign(kPlanes * rows * padded, 0);
  for (size_t i = 0; i < used.size(); ++i) {
    Product product;
    product.weight = weight.typed_data() + used[i] * inner * columns;
    product.scales = reinterpret_cast<const uint16_t*>(scales.untyped_data()) + used[i] * groups * columns;
    product.inner = inner;
    product.columns = columns;
    product.groups = groups;
    for (const int64_t row : of_matrix[i]) {
      const float* values = x.typed_data() + row * inner;
      product.x.push_back(values);
      product.y.push_back(y->typed_data() + row * columns);
      if (integers) {
        uint8_t* bytes = tasks->bytes.data() + kPlanes * row * padded;
        product.bytes.push_back(bytes);
#ifdef GROK1_X86
        product.step.push_back(Split(values, inner, padded, bytes));
#endif
      }
    }
    for (int64_t begin = 0; begin < columns; begin += tasks->tile_columns) tasks->list.emplace_back(i, begin);
    tasks->products.push_back(std::move(product));
  }

  if (tasks->list.empty()) return ffi::Error::Success();
  const int64_t helpers = std::min<int64_t>(threads, tasks->list.size()) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([tasks] { tasks->Work(); });
  tasks->Work();
  // Helpers that have not begun find nothing left; those that have are waited for.
  std::unique_lock<std::mutex> lock(tasks->mutex);
  tasks->finished.wait(lock, [&] { return tasks->done.load() == tasks->list.size(); });
  return ffi::Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(Grok1QuantizedMatmul, QuantizedMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<bool>("portable")
                                  .Ret<ffi::Buffer<ffi::F32>>());

extern "C" const char* Grok1KernelName() { return kKernel == MultiplyFloat ? "portable" : "avx512-vnni"; }

#pragma GCC visibility pop
