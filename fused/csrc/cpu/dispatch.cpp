// CPU entry points: they select the kernels of the best instruction set that the processor supports.
#include "instruction_sets.h"

namespace fused {
namespace {

const Kernels& choose() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBaseline;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace

void norm_sums_cpu(const NormSums& arguments) { kernels().norm_sums(arguments); }

void norm_apply_cpu(const NormApply& arguments) { kernels().norm_apply(arguments); }

void norm_backward_sums_cpu(const NormBackwardSums& arguments) { kernels().norm_backward_sums(arguments); }

void norm_backward_input_cpu(const NormBackwardInput& arguments) { kernels().norm_backward_input(arguments); }

void segmentation_loss_cpu(const SegmentationLoss& arguments) { kernels().segmentation_loss(arguments); }

void coarse_probability_cpu(const CoarseProbability& arguments) { kernels().coarse_probability(arguments); }

void upsampled_classes_cpu(const UpsampledClasses& arguments) { kernels().upsampled_classes(arguments); }

}  // namespace fused
