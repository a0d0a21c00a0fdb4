// Helpers of the host functions: argument checks with readable errors, dtypes, output tensors, the current stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <sstream>
#include <string>
#include <vector>

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

// Throws unless all operands are [N, any, H, W], or [N, any, T, H, W] if `video` is allowed, with H and W at least 1,
// and share all sizes but the channels, the dtype and the device.
inline void check_operands(const char* op, std::initializer_list<Operand> operands, bool video = false) {
  const Operand& first = *operands.begin();
  for (const Operand& operand : operands) {
    const Tensor& tensor = operand.tensor;
    const int64_t dim = first.tensor.dim();
    STD_TORCH_CHECK(tensor.dim() == dim && (dim == 4 || (dim == 5 && video)), op, ": ", operand.name, " must have 4 ",
                    video ? "or 5 " : "", "dimensions", dim == 5 && video ? ", like the others" : "", ", got shape ",
                    shape_of(tensor));
    for (int64_t d = 2; d < dim; ++d)
      STD_TORCH_CHECK(tensor.size(d) > 0, op, ": ", operand.name, " must have at least one row and one column",
                      dim == 5 ? " and frame" : "", ", got shape ", shape_of(tensor));
    for (int64_t d = 0; d < dim; ++d)
      STD_TORCH_CHECK(d == 1 || tensor.size(d) == first.tensor.size(d), op, ": ", first.name, " and ", operand.name,
                      " must agree in batch, ", dim == 5 ? "frames, " : "", "height and width, got shapes ",
                      shape_of(first.tensor), " and ", shape_of(tensor));
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

// The dtype of the normalizers that the forward saves, and of gamma (kernels.h).
inline ScalarType summing_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The shape of the normalizers: [N,H,W,heads,2] or [N,T,H,W,heads,2].
inline std::vector<int64_t> normalizer_shape(const Tensor& value, int64_t heads) {
  std::vector<int64_t> shape = {value.size(0)};
  for (int64_t d = 2; d < value.dim(); ++d) shape.push_back(value.size(d));
  shape.insert(shape.end(), {heads, 2});
  return shape;
}

// Throws unless normalizer is the one of the forward.
inline void check_normalizer(const char* op, const Tensor& normalizer, const Tensor& value, int64_t heads) {
  const std::vector<int64_t> shape = normalizer_shape(value, heads);
  bool same = normalizer.dim() == static_cast<int64_t>(shape.size()) &&
              normalizer.scalar_type() == summing_dtype(value) && normalizer.device() == value.device();
  for (size_t d = 0; same && d < shape.size(); ++d) same = normalizer.size(d) == shape[d];
  STD_TORCH_CHECK(same, op, ": normalizer must be the one that the forward gave for value of shape ", shape_of(value),
                  ", got shape ", shape_of(normalizer));
}

inline int64_t positions(const Tensor& map) { return map.size(2) + map.size(3) - 1; }

inline torch::headeronly::MemoryFormat memory_format(const Tensor& map) {
  return map.dim() == 5 ? torch::headeronly::MemoryFormat::ChannelsLast3d
                        : torch::headeronly::MemoryFormat::ChannelsLast;
}

// Returns the map in the memory format of the kernels, [N,T,H,W,channels] in memory.
inline Tensor channels_last(const Tensor& map) { return torch::stable::contiguous(map, memory_format(map)); }

// Returns the elements between neighboring pixels if the kernels can read the map in place, otherwise 0.
inline int64_t pitch_of(const Tensor& map) {
  if (map.numel() == 0 || (map.size(1) > 1 && map.stride(1) != 1)) return 0;
  int64_t pitch = 0, pixels = 1;
  for (int64_t d = map.dim() - 1; d >= 0; --d) {
    if (d == 1) continue;
    if (map.size(d) > 1) {
      if (pitch == 0 && map.stride(d) % pixels == 0) pitch = map.stride(d) / pixels;
      if (pitch < map.size(1) || map.stride(d) != pitch * pixels) return 0;
    }
    pixels *= map.size(d);
  }
  return pitch == 0 ? map.size(1) : pitch;
}

// Returns the map, copied to channels_last if the kernels can't read it in place.
inline Tensor readable(const Tensor& map) { return pitch_of(map) != 0 ? map : channels_last(map); }

inline Map map_of(const Tensor& map) {
  const int64_t pitch = pitch_of(map);
  return {map.const_data_ptr(), pitch != 0 ? pitch : map.size(1)};
}
inline MutableMap mutable_map_of(Tensor& map) {
  const int64_t pitch = pitch_of(map);
  return {map.mutable_data_ptr(), pitch != 0 ? pitch : map.size(1)};
}

// Returns an uninitialized map with the given number of channels in channels_last, otherwise like `map`.
inline Tensor empty_map(const Tensor& map, int64_t channels) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < map.dim(); ++d) shape.push_back(d == 1 ? channels : map.size(d));
  return torch::stable::empty(shape, map.scalar_type(), std::nullopt, map.device(), std::nullopt, memory_format(map));
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
    const char* const untested = std::getenv("CC_ATTENTION_UNTESTED");
    device.untested = untested != nullptr && std::strcmp(untested, "1") == 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  }

  void check(int error) const { STD_CUDA_CHECK(static_cast<cudaError_t>(error)); }
};
#endif

}  // namespace cc_attention
