// The kernels compiled for each instruction set.
//
// The standard and torch headers are included here, before a .cpp file selects its instruction set. The linker may
// share their inline functions with code for other processors, so they must not use that instruction set.
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
