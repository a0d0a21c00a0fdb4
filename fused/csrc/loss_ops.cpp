// The operators of upsampled logits: schemas, checks and output shapes.
#include <torch/csrc/stable/library.h>

#include "../../cc_attention/csrc/common.h"
#include "loss.h"

STABLE_TORCH_LIBRARY_FRAGMENT(fused, library) {}
