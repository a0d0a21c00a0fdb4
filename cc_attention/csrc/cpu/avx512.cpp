// The kernels for AVX-512: 32 registers of 64 bytes.
#ifdef __x86_64__
#include "instruction_sets.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")

namespace cc_attention {
namespace {
constexpr int kVectorBytes = 64, kTileRows = 5, kTileVectors = 4;
}
}  // namespace cc_attention

#include "lines.h"

const cc_attention::Kernels cc_attention::kAvx512 = {run_forward, run_backward, run_primitive};
#endif
