// Chooses the kernels: the tensor-core kernels where they support the arguments, then those for float32, otherwise the
// general kernels.
#include "float32.h"
#include "general.h"
#include "tensor_core.h"

namespace cc_attention {
namespace {

enum class Path { tensor_core, float32, general };

template <class Arguments>
Path path_of(const Arguments& arguments, const Device& device) {
  if (tensor_core::serves(arguments, device)) return Path::tensor_core;
  // No GPU has run the kernels for float32 yet.
  return device.untested && float32::serves(arguments, device) ? Path::float32 : Path::general;
}

}  // namespace

int forward_cuda(const Forward& arguments, const Device& device, void* stream) {
  if (arguments.sizes.pixels() == 0) return cudaSuccess;
  switch (path_of(arguments, device)) {
    case Path::tensor_core:
      return tensor_core::forward(arguments, device, stream);
    case Path::float32:
      return float32::forward(arguments, device, stream);
    default:
      return general::forward(arguments, stream);
  }
}

int backward_cuda(const Backward& arguments, const Device& device, void* stream) {
  if (arguments.sizes.pixels() == 0)
    return arguments.grad_gamma == nullptr
               ? static_cast<int>(cudaSuccess)
               : general::total(arguments.dtype, nullptr, 0, nullptr, arguments.grad_gamma, stream);
  switch (path_of(arguments, device)) {
    case Path::tensor_core:
      return tensor_core::backward(arguments, device, stream);
    case Path::float32:
      return float32::backward(arguments, device, stream);
    default:
      return general::backward(arguments, stream);
  }
}

int primitive_cuda(Primitive primitive, Dtype dtype, const Sizes& sizes, const void* first, const void* second,
                   void* out, void* stream) {
  return general::primitive(primitive, dtype, sizes, first, second, out, stream);
}

int64_t forward_workspace_cuda(const Forward& arguments, const Device& device) {
  if (arguments.sizes.pixels() == 0 || !tensor_core::serves(arguments, device)) return 0;
  return tensor_core::forward_workspace(arguments, device);
}

int64_t backward_workspace_cuda(const Backward& arguments, const Device& device) {
  switch (path_of(arguments, device)) {
    case Path::tensor_core:
      return tensor_core::backward_workspace(arguments, device);
    case Path::float32:
      return float32::backward_workspace(arguments, device);
    default:
      return general::backward_workspace(arguments);
  }
}

}  // namespace cc_attention
