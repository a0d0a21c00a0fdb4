// The operators' contract: schemas, checks, output shapes. Semantics: reference.py. Algorithms: cpu/ and cuda/.
//
// Both gradients are made of the same three primitives as the forwards (kernels.h):
//   ca_weight: score(query, key)        d_query = gather(grad, key)       d_key   = scatter(grad, query)
//   ca_map:    gather(weight, value)    d_weight = score(grad, value)     d_value = scatter(weight, grad)
#if __has_include(<Python.h>)
#include <Python.h>
#define CC_PYTHON_MODULE
#endif

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common.h"

namespace cc_attention {
namespace {

// out = primitive(first, second); sizes.C is the channel count of the feature maps.
void run(const char* op, Primitive primitive, const Sizes& sizes, const Tensor& first, const Tensor& second,
         Tensor& out) {
  const Dtype dtype = kernel_dtype(op, out);
  const Tensor a = torch::stable::contiguous(first);
  const Tensor b = torch::stable::contiguous(second);
#ifdef USE_CUDA
  if (out.is_cuda()) {
    const int32_t device = out.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    STD_CUDA_CHECK(static_cast<cudaError_t>(run_cuda(primitive, dtype, sizes, a.const_data_ptr(), b.const_data_ptr(),
                                                     out.mutable_data_ptr(), current_stream(device))));
    return;
  }
#endif
  run_cpu(primitive, dtype, sizes, a.const_data_ptr(), b.const_data_ptr(), out.mutable_data_ptr());
}

Tensor score(const char* op, const Sizes& sizes, const Tensor& a, const Tensor& b) {
  Tensor out = torch::stable::new_empty(a, {sizes.N, sizes.L(), sizes.H, sizes.W});
  run(op, Primitive::score, sizes, a, b, out);
  return out;
}

Tensor gather(const char* op, const Sizes& sizes, const Tensor& w, const Tensor& v) {
  Tensor out = torch::stable::new_empty(v, {sizes.N, sizes.C, sizes.H, sizes.W});
  run(op, Primitive::gather, sizes, w, v, out);
  return out;
}

Tensor scatter(const char* op, const Sizes& sizes, const Tensor& w, const Tensor& g) {
  Tensor out = torch::stable::new_empty(g, {sizes.N, sizes.C, sizes.H, sizes.W});
  run(op, Primitive::scatter, sizes, w, g, out);
  return out;
}

constexpr const char* kPositions = "H + W - 1, the positions of a criss-cross";

// query [N,C,H,W], key [N,C,H,W] -> [N,L,H,W]
Tensor ca_weight(const Tensor& query, const Tensor& key) {
  check_operands("ca_weight", {{"query", query}, {"key", key}});
  check_channels("ca_weight", {"key", key}, query.size(1), "those of query");
  return score("ca_weight", sizes_of(query), query, key);
}

// grad [N,L,H,W], query [N,C,H,W], key [N,C,H,W] -> d_query [N,C,H,W], d_key [N,C,H,W]
std::tuple<Tensor, Tensor> ca_weight_backward(const Tensor& grad, const Tensor& query, const Tensor& key) {
  constexpr const char* op = "ca_weight_backward";
  const Operand grad_operand{"grad", grad};
  check_operands(op, {{"query", query}, {"key", key}, grad_operand});
  check_channels(op, {"key", key}, query.size(1), "those of query");
  const Sizes sizes = sizes_of(query);
  check_channels(op, grad_operand, sizes.L(), kPositions);
  return {gather(op, sizes, grad, key), scatter(op, sizes, grad, query)};
}

// weight [N,L,H,W], value [N,C,H,W] -> [N,C,H,W]
Tensor ca_map(const Tensor& weight, const Tensor& value) {
  check_operands("ca_map", {{"weight", weight}, {"value", value}});
  const Sizes sizes = sizes_of(value);
  check_channels("ca_map", {"weight", weight}, sizes.L(), kPositions);
  return gather("ca_map", sizes, weight, value);
}

// grad [N,C,H,W], weight [N,L,H,W], value [N,C,H,W] -> d_weight [N,L,H,W], d_value [N,C,H,W]
std::tuple<Tensor, Tensor> ca_map_backward(const Tensor& grad, const Tensor& weight, const Tensor& value) {
  constexpr const char* op = "ca_map_backward";
  check_operands(op, {{"weight", weight}, {"value", value}, {"grad", grad}});
  const Sizes sizes = sizes_of(value);
  check_channels(op, {"weight", weight}, sizes.L(), kPositions);
  check_channels(op, {"grad", grad}, sizes.C, "those of value");
  return {score(op, sizes, grad, value), scatter(op, sizes, weight, grad)};
}

void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("ca_weight", TORCH_BOX(&ca_weight));
  library.impl("ca_weight_backward", TORCH_BOX(&ca_weight_backward));
  library.impl("ca_map", TORCH_BOX(&ca_map));
  library.impl("ca_map_backward", TORCH_BOX(&ca_map_backward));
}

}  // namespace
}  // namespace cc_attention

STABLE_TORCH_LIBRARY(cc_attention, library) {
  library.def("ca_weight(Tensor query, Tensor key) -> Tensor");
  library.def("ca_weight_backward(Tensor grad, Tensor query, Tensor key) -> (Tensor, Tensor)");
  library.def("ca_map(Tensor weight, Tensor value) -> Tensor");
  library.def("ca_map_backward(Tensor grad, Tensor weight, Tensor value) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(cc_attention, CPU, library) { cc_attention::implement(library); }

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(cc_attention, CUDA, library) { cc_attention::implement(library); }
#endif

// ops.py loads the library as it is; the empty module serves `import cc_attention._C`. Python's headers are optional,
// since distributions ship them apart from Python.
#ifdef CC_PYTHON_MODULE
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
#endif
