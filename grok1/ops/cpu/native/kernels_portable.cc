// Kernels for any processor, written with vector types of GCC and Clang.

#include "kernels.h"

namespace grok1 {
namespace {

constexpr int kWidth = 4;

#include "scales-inl.h"
#include "floats-inl.h"
#include "float_product-inl.h"

bool Available() { return true; }

}  // namespace

const Kernels kPortableKernels = {
    "portable", Available, FloatRowBytes, PrepareFloats, MultiplyFloats, GeluProducts, Attend, MultiplyTransposed,
};

}  // namespace grok1
