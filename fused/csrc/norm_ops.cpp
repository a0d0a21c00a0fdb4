// The operators of the activated batch norm: schemas, checks and output shapes.
#include <torch/csrc/stable/library.h>

#include "../../cc_attention/csrc/common.h"
#include "norm.h"

STABLE_TORCH_LIBRARY_FRAGMENT(fused, library) {}
