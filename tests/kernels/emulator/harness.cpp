// The functions of kernels.h for the GPU, under names that Python can look up.
#include "../kernels.h"  // of the copy of the sources that build() makes

#include "../cuda/float32.h"
#include "../cuda/tensor_core.h"

using namespace cc_attention;

extern "C" int emulated_forward(const Forward* arguments, const Device* device) {
  return forward_cuda(*arguments, *device, nullptr);
}

extern "C" int emulated_backward(const Backward* arguments, const Device* device) {
  return backward_cuda(*arguments, *device, nullptr);
}

extern "C" int emulated_forward_on_tensor_cores(const Forward* arguments, const Device* device) {
  return tensor_core::serves(*arguments, *device);
}

extern "C" int emulated_backward_on_tensor_cores(const Backward* arguments, const Device* device) {
  return tensor_core::serves(*arguments, *device);
}

extern "C" int emulated_forward_in_float32(const Forward* arguments, const Device* device) {
  return float32::serves(*arguments, *device);
}

extern "C" int emulated_backward_in_float32(const Backward* arguments, const Device* device) {
  return float32::serves(*arguments, *device);
}

extern "C" int emulated_primitive(int primitive, int dtype, const Sizes* sizes, const void* first, const void* second,
                                  void* out) {
  return primitive_cuda(static_cast<Primitive>(primitive), static_cast<Dtype>(dtype), *sizes, first, second, out,
                        nullptr);
}

extern "C" int64_t emulated_forward_workspace(const Forward* arguments, const Device* device) {
  return forward_workspace_cuda(*arguments, *device);
}

extern "C" int64_t emulated_backward_workspace(const Backward* arguments, const Device* device) {
  return backward_workspace_cuda(*arguments, *device);
}
