// The operators of upsampled logits: schemas, checks and output shapes. loss.h specifies the results, and
// fused/loss_reference.py computes them in plain PyTorch.
//
// Tensors may have any strides. Logits of any floating dtype are converted to S: float64 stays, others become float32.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "../../cc_attention/csrc/common.h"
#include "loss.h"

namespace fused {
namespace {

using namespace cc_attention;
using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::to;

constexpr int64_t kMostClasses = 255;  // indices are uint8, and 255 stands for NaN

Tensor converted(const Tensor& tensor, ScalarType dtype) {
  return contiguous(tensor.scalar_type() == dtype ? tensor : to(tensor, dtype));
}

// Returns the logits [N,C,H,W], dense and in S.
Tensor dense_logits(const char* op, const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 4 && logits.size(1) > 0 && logits.size(2) > 0 && logits.size(3) > 0, op,
                  ": logits must be [N, C, H, W] with at least one class, row and column, got shape ",
                  shape_of(logits));
  kernel_dtype(op, logits);  // throws unless they are floating
  return converted(logits, summing_dtype(logits));
}

// Returns the target [N,h,w], dense and int64.
Tensor dense_target(const char* op, const Tensor& target, const Tensor& logits) {
  STD_TORCH_CHECK(target.dim() == 3 && target.size(0) == logits.size(0) && target.size(1) > 0 && target.size(2) > 0, op,
                  ": target must be [N, h, w] with the N of the logits and at least one row and column, got shape ",
                  shape_of(target), " for logits of shape ", shape_of(logits));
  STD_TORCH_CHECK(target.device() == logits.device(), op, ": target and logits must be on the same device");
  return converted(target, ScalarType::Long);
}

// Returns an optional vector of `count` elements, dense and in the dtype of the dense logits.
std::optional<Tensor> dense_vector(const char* op, const Operand& operand, int64_t count, const Tensor& logits) {
  STD_TORCH_CHECK(operand.tensor.numel() == count, op, ": ", operand.name, " must have ", count,
                  count == 1 ? " element" : " elements", ", got shape ", shape_of(operand.tensor));
  STD_TORCH_CHECK(operand.tensor.device() == logits.device(), op, ": ", operand.name,
                  " and logits must be on the same device");
  return converted(operand.tensor, logits.scalar_type());
}

Logits upsampled(const Tensor& logits, int64_t height, int64_t width) {
  return {logits.scalar_type() == ScalarType::Double,
          {logits.size(0), logits.size(1), logits.size(2), logits.size(3), height, width},
          logits.const_data_ptr()};
}

// Throws if a label is neither a class nor ignored.
void check_labels(const char* op, const Tensor& target, int64_t ignored, int64_t classes) {
  const int64_t* label = static_cast<const int64_t*>(target.const_data_ptr());
  for (const int64_t* end = label + target.numel(); label != end; ++label)
    STD_TORCH_CHECK(*label == ignored || (*label >= 0 && *label < classes), op, ": the target has the label ", *label,
                    ", but the logits have ", classes, " classes, and ", ignored, " is ignored");
}

// logits [N,C,H,W], target [N,h,w], class_weights [C], threshold [1] -> totals [2], grad [N,C,H,W] (loss.h). grad is
// empty unless needs_grad. On the CPU, a wrong label is an error.
std::tuple<Tensor, Tensor> segmentation_loss(const Tensor& logits_, const Tensor& target_, int64_t ignored,
                                             const std::optional<Tensor>& class_weights_,
                                             const std::optional<Tensor>& threshold_, bool needs_grad) {
  constexpr const char* op = "segmentation_loss";
  const Tensor logits = dense_logits(op, logits_), target = dense_target(op, target_, logits);
  std::optional<Tensor> class_weights, threshold;
  if (class_weights_) class_weights = dense_vector(op, {"class_weights", *class_weights_}, logits.size(1), logits);
  if (threshold_) threshold = dense_vector(op, {"threshold", *threshold_}, 1, logits);
  Tensor totals = new_empty(logits, {2});
  Tensor grad = needs_grad ? new_empty(logits, logits.sizes()) : new_empty(logits, {0});
  SegmentationLoss arguments = {upsampled(logits, target.size(1), target.size(2)),
                                static_cast<const int64_t*>(target.const_data_ptr()),
                                ignored,
                                class_weights ? class_weights->const_data_ptr() : nullptr,
                                threshold ? threshold->const_data_ptr() : nullptr,
                                totals.mutable_data_ptr(),
                                needs_grad ? grad.mutable_data_ptr() : nullptr,
                                nullptr};
#ifdef USE_CUDA
  if (logits.is_cuda()) {
    const CudaCall call(logits, false);
    const int64_t bytes = loss_workspace_cuda(arguments.input.wide, arguments.input.sizes);
    Tensor workspace = new_empty(logits, {bytes}, ScalarType::Byte);
    arguments.workspace = workspace.mutable_data_ptr();
    call.check(segmentation_loss_cuda(arguments, call.stream));
    return {totals, grad};
  }
#endif
  segmentation_loss_cpu(arguments);
  const bool finite = arguments.input.wide ? !std::isnan(*static_cast<const double*>(arguments.totals))
                                           : !std::isnan(*static_cast<const float*>(arguments.totals));
  if (!finite) check_labels(op, target, ignored, logits.size(1));
  return {totals, grad};
}

// logits [N,C,H,W], target [N,h,w] -> [N,rows,columns] (loss.h)
Tensor coarse_probability(const Tensor& logits_, const Tensor& target_, int64_t ignored, int64_t rows,
                          int64_t columns) {
  constexpr const char* op = "coarse_probability";
  const Tensor logits = dense_logits(op, logits_), target = dense_target(op, target_, logits);
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, op, ": rows and columns must not be negative, got ", rows, " and ",
                  columns);
  Tensor probability = new_empty(logits, {logits.size(0), rows, columns});
  const CoarseProbability arguments = {upsampled(logits, target.size(1), target.size(2)),
                                       static_cast<const int64_t*>(target.const_data_ptr()),
                                       ignored,
                                       rows,
                                       columns,
                                       probability.mutable_data_ptr()};
#ifdef USE_CUDA
  if (logits.is_cuda()) {
    const CudaCall call(logits, false);
    call.check(coarse_probability_cuda(arguments, call.stream));
    return probability;
  }
#endif
  coarse_probability_cpu(arguments);
  return probability;
}

// logits [N,C,H,W] -> uint8 [N,height,width] (loss.h)
Tensor upsampled_classes(const Tensor& logits_, int64_t height, int64_t width) {
  constexpr const char* op = "upsampled_classes";
  const Tensor logits = dense_logits(op, logits_);
  STD_TORCH_CHECK(logits.size(1) <= kMostClasses, op, ": logits must have at most ", kMostClasses,
                  " classes, got shape ", shape_of(logits));
  STD_TORCH_CHECK(height > 0 && width > 0, op, ": height and width must be at least 1, got ", height, " and ", width);
  Tensor classes = new_empty(logits, {logits.size(0), height, width}, ScalarType::Byte);
  const UpsampledClasses arguments = {upsampled(logits, height, width),
                                      static_cast<uint8_t*>(classes.mutable_data_ptr())};
#ifdef USE_CUDA
  if (logits.is_cuda()) {
    const CudaCall call(logits, false);
    call.check(upsampled_classes_cuda(arguments, call.stream));
    return classes;
  }
#endif
  upsampled_classes_cpu(arguments);
  return classes;
}

void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("segmentation_loss", TORCH_BOX(&segmentation_loss));
  library.impl("coarse_probability", TORCH_BOX(&coarse_probability));
  library.impl("upsampled_classes", TORCH_BOX(&upsampled_classes));
}

}  // namespace
}  // namespace fused

STABLE_TORCH_LIBRARY_FRAGMENT(fused, library) {
  library.def(
      "segmentation_loss(Tensor logits, Tensor target, int ignored, Tensor? class_weights, Tensor? threshold, bool "
      "needs_grad) -> (Tensor totals, Tensor grad)");
  library.def(
      "coarse_probability(Tensor logits, Tensor target, int ignored, SymInt rows, SymInt columns) -> Tensor "
      "probability");
  library.def("upsampled_classes(Tensor logits, SymInt height, SymInt width) -> Tensor classes");
}

STABLE_TORCH_LIBRARY_IMPL(fused, CPU, library) { fused::implement(library); }

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(fused, CUDA, library) { fused::implement(library); }
#endif
