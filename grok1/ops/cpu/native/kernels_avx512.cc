// Kernels for x86 processors with AVX-512 VNNI.

#include <immintrin.h>

#include "kernels.h"

namespace grok1 {
namespace {

constexpr int kWidth = 16;

#include "scales-inl.h"
#include "prepare-inl.h"
#include "dot_product-inl.h"
#include "floats-inl.h"

struct Avx512 {
  using Vector = __m512i;
  static constexpr int kColumns = 16, kAccumulators = 24;
  static Vector Zero() { return _mm512_setzero_si512(); }
  static Vector Load(const uint8_t* from) { return _mm512_loadu_si512(from); }
  static Vector Broadcast(const int8_t* quad) {
    int32_t four;
    __builtin_memcpy(&four, quad, sizeof four);
    return _mm512_set1_epi32(four);
  }
  static Vector Dot(Vector sum, Vector weights, Vector x) { return _mm512_dpbusd_epi32(sum, weights, x); }
  static Vector Add(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
  static void Prefetch(const uint8_t* from) { _mm_prefetch(from + 2048, _MM_HINT_T0); }
  static void Store(int32_t* to, Vector x) { _mm512_storeu_si512(to, x); }
};

bool Available() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

}  // namespace

const Kernels kAvx512Kernels = {
    "avx512-vnni",        Available,    PlanesRowBytes, PreparePlanes<true>,
    MultiplyRows<Avx512>, GeluProducts, Attend,         MultiplyTransposed,
};

}  // namespace grok1
