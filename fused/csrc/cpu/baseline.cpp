// Kernels for any processor: vectors of 16 bytes.
#include "instruction_sets.h"

namespace cc_attention {
namespace {
constexpr int kVectorBytes = 16;
}
}  // namespace cc_attention

#include "loss_kernels.h"
#include "norm_kernels.h"

const fused::Kernels fused::kBaseline = {norm_sums,         norm_apply,         norm_backward_sums, norm_backward_input,
                                         segmentation_loss, coarse_probability, upsampled_classes};
