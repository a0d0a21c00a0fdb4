// The operators of upsampled logits on the CPU, compiled once for each instruction set (see
// ../../../cc_attention/csrc/cpu/vector.h).
#pragma once

#include "../../../cc_attention/csrc/cpu/vector.h"
#include "instruction_sets.h"

namespace fused {
namespace {

using namespace cc_attention;

void segmentation_loss(const SegmentationLoss&) {}
void coarse_probability(const CoarseProbability&) {}
void upsampled_classes(const UpsampledClasses&) {}

}  // namespace
}  // namespace fused
