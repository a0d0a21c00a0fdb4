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
constexpr int kVectorBytes = 64;
}
}  // namespace cc_attention

#include "loss_kernels.h"
#include "norm_kernels.h"

const fused::Kernels fused::kAvx512 = {norm_sums,         norm_apply,         norm_backward_sums, norm_backward_input,
                                       segmentation_loss, coarse_probability, upsampled_classes};

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
