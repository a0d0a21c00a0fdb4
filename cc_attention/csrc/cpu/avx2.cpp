// The kernels for AVX2: 16 registers of 32 bytes.
#ifdef __x86_64__
#include "instruction_sets.h"

#pragma GCC target("avx2,fma")

namespace cc_attention {
namespace {
constexpr int kVectorBytes = 32, kTileRows = 4, kTileVectors = 3;
}
}  // namespace cc_attention

#include "lines.h"

const cc_attention::Kernels cc_attention::kAvx2 = {run_forward, run_backward, run_primitive};
#endif
