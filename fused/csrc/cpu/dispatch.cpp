// CPU entry points: they select the kernels of the best instruction set that the processor supports.
#include "instruction_sets.h"

namespace fused {
namespace {

const Kernels& choose() {
#ifdef __x86_64__
  return cc_attention::best_of(kBaseline, kAvx2, kAvx512);
#else
  return kBaseline;
#endif
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

template <typename S>
void statistics(const NormStatistics& a) {
  S *result = static_cast<S*>(a.statistics), *running_mean = static_cast<S*>(a.running_mean);
  S* running_variance = static_cast<S*>(a.running_variance);
  const double count = a.sums[2 * a.C];
  const auto update = [&a](S& running, double value) {
    running = static_cast<S>((1 - a.momentum) * running + a.momentum * value);
  };
  for (int64_t i = 0; i < a.C; ++i) {
    const double mean = a.sums[i] / count, difference = a.sums[a.C + i] / count - mean * mean;
    const double variance = difference < 0 ? 0 : difference;  // rounding; NaN stays
    result[i] = static_cast<S>(mean);
    result[a.C + i] = static_cast<S>(1 / std::sqrt(variance + a.eps));
    if (running_mean != nullptr) update(running_mean[i], mean);
    if (running_variance != nullptr) update(running_variance[i], variance * (count / (count - 1)));
  }
}

}  // namespace

void norm_sums_cpu(const NormSums& arguments) { kernels().norm_sums(arguments); }

void norm_statistics_cpu(const NormStatistics& arguments) {
  arguments.dtype == Dtype::float64 ? statistics<double>(arguments) : statistics<float>(arguments);
}

void norm_apply_cpu(const NormApply& arguments) { kernels().norm_apply(arguments); }

void norm_backward_sums_cpu(const NormBackwardSums& arguments) { kernels().norm_backward_sums(arguments); }

void norm_backward_input_cpu(const NormBackwardInput& arguments) { kernels().norm_backward_input(arguments); }

void segmentation_loss_cpu(const SegmentationLoss& arguments) { kernels().segmentation_loss(arguments); }

void coarse_probability_cpu(const CoarseProbability& arguments) { kernels().coarse_probability(arguments); }

void upsampled_classes_cpu(const UpsampledClasses& arguments) { kernels().upsampled_classes(arguments); }

}  // namespace fused
