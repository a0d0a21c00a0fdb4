// The kernels compiled for each instruction set, as in cc_attention/csrc/cpu/instruction_sets.h.
#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <cstring>
#include <memory>

#include "../../../cc_attention/csrc/cpu/instruction_sets.h"
#include "../loss.h"
#include "../norm.h"

namespace fused {

struct Kernels {
  void (*norm_sums)(const NormSums&);
  void (*norm_apply)(const NormApply&);
  void (*norm_backward_sums)(const NormBackwardSums&);
  void (*norm_backward_input)(const NormBackwardInput&);
  void (*segmentation_loss)(const SegmentationLoss&);
  void (*coarse_probability)(const CoarseProbability&);
  void (*upsampled_classes)(const UpsampledClasses&);
};

extern const Kernels kBaseline;
#ifdef __x86_64__
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace fused
