// Chooses the kernels: the tensor-core kernels where they support the arguments, otherwise the general kernels.
#include "general.h"
#include "tensor_core.h"

namespace cc_attention {

int forward_cuda(const Forward& arguments, const Device& device, void* stream) {
  if (arguments.sizes.pixels() == 0) return cudaSuccess;
  return tensor_core::serves(arguments, device) ? tensor_core::forward(arguments, device, stream)
                                                : general::forward(arguments, stream);
}

int backward_cuda(const Backward& arguments, const Device& device, void* stream) {
  if (arguments.sizes.pixels() == 0)
    return arguments.grad_gamma == nullptr
               ? static_cast<int>(cudaSuccess)
               : general::total(arguments.dtype, nullptr, 0, nullptr, arguments.grad_gamma, stream);
  return tensor_core::serves(arguments, device) ? tensor_core::backward(arguments, device, stream)
                                                : general::backward(arguments, stream);
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
  return tensor_core::serves(arguments, device) ? tensor_core::backward_workspace(arguments, device)
                                                : general::backward_workspace(arguments);
}

}  // namespace cc_attention
