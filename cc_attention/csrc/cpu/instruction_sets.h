// The kernels compiled for each instruction set.
//
// The headers of the kernels are included here, before a .cpp file names its instruction set: what they define is
// shared with code for other processors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "../kernels.h"

namespace cc_attention {

struct Kernels {
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
  void (*primitive)(Primitive, Dtype, const Sizes&, const void*, const void*, void*);
};

extern const Kernels kBaseline;
#ifdef __x86_64__
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace cc_attention
