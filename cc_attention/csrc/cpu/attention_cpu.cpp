// The three primitives on the CPU. A task is one row of pixels of one sample and owns all its outputs; the innermost
// loops run over neighbouring pixels of that row, where memory is contiguous.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../kernels.h"

namespace cc_attention {
namespace {

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int64_t kTile = 16;         // pixels whose sums stay in registers
constexpr int64_t kGrain = 1 << 16;  // multiplications that make a task worth a thread

// Calls body(x, width) for tiles that cover [0, extent). A full tile's width is a compile-time constant: its loops unroll.
template <typename Body>
void for_each_tile(int64_t extent, const Body& body) {
  int64_t x = 0;
  for (; x + kTile <= extent; x += kTile) body(x, std::integral_constant<int64_t, kTile>());
  if (x < extent) body(x, extent - x);
}

// out[l, y, x] for all l and x, one sample. a, b [C,H,W]; sums [L,W], all zero on entry; out [L,H,W]
// Channels are the outer loop, as each one's plane of b is then read in one piece.
template <typename T>
void score_row(const Sizes& s, int64_t y, const T* a, const T* b, Sum<T>* sums, T* out) {
  for (int64_t c = 0; c < s.C; ++c, a += s.H * s.W, b += s.H * s.W) {
    const T* a_row = a + y * s.W;
    Sum<T>* sum = sums;
    for (int64_t l = 0; l < s.W; ++l, sum += s.W) {
      const Sum<T> factor = b[y * s.W + l];
      for (int64_t x = 0; x < s.W; ++x) sum[x] += static_cast<Sum<T>>(a_row[x]) * factor;
    }
    for (int64_t j = 0; j < s.H - 1; ++j, sum += s.W) {
      const T* b_row = b + other_row(j, y) * s.W;
      for (int64_t x = 0; x < s.W; ++x) sum[x] += static_cast<Sum<T>>(a_row[x]) * static_cast<Sum<T>>(b_row[x]);
    }
  }
  for (int64_t l = 0; l < s.L(); ++l)
    for (int64_t x = 0; x < s.W; ++x) out[(l * s.H + y) * s.W + x] = static_cast<T>(sums[l * s.W + x]);
}

// The weights with which row y of a gather's output sums its positions. w [L,H,W] -> weights [L,W]
template <typename T>
void gather_weights(const Sizes& s, int64_t y, const T* w, Sum<T>* weights) {
  for (int64_t l = 0; l < s.L(); ++l)
    for (int64_t x = 0; x < s.W; ++x) weights[l * s.W + x] = w[(l * s.H + y) * s.W + x];
}

// The same for a scatter: the pixels that see (y, x) are the positions of (y, x), each with the weight it gives to (y, x).
template <typename T>
void scatter_weights(const Sizes& s, int64_t y, const T* w, Sum<T>* weights) {
  for (int64_t x = 0; x < s.W; ++x)
    for (int64_t l = 0; l < s.W; ++l) weights[l * s.W + x] = w[(x * s.H + y) * s.W + l];
  for (int64_t l = s.W; l < s.L(); ++l) {
    const int64_t row = other_row(l - s.W, y);
    const T* entry = w + ((s.W + column_entry(y, row)) * s.H + row) * s.W;
    for (int64_t x = 0; x < s.W; ++x) weights[l * s.W + x] = entry[x];
  }
}

// out[c, y, x] = sum over l of weights[l, x] * v[c, position l of (y, x)], all c and x, one sample. v, out [C,H,W]
template <typename T>
void weighted_sum_row(const Sizes& s, int64_t y, const Sum<T>* weights, const T* v, T* out) {
  for (int64_t c = 0; c < s.C; ++c, v += s.H * s.W, out += s.H * s.W) {
    for_each_tile(s.W, [&](int64_t x, auto width) {
      Sum<T> sum[kTile] = {};
      const Sum<T>* weight = weights + x;
      for (int64_t l = 0; l < s.W; ++l, weight += s.W) {
        const Sum<T> factor = v[y * s.W + l];
        for (int64_t i = 0; i < width; ++i) sum[i] += weight[i] * factor;
      }
      for (int64_t j = 0; j < s.H - 1; ++j, weight += s.W) {
        const T* v_tile = v + other_row(j, y) * s.W + x;
        for (int64_t i = 0; i < width; ++i) sum[i] += weight[i] * static_cast<Sum<T>>(v_tile[i]);
      }
      T* out_tile = out + y * s.W + x;
      for (int64_t i = 0; i < width; ++i) out_tile[i] = static_cast<T>(sum[i]);
    });
  }
}

template <typename T>
void run(Primitive primitive, const Sizes& s, const T* first, const T* second, T* out) {
  const int64_t maps = s.C * s.H * s.W;           // elements of one sample of a feature map
  const int64_t positions = s.L() * s.H * s.W;    // and of one sample of weights
  const int64_t work = std::max<int64_t>(1, s.L() * s.C * s.W);
  torch::stable::parallel_for(0, s.N * s.H, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
    std::vector<Sum<T>> line(s.L() * s.W);  // what the row's pixels sum up, or what they weigh their positions by
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / s.H, y = task % s.H;
      if (primitive == Primitive::score) {
        std::fill(line.begin(), line.end(), Sum<T>(0));
        score_row(s, y, first + n * maps, second + n * maps, line.data(), out + n * positions);
        continue;
      }
      const auto load = primitive == Primitive::gather ? gather_weights<T> : scatter_weights<T>;
      load(s, y, first + n * positions, line.data());
      weighted_sum_row(s, y, line.data(), second + n * maps, out + n * maps);
    }
  });
}

template <typename T>
void run(Primitive primitive, const Sizes& sizes, const void* first, const void* second, void* out) {
  run(primitive, sizes, static_cast<const T*>(first), static_cast<const T*>(second), static_cast<T*>(out));
}

}  // namespace

void run_cpu(Primitive primitive, Dtype dtype, const Sizes& sizes, const void* first, const void* second, void* out) {
  switch (dtype) {
    case Dtype::float32: return run<float>(primitive, sizes, first, second, out);
    case Dtype::float64: return run<double>(primitive, sizes, first, second, out);
    case Dtype::float16: return run<torch::headeronly::Half>(primitive, sizes, first, second, out);
    case Dtype::bfloat16: return run<torch::headeronly::BFloat16>(primitive, sizes, first, second, out);
  }
}

}  // namespace cc_attention
