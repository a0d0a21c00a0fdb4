// Cross entropy and classes of logits that are upsampled on the fly: the interface between loss_ops.cpp and the kernels
// of each device, over raw pointers. It includes no torch header, like cc_attention/csrc/kernels.h.
//
// Logits are dense [N,C,H,W] of type S, float or double. They are upsampled to h rows and w columns, bilinearly with
// aligned corners, as torch.nn.functional.interpolate does in the precision S; upsampled logits are never stored. Class
// indices ("target") are dense int64 [N,h,w]. Sums run in a fixed order without atomics, so that results are
// bit-identical in every run and for any number of threads.
#pragma once

#include <cstdint>

#include "../../cc_attention/csrc/kernels.h"

namespace fused {

struct LossSizes {
  int64_t N, C, H, W, h, w;
};

struct Logits {
  bool wide;  // S is double
  LossSizes sizes;
  const void* logits;
};

// The weighted cross entropy, summed over pixels, and its gradient.
//
// A pixel counts if its target is not `ignored` and, with a threshold, if the probability of its class is at most the
// threshold. A NaN probability counts, so that the loss is NaN. The probability is the same function, to the last bit,
// as in CoarseProbability. Pixels that do not count add nothing to loss and gradient, even if their logits are NaN. A
// target that is neither ignored nor a class makes the loss NaN.
struct SegmentationLoss {
  Logits input;
  const int64_t* target;
  int64_t ignored;
  const void* class_weights;  // S [C], or null: all 1
  const void* threshold;      // S [1] in the memory of the device, or null
  void* totals;               // S [2]: the sum of weight * loss, and the sum of the weights
  void* grad;                 // S [N,C,H,W]: gradient of the first total, or null
  void* workspace;            // loss_workspace_cuda(...) bytes, aligned to 16; null on the CPU
};

// The probability of the true class on the coarse grid of OHEM, interpolated as scipy.ndimage.zoom does.
//
// Sample i of `rows` samples is at position p = i * ((h - 1) / (rows - 1)) (i * 1 for one sample), in double. A
// position beyond h - 1 by rounding is outside: its label is class 0 and its probability 0. The target is that of the
// nearest pixel, floor(p + 0.5). If it is `ignored`, the result is infinity; if it is not a class, NaN. Otherwise the
// probabilities of that class at the pixels floor(p) and floor(p) + 1 (at most h - 1), in S, are interpolated linearly
// in double, in the order
//   p00 * (1-wy) * (1-wx) + p01 * (1-wy) * wx + p10 * wy * (1-wx) + p11 * wy * wx,
// and the result is rounded to S.
struct CoarseProbability {
  Logits input;
  const int64_t* target;
  int64_t ignored;
  int64_t rows, columns;  // of the coarse grid
  void* probability;      // S [N,rows,columns]
};

// The class with the largest logit: the lowest one of several, and 255 where a logit is NaN. C is at most 255.
struct UpsampledClasses {
  Logits input;
  uint8_t* classes;  // [N,h,w]
};

void segmentation_loss_cpu(const SegmentationLoss& arguments);
void coarse_probability_cpu(const CoarseProbability& arguments);
void upsampled_classes_cpu(const UpsampledClasses& arguments);

// These queue their work on the stream (a cudaStream_t) and return the cudaError_t of the launches as an int.
int segmentation_loss_cuda(const SegmentationLoss& arguments, void* stream);
int coarse_probability_cuda(const CoarseProbability& arguments, void* stream);
int upsampled_classes_cuda(const UpsampledClasses& arguments, void* stream);
int64_t loss_workspace_cuda(bool wide, const LossSizes& sizes);

}  // namespace fused
