// CPU entry points: they select the kernels of the best instruction set that the processor supports.
#include "instruction_sets.h"

namespace cc_attention {
namespace {

const Kernels& choose() {
#ifdef __x86_64__
  return best_of(kBaseline, kAvx2, kAvx512);
#else
  return kBaseline;
#endif
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace

void forward_cpu(const Forward& arguments) { kernels().forward(arguments); }

void backward_cpu(const Backward& arguments) { kernels().backward(arguments); }

void primitive_cpu(Primitive primitive, Dtype dtype, const Sizes& sizes, const void* first, const void* second,
                   void* out) {
  kernels().primitive(primitive, dtype, sizes, first, second, out);
}

}  // namespace cc_attention
