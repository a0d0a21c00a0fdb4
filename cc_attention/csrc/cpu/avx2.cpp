// Kernels for AVX2: 16 registers of 32 bytes.
#ifdef __x86_64__
#include "instruction_sets.h"

#pragma GCC diagnostic error "-Wpsabi"  // catches a function compiled without the instruction set
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace cc_attention {
namespace {
constexpr int kVectorBytes = 32, kTileRows = 4, kTileVectors = 3;
}
}  // namespace cc_attention

#include "lines.h"

const cc_attention::Kernels cc_attention::kAvx2 = {run_forward, run_backward, run_primitive};

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
