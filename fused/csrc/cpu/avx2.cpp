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
constexpr int kVectorBytes = 32;
}
}  // namespace cc_attention

#include "loss_kernels.h"
#include "norm_kernels.h"

const fused::Kernels fused::kAvx2 = {norm_sums,         norm_apply,         norm_backward_sums, norm_backward_input,
                                     segmentation_loss, coarse_probability, upsampled_classes};

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
