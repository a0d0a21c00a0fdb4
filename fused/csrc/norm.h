// Activated batch norm: the interface between norm_ops.cpp and the kernels of each device, over raw pointers. It
// includes no torch header, like cc_attention/csrc/kernels.h.
//
// A feature map has N samples, C channels and P pixels (height times width). It is dense: [N,P,C] in memory if
// channels_last, and [N,C,P] otherwise. With S = float, or double for float64 maps, the operators compute
//   z = (|weight| + eps) * (x - mean) * inverse + bias (+ residual),    y = z, relu(z) or leaky_relu(z)
// Sums of many elements keep the precision of S, and run in a fixed order without atomics, so that results are
// bit-identical in every run and for any number of threads.
#pragma once

#include <cstdint>

#include "../../cc_attention/csrc/kernels.h"

namespace fused {

using cc_attention::Dtype;

enum class Activation { identity, relu, leaky_relu };

struct MapSizes {
  int64_t N, C, P;
  bool channels_last;
};

// Parameters of the norm: y is a function of them, x and residual. All vectors have C elements of type S, except
// `statistics`.
struct Norm {
  Dtype dtype;  // of all maps
  MapSizes sizes;
  const void* statistics;  // S [2,C]: mean, and inverse = 1 / sqrt(variance + eps)
  const void* weight;
  const void* bias;
  double eps;
  Activation activation;
  double slope;  // of leaky_relu
};

// sums[0:C] = sum over N and P of x, sums[C:2C] = sum of x * x, sums[2C] = N * P. For maps of
// 32 or 16 bits, variances computed from them must be as accurate as those of a two-pass or Welford sum in S, also if
// the mean is far from zero. For float64 maps, the error grows with the square of mean / deviation.
struct NormSums {
  Dtype dtype;
  MapSizes sizes;
  const void* x;
  double* sums;     // [2C+1]
  void* workspace;  // norm_workspace_cuda(...) bytes, aligned to 16; null on the CPU
};

// The statistics of all processes from the sum of their sums; updates the running statistics.
struct NormStatistics {
  Dtype dtype;  // of the maps
  int64_t C;
  const double* sums;  // [2C+1]
  double eps, momentum;
  void* running_mean;      // S [C], or null
  void* running_variance;  // S [C], or null; gets the unbiased variance
  void* statistics;        // S [2,C]
};

struct NormApply {
  Norm norm;
  const void* x;
  const void* residual;  // a map, or null
  void* y;
};

// The first half of the backward: the sums over pixels, and the gradient after the activation.
struct NormBackwardSums {
  Norm norm;
  const void* x;
  const void* y;      // the output, whose sign is the mask of the activation; null: recompute the sign from x
  const void* grad;   // of y
  void* masked;       // a map: the gradient of z, which is that of residual too; null: not needed
  void* sums;         // S [2,C]: sum of the gradient of z; sum of its products with (x - mean) * inverse
  void* grad_weight;  // S [C]: the second sum, with the sign of weight; weight = 0 counts as positive
  void* workspace;    // norm_workspace_cuda(...) bytes, aligned to 16; null on the CPU
};

// The second half: the gradient of x. With statistics of the batch, mean and inverse depend on x, which takes the sums
// of all processes and the number of their pixels.
struct NormBackwardInput {
  Norm norm;
  const void* x;
  const void* y;     // as above
  const void* grad;  // of y; or, if `masked` is true, the masked map of the first half
  bool masked;
  const void* sums;     // S [2,C], of all processes; null: the statistics are constants
  const double* count;  // [1], pixels of all processes, in the memory of the device; null if sums is
  void* grad_x;
};

void norm_sums_cpu(const NormSums& arguments);
void norm_statistics_cpu(const NormStatistics& arguments);
void norm_apply_cpu(const NormApply& arguments);
void norm_backward_sums_cpu(const NormBackwardSums& arguments);
void norm_backward_input_cpu(const NormBackwardInput& arguments);

// These queue their work on the stream (a cudaStream_t) and return the cudaError_t of the launches as an int. Maps must
// be channels_last.
int norm_sums_cuda(const NormSums& arguments, void* stream);
int norm_statistics_cuda(const NormStatistics& arguments, void* stream);
int norm_apply_cuda(const NormApply& arguments, void* stream);
int norm_backward_sums_cuda(const NormBackwardSums& arguments, void* stream);
int norm_backward_input_cuda(const NormBackwardInput& arguments, void* stream);
int64_t norm_workspace_cuda(Dtype dtype, const MapSizes& sizes);  // for both kinds of sums

}  // namespace fused
