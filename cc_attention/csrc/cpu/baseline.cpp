// Kernels for any processor: vectors of 16 bytes.
#include "instruction_sets.h"

namespace cc_attention {
namespace {
constexpr int kVectorBytes = 16, kTileRows = 4, kTileVectors = 2;
}
}  // namespace cc_attention

#include "lines.h"

const cc_attention::Kernels cc_attention::kBaseline = {run_forward, run_backward, run_primitive};
