// The functions of norm.h and loss.h for the GPU, under names that Python can look up.
#include "../loss.h"  // of the copy of the sources that build() makes
#include "../norm.h"

using namespace fused;

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
