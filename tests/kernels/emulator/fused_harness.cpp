// The functions of norm.h and loss.h for the GPU, under names that Python can look up.
#include "../loss.h"  // of the copy of the sources that build() makes
#include "../norm.h"

using namespace fused;

// norm.h

extern "C" int emulated_norm_sums(const NormSums* arguments) { return norm_sums_cuda(*arguments, nullptr); }

extern "C" int emulated_norm_statistics(const NormStatistics* arguments) {
  return norm_statistics_cuda(*arguments, nullptr);
}

extern "C" int emulated_norm_apply(const NormApply* arguments) { return norm_apply_cuda(*arguments, nullptr); }

extern "C" int emulated_norm_backward_sums(const NormBackwardSums* arguments) {
  return norm_backward_sums_cuda(*arguments, nullptr);
}

extern "C" int emulated_norm_backward_input(const NormBackwardInput* arguments) {
  return norm_backward_input_cuda(*arguments, nullptr);
}

extern "C" int64_t emulated_norm_workspace(int dtype, const MapSizes* sizes) {
  return norm_workspace_cuda(static_cast<Dtype>(dtype), *sizes);
}

// loss.h

extern "C" int emulated_segmentation_loss(const SegmentationLoss* arguments) {
  return segmentation_loss_cuda(*arguments, nullptr);
}

extern "C" int emulated_coarse_probability(const CoarseProbability* arguments) {
  return coarse_probability_cuda(*arguments, nullptr);
}

extern "C" int emulated_upsampled_classes(const UpsampledClasses* arguments) {
  return upsampled_classes_cuda(*arguments, nullptr);
}

extern "C" int64_t emulated_loss_workspace(bool wide, const LossSizes* sizes) {
  return loss_workspace_cuda(wide, *sizes);
}
