// Kernels for AVX-512: 32 registers of 64 bytes.
#ifdef __x86_64__
#include "instruction_sets.h"

#pragma GCC diagnostic error "-Wpsabi"  // catches a function compiled without the instruction set
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

namespace cc_attention {
namespace {
constexpr int kVectorBytes = 64, kTileRows = 5, kTileVectors = 4;
}
}  // namespace cc_attention

#include "lines.h"

const cc_attention::Kernels cc_attention::kAvx512 = {run_forward, run_backward, run_primitive};

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
