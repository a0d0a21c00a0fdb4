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

#include <optional>
#include <tuple>
#include <utility>

#include "common.h"

namespace cc_attention {
namespace {

// How pixels attend (kernels.h).
struct Attention {
  int64_t heads;
  double scale;
  int64_t axes;
  bool tf32;  // float32 products may run on tensor cores, if the device has them
};

// Checks the operands of the attention, and returns their sizes.
Sizes check_attention(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                      const Attention& how) {
  check_operands(op, {{"value", value}, {"query", query}, {"key", key}}, true);
  check_channels(op, {"key", key}, query.size(1), "those of query");
  STD_TORCH_CHECK(how.heads > 0, op, ": heads must be at least 1, got ", how.heads);
  for (const Operand& operand : {Operand{"query", query}, Operand{"value", value}})
    STD_TORCH_CHECK(operand.tensor.size(1) % how.heads == 0, op, ": the channels of ", operand.name,
                    " must be divisible by heads=", how.heads, ", got shape ", shape_of(operand.tensor));
  const int64_t dim = value.dim(), all = dim == 5 ? 7 : 6;
  STD_TORCH_CHECK(how.axes > 0 && (how.axes & ~all) == 0, op, ": axes must be a set of axes of value, got ", how.axes);
  return {value.size(0),
          how.heads,
          query.size(1) / how.heads,
          value.size(1) / how.heads,
          dim == 5 ? value.size(2) : 1,
          value.size(dim - 2),
          value.size(dim - 1)};
}

// Returns the axes without those of a single pixel, unless no other is left: such a line is the pixel itself.
int useful_axes(const Sizes& s, int64_t axes) {
  for (const auto& [axis, length] : {std::pair{kFrames, s.T}, {kColumn, s.H}, {kRow, s.W}})
    if (length == 1 && (axes & ~(1 << axis)) != 0) axes &= ~(1 << axis);
  return static_cast<int>(axes);
}

void check_gamma(const char* op, const Tensor& gamma, const Tensor& value) {
  STD_TORCH_CHECK(gamma.numel() == 1 && gamma.scalar_type() == summing_dtype(value) && gamma.device() == value.device(),
                  op, ": gamma must have one element, in ", torch::headeronly::toString(summing_dtype(value)),
                  " and on the device of value, got shape ", shape_of(gamma), " in ",
                  torch::headeronly::toString(gamma.scalar_type()));
}

Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

// query, key [N,heads*c,H,W], value [N,heads*C,H,W] -> out [N,heads*C,H,W], normalizer [N,H,W,heads,2] (kernels.h), and
// residual + gamma * out, or an empty tensor without a residual. All maps may have a dimension T before H. `keep`:
// whether out is needed beside the sum; otherwise it is empty if there is a residual.
std::tuple<Tensor, Tensor, Tensor> criss_cross_attention(const Tensor& query_, const Tensor& key_, const Tensor& value_,
                                                         const std::optional<Tensor>& residual_,
                                                         const std::optional<Tensor>& gamma, int64_t heads,
                                                         double scale, int64_t axes, bool tf32, bool keep) {
  constexpr const char* op = "criss_cross_attention";
  const Attention how{heads, scale, axes, tf32};
  const Sizes sizes = check_attention(op, query_, key_, value_, how);
  STD_TORCH_CHECK(residual_.has_value() == gamma.has_value(), op, ": residual and gamma must be given together");
  if (residual_.has_value()) {
    check_operands(op, {{"value", value_}, {"residual", *residual_}}, true);
    check_channels(op, {"residual", *residual_}, value_.size(1), "those of value");
    check_gamma(op, *gamma, value_);
  }
  const Tensor query = readable(query_), key = readable(key_), value = readable(value_);
  const Tensor residual = residual_.has_value() ? readable(*residual_) : nothing(value);
  Tensor out = empty_map(value, value.size(1));
  Tensor normalizer = torch::stable::new_empty(value, normalizer_shape(value, heads), summing_dtype(value));
  const bool with_residual = residual_.has_value();
  // The CPU kernels can write the sum over out.
  const bool in_place = with_residual && !keep && !value.is_cuda();
  Tensor sum = in_place ? out : with_residual ? empty_map(value, value.size(1)) : nothing(value);
  const auto results = [&]() -> std::tuple<Tensor, Tensor, Tensor> {
    return {with_residual && !keep ? nothing(value) : out, normalizer, sum};
  };
  Forward arguments = {kernel_dtype(op, value),
                       sizes,
                       useful_axes(sizes, axes),
                       scale,
                       map_of(query),
                       map_of(key),
                       map_of(value),
                       mutable_map_of(out),
                       normalizer.mutable_data_ptr(),
                       with_residual ? map_of(residual) : Map{nullptr, 0},
                       with_residual ? mutable_map_of(sum) : MutableMap{nullptr, 0},
                       with_residual ? gamma->const_data_ptr() : nullptr,
                       nullptr};
#ifdef USE_CUDA
  if (value.is_cuda()) {
    const CudaCall call(value, tf32);
    const int64_t bytes = forward_workspace_cuda(arguments, call.device);
    Tensor workspace = torch::stable::new_empty(value, {bytes}, ScalarType::Byte);
    arguments.workspace = workspace.mutable_data_ptr();
    call.check(forward_cuda(arguments, call.device, call.stream));
    return results();
  }
#endif
  forward_cpu(arguments);
  return results();
}

// grad, the gradient of out or of the sum with the residual, has the shape of out -> the gradients of query, key, value
// and gamma (empty without a residual). If `joint`, the first result is a map with the channels of all three gradients,
// one after the other, and the next two are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> criss_cross_attention_backward(const Tensor& grad_, const Tensor& query_,
                                                                          const Tensor& key_, const Tensor& value_,
                                                                          const Tensor& out_, const Tensor& normalizer,
                                                                          const std::optional<Tensor>& gamma,
                                                                          int64_t heads, double scale, int64_t axes,
                                                                          bool joint, bool tf32) {
  constexpr const char* op = "criss_cross_attention_backward";
  const Attention how{heads, scale, axes, tf32};
  const Sizes sizes = check_attention(op, query_, key_, value_, how);
  check_operands(op, {{"value", value_}, {"out", out_}, {"grad", grad_}}, true);
  check_channels(op, {"out", out_}, value_.size(1), "those of value");
  check_channels(op, {"grad", grad_}, value_.size(1), "those of value");
  check_normalizer(op, normalizer, value_, heads);
  if (gamma.has_value()) check_gamma(op, *gamma, value_);
  const Tensor query = readable(query_), key = readable(key_), value = readable(value_), out = readable(out_),
               grad = readable(grad_), dense_normalizer = torch::stable::contiguous(normalizer);
  const int64_t c = query.size(1), C = value.size(1);
  Tensor grad_query = empty_map(value, joint ? 2 * c + C : c);
  Tensor grad_key = joint ? torch::stable::narrow(grad_query, 1, c, c) : empty_map(value, c);
  Tensor grad_value = joint ? torch::stable::narrow(grad_query, 1, 2 * c, C) : empty_map(value, C);
  Tensor grad_gamma = gamma.has_value() ? torch::stable::new_empty(*gamma, {1}) : nothing(value);
  const int64_t joint_pitch = grad_query.size(1);
  Backward arguments = {kernel_dtype(op, value),
                        sizes,
                        useful_axes(sizes, axes),
                        scale,
                        map_of(query),
                        map_of(key),
                        map_of(value),
                        map_of(out),
                        dense_normalizer.const_data_ptr(),
                        map_of(grad),
                        gamma.has_value() ? gamma->const_data_ptr() : nullptr,
                        {grad_query.mutable_data_ptr(), joint_pitch},
                        {grad_key.mutable_data_ptr(), joint ? joint_pitch : c},
                        {grad_value.mutable_data_ptr(), joint ? joint_pitch : C},
                        gamma.has_value() ? grad_gamma.mutable_data_ptr() : nullptr,
                        nullptr};
  const auto results = [&]() -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    if (joint) return {grad_query, nothing(value), nothing(value), grad_gamma};
    return {grad_query, grad_key, grad_value, grad_gamma};
  };
#ifdef USE_CUDA
  if (value.is_cuda()) {
    const CudaCall call(value, tf32);
    const int64_t bytes = backward_workspace_cuda(arguments, call.device);
    Tensor workspace = torch::stable::new_empty(value, {bytes}, ScalarType::Byte);
    arguments.workspace = workspace.mutable_data_ptr();
    call.check(backward_cuda(arguments, call.device, call.stream));
    return results();
  }
#endif
  backward_cpu(arguments);
  return results();
}

// out = primitive(first, second). For the score, first is a feature map; otherwise it holds weights over positions.
// `map` is a feature map with the sizes of the primitive.
void run(const char* op, Primitive primitive, const Tensor& map, const Tensor& first, const Tensor& second,
         Tensor& out) {
  const Dtype dtype = kernel_dtype(op, map);
  const Sizes sizes = {map.size(0), 1, map.size(1), map.size(1), 1, map.size(2), map.size(3)};
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
  // axes: 1 for T, 2 for H, 4 for W, added up.
  library.def(
      "criss_cross_attention(Tensor query, Tensor key, Tensor value, Tensor? residual=None, Tensor? gamma=None, int "
      "heads=1, float scale=1.0, int axes=6, bool tf32=False, bool keep=True) -> (Tensor out, Tensor normalizer, "
      "Tensor sum)");
  library.def(
      "criss_cross_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor "
      "normalizer, Tensor? gamma=None, int heads=1, float scale=1.0, int axes=6, bool joint=False, bool tf32=False) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
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
