// The operators of the activated batch norm: schemas, checks and output shapes. norm_reference.py specifies the
// results; cpu/ and cuda/ compute them.
//
// Maps are [N,C,...] of any strides. A map that is dense in neither [N,C,P] nor [N,P,C] (channels_last) is copied; for
// CUDA, it is copied unless it is channels_last. All maps of a call take the layout of x, and returned maps have it.
// Vectors have one element per channel, and are converted to the dtype in which the kernels compute.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../../cc_attention/csrc/common.h"
#include "norm.h"

namespace fused {
namespace {

using cc_attention::kernel_dtype;
using cc_attention::Operand;
using cc_attention::shape_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The type in which maps of `dtype` are computed.
ScalarType computing_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_device(const char* op, const Operand& operand, const Tensor& like) {
  STD_TORCH_CHECK(operand.tensor.device() == like.device(), op, ": x and ", operand.name,
                  " must be on the same device");
}

// Returns the vector [C] for a map x, in the computing dtype, contiguous.
Tensor vector_of(const char* op, const Operand& operand, const Tensor& x) {
  const Tensor& vector = operand.tensor;
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == x.size(1), op, ": ", operand.name,
                  " must have one element for each of the ", x.size(1), " channels of x, got shape ", shape_of(vector));
  check_device(op, operand, x);
  kernel_dtype(op, vector);  // refuses integers
  return torch::stable::contiguous(torch::stable::to(vector, computing_dtype(x.scalar_type())));
}

// Returns statistics or sums [2,C] for a map x, contiguous.
Tensor pair_of(const char* op, const Operand& operand, const Tensor& x) {
  const Tensor& pair = operand.tensor;
  const ScalarType dtype = computing_dtype(x.scalar_type());
  STD_TORCH_CHECK(pair.dim() == 2 && pair.size(0) == 2 && pair.size(1) == x.size(1) && pair.scalar_type() == dtype, op,
                  ": ", operand.name, " must be ", torch::headeronly::toString(dtype), " of shape [2, ", x.size(1),
                  "], got ", torch::headeronly::toString(pair.scalar_type()), " of shape ", shape_of(pair));
  check_device(op, operand, x);
  return torch::stable::contiguous(pair);
}

// Returns whether the elements of a map are dense, with channels as the second dimension in memory or, if
// channels_last, as the last.
bool is_dense(const Tensor& map, bool channels_last) {
  int64_t expected = 1;
  const auto matches = [&](int64_t d) {
    const bool result = map.size(d) == 1 || map.stride(d) == expected;
    expected *= map.size(d);
    return result;
  };
  if (map.numel() == 0) return true;
  if (channels_last && !matches(1)) return false;
  for (int64_t d = map.dim() - 1; d >= 2; --d)
    if (!matches(d)) return false;
  return (channels_last || matches(1)) && matches(0);
}

// Returns a copy of the map in the memory format channels_last, of any number of dimensions.
Tensor channels_last_copy(const Tensor& map) {
  const Tensor pixels_first = torch::stable::contiguous(torch::stable::transpose(torch::stable::flatten(map, 2), 1, 2));
  const auto sizes = map.sizes();
  return torch::stable::view(torch::stable::transpose(pixels_first, 1, 2), sizes);
}

// The map x of a call, dense, and what its layout decides.
struct Map {
  Tensor tensor;
  MapSizes sizes;

  Map(const char* op, const Tensor& x) : tensor(x), sizes() {
    STD_TORCH_CHECK(x.dim() >= 2, op, ": x must have at least 2 dimensions, got shape ", shape_of(x));
    kernel_dtype(op, x);
    sizes.N = x.size(0);
    sizes.C = x.size(1);
    sizes.P = 1;
    for (int64_t d = 2; d < x.dim(); ++d) sizes.P *= x.size(d);
    if (choose_layout()) return;
    const bool channels_last = x.dim() > 2 && (x.is_cuda() || x.stride(1) == 1);
    tensor = channels_last ? channels_last_copy(x) : torch::stable::contiguous(x);
    choose_layout();
  }

  // Sets sizes.channels_last; returns false if the kernels need another layout. With one pixel or one channel, both
  // layouts are the same, and the longer dimension should be the inner one.
  bool choose_layout() {
    sizes.channels_last = is_dense(tensor, true) && (tensor.is_cuda() || sizes.C > 1);
    return sizes.channels_last || (!tensor.is_cuda() && is_dense(tensor, false));
  }

  Dtype dtype() const { return kernel_dtype("", tensor); }

  // Returns an operand of the same shape and dtype in the same layout.
  Tensor like(const char* op, const Operand& operand) const {
    const Tensor& map = operand.tensor;
    bool same = map.dim() == tensor.dim();
    for (int64_t d = 0; same && d < map.dim(); ++d) same = map.size(d) == tensor.size(d);
    STD_TORCH_CHECK(same, op, ": x and ", operand.name, " must have the same shape, got ", shape_of(tensor), " and ",
                    shape_of(map));
    STD_TORCH_CHECK(map.scalar_type() == tensor.scalar_type(), op, ": x and ", operand.name,
                    " must have the same dtype, got ", torch::headeronly::toString(tensor.scalar_type()), " and ",
                    torch::headeronly::toString(map.scalar_type()));
    check_device(op, operand, tensor);
    if (is_dense(map, sizes.channels_last)) return map;
    Tensor copy = torch::stable::empty_like(tensor);
    torch::stable::copy_(copy, map);
    return copy;
  }

  std::optional<Tensor> like(const char* op, const char* name, const std::optional<Tensor>& map) const {
    return map.has_value() ? std::optional<Tensor>(like(op, {name, *map})) : std::nullopt;
  }
};

const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

// What determines y besides x and residual; keeps the converted vectors.
struct NormOperands {
  Tensor statistics, weight, bias;
  Norm norm;

  NormOperands(const char* op, const Map& x, const Tensor& statistics_, const Tensor& weight_, const Tensor& bias_,
               double eps, int64_t activation, double slope)
      : statistics(pair_of(op, {"statistics", statistics_}, x.tensor)),
        weight(vector_of(op, {"weight", weight_}, x.tensor)),
        bias(vector_of(op, {"bias", bias_}, x.tensor)),
        norm{x.dtype(),
             x.sizes,
             statistics.const_data_ptr(),
             weight.const_data_ptr(),
             bias.const_data_ptr(),
             eps,
             static_cast<Activation>(activation),
             slope} {
    STD_TORCH_CHECK(activation >= 0 && activation <= 2, op,
                    ": activation must be 0 (identity), 1 (relu) or 2 (leaky_relu), got ", activation);
    // The sign of y must be that of its argument: the backward reads it there.
    STD_TORCH_CHECK(slope >= 0, op, ": slope must not be negative, got ", slope);
  }
};

#ifdef USE_CUDA
using cc_attention::CudaCall;

Tensor workspace_for(const Map& x) {
  return torch::stable::new_empty(x.tensor, {norm_workspace_cuda(x.dtype(), x.sizes)}, ScalarType::Byte);
}
#endif

// x [N,C,...] -> float64 [2C+1] (norm.h)
Tensor batch_norm_sums(const Tensor& x_) {
  const Map x("batch_norm_sums", x_);
  Tensor sums = torch::stable::new_empty(x.tensor, {2 * x.sizes.C + 1}, ScalarType::Double);
  NormSums arguments = {x.dtype(), x.sizes, x.tensor.const_data_ptr(), static_cast<double*>(sums.mutable_data_ptr()),
                        nullptr};
#ifdef USE_CUDA
  if (x.tensor.is_cuda()) {
    const CudaCall call(x.tensor, false);
    Tensor workspace = workspace_for(x);
    arguments.workspace = workspace.mutable_data_ptr();
    call.check(norm_sums_cuda(arguments, call.stream));
    return sums;
  }
#endif
  norm_sums_cpu(arguments);
  return sums;
}

// The running mean or variance, in the dtype and layout of the kernels.
class Running {
 public:
  Running(const char* op, const char* name, const std::optional<Tensor>& original, const Tensor& sums, int64_t channels,
          ScalarType dtype)
      : original_(original) {
    if (!original.has_value()) return;
    STD_TORCH_CHECK(original->dim() == 1 && original->size(0) == channels, op, ": ", name,
                    " must have one element for each of the ", channels, " channels, got shape ", shape_of(*original));
    STD_TORCH_CHECK(original->device() == sums.device(), op, ": sums and ", name, " must be on the same device");
    kernel_dtype(op, *original);
    used_ = torch::stable::contiguous(torch::stable::to(*original, dtype));
  }

  void* data() { return used_.has_value() ? used_->mutable_data_ptr() : nullptr; }

  // Copies the result back if the kernel could not write to the original.
  void finish() {
    if (used_.has_value() && used_->const_data_ptr() != original_->const_data_ptr())
      torch::stable::copy_(*original_, *used_);
  }

 private:
  std::optional<Tensor> original_, used_;
};

// sums float64 [2C+1] -> S [2,C]: mean, and 1 / sqrt(variance + eps). Updates the running statistics [C].
// dtype is that of the maps.
Tensor batch_norm_statistics(const Tensor& sums_, const std::optional<Tensor>& running_mean,
                             const std::optional<Tensor>& running_var, double eps, double momentum, ScalarType dtype) {
  constexpr const char* op = "batch_norm_statistics";
  STD_TORCH_CHECK(sums_.dim() == 1 && sums_.size(0) % 2 == 1 && sums_.scalar_type() == ScalarType::Double, op,
                  ": sums must be those of batch_norm_sums, Double of shape [2 C + 1], got ",
                  torch::headeronly::toString(sums_.scalar_type()), " of shape ", shape_of(sums_));
  const Tensor sums = torch::stable::contiguous(sums_);
  const int64_t channels = sums.size(0) / 2;
  const ScalarType computing = computing_dtype(dtype);
  Tensor statistics = torch::stable::new_empty(sums, {2, channels}, computing);
  Running mean(op, "running_mean", running_mean, sums, channels, computing);
  Running variance(op, "running_var", running_var, sums, channels, computing);
  const NormStatistics arguments = {kernel_dtype(op, statistics),
                                    channels,
                                    static_cast<const double*>(sums.const_data_ptr()),
                                    eps,
                                    momentum,
                                    mean.data(),
                                    variance.data(),
                                    statistics.mutable_data_ptr()};
#ifdef USE_CUDA
  if (sums.is_cuda()) {
    const CudaCall call(sums, false);
    call.check(norm_statistics_cuda(arguments, call.stream));
    mean.finish();
    variance.finish();
    return statistics;
  }
#endif
  norm_statistics_cpu(arguments);
  mean.finish();
  variance.finish();
  return statistics;
}

// x, residual [N,C,...] -> y [N,C,...]
Tensor batch_norm_apply(const Tensor& x_, const Tensor& statistics, const Tensor& weight, const Tensor& bias,
                        const std::optional<Tensor>& residual_, double eps, int64_t activation, double slope) {
  constexpr const char* op = "batch_norm_apply";
  const Map x(op, x_);
  const NormOperands operands(op, x, statistics, weight, bias, eps, activation, slope);
  const std::optional<Tensor> residual = x.like(op, "residual", residual_);
  Tensor y = torch::stable::empty_like(x.tensor);
  const NormApply arguments = {operands.norm, x.tensor.const_data_ptr(), data_or_null(residual), y.mutable_data_ptr()};
#ifdef USE_CUDA
  if (x.tensor.is_cuda()) {
    const CudaCall call(x.tensor, false);
    call.check(norm_apply_cuda(arguments, call.stream));
    return y;
  }
#endif
  norm_apply_cpu(arguments);
  return y;
}

// grad, the gradient of y -> the sums S [2,C], the gradient of weight S [C], and, if asked for, the gradient of
// residual [N,C,...] (otherwise an empty tensor).
std::tuple<Tensor, Tensor, Tensor> batch_norm_backward_sums(const Tensor& grad_, const Tensor& x_,
                                                            const std::optional<Tensor>& y_, const Tensor& statistics,
                                                            const Tensor& weight, const Tensor& bias, double eps,
                                                            int64_t activation, double slope, bool with_masked) {
  constexpr const char* op = "batch_norm_backward_sums";
  const Map x(op, x_);
  const NormOperands operands(op, x, statistics, weight, bias, eps, activation, slope);
  const Tensor grad = x.like(op, {"grad", grad_});
  const std::optional<Tensor> y = x.like(op, "y", y_);
  Tensor sums = torch::stable::new_empty(operands.statistics, {2, x.sizes.C});
  Tensor grad_weight = torch::stable::new_empty(operands.statistics, {x.sizes.C});
  Tensor masked = with_masked ? torch::stable::empty_like(x.tensor) : torch::stable::new_empty(x.tensor, {0});
  NormBackwardSums arguments = {operands.norm,
                                x.tensor.const_data_ptr(),
                                data_or_null(y),
                                grad.const_data_ptr(),
                                with_masked ? masked.mutable_data_ptr() : nullptr,
                                sums.mutable_data_ptr(),
                                grad_weight.mutable_data_ptr(),
                                nullptr};
#ifdef USE_CUDA
  if (x.tensor.is_cuda()) {
    const CudaCall call(x.tensor, false);
    Tensor workspace = workspace_for(x);
    arguments.workspace = workspace.mutable_data_ptr();
    call.check(norm_backward_sums_cuda(arguments, call.stream));
    return {sums, grad_weight, masked};
  }
#endif
  norm_backward_sums_cpu(arguments);
  return {sums, grad_weight, masked};
}

// grad, the gradient of y or, if `masked`, the masked map of batch_norm_backward_sums -> the gradient of x [N,C,...].
// sums S [2,C] and count float64 [1] are those of all processes; without them, the statistics are constants.
Tensor batch_norm_backward_input(const Tensor& grad_, const Tensor& x_, const std::optional<Tensor>& y_,
                                 const Tensor& statistics, const Tensor& weight, const Tensor& bias,
                                 const std::optional<Tensor>& sums_, const std::optional<Tensor>& count, double eps,
                                 int64_t activation, double slope, bool masked) {
  constexpr const char* op = "batch_norm_backward_input";
  const Map x(op, x_);
  const NormOperands operands(op, x, statistics, weight, bias, eps, activation, slope);
  const Tensor grad = x.like(op, {"grad", grad_});
  const std::optional<Tensor> y = x.like(op, "y", y_);
  STD_TORCH_CHECK(sums_.has_value() == count.has_value(), op, ": sums and count belong together");
  std::optional<Tensor> sums;
  if (sums_.has_value()) {
    sums = pair_of(op, {"sums", *sums_}, x.tensor);
    STD_TORCH_CHECK(count->numel() == 1 && count->scalar_type() == ScalarType::Double, op,
                    ": count must be one Double, got ", torch::headeronly::toString(count->scalar_type()), " of shape ",
                    shape_of(*count));
    check_device(op, {"count", *count}, x.tensor);
  }
  Tensor grad_x = torch::stable::empty_like(x.tensor);
  const NormBackwardInput arguments = {operands.norm,
                                       x.tensor.const_data_ptr(),
                                       data_or_null(y),
                                       grad.const_data_ptr(),
                                       masked,
                                       data_or_null(sums),
                                       static_cast<const double*>(data_or_null(count)),
                                       grad_x.mutable_data_ptr()};
#ifdef USE_CUDA
  if (x.tensor.is_cuda()) {
    const CudaCall call(x.tensor, false);
    call.check(norm_backward_input_cuda(arguments, call.stream));
    return grad_x;
  }
#endif
  norm_backward_input_cpu(arguments);
  return grad_x;
}

void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("batch_norm_sums", TORCH_BOX(&batch_norm_sums));
  library.impl("batch_norm_statistics", TORCH_BOX(&batch_norm_statistics));
  library.impl("batch_norm_apply", TORCH_BOX(&batch_norm_apply));
  library.impl("batch_norm_backward_sums", TORCH_BOX(&batch_norm_backward_sums));
  library.impl("batch_norm_backward_input", TORCH_BOX(&batch_norm_backward_input));
}

}  // namespace
}  // namespace fused

STABLE_TORCH_LIBRARY_FRAGMENT(fused, library) {
  library.def("batch_norm_sums(Tensor x) -> Tensor");
  library.def(
      "batch_norm_statistics(Tensor sums, Tensor(a!)? running_mean, Tensor(b!)? running_var, float eps, float "
      "momentum, ScalarType dtype) -> Tensor");
  library.def(
      "batch_norm_apply(Tensor x, Tensor statistics, Tensor weight, Tensor bias, Tensor? residual, float eps, int "
      "activation, float slope) -> Tensor");
  library.def(
      "batch_norm_backward_sums(Tensor grad, Tensor x, Tensor? y, Tensor statistics, Tensor weight, Tensor bias, "
      "float eps, int activation, float slope, bool masked) -> (Tensor sums, Tensor grad_weight, Tensor masked)");
  library.def(
      "batch_norm_backward_input(Tensor grad, Tensor x, Tensor? y, Tensor statistics, Tensor weight, Tensor bias, "
      "Tensor? sums, Tensor? count, float eps, int activation, float slope, bool masked) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fused, CPU, library) { fused::implement(library); }

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(fused, CUDA, library) { fused::implement(library); }
#endif
