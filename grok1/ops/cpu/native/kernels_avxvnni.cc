// Kernels for x86 processors with AVX2 and AVX-VNNI.

#include <cpuid.h>
#include <immintrin.h>

#include "kernels.h"

namespace grok1 {
namespace {

constexpr int kWidth = 8;

#include "scales-inl.h"
#include "prepare-inl.h"
#include "dot_product-inl.h"
#include "floats-inl.h"

struct AvxVnni {
  using Vector = __m256i;
  static constexpr int kColumns = 8, kAccumulators = 12;
  static Vector Zero() { return _mm256_setzero_si256(); }
  static Vector Load(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static Vector Broadcast(const int8_t* quad) {
    int32_t four;
    __builtin_memcpy(&four, quad, sizeof four);
    return _mm256_set1_epi32(four);
  }
  static Vector Dot(Vector sum, Vector weights, Vector x) { return _mm256_dpbusd_avx_epi32(sum, weights, x); }
  static Vector Add(Vector a, Vector b) { return _mm256_add_epi32(a, b); }
  static void Prefetch(const uint8_t* from) { _mm_prefetch(from + 2048, _MM_HINT_T0); }
  static void Store(int32_t* to, Vector x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }
};

bool Available() {
  unsigned a = 0, b, c, d;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid_count(7, 1, &a, &b, &c, &d) &&
         a >> 4 & 1;
}

}  // namespace

const Kernels kAvxVnniKernels = {
    "avx-vnni",   Available, PlanesRowBytes,     PreparePlanes<true>, MultiplyRows<AvxVnni>,
    GeluProducts, Attend,    MultiplyTransposed,
};

}  // namespace grok1
