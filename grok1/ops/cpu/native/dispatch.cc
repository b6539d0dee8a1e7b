// Selection of the kernels for this processor.

#include "kernels.h"

namespace grok1 {
namespace {

struct Choice {
  const Kernels* list[8];

  Choice() {
    static const Kernels* const known[] = {
#ifdef __x86_64__
        &kAmxKernels,        &kAvx512Kernels, &kAvxVnniKernels, &kAvx2Kernels,
#endif
#ifdef __aarch64__
        &kDotProductKernels,
#endif
        &kPortableKernels,
    };
    int count = 0;
    for (const Kernels* kernels : known)
      if (kernels->available()) list[count++] = kernels;
    list[count] = nullptr;
  }
};

}  // namespace

const Kernels* const* AllKernels() {
  static const Choice choice;
  return choice.list;
}

const Kernels* FindKernels(std::string_view name) {
  for (const Kernels* const* kernels = AllKernels(); *kernels; ++kernels)
    if (name.empty() || name == (*kernels)->name) return *kernels;
  return nullptr;
}

}  // namespace grok1
