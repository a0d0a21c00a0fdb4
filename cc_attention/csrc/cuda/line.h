// A line: pixels along one axis (a row, a column, or one place in all frames) with a constant stride. It serves maps of
// any number of channels.
#pragma once

#include "device.h"

namespace cc_attention {

template <class Index>
struct LineOf {
  Index first;  // index of the first pixel in the batch
  int64_t step;
  int length;
  __device__ __forceinline__ int64_t pixel(int i) const { return first + i * step; }
};

// A pass over all lines of one axis. The last pass of a call includes the pixel itself, the others do not. All but the
// first add to the results of the earlier ones.
struct Pass {
  int64_t lines, step;
  int length;
  bool first, last;
  bool backwards;  // starts with the lines that the previous pass used last, which are still in the L2 cache
};

struct Passes {
  Pass at[3];
  int count = 0;
  const Pass* begin() const { return at; }
  const Pass* end() const { return at + count; }
};

inline Passes passes_of(const Sizes& sizes, int axes) {
  const int64_t lengths[] = {sizes.T, sizes.H, sizes.W};
  Passes passes;
  int64_t outside = sizes.N;  // the product of the lengths of the axes before this one
  for (const Axis axis : {kFrames, kColumn, kRow}) {
    const int64_t length = lengths[axis];
    const int64_t step = axis == kFrames ? sizes.H * sizes.W : axis == kColumn ? sizes.W : 1;
    if (axes >> axis & 1) {
      const bool first = passes.count == 0, last = axes >> axis == 1;
      passes.at[passes.count] = {outside * step, step, static_cast<int>(length), first, last, passes.count % 2 == 1};
      ++passes.count;
    }
    outside *= length;
  }
  return passes;
}

// Returns line number `index` of a pass. Lines with neighboring indices are neighbors in memory.
__device__ __forceinline__ LineOf<int64_t> line_of(const Pass& pass, unsigned index) {
  const unsigned step = static_cast<unsigned>(pass.step);
  return {index / step * (pass.step * pass.length) + index % step, pass.step, pass.length};
}

}  // namespace cc_attention
