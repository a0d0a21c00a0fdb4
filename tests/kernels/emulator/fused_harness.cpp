// The functions of norm.h and loss.h for the GPU, under names that Python can look up.
#include "../loss.h"  // of the copy of the sources that build() makes
#include "../norm.h"

using namespace fused;

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
