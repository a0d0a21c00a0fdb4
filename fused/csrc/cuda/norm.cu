// The activated batch norm for channels_last maps: a matrix of pixels (rows) and channels (columns), dense in memory.
//
// All passes are limited by the memory, so they differ only in what they do with the numbers. A thread owns a run of
// neighboring channels, 16 bytes if the sizes and addresses allow it and a single channel otherwise, at every n-th
// pixel. So it keeps what belongs to its channels in registers. It starts the loads of kAhead pixels before it uses the
// first. Neighboring threads own neighboring runs, up to 128 bytes of a pixel, then those of the next pixel.
//
// Sums: a thread adds up its pixels in Sum<T>, at most kMostRows of them. Further sums are in double: over the threads
// of a block, which writes one partial sum per channel to the workspace, and over the blocks, in a second kernel. Every
// order is fixed. The number of blocks depends on the sizes alone, not on the GPU, so that the bits do not either.
// (They do depend on whether all addresses are multiples of 16.)
//
// The sums run from the last pixel to the first, and the passes that follow them from the first to the last: x was
// written just before the sums and is read just after, and part of it is still in the L2 cache.
#include <algorithm>
#include <initializer_list>

#include "../../../cc_attention/csrc/cuda/device.h"
#include "../norm.h"

namespace fused {
namespace {

namespace device = cc_attention::device;
using cc_attention::Sum;
using device::kAllLanes;
using device::kWarp;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRunBytes = 16;
constexpr int kLanes = 8;         // threads side by side along the channels, with runs of 16 bytes
constexpr int kScalarLanes = 32;  // the same with runs of one channel
constexpr int kAhead = 4;         // pixels whose loads are started together
constexpr int kMostRows = 128;    // pixels that a thread adds up, so that the rounding error of its sums stays small
// The number of blocks for large maps: four for each of the 132 multiprocessors of an H100 or H200. Where fewer fit,
// they run one after the other. On other GPUs, the last blocks may run on a part of the multiprocessors. That costs
// little: a block has 16 KB of loads under way for each map that it reads, so some of the blocks saturate the memory.
constexpr int64_t kBlocks = 528;

// How a map is divided. Block b works on tile b % tiles of the channels, and on rows of part b / tiles.
struct Grid {
  int64_t rows, channels;
  int lanes;       // threads along the channels: a power of two, at most a warp
  unsigned tiles;  // of lanes * run channels
  unsigned parts;  // of the rows: a block works on every parts-th group of kThreads / lanes rows
  int rounds;      // groups of rows that every part has; the first `extra` rows of one more round remain
  int64_t extra;

  dim3 blocks() const { return dim3(tiles * parts); }
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `run` is the number of channels of a thread.
Grid make_grid(const MapSizes& sizes, int run) {
  Grid grid;
  grid.rows = sizes.N * sizes.P;
  grid.channels = sizes.C;
  const int64_t runs = ceil_div(sizes.C, run);
  grid.lanes = 1;
  while (grid.lanes < (run > 1 ? kLanes : kScalarLanes) && grid.lanes < runs) grid.lanes *= 2;
  grid.tiles = static_cast<unsigned>(std::max<int64_t>(1, ceil_div(runs, grid.lanes)));
  const int64_t group = kThreads / grid.lanes;
  const int64_t few = ceil_div(grid.rows, group * kMostRows), many = ceil_div(grid.rows, group * kAhead);
  const int64_t parts = std::max({int64_t{1}, few, std::min(many, kBlocks / grid.tiles)});
  grid.parts = static_cast<unsigned>(parts);
  grid.rounds = static_cast<int>(grid.rows / (parts * group));
  grid.extra = grid.rows % (parts * group);
  return grid;
}

// The runs of a thread: `count` of them, the first at offset `first` of the map and the others `apart` elements apart.
struct Share {
  int64_t channel, first, apart;
  int count;  // 0 beyond the channels
};

enum class Order { first_to_last, last_to_first };

template <int run>
__device__ __forceinline__ Share share_of(const Grid& grid, Order order) {
  const int64_t tile = blockIdx.x % grid.tiles, part = blockIdx.x / grid.tiles, group = kThreads / grid.lanes;
  const int64_t channel = (tile * grid.lanes + threadIdx.x % grid.lanes) * run;
  const int64_t row = part * group + threadIdx.x / grid.lanes, step = grid.parts * group;
  const int count = channel < grid.channels ? grid.rounds + (row < grid.extra) : 0;
  if (order == Order::first_to_last) return {channel, row * grid.channels + channel, step * grid.channels, count};
  return {channel, (grid.rows - 1 - row) * grid.channels + channel, -step * grid.channels, count};
}

// A run as it lies in memory. It is held as words: the compiler would unpack 16-bit elements as soon as they are
// loaded.
template <class T, int run>
struct Run {
  using Word = std::conditional_t<run == 1, T, uint4>;
  Word word;

  __device__ __forceinline__ void load(const T* from) { word = *reinterpret_cast<const Word*>(from); }
  __device__ __forceinline__ Sum<T> at(int i) const {
    T elements[run];
    memcpy(elements, &word, sizeof word);
    return device::to_sum(elements[i]);
  }
};

template <class T, int run>
__device__ __forceinline__ void store(T* to, const Sum<T> (&values)[run]) {
  if constexpr (run == 1) {
    *to = device::from_sum<T>(values[0]);
  } else {
    uint32_t words[kRunBytes / 4];
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int i = 0; i < run / 2; ++i) words[i] = device::pack<T>(values[2 * i], values[2 * i + 1]);
    } else {
      memcpy(words, values, kRunBytes);
    }
    device::store_words(to, words);
  }
}

// Loads the runs at offsets at, at + apart, ... of a map; there are `count`.
template <class T, int run>
__device__ __forceinline__ void load_runs(Run<T, run> (&runs)[kAhead], const T* map, int64_t at, int64_t apart,
                                          int count) {
#pragma unroll
  for (int k = 0; k < kAhead; ++k)
    if (k < count) runs[k].load(map + at + k * apart);
}

// Loads numbers of the thread's channels, from vectors of all channels.
template <class S, int run>
__device__ __forceinline__ void load_numbers(S (&numbers)[run], const void* vector, int64_t channel) {
  constexpr int kEach = run == 1 ? 1 : kRunBytes / sizeof(S);
#pragma unroll
  for (int i = 0; i < run; i += kEach) {
    Run<S, kEach> part;
    part.load(static_cast<const S*>(vector) + channel + i);
#pragma unroll
    for (int k = 0; k < kEach; ++k) numbers[i + k] = part.at(k);
  }
}

// z = (x - mean) * scale + bias.
template <class S, int run>
struct Affine {
  S mean[run], scale[run], bias[run];

  __device__ __forceinline__ Affine(const Norm& norm, int64_t channel) {
    S inverse[run];
    load_numbers(mean, norm.statistics, channel);
    load_numbers(inverse, norm.statistics, norm.sizes.C + channel);
    load_numbers(scale, norm.weight, channel);
    load_numbers(bias, norm.bias, channel);
#pragma unroll
    for (int i = 0; i < run; ++i) scale[i] = (std::abs(scale[i]) + static_cast<S>(norm.eps)) * inverse[i];
  }
  // An explicit fma here and below: kernels must agree to the last bit, whatever the compiler makes of an expression.
  __device__ __forceinline__ S z(int i, S x) const { return std::fma(x - mean[i], scale[i], bias[i]); }
};

// The activation, or its derivative times a number.
template <class S>
struct Activate {
  bool relu;
  S slope;

  __device__ __forceinline__ explicit Activate(const Norm& norm)
      : relu(norm.activation == Activation::relu),
        slope(norm.activation == Activation::identity ? S(1) : static_cast<S>(norm.slope)) {}
  // Returns `value` if `sign` is positive or NaN, and otherwise 0 or slope * value.
  __device__ __forceinline__ S operator()(S sign, S value) const {
    return sign <= 0 ? (relu ? S(0) : slope * value) : value;
  }
};

// Adds up numbers of all threads that agree in threadIdx.x % lanes. Returns to thread j < lanes * count the sum of
// numbers[j % count] over the threads with threadIdx.x % lanes = j / count.
template <int count>
__device__ __forceinline__ double sum_over_block(const double (&numbers)[count], int lanes) {
  constexpr int kMostLanes = count > 2 ? kLanes : kScalarLanes;
  __shared__ double partial[kWarps][count * kMostLanes];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    double sum = numbers[i];
    for (int distance = lanes; distance < kWarp; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    if (lane < lanes) partial[warp][lane * count + i] = sum;
  }
  __syncthreads();
  double sum = 0;
  if (threadIdx.x < lanes * count)
    for (int w = 0; w < kWarps; ++w) sum += partial[w][threadIdx.x];
  return sum;
}

// Writes the sums of a block, numbers[0:run] and numbers[run:2*run] of each thread's channels, to the workspace
// [parts,2,C].
template <int run>
__device__ __forceinline__ void write_partial_sums(const double (&numbers)[2 * run], const Grid& grid,
                                                   double* partial) {
  const double sum = sum_over_block(numbers, grid.lanes);
  const int lane = threadIdx.x / (2 * run), which = threadIdx.x / run % 2, i = threadIdx.x % run;
  const int64_t tile = blockIdx.x % grid.tiles, part = blockIdx.x / grid.tiles;
  const int64_t channel = (tile * grid.lanes + lane) * run + i;
  if (lane < grid.lanes && channel < grid.channels) partial[(2 * part + which) * grid.channels + channel] = sum;
}

// A thread sums the distances from its first pixel. Their squares are not much larger than the variance, so it shows in
// them also if the mean is far from zero.
template <class T, int run>
__global__ void __launch_bounds__(kThreads, 4) sums_kernel(NormSums a, Grid grid) {
  using S = Sum<T>;
  const Share share = share_of<run>(grid, Order::last_to_first);
  const T* const map = static_cast<const T*>(a.x);
  Run<T, run> first{};
  if (share.count > 0) first.load(map + share.first);
  S distances[run] = {}, squares[run] = {};
  int64_t at = share.first;
  for (int left = share.count; left > 0; left -= kAhead, at += kAhead * share.apart) {
    Run<T, run> x[kAhead];
    load_runs(x, map, at, share.apart, left);
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (k < left)
#pragma unroll
        for (int i = 0; i < run; ++i) {
          const S distance = x[k].at(i) - first.at(i);
          distances[i] += distance;
          squares[i] = std::fma(distance, distance, squares[i]);
        }
  }
  double numbers[2 * run];
#pragma unroll
  for (int i = 0; i < run; ++i) {
    const double shift = first.at(i), sum = distances[i], shifts = share.count * shift;
    numbers[i] = shifts + sum;
    numbers[run + i] = squares[i] + shift * (shifts + 2 * sum);
  }
  write_partial_sums<run>(numbers, grid, static_cast<double*>(a.workspace));
}

// Blocks of this many channels finish the sums: 32 bytes, the smallest piece that is read from memory.
constexpr int kFinished = 4;

// Returns to each of the first kFinished threads a total of partial[parts,entries], that of `entry`.
__device__ __forceinline__ double total_of(const double* partial, unsigned parts, int64_t entries, int64_t entry) {
  double sum[1] = {};
  if (entry < entries) {
#pragma unroll 4
    for (unsigned part = threadIdx.x / kFinished; part < parts; part += kThreads / kFinished)
      sum[0] += partial[part * entries + entry];
  }
  return sum_over_block(sum, kFinished);
}

__device__ __forceinline__ int64_t finished_entry() {
  return static_cast<int64_t>(blockIdx.x) * kFinished + threadIdx.x % kFinished;
}

__global__ void __launch_bounds__(kThreads) finish_sums_kernel(NormSums a, Grid grid) {
  const int64_t entries = 2 * grid.channels, entry = finished_entry();
  const double sum = total_of(static_cast<const double*>(a.workspace), grid.parts, entries, entry);
  if (threadIdx.x >= kFinished) return;
  if (entry < entries) a.sums[entry] = sum;
  if (entry == 0) a.sums[entries] = static_cast<double>(grid.rows);
}

template <class S>
__global__ void __launch_bounds__(kThreads) finish_backward_sums_kernel(NormBackwardSums a, Grid grid) {
  const int64_t entries = 2 * grid.channels, entry = finished_entry(), channel = entry - grid.channels;
  double sum = total_of(static_cast<const double*>(a.workspace), grid.parts, entries, entry);
  if (threadIdx.x >= kFinished || entry >= entries) return;
  if (channel >= 0) {
    sum *= static_cast<const S*>(a.norm.statistics)[grid.channels + channel];
    const bool negative = static_cast<const S*>(a.norm.weight)[channel] < 0;
    static_cast<S*>(a.grad_weight)[channel] = static_cast<S>(negative ? -sum : sum);
  }
  static_cast<S*>(a.sums)[entry] = static_cast<S>(sum);
}

template <class S>
__global__ void __launch_bounds__(kThreads) statistics_kernel(NormStatistics a) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (channel >= a.C) return;
  const double count = a.sums[2 * a.C], mean = a.sums[channel] / count;
  const double deviation = std::fma(-mean, a.sums[channel], a.sums[a.C + channel]) / count;
  const double variance = deviation < 0 ? 0 : deviation;  // NaN stays
  S* const statistics = static_cast<S*>(a.statistics);
  statistics[channel] = static_cast<S>(mean);
  statistics[a.C + channel] = static_cast<S>(1 / sqrt(variance + a.eps));
  const auto update = [&](void* running, double value) {
    if (running == nullptr) return;
    S& number = static_cast<S*>(running)[channel];
    number = static_cast<S>((1 - a.momentum) * number + a.momentum * value);
  };
  update(a.running_mean, mean);
  update(a.running_variance, variance * (count / (count - 1)));
}

template <class T, int run>
__global__ void __launch_bounds__(kThreads, 3) apply_kernel(NormApply a, Grid grid) {
  using S = Sum<T>;
  const Share share = share_of<run>(grid, Order::first_to_last);
  if (share.count == 0) return;
  const T* const residuals = static_cast<const T*>(a.residual);
  const Affine<S, run> affine(a.norm, share.channel);
  const Activate<S> activate(a.norm);
  int64_t at = share.first;
  for (int left = share.count; left > 0; left -= kAhead, at += kAhead * share.apart) {
    Run<T, run> x[kAhead], residual[kAhead];
    load_runs(x, static_cast<const T*>(a.x), at, share.apart, left);
    if (residuals) load_runs(residual, residuals, at, share.apart, left);
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (k < left) {
        S y[run];
#pragma unroll
        for (int i = 0; i < run; ++i) {
          S z = affine.z(i, x[k].at(i));
          if (residuals) z += residual[k].at(i);
          y[i] = activate(z, z);
        }
        store(static_cast<T*>(a.y) + at + k * share.apart, y);
      }
  }
}

// What tells the sign of z: nothing if the activation is not to be differentiated.
enum class Mask { none, output, input };

Mask mask_of(const Norm& norm, const void* y, bool masked) {
  if (masked || norm.activation == Activation::identity) return Mask::none;
  return y ? Mask::output : Mask::input;
}

// Computes the gradient of z for the run of a pixel. Of x and y, only what the mask needs is read.
template <class T, int run>
__device__ __forceinline__ void gradient_of_z(Sum<T> (&gradient)[run], Mask mask, const Affine<Sum<T>, run>& affine,
                                              const Activate<Sum<T>>& activate, const Run<T, run>& x,
                                              const Run<T, run>& y, const Run<T, run>& grad) {
#pragma unroll
  for (int i = 0; i < run; ++i) {
    gradient[i] = grad.at(i);
    if (mask == Mask::output) gradient[i] = activate(y.at(i), gradient[i]);
    if (mask == Mask::input)  // rounded like y: a small number may become 0
      gradient[i] = activate(device::to_sum(device::from_sum<T>(affine.z(i, x.at(i)))), gradient[i]);
  }
}

template <class T, int run, Mask mask>
__global__ void __launch_bounds__(kThreads, 2) backward_sums_kernel(NormBackwardSums a, Grid grid) {
  using S = Sum<T>;
  const Share share = share_of<run>(grid, Order::last_to_first);
  T* const masked = static_cast<T*>(a.masked);
  double numbers[2 * run] = {};
  if (share.count > 0) {
    const Affine<S, run> affine(a.norm, share.channel);
    const Activate<S> activate(a.norm);
    S sums[run] = {}, products[run] = {};
    int64_t at = share.first;
    for (int left = share.count; left > 0; left -= kAhead, at += kAhead * share.apart) {
      Run<T, run> x[kAhead], y[kAhead], grad[kAhead];
      load_runs(grad, static_cast<const T*>(a.grad), at, share.apart, left);
      load_runs(x, static_cast<const T*>(a.x), at, share.apart, left);
      if (mask == Mask::output) load_runs(y, static_cast<const T*>(a.y), at, share.apart, left);
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (k < left) {
          S gradient[run];
          gradient_of_z(gradient, mask, affine, activate, x[k], y[k], grad[k]);
          if (masked) store(masked + at + k * share.apart, gradient);
#pragma unroll
          for (int i = 0; i < run; ++i) {
            sums[i] += gradient[i];
            products[i] = std::fma(gradient[i], x[k].at(i) - affine.mean[i], products[i]);
          }
        }
    }
#pragma unroll
    for (int i = 0; i < run; ++i) {
      numbers[i] = sums[i];
      numbers[run + i] = products[i];
    }
  }
  write_partial_sums<run>(numbers, grid, static_cast<double*>(a.workspace));
}

// With s0 and s1 the sums, the gradient of x is
//   scale * (gradient - s0 / count - (x - mean) * inverse * s1 / count) = scale * (gradient - (x - mean) * slope -
//   level)
template <class T, int run, Mask mask>
__global__ void __launch_bounds__(kThreads, 2) backward_input_kernel(NormBackwardInput a, Grid grid) {
  using S = Sum<T>;
  const Share share = share_of<run>(grid, Order::first_to_last);
  if (share.count == 0) return;
  const Affine<S, run> affine(a.norm, share.channel);
  const Activate<S> activate(a.norm);
  S level[run] = {}, slope[run] = {};
  if (a.sums) {
    S inverse[run];
    const S each = static_cast<S>(1 / *a.count);
    load_numbers(inverse, a.norm.statistics, grid.channels + share.channel);
    load_numbers(level, a.sums, share.channel);
    load_numbers(slope, a.sums, grid.channels + share.channel);
#pragma unroll
    for (int i = 0; i < run; ++i) {
      level[i] *= each;
      slope[i] *= each * inverse[i];
    }
  }
  const bool reads_x = mask == Mask::input || a.sums;
  int64_t at = share.first;
  for (int left = share.count; left > 0; left -= kAhead, at += kAhead * share.apart) {
    Run<T, run> x[kAhead], y[kAhead], grad[kAhead];
    load_runs(grad, static_cast<const T*>(a.grad), at, share.apart, left);
    if (reads_x) load_runs(x, static_cast<const T*>(a.x), at, share.apart, left);
    if (mask == Mask::output) load_runs(y, static_cast<const T*>(a.y), at, share.apart, left);
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (k < left) {
        S gradient[run];
        gradient_of_z(gradient, mask, affine, activate, x[k], y[k], grad[k]);
#pragma unroll
        for (int i = 0; i < run; ++i) {
          if (a.sums) gradient[i] -= std::fma(x[k].at(i) - affine.mean[i], slope[i], level[i]);
          gradient[i] *= affine.scale[i];
        }
        store(static_cast<T*>(a.grad_x) + at + k * share.apart, gradient);
      }
  }
}

// Calls f(T{}, run) with the storage type and, as a constant, the number of channels of a thread.
template <class F>
int with_runs(Dtype dtype, const MapSizes& sizes, std::initializer_list<const void*> operands, F&& f) {
  bool aligned = sizes.C * cc_attention::element_size(dtype) % kRunBytes == 0;
  for (const void* operand : operands) aligned = aligned && reinterpret_cast<uintptr_t>(operand) % kRunBytes == 0;
  return cc_attention::dispatch(dtype, [&](auto element) -> int {
    constexpr int kRun = kRunBytes / sizeof(element);
    return aligned ? f(element, std::integral_constant<int, kRun>()) : f(element, std::integral_constant<int, 1>());
  });
}

// Calls f with the mask as a constant.
template <class F>
int with_mask(Mask mask, F&& f) {
  switch (mask) {
    case Mask::none:
      return f(std::integral_constant<Mask, Mask::none>());
    case Mask::output:
      return f(std::integral_constant<Mask, Mask::output>());
    default:
      return f(std::integral_constant<Mask, Mask::input>());
  }
}

dim3 finish_blocks(const Grid& grid) {
  return dim3(static_cast<unsigned>(std::max<int64_t>(1, ceil_div(2 * grid.channels, kFinished))));
}

bool is_empty(const MapSizes& sizes) { return sizes.N == 0 || sizes.C == 0 || sizes.P == 0; }

}  // namespace

int norm_sums_cuda(const NormSums& a, void* stream) {
  return with_runs(a.dtype, a.sizes, {a.x}, [&](auto element, auto run) -> int {
    const Grid grid = make_grid(a.sizes, run);
    const cudaError_t error =
        device::launch(sums_kernel<decltype(element), run>, grid.blocks(), kThreads, 0, stream, a, grid);
    if (error != cudaSuccess) return error;
    return device::launch(finish_sums_kernel, finish_blocks(grid), kThreads, 0, stream, a, grid);
  });
}

int norm_statistics_cuda(const NormStatistics& a, void* stream) {
  if (a.C == 0) return cudaSuccess;
  const dim3 blocks(static_cast<unsigned>(ceil_div(a.C, kThreads)));
  if (a.dtype == Dtype::float64) return device::launch(statistics_kernel<double>, blocks, kThreads, 0, stream, a);
  return device::launch(statistics_kernel<float>, blocks, kThreads, 0, stream, a);
}

int norm_apply_cuda(const NormApply& a, void* stream) {
  if (is_empty(a.norm.sizes)) return cudaSuccess;
  return with_runs(a.norm.dtype, a.norm.sizes, {a.x, a.residual, a.y, a.norm.statistics, a.norm.weight, a.norm.bias},
                   [&](auto element, auto run) -> int {
                     const Grid grid = make_grid(a.norm.sizes, run);
                     return device::launch(apply_kernel<decltype(element), run>, grid.blocks(), kThreads, 0, stream, a,
                                           grid);
                   });
}

int norm_backward_sums_cuda(const NormBackwardSums& a, void* stream) {
  const auto launch = [&](auto element, auto run, auto mask) -> int {
    using T = decltype(element);
    const Grid grid = make_grid(a.norm.sizes, run);
    const cudaError_t error =
        device::launch(backward_sums_kernel<T, run, mask>, grid.blocks(), kThreads, 0, stream, a, grid);
    if (error != cudaSuccess) return error;
    return device::launch(finish_backward_sums_kernel<Sum<T>>, finish_blocks(grid), kThreads, 0, stream, a, grid);
  };
  return with_runs(
      a.norm.dtype, a.norm.sizes, {a.x, a.y, a.grad, a.masked, a.norm.statistics, a.norm.weight, a.norm.bias},
      [&](auto element, auto run) {
        return with_mask(mask_of(a.norm, a.y, false), [&](auto mask) { return launch(element, run, mask); });
      });
}

int norm_backward_input_cuda(const NormBackwardInput& a, void* stream) {
  if (is_empty(a.norm.sizes)) return cudaSuccess;
  const auto launch = [&](auto element, auto run, auto mask) -> int {
    const Grid grid = make_grid(a.norm.sizes, run);
    return device::launch(backward_input_kernel<decltype(element), run, mask>, grid.blocks(), kThreads, 0, stream, a,
                          grid);
  };
  return with_runs(
      a.norm.dtype, a.norm.sizes, {a.x, a.y, a.grad, a.sums, a.grad_x, a.norm.statistics, a.norm.weight, a.norm.bias},
      [&](auto element, auto run) {
        return with_mask(mask_of(a.norm, a.y, a.masked), [&](auto mask) { return launch(element, run, mask); });
      });
}

int64_t norm_workspace_cuda(Dtype dtype, const MapSizes& sizes) {
  const int run = static_cast<int>(kRunBytes / cc_attention::element_size(dtype));
  const unsigned parts = std::max(make_grid(sizes, 1).parts, make_grid(sizes, run).parts);
  return static_cast<int64_t>(sizeof(double)) * parts * 2 * sizes.C;
}

}  // namespace fused
