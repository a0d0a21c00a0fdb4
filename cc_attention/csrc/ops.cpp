// The operators: schemas, checks and output shapes. reference.py specifies the results; cpu/ and cuda/ compute them.
//
// criss_cross_attention is the fused operator. ca_weight (the scores) and ca_map (the weighted sums) are its two
// halves. They and their gradients are made of three primitives (kernels.h):
//   ca_weight: score(query, key)        d_query = gather(grad, key)       d_key   = scatter(grad, query)
//   ca_map:    gather(weight, value)    d_weight = score(grad, value)     d_value = scatter(weight, grad)
//
// Operands may have any strides. A feature map that is not channels_last is copied to that format. Every returned
// feature map is channels_last.
#if __has_include(<Python.h>)
#include <Python.h>
#define CC_PYTHON_MODULE
#endif

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common.h"

namespace cc_attention {
namespace {

// query [N,c,H,W], key [N,c,H,W], value [N,C,H,W] -> out [N,C,H,W], normalizer [N,H,W,2] (kernels.h).
// tf32: float32 products may run on tensor cores, if the device has them.
std::tuple<Tensor, Tensor> criss_cross_attention(const Tensor& query_, const Tensor& key_, const Tensor& value_,
                                                 bool tf32) {
  constexpr const char* op = "criss_cross_attention";
  check_operands(op, {{"value", value_}, {"query", query_}, {"key", key_}});
  check_channels(op, {"key", key_}, query_.size(1), "those of query");
  const Tensor query = channels_last(query_), key = channels_last(key_), value = channels_last(value_);
  Tensor out = empty_map(value, value.size(1));
  Tensor normalizer = empty_normalizer(value);
  const Forward arguments = {kernel_dtype(op, value),      sizes_of(query, value), query.const_data_ptr(),
                             key.const_data_ptr(),         value.const_data_ptr(), out.mutable_data_ptr(),
                             normalizer.mutable_data_ptr()};
#ifdef USE_CUDA
  if (value.is_cuda()) {
    const CudaCall call(value, tf32);
    call.check(forward_cuda(arguments, call.device, call.stream));
    return {out, normalizer};
  }
#endif
  forward_cpu(arguments);
  return {out, normalizer};
}

// grad [N,C,H,W], the gradient of out -> the gradients of query [N,c,H,W], key [N,c,H,W] and value [N,C,H,W].
std::tuple<Tensor, Tensor, Tensor> criss_cross_attention_backward(const Tensor& grad_, const Tensor& query_,
                                                                  const Tensor& key_, const Tensor& value_,
                                                                  const Tensor& out_, const Tensor& normalizer,
                                                                  bool tf32) {
  constexpr const char* op = "criss_cross_attention_backward";
  check_operands(op, {{"value", value_}, {"query", query_}, {"key", key_}, {"out", out_}, {"grad", grad_}});
  check_channels(op, {"key", key_}, query_.size(1), "those of query");
  check_channels(op, {"out", out_}, value_.size(1), "those of value");
  check_channels(op, {"grad", grad_}, value_.size(1), "those of value");
  check_normalizer(op, normalizer, value_);
  const Tensor query = channels_last(query_), key = channels_last(key_), value = channels_last(value_);
  const Tensor out = channels_last(out_), grad = channels_last(grad_),
               dense_normalizer = torch::stable::contiguous(normalizer);
  Tensor grad_query = empty_map(query, query.size(1));
  Tensor grad_key = empty_map(key, key.size(1));
  Tensor grad_value = empty_map(value, value.size(1));
  Backward arguments = {kernel_dtype(op, value),
                        sizes_of(query, value),
                        query.const_data_ptr(),
                        key.const_data_ptr(),
                        value.const_data_ptr(),
                        out.const_data_ptr(),
                        dense_normalizer.const_data_ptr(),
                        grad.const_data_ptr(),
                        grad_query.mutable_data_ptr(),
                        grad_key.mutable_data_ptr(),
                        grad_value.mutable_data_ptr(),
                        nullptr};
#ifdef USE_CUDA
  if (value.is_cuda()) {
    const CudaCall call(value, tf32);
    const int64_t bytes = backward_workspace_cuda(arguments.dtype, arguments.sizes);
    Tensor workspace = torch::stable::new_empty(value, {bytes}, ScalarType::Byte);
    arguments.workspace = workspace.mutable_data_ptr();
    call.check(backward_cuda(arguments, call.device, call.stream));
    return {grad_query, grad_key, grad_value};
  }
#endif
  backward_cpu(arguments);
  return {grad_query, grad_key, grad_value};
}

// out = primitive(first, second). For the score, first is a feature map; otherwise it holds weights over positions.
// `map` is a feature map with the sizes of the primitive.
void run(const char* op, Primitive primitive, const Tensor& map, const Tensor& first, const Tensor& second,
         Tensor& out) {
  const Dtype dtype = kernel_dtype(op, map);
  const Sizes sizes = sizes_of(map, map);
  const Tensor a = primitive == Primitive::score ? channels_last(first) : torch::stable::contiguous(first);
  const Tensor b = channels_last(second);
#ifdef USE_CUDA
  if (map.is_cuda()) {
    const CudaCall call(map, false);
    call.check(primitive_cuda(primitive, dtype, sizes, a.const_data_ptr(), b.const_data_ptr(), out.mutable_data_ptr(),
                              call.stream));
    return;
  }
#endif
  primitive_cpu(primitive, dtype, sizes, a.const_data_ptr(), b.const_data_ptr(), out.mutable_data_ptr());
}

Tensor score(const char* op, const Tensor& a, const Tensor& b) {
  Tensor out = torch::stable::new_empty(a, {a.size(0), positions(a), a.size(2), a.size(3)});
  run(op, Primitive::score, a, a, b, out);
  return out;
}

Tensor gather(const char* op, const Tensor& w, const Tensor& v) {
  Tensor out = empty_map(v, v.size(1));
  run(op, Primitive::gather, v, w, v, out);
  return out;
}

Tensor scatter(const char* op, const Tensor& w, const Tensor& g) {
  Tensor out = empty_map(g, g.size(1));
  run(op, Primitive::scatter, g, w, g, out);
  return out;
}

constexpr const char* kPositions = "H + W - 1, the positions of a criss-cross";

// query [N,C,H,W], key [N,C,H,W] -> [N,L,H,W]
Tensor ca_weight(const Tensor& query, const Tensor& key) {
  check_operands("ca_weight", {{"query", query}, {"key", key}});
  check_channels("ca_weight", {"key", key}, query.size(1), "those of query");
  return score("ca_weight", query, key);
}

// grad [N,L,H,W], query [N,C,H,W], key [N,C,H,W] -> d_query [N,C,H,W], d_key [N,C,H,W]
std::tuple<Tensor, Tensor> ca_weight_backward(const Tensor& grad, const Tensor& query, const Tensor& key) {
  constexpr const char* op = "ca_weight_backward";
  const Operand grad_operand{"grad", grad};
  check_operands(op, {{"query", query}, {"key", key}, grad_operand});
  check_channels(op, {"key", key}, query.size(1), "those of query");
  check_channels(op, grad_operand, positions(query), kPositions);
  return {gather(op, grad, key), scatter(op, grad, query)};
}

// weight [N,L,H,W], value [N,C,H,W] -> [N,C,H,W]
Tensor ca_map(const Tensor& weight, const Tensor& value) {
  check_operands("ca_map", {{"weight", weight}, {"value", value}});
  check_channels("ca_map", {"weight", weight}, positions(value), kPositions);
  return gather("ca_map", weight, value);
}

// grad [N,C,H,W], weight [N,L,H,W], value [N,C,H,W] -> d_weight [N,L,H,W], d_value [N,C,H,W]
std::tuple<Tensor, Tensor> ca_map_backward(const Tensor& grad, const Tensor& weight, const Tensor& value) {
  constexpr const char* op = "ca_map_backward";
  check_operands(op, {{"weight", weight}, {"value", value}, {"grad", grad}});
  check_channels(op, {"weight", weight}, positions(value), kPositions);
  check_channels(op, {"grad", grad}, value.size(1), "those of value");
  return {score(op, grad, value), scatter(op, weight, grad)};
}

void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("criss_cross_attention", TORCH_BOX(&criss_cross_attention));
  library.impl("criss_cross_attention_backward", TORCH_BOX(&criss_cross_attention_backward));
  library.impl("ca_weight", TORCH_BOX(&ca_weight));
  library.impl("ca_weight_backward", TORCH_BOX(&ca_weight_backward));
  library.impl("ca_map", TORCH_BOX(&ca_map));
  library.impl("ca_map_backward", TORCH_BOX(&ca_map_backward));
}

}  // namespace
}  // namespace cc_attention

STABLE_TORCH_LIBRARY(cc_attention, library) {
  library.def(
      "criss_cross_attention(Tensor query, Tensor key, Tensor value, bool tf32=False) -> (Tensor out, Tensor "
      "normalizer)");
  library.def(
      "criss_cross_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor "
      "normalizer, "
      "bool tf32=False) -> (Tensor, Tensor, Tensor)");
  library.def("ca_weight(Tensor query, Tensor key) -> Tensor");
  library.def("ca_weight_backward(Tensor grad, Tensor query, Tensor key) -> (Tensor, Tensor)");
  library.def("ca_map(Tensor weight, Tensor value) -> Tensor");
  library.def("ca_map_backward(Tensor grad, Tensor weight, Tensor value) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(cc_attention, CPU, library) { cc_attention::implement(library); }

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(cc_attention, CUDA, library) { cc_attention::implement(library); }
#endif

// ops.py loads this file as a plain library; the empty module is for `import cc_attention._C`. Python's headers are
// optional, because many distributions package them separately.
#ifdef CC_PYTHON_MODULE
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
#endif
