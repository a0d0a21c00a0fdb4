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
#include <cstdlib>
#include <limits>
#include <numeric>
#include <string_view>
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

// Returns the kernels of the best instruction set that the processor supports. ATEN_CPU_CAPABILITY limits it to
// "default" or "avx2", as it does for PyTorch's own kernels.
template <typename K>
const K& best_of(const K& baseline, const K& avx2, const K& avx512) {
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view limit = variable == nullptr ? "" : variable;
  if (limit == "default" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return baseline;
  const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return supported && limit != "avx2" ? avx512 : avx2;
}
#endif

}  // namespace cc_attention
