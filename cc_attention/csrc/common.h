// Helpers of the host functions: argument checks with readable errors, dtypes, output tensors, the current stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <sstream>
#include <string>

#include "kernels.h"

#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace cc_attention {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Operand {
  const char* name;  // its name in the schema
  const Tensor& tensor;
};

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

// Throws unless all operands are [N, any, H, W] with H and W at least 1, and share N, H, W, dtype and device.
inline void check_operands(const char* op, std::initializer_list<Operand> operands) {
  const Operand& first = *operands.begin();
  for (const Operand& operand : operands) {
    const Tensor& tensor = operand.tensor;
    STD_TORCH_CHECK(tensor.dim() == 4, op, ": ", operand.name, " must have 4 dimensions, got shape ", shape_of(tensor));
    STD_TORCH_CHECK(tensor.size(2) > 0 && tensor.size(3) > 0, op, ": ", operand.name,
                    " must have at least one row and one column, got shape ", shape_of(tensor));
    for (const int64_t d : {0, 2, 3})
      STD_TORCH_CHECK(tensor.size(d) == first.tensor.size(d), op, ": ", first.name, " and ", operand.name,
                      " must agree in batch, height and width, got shapes ", shape_of(first.tensor), " and ",
                      shape_of(tensor));
    STD_TORCH_CHECK(tensor.scalar_type() == first.tensor.scalar_type(), op, ": ", first.name, " and ", operand.name,
                    " must have the same dtype, got ", torch::headeronly::toString(first.tensor.scalar_type()), " and ",
                    torch::headeronly::toString(tensor.scalar_type()));
    STD_TORCH_CHECK(tensor.device() == first.tensor.device(), op, ": ", first.name, " and ", operand.name,
                    " must be on the same device");
  }
}

// Throws unless the operand has `expected` channels; `meaning` explains that number.
inline void check_channels(const char* op, const Operand& operand, int64_t expected, const char* meaning) {
  STD_TORCH_CHECK(operand.tensor.size(1) == expected, op, ": ", operand.name, " must have ", expected, " channels (",
                  meaning, "), got shape ", shape_of(operand.tensor));
}

// The dtype of the normalizers that the forward saves (kernels.h).
inline ScalarType normalizer_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Throws unless normalizer is [N,H,W,2] for value [N,C,H,W], with the dtype of normalizer_dtype(value).
inline void check_normalizer(const char* op, const Tensor& normalizer, const Tensor& value) {
  STD_TORCH_CHECK(normalizer.dim() == 4 && normalizer.size(0) == value.size(0) && normalizer.size(1) == value.size(2) &&
                      normalizer.size(2) == value.size(3) && normalizer.size(3) == 2 &&
                      normalizer.scalar_type() == normalizer_dtype(value) && normalizer.device() == value.device(),
                  op, ": normalizer must be the one that the forward gave for value of shape ", shape_of(value),
                  ", got shape ", shape_of(normalizer));
}

inline Sizes sizes_of(const Tensor& query, const Tensor& value) {
  return {value.size(0), query.size(1), value.size(1), value.size(2), value.size(3)};
}

inline int64_t positions(const Tensor& map) { return map.size(2) + map.size(3) - 1; }

// Returns the map in the memory format of the kernels, [N,H,W,C] in memory.
inline Tensor channels_last(const Tensor& map) {
  return torch::stable::contiguous(map, torch::headeronly::MemoryFormat::ChannelsLast);
}

// Returns an uninitialized [N,channels,H,W] in channels_last, with the dtype and device of `map`.
inline Tensor empty_map(const Tensor& map, int64_t channels) {
  return torch::stable::empty({map.size(0), channels, map.size(2), map.size(3)}, map.scalar_type(), std::nullopt,
                              map.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

// Returns an uninitialized [N,H,W,2]: one Normalizer per pixel.
inline Tensor empty_normalizer(const Tensor& value) {
  return torch::stable::new_empty(value, {value.size(0), value.size(2), value.size(3), 2}, normalizer_dtype(value));
}

inline Dtype kernel_dtype(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      STD_TORCH_CHECK(false, op, ": needs float32, float64, float16 or bfloat16 tensors, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

#ifdef USE_CUDA
// Makes the tensor's device current and gets its properties and PyTorch's current stream. Launching on another stream
// would race with the neighboring ops.
struct CudaCall {
  torch::stable::accelerator::DeviceGuard guard;
  Device device;
  void* stream = nullptr;

  CudaCall(const Tensor& tensor, bool tf32) : guard(tensor.get_device_index()) {
    const int32_t index = tensor.get_device_index();
    const auto attribute = [index](cudaDeviceAttr which) {
      int value = 0;
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
      return value;
    };
    device.capability =
        10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
    device.shared_memory = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    device.tf32 = tf32;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  }

  void check(int error) const { STD_CUDA_CHECK(static_cast<cudaError_t>(error)); }
};
#endif

}  // namespace cc_attention
