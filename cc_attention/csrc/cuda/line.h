// A line: a row or a column of an image, as pixels with a constant stride. It serves maps of any number of channels.
#pragma once

#include "device.h"

namespace cc_attention {

struct Line {
  int64_t first;  // index of the first pixel in the batch
  int64_t step;
  int length;
  __device__ __forceinline__ int64_t pixel(int i) const { return first + i * step; }
};

inline int64_t lines(const Sizes& sizes, bool column) { return sizes.N * (column ? sizes.W : sizes.H); }

// Returns line number `index` of lines(sizes, column). Columns with neighboring indices are neighbors in memory.
__device__ __forceinline__ Line line_of(const Sizes& sizes, bool column, int64_t index) {
  if (column) return {index / sizes.W * sizes.H * sizes.W + index % sizes.W, sizes.W, static_cast<int>(sizes.H)};
  return {index * sizes.W, 1, static_cast<int>(sizes.W)};
}

}  // namespace cc_attention
