// Kernels for x86 processors with AVX2 and FMA.

#include "kernels.h"

namespace grok1 {
namespace {

constexpr int kWidth = 8;

#include "scales-inl.h"
#include "floats-inl.h"
#include "float_product-inl.h"

bool Available() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

const Kernels kAvx2Kernels = {
    "avx2", Available, FloatRowBytes, PrepareFloats, MultiplyFloats, GeluProducts, Attend, MultiplyTransposed,
};

}  // namespace grok1
