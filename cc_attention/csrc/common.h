// What every op's host function needs: argument checks with readable errors, the kernels' dtype, the current stream.
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
  const char* name;  // as in the schema
  const Tensor& tensor;
};

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

// Throws unless all operands are [N, any, H, W] with the same N, H, W, dtype and device, H and W at least 1.
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

// Throws unless the operand's second dimension is `expected`; `meaning` says what that number is.
inline void check_channels(const char* op, const Operand& operand, int64_t expected, const char* meaning) {
  STD_TORCH_CHECK(operand.tensor.size(1) == expected, op, ": ", operand.name, " must have ", expected, " channels (",
                  meaning, "), got shape ", shape_of(operand.tensor));
}

inline Sizes sizes_of(const Tensor& feature_map) {
  return {feature_map.size(0), feature_map.size(1), feature_map.size(2), feature_map.size(3)};
}

inline Dtype kernel_dtype(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default:
      STD_TORCH_CHECK(false, op, ": needs float32, float64, float16 or bfloat16 tensors, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

#ifdef USE_CUDA
// The stream PyTorch is working on: launching elsewhere would race with the ops around this one.
inline void* current_stream(int32_t device_index) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return stream;
}
#endif

}  // namespace cc_attention
