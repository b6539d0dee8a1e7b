// Kernels for ARM processors with dot products of bytes.

#include <arm_neon.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif

#include "kernels.h"

namespace grok1 {
namespace {

constexpr int kWidth = 4;

#include "scales-inl.h"
#include "prepare-inl.h"
#include "dot_product-inl.h"
#include "floats-inl.h"

struct DotProduct {
  using Vector = int32x4_t;
  static constexpr int kColumns = 4, kAccumulators = 24;
  static Vector Zero() { return vdupq_n_s32(0); }
  static Vector Load(const uint8_t* from) {  // subtracts the 128 that was added to packed values
    return vreinterpretq_s32_u8(veorq_u8(vld1q_u8(from), vdupq_n_u8(0x80)));
  }
  static Vector Broadcast(const int8_t* quad) {
    int32_t four;
    __builtin_memcpy(&four, quad, sizeof four);
    return vdupq_n_s32(four);
  }
  static Vector Dot(Vector sum, Vector weights, Vector x) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(weights), vreinterpretq_s8_s32(x));
  }
  static Vector Add(Vector a, Vector b) { return vaddq_s32(a, b); }
  static void Prefetch(const uint8_t*) {}
  static void Store(int32_t* to, Vector x) { vst1q_s32(to, x); }
};

bool Available() {
#ifdef __linux__
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
  return true;  // all 64-bit ARM processors that run macOS
#endif
}

}  // namespace

const Kernels kDotProductKernels = {
    "arm-dotprod", Available, PlanesRowBytes,     PreparePlanes<false>, MultiplyRows<DotProduct>,
    GeluProducts,  Attend,    MultiplyTransposed,
};

}  // namespace grok1
