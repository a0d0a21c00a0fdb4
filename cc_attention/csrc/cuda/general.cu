// The general kernels. They use scalar arithmetic in Sum<T>, so float32 products are not rounded to tf32. They have no
// requirements on sizes, alignment or architecture.
//
// There is one pass over the lines of each axis (line.h). All but the first add to the result of the earlier ones, in
// place. Each head of a line is a separate problem. Two device functions do nearly all the work of a block:
//
//   multiply    computes the [pixels a] x [pixels b] dot products over channels. Both sides pass through shared memory
//               in pieces of a few channels, transposed so that a thread reads four pixels in one load. A thread holds
//               a square of products.
//   accumulate  computes [targets] x [channels] sums over source pixels, with weights in shared memory. A thread holds
//               kPerThread targets x a few channels; neighboring threads hold neighboring channels. The sources pass
//               through shared memory in pieces of a few pixels, with coalesced reads for any alignment.
//
// In both, a thread loads its part of a later piece into registers while the block works on the current piece. Shared
// memory holds two pieces of multiply and four of accumulate (two for float64). Half of them are passed on per barrier,
// so no thread waits for global memory.
//
// Forward: one kernel with multiply, an online softmax and accumulate. The softmax of a later pass starts from the
// normalizers of the earlier ones, so their result is weighted like a value. If all their scores are -inf, its weight
// is 0.
//
// Backward, with P = exp(score - top) / total, dP = dO V^T, dS = gamma scale P (dP - delta) and delta = sum over C of
// dO * O, where gamma is 1 without a residual: product_kernel writes P and dS of some lines to the workspace. Then
// dV = gamma P^T dO, dK = dS^T Q and dQ = dS K are weighted sums, computed by the kernel of the primitives gather and
// scatter. So each product is computed once. The workspace has a fixed size for any batch: it holds P and dS of some
// lines, or of some keys of one line, at a time. The gradient of gamma is the sum of delta.
//
// Between the passes of 16-bit dtypes, dQ and dK are kept in float32, since the parts may cancel. The other results are
// averages, which do not cancel, and are kept in the output.
#include "general.h"

#include <algorithm>
#include <limits>

#include "device.h"
#include "line.h"

namespace cc_attention::general {
namespace {

using device::kAllLanes;
using device::kWarp;

constexpr int kThreads = 256;
constexpr int kPiece = 8;             // channels in a piece of multiply
constexpr int kPad = 4;               // aligns rows of shared memory to Vec4 and spreads columns over the banks
constexpr int kPerThread = 8;         // targets per thread in accumulate
constexpr int kSide = 104;            // maximum pixels of either side in a block of product_kernel
constexpr int kProductThreads = 192;  // threads of product_kernel, with 8 x 8 products each

// The maximum number of channels of a product, or sources of a weighted sum, that a thread adds up before the result
// goes to memory. The following ones are added there, because a sum of sums has a smaller rounding error than one long
// sum. There is no limit for 16-bit dtypes, whose own rounding is far larger.
template <class T>
constexpr int kLongestSum = sizeof(T) < 4 ? std::numeric_limits<int>::max() : 128;

// The size of P and dS together. It holds 810 lines of 97 pixels, as many as 8 images have. So there are few launches,
// each with enough work for a whole GPU.
constexpr int64_t kWorkspaceBytes = 60 << 20;

// The minimum number of blocks per multiprocessor, which limits the registers; 64-bit sums take twice as many
// registers.
template <class T>
constexpr int kBlocks = std::is_same_v<T, double> ? 1 : 2;

// Returns exp(a - b). Subtract before multiplying by log2(e): the product of a large b would round the difference away.
__device__ __forceinline__ float exp_difference(float a, float b) {
  return device::exp2_approximate((a - b) * 1.4426950408889634f);
}
__device__ __forceinline__ double exp_difference(double a, double b) { return exp(a - b); }

template <class S>
__device__ __forceinline__ S* shared() {
  return reinterpret_cast<S*>(device::dynamic_shared());
}

template <class I>
constexpr CC_HOST_DEVICE I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

// A range of neighboring pixels of a line.
struct Range {
  int first, count;
  // Returns tile number `tile` of this range, divided into tiles of `size` pixels.
  __device__ __forceinline__ Range tile(int tile, int size) const {
    const int skipped = tile * size;
    return {first + skipped, min(size, count - skipped)};
  }
};

using Line = LineOf<int64_t>;

// A head of a line. Heads of the same line have neighboring indices.
struct HeadLine : Line {
  int head;
  __device__ __forceinline__ HeadLine(const Pass& pass, int heads, unsigned index)
      : Line(line_of(pass, index / heads)), head(index % heads) {}
};

// Returns x. What follows from the result is computed again, and does not hold registers from an earlier use on.
__device__ __forceinline__ unsigned again(unsigned x) { return x + device::lane() / kWarp; }

// The pixels of a Range in a feature map, from channel `channel` on.
template <class T>
struct Pixels {
  const T* first;
  int64_t step;  // elements
  int count;
  __device__ __forceinline__ Pixels(const Map& map, int channel, const Line& line, Range range)
      : first(static_cast<const T*>(map.data) + line.pixel(range.first) * map.pitch + channel),
        step(line.step * map.pitch),
        count(range.count) {}
};

__device__ __forceinline__ unsigned block_of_pass(const Pass& pass) {
  return pass.backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
}

// Copies one side of multiply from global to shared memory, in pieces of kPiece channels of up to kRows pixels. A
// thread copies kLoads groups of four neighboring pixels of one channel, so it can write Vec4. Neighboring threads copy
// neighboring channels. The block must have at least kRows / kLoads threads.
template <class T, int kRows, int kLoads>
struct Pieces {
  static constexpr int kPitch = kRows + kPad;
  static constexpr int kSize = kPiece * kPitch;

  const T* source;  // address of the thread's first row in the next piece
  int rows;         // number of rows from there on
  T held[kLoads][4];

  static __device__ __forceinline__ int channel() { return threadIdx.x % kPiece; }
  static __device__ __forceinline__ int row() { return threadIdx.x / kPiece * 4; }
  static __device__ __forceinline__ int apart() { return blockDim.x / kPiece * 4; }  // rows between a thread's groups

  __device__ __forceinline__ explicit Pieces(const Pixels<T>& pixels)
      : source(pixels.first + row() * pixels.step + channel()), rows(pixels.count - row()) {}

  // Reads the next piece, where `channels` channels are left. Past the last channel and pixel, it holds zeros.
  __device__ __forceinline__ void load(int64_t step, int channels) {
    const int present = channel() < channels ? rows : 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const T* next = source + i * apart() * step;
#pragma unroll
      for (int j = 0; j < 4; ++j, next += step) held[i][j] = i * apart() + j < present ? *next : T{};
    }
    source += kPiece;
  }

  // Writes the loaded piece to stage [kPiece, kPitch].
  __device__ __forceinline__ void store(Sum<T>* stage) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (row() + i * apart() >= kRows) continue;
      Vec4<Sum<T>> pixels;
#pragma unroll
      for (int j = 0; j < 4; ++j) pixels.at[j] = device::to_sum(held[i][j]);
      *reinterpret_cast<Vec4<Sum<T>>*>(stage + channel() * kPitch + row() + i * apart()) = pixels;
    }
  }
};

// The products of multiply that a thread holds: kQuads * 4 pixels of either side, in separate groups of four, so that
// neighboring threads read neighboring groups. It is computed from device::lane, so that another Square after the
// products is recomputed there and does not hold registers during them.
template <int kQuads>
struct Square {
  int a_step, b_step;  // groups of four pixels between two groups of a thread
  int a_first, b_first;
  bool active;
  __device__ __forceinline__ Square(int a_count, int b_count)
      : a_step(ceil_div(a_count, 4 * kQuads)),
        b_step(ceil_div(b_count, 4 * kQuads)),
        a_first(thread() % a_step),
        b_first(thread() / a_step),
        active(b_first < b_step) {}
  static __device__ __forceinline__ int thread() { return threadIdx.x / kWarp * kWarp + device::lane(); }
  __device__ __forceinline__ int a(int i) const { return 4 * (a_first + i / 4 * a_step) + i % 4; }
  __device__ __forceinline__ int b(int i) const { return 4 * (b_first + i / 4 * b_step) + i % 4; }
};

template <int kARows, int kBRows>
constexpr int kPieceSize = kPiece * (kARows + kBRows + 2 * kPad);

// products[i][j] = sum over channels of a[square.a(i)] * b[square.b(j)]. Products past the last pixel are undefined.
// stage: unused shared memory for 2 * kPieceSize sums; it can be reused after a barrier.
template <class T, int kARows, int kBRows, int kQuads, int kLoads>
__device__ __forceinline__ void multiply(Sum<T> (&products)[4 * kQuads][4 * kQuads], const Square<kQuads>& square,
                                         const Pixels<T>& a, const Pixels<T>& b, int channels, Sum<T>* stage) {
  using Quad = Vec4<Sum<T>>;
  using APieces = Pieces<T, kARows, kLoads>;
  using BPieces = Pieces<T, kBRows, kLoads>;
  constexpr int kAPitch = APieces::kPitch, kBPitch = BPieces::kPitch;
#pragma unroll
  for (auto& row : products)
#pragma unroll
    for (auto& product : row) product = 0;
  APieces a_pieces(a);
  BPieces b_pieces(b);
  const auto load = [&](int left) {
    a_pieces.load(a.step, left);
    b_pieces.load(b.step, left);
  };
  Sum<T>* next = stage;
  const auto store = [&] {
    a_pieces.store(next);
    b_pieces.store(next + APieces::kSize);
    __syncthreads();  // the piece is visible to all threads, and all have read the previous one
  };
  load(channels);
  store();
  for (int left = channels; left > 0; left -= kPiece) {
    const Sum<T>* const a_stage = next;
    const Sum<T>* const b_stage = next + APieces::kSize;
    if (left > kPiece) load(left - kPiece);
    if (square.active) {
#pragma unroll 1
      for (int channel = 0; channel < kPiece; ++channel) {
        Quad a_quads[kQuads], b_quads[kQuads];
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
          a_quads[i] = *reinterpret_cast<const Quad*>(a_stage + channel * kAPitch + square.a(4 * i));
          b_quads[i] = *reinterpret_cast<const Quad*>(b_stage + channel * kBPitch + square.b(4 * i));
        }
#pragma unroll
        for (int i = 0; i < 4 * kQuads; ++i)
#pragma unroll
          for (int j = 0; j < 4 * kQuads; ++j) products[i][j] += a_quads[i / 4].at[i % 4] * b_quads[j / 4].at[j % 4];
      }
    }
    if (left > kPiece) {
      next = next == stage ? stage + kPieceSize<kARows, kBRows> : stage;
      store();
    }
  }
}

// The distribution of the sums of accumulate over a block. kLanes neighboring threads hold kChannels channels each,
// with stride kLanes. sources: the number of sources whose weights are in shared memory at a time.
template <int lanes, int channels, int sources>
struct Shape {
  static constexpr int kLanes = lanes, kChannels = channels;
  static constexpr int kSpan = kLanes * kChannels;  // channels per block
  static constexpr int kTargets = kPerThread * kThreads / kLanes;
  static constexpr int kSources = sources;
  static constexpr int kPitch = kTargets + kPad;
  static constexpr int kWeights = kSources * kPitch;    // [kSources, kPitch] in shared memory
  static_assert(kTargets * kSources <= 16 * kThreads);  // 4 x 4 products per thread
};

constexpr int kPieceBytes = 8192;  // bytes in a piece of the values

// Copies the values of accumulate from global to shared memory, in pieces of kRows sources of kSpan channels, to a ring
// of kPieces pieces. Each barrier passes kAhead pieces on. For every kernel, two blocks fit in the 100 KB of sm_86,
// sm_89 and sm_120, and one block of float64 fits in the 64 KB of sm_75.
template <class T, class Shape>
struct Values {
  static constexpr int kSpan = Shape::kSpan;
  static constexpr int kSize = kPieceBytes / sizeof(Sum<T>);
  static constexpr int kRows = kSize / kSpan;
  static constexpr int kPieces = std::min(ceil_div(Shape::kSources, kRows), std::is_same_v<T, double> ? 2 : 4);
  static constexpr int kAhead = ceil_div(kPieces, 2);
  static constexpr int kRing = kPieces * kSize;
  static constexpr int kLoads = kSize / kThreads;
  static constexpr int kWidth = std::min(kSpan, kThreads);

  const T* source;  // address of the thread's first value in the next piece
  int64_t step;
  int rows, channels;  // number of rows and channels from there on
  T held[kLoads];

  // channels_: the channels of the map from the first one of `sources` on.
  __device__ __forceinline__ Values(const Pixels<T>& sources, int channels_)
      : source(sources.first + threadIdx.x / kWidth * sources.step + threadIdx.x % kWidth),
        step(sources.step),
        rows(sources.count - threadIdx.x / kWidth),
        channels(channels_ - threadIdx.x % kWidth) {
    load();
  }

  // Reads the next piece. Past the last source and the last channel, it holds zeros.
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int row = i * kThreads / kSpan, channel = i * kThreads % kSpan;
      held[i] = row < rows && channel < channels ? source[row * step + channel] : T{};
    }
    source += kRows * step;
    rows -= kRows;
  }

  // Writes the loaded piece to stage [kRows, kSpan].
  __device__ __forceinline__ void store(Sum<T>* stage) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) stage[i * kThreads + threadIdx.x] = device::to_sum(held[i]);
  }
};
using Narrow = Shape<16, 4, 32>;
using Wide = Shape<32, 8, 64>;
using Widest = Shape<64, 8, 104>;
constexpr int kNarrowChannels = 2 * Narrow::kSpan;  // up to here, a wider shape has idle threads or is not faster

// The sums of accumulate that a thread holds.
template <class T, class Shape>
struct Sums {
  Sum<T> at[kPerThread][Shape::kChannels];
  int first_target, first_channel;

  __device__ __forceinline__ Sums()
      : first_target(threadIdx.x / Shape::kLanes * kPerThread), first_channel(threadIdx.x % Shape::kLanes) {
#pragma unroll
    for (auto& row : at)
#pragma unroll
      for (auto& element : row) element = 0;
  }

  // Calls f(sum, target, channel) for the sums that exist.
  template <class F>
  __device__ __forceinline__ void for_each(int targets, int channels, F&& f) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (first_target + i >= targets) break;
#pragma unroll
      for (int j = 0; j < Shape::kChannels; ++j)
        if (first_channel + j * Shape::kLanes < channels)
          f(at[i][j], first_target + i, first_channel + j * Shape::kLanes);
    }
  }

  // at += weight * value, over `sources` sources. weights: [sources, kPitch] in shared memory; values: holds the first
  // piece; ring: unused shared memory for Values::kRing sums. No barrier is needed between writing the weights and this
  // call. They can be overwritten after a barrier.
  __device__ __forceinline__ void accumulate(const Sum<T>* weights, Values<T, Shape>& values, int sources, int targets,
                                             Sum<T>* ring) {
    using V = Values<T, Shape>;
    values.store(ring);
#pragma unroll
    for (int piece = 1; piece < V::kAhead; ++piece) {
      values.load();
      values.store(ring + piece * V::kSize);
    }
    const Sum<T>* own_weights = weights + first_target;
    int piece = 0;
    for (int left = sources; left > 0; left -= V::kRows, ++piece) {
      if (piece % V::kAhead == 0) __syncthreads();  // kAhead pieces are visible, and all have read the previous ones
      const bool more = left > V::kAhead * V::kRows;
      if (more) values.load();
      const Sum<T>* const row_values = ring + piece % V::kPieces * V::kSize + first_channel;
      if (first_target >= targets) {
        // this thread has no sums
      } else if (left >= V::kRows) {
#pragma unroll 2
        for (int row = 0; row < V::kRows; ++row)
          add(own_weights + row * Shape::kPitch, row_values + row * Shape::kSpan);
      } else {
#pragma unroll 1
        for (int row = 0; row < left; ++row) add(own_weights + row * Shape::kPitch, row_values + row * Shape::kSpan);
      }
      own_weights += V::kRows * Shape::kPitch;
      if (more) values.store(ring + (piece + V::kAhead) % V::kPieces * V::kSize);
    }
  }

  __device__ __forceinline__ void add(const Sum<T>* weights, const Sum<T>* piece) {
    Sum<T> value[Shape::kChannels];
#pragma unroll
    for (int j = 0; j < Shape::kChannels; ++j) value[j] = piece[j * Shape::kLanes];
#pragma unroll
    for (int i = 0; i < kPerThread; i += 4) {
      const auto quad = *reinterpret_cast<const Vec4<Sum<T>>*>(weights + i);
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int j = 0; j < Shape::kChannels; ++j) at[i + k][j] += quad.at[k] * value[j];
    }
  }
};

// Shared memory of forward_kernel, in sums: the scores overwrite the pieces of multiply.
template <class T, class Shape>
constexpr int kForwardTile = std::max(Shape::kWeights, 2 * kPieceSize<Shape::kTargets, Shape::kSources>);
template <class T, class Shape>
constexpr int kForwardShared =
    (kForwardTile<T, Shape> + 3 * Shape::kTargets + Values<T, Shape>::kRing) * sizeof(Sum<T>);

// Computes up to Shape::kSpan channels of the result of each head, starting at `channel`. There is one block per line,
// head and tile of queries. The last launch of a pass writes the normalizers.
template <class T, class Shape>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) forward_kernel(Forward f, Pass pass, int channel) {
  using S = Sum<T>;
  constexpr int kReaders = kThreads / Shape::kTargets;  // threads that share the softmax of a query
  S* const tile = shared<S>();                          // [kSources, kPitch] scores, then weights
  S* const tops = tile + kForwardTile<T, Shape>;        // [kTargets] largest score of a query so far
  S* const totals = tops + Shape::kTargets;             // [kTargets] sum of the exponentials relative to it
  S* const factors = totals + Shape::kTargets;          // [kTargets] factors that the sums must be multiplied by
  S* const value_ring = factors + Shape::kTargets;      // [Values::kRing]

  const int length = pass.length;
  const int c = static_cast<int>(f.sizes.c), C = static_cast<int>(f.sizes.C);
  const int heads = static_cast<int>(f.sizes.heads);
  const unsigned block = block_of_pass(pass), tiles = ceil_div(length, Shape::kTargets);
  const auto this_line = [&] { return HeadLine(pass, heads, again(block / tiles)); };
  const Range queries = Range{0, length}.tile(block % tiles, Shape::kTargets);
  const S scale = static_cast<S>(f.scale);
  const auto normalizer = [&](const HeadLine& line, int query) -> Normalizer<S>& {
    return static_cast<Normalizer<S>*>(f.normalizer)[line.pixel(queries.first + query) * heads + line.head];
  };
  const Normalizer<S> none{-INFINITY, 0};
  const int query = threadIdx.x / kReaders, reader = threadIdx.x % kReaders;  // role in the softmax

  if (reader == 0) {
    const Normalizer<S> before = !pass.first && query < queries.count ? normalizer(this_line(), query) : none;
    tops[query] = before.top;
    totals[query] = before.total;
  }
  Sums<T, Shape> sums;
  for (int first = 0; first < length; first += Shape::kSources) {
    const Range keys{first, min(Shape::kSources, length - first)};
    const HeadLine line = this_line();
    S scores[4][4];
    __syncthreads();  // all threads have used the previous tile
    multiply<T, Shape::kTargets, Shape::kSources, 1, 1>(scores, Square<1>(queries.count, keys.count),
                                                        {f.query, line.head * c, line, queries},
                                                        {f.key, line.head * c, line, keys}, c, tile);
    __syncthreads();  // the scores overwrite the pieces
    if (const Square<1> square(queries.count, keys.count); square.active) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Vec4<S> quad;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool self = queries.first + square.a(i) == keys.first + square.b(j);
          quad.at[i] = !pass.last && self ? -INFINITY : device::multiply(scores[i][j], scale);
        }
        *reinterpret_cast<Vec4<S>*>(tile + square.b(j) * Shape::kPitch + square.a(0)) = quad;
      }
    }
    __syncthreads();

    S top = tops[query];
    const S top_before = top;
    for (int k = reader; k < keys.count; k += kReaders) top = max(top, tile[k * Shape::kPitch + query]);
#pragma unroll
    for (int lanes = 1; lanes < kReaders; lanes *= 2) top = max(top, __shfl_xor_sync(kAllLanes, top, lanes));
    const S base = top == -INFINITY ? 0 : top;  // if all are masked, avoids -inf - -inf = NaN
    S added = 0;
    for (int k = reader; k < keys.count; k += kReaders) {
      S& element = tile[k * Shape::kPitch + query];
      element = exp_difference(element, base);
      added += element;
    }
#pragma unroll
    for (int lanes = 1; lanes < kReaders; lanes *= 2) added += __shfl_xor_sync(kAllLanes, added, lanes);
    if (reader == 0) {
      factors[query] = exp_difference(top_before, base);
      totals[query] = totals[query] * factors[query] + added;
      tops[query] = top;
    }
    Values<T, Shape> values({f.value, line.head * C + channel, line, keys}, C - channel);
    __syncthreads();

#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
#pragma unroll
      for (auto& element : sums.at[i]) element *= factors[sums.first_target + i];
    sums.accumulate(tile, values, keys.count, queries.count, value_ring);
  }

  // The earlier result is weighted by its total, as if it were the exponential of one score. Without a finite score so
  // far, both weights are 0; without any at all, the result is NaN.
  __syncthreads();
  const HeadLine line = this_line();
  S* const carried = tile;  // [kTargets]
  if (threadIdx.x < queries.count) {
    const S top = tops[threadIdx.x], total = totals[threadIdx.x];
    factors[threadIdx.x] = total == 0 && !pass.last ? 0 : 1 / total;
    const Normalizer<S> before = pass.first ? none : normalizer(line, threadIdx.x);
    carried[threadIdx.x] = before.total == 0 ? 0 : exp_difference(before.top, top) * before.total / total;
    if (pass.first || channel + Shape::kSpan >= C) normalizer(line, threadIdx.x) = {top, total};
  }
  __syncthreads();
  const int64_t first = line.pixel(queries.first), from = line.head * C + channel;
  const int64_t out_step = pass.step * f.out.pitch;
  T* const out = static_cast<T*>(f.out.data) + first * f.out.pitch + from;
  sums.for_each(queries.count, C - channel, [&](S& element, int target, int offset) {
    T& to = out[target * out_step + offset];
    element *= factors[target];
    if (!pass.first) element += device::to_sum(to) * carried[target];
    to = device::from_sum<T>(element);
  });
  if (!pass.last || f.residual.data == nullptr) return;
  const S gamma = *static_cast<const S*>(f.gamma);
  const int64_t residual_step = pass.step * f.residual.pitch, sum_step = pass.step * f.sum.pitch;
  const T* const residual = static_cast<const T*>(f.residual.data) + first * f.residual.pitch + from;
  T* const sum = static_cast<T*>(f.sum.data) + first * f.sum.pitch + from;
  sums.for_each(queries.count, C - channel, [&](S element, int target, int offset) {
    sum[target * sum_step + offset] =
        device::from_sum<T>(gamma * element + device::to_sum(residual[target * residual_step + offset]));
  });
}

// The location of the weight with which pixel `query` of a line attends to pixel `key`.
struct WeightLayout {
  int64_t start, lines, outer, inner;  // line i starts at start + i / lines * outer + i % lines * inner
  int64_t query_step, key_step;
  int first_key;
  bool without_self;  // a query has no entry for itself
  __device__ __forceinline__ int64_t line(int64_t i) const { return start + i / lines * outer + i % lines * inner; }
  __device__ __forceinline__ int64_t entry(int query, int key) const {
    return query * query_step + (key - first_key) * key_step - (without_self && key > query ? key_step : 0);
  }
  __device__ __forceinline__ bool absent(int query, int key) const { return without_self && key == query; }
};

// The layout of the column entries, the first pass, or the row entries in weights [N,L,H,W].
WeightLayout entries(const Sizes& s, const Pass& pass) {
  const int64_t plane = s.H * s.W;
  if (pass.first) return {s.W * plane, s.W, s.L() * plane, 1, s.W, plane, 0, true};
  return {0, s.H, s.L() * plane, s.W, 1, plane, 0, false};
}

// The length of a row of P and dS, padded to whole Vec4.
constexpr int64_t row_of(int64_t queries) { return ceil_div<int64_t>(queries, 4) * 4; }

// The layout of P and dS, [lines, keys, row_of(queries)].
WeightLayout matrices(const Range& keys, int64_t queries) {
  return {0, 1, keys.count * row_of(queries), 0, 1, row_of(queries), keys.first, false};
}

// What product_kernel writes for the product x of a query pixel and a key pixel.
enum class Result {
  score,     // x
  softmax,   // P = exp(scale x - top) / total
  gradient,  // dS = gamma scale P (x - delta)
};

// gamma, or 1 without a residual.
template <class S>
__device__ __forceinline__ S factor_of(const void* gamma) {
  return gamma == nullptr ? 1 : *static_cast<const S*>(gamma);
}

// The arguments of product_kernel, which computes the products of all query pixels with all key pixels of each line.
struct Products {
  Pass pass;
  int heads, channels;  // channels of a head
  unsigned first_line;  // each head of a line counts as a line
  int64_t lines;
  double scale;
  const void* gamma;         // null without a residual
  Range queries, keys;       // pixels of each line
  int query_side, key_side;  // pixels per block, at most kSide
  Map query_map, key_map;    // [N,T,H,W,heads,channels]
  const void* shift;         // [N,T,H,W,heads] normalizers or delta
  const void* P;             // in Sum<T>, for Result::gradient
  void* out;                 // in T for Result::score, otherwise in Sum<T>
  WeightLayout layout;       // layout of P and out
};

template <class T>
constexpr int kProductShared = 2 * kPieceSize<kSide, kSide> * sizeof(Sum<T>);

// Writes or adds the products of some channels to [N,L,H,W].
template <class T>
__device__ __forceinline__ void write_scores(const Products& p, const Sum<T> (&products)[8][8], const Range& queries,
                                             const Range& keys, int64_t start, bool first) {
  const Square<2> square(queries.count, keys.count);
  T* const out = static_cast<T*>(p.out);
  const int64_t query_step = p.layout.query_step;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (square.b(j) >= keys.count) continue;
    const int key = keys.first + square.b(j);
    int64_t entry = start + (queries.first + square.a(0)) * query_step + (key - p.layout.first_key) * p.layout.key_step;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int query = queries.first + square.a(i);
      if (square.a(i) < queries.count && !p.layout.absent(query, key)) {
        T& to = out[p.layout.without_self && key > query ? entry - p.layout.key_step : entry];
        if constexpr (std::is_same_v<T, Sum<T>>)
          to = first ? products[i][j] : to + products[i][j];
        else  // 16-bit types have all channels in one span
          to = device::from_sum<T>(products[i][j]);
      }
      entry += (i == 3 ? 4 * square.a_step - 3 : 1) * query_step;
    }
  }
}

// Writes or adds the products of some channels to [lines, keys, queries]. With the last channels, they become P or dS.
// Queries are written in groups of four: the padding of the rows takes those past the last query.
template <class T, Result result>
__device__ __forceinline__ void write_matrix(const Products& p, const Sum<T> (&products)[8][8], const Square<2>& square,
                                             unsigned index, const Range& queries, const Range& keys, int64_t start,
                                             bool first, bool last) {
  using S = Sum<T>;
  using Quad = Vec4<S>;
  const HeadLine line(p.pass, p.heads, index);
  const S factor = static_cast<S>(p.scale) * (result == Result::gradient ? factor_of<S>(p.gamma) : 1);
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    if (square.a(i) >= queries.count) continue;
    const int64_t first_entry = start + p.layout.entry(queries.first + square.a(i), keys.first);
    S shifts[4], factors[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t pixel = line.pixel(queries.first + min(square.a(i + k), queries.count - 1)) * p.heads + line.head;
      shifts[k] = 0;
      factors[k] = 1;
      if (!last) continue;
      if constexpr (result == Result::gradient) {
        shifts[k] = factor * static_cast<const S*>(p.shift)[pixel];
      } else {
        const Normalizer<S> normalizer = static_cast<const Normalizer<S>*>(p.shift)[pixel];
        shifts[k] = normalizer.top;
        factors[k] = 1 / normalizer.total;
      }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (square.b(j) >= keys.count) continue;
      const int64_t entry = first_entry + square.b(j) * p.layout.key_step;
      Quad* const to = reinterpret_cast<Quad*>(static_cast<S*>(p.out) + entry);
      Quad quad = first ? Quad{} : *to;
#pragma unroll
      for (int k = 0; k < 4; ++k) quad.at[k] += products[i + k][j];
      if (last && result == Result::gradient) {
        const Quad P = *reinterpret_cast<const Quad*>(static_cast<const S*>(p.P) + entry);
#pragma unroll
        for (int k = 0; k < 4; ++k) quad.at[k] = P.at[k] * (factor * quad.at[k] - shifts[k]);
      }
      if (last && result == Result::softmax) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const bool self = !p.pass.last && queries.first + square.a(i + k) == keys.first + square.b(j);
          quad.at[k] = self ? 0 : exp_difference(device::multiply(quad.at[k], factor), shifts[k]) * factors[k];
        }
      }
      *to = quad;
    }
  }
}

template <class T, Result result>
__global__ void __launch_bounds__(kProductThreads, kBlocks<T>) product_kernel(Products p) {
  using S = Sum<T>;
  unsigned block = block_of_pass(p.pass);
  const unsigned query_tiles = ceil_div(p.queries.count, p.query_side);
  const unsigned key_tiles = ceil_div(p.keys.count, p.key_side);
  const Range queries = p.queries.tile(block % query_tiles, p.query_side);
  block /= query_tiles;
  const Range keys = p.keys.tile(block % key_tiles, p.key_side);
  const unsigned line_index = block / key_tiles;
  const HeadLine line(p.pass, p.heads, p.first_line + line_index);

  const Square<2> square(queries.count, keys.count);
  const int64_t start = p.layout.line(line_index);
  S products[8][8];
  Range span{0, 0};  // range of channels
  do {               // runs once even without channels, to write zeros
    span = {span.first + span.count, min(p.channels - span.first - span.count, kLongestSum<T>)};
    const int channel = line.head * p.channels + span.first;
    __syncthreads();  // all threads have read the previous pieces
    multiply<T, kSide, kSide, 2, 2>(products, square, {p.query_map, channel, line, queries},
                                    {p.key_map, channel, line, keys}, span.count, shared<S>());
    if (!square.active) continue;
    constexpr bool only = !std::is_same_v<T, Sum<T>>;  // 16-bit types have one span
    const bool first = only || span.first == 0, last = only || span.first + span.count >= p.channels;
    if constexpr (result == Result::score)
      write_scores<T>(p, products, queries, keys, start, first);
    else
      write_matrix<T, result>(p, products, square, again(p.first_line + line_index), queries, keys, start, first, last);
  } while (span.first + span.count < p.channels);
}

// delta [N,T,H,W,heads] = sum over C of out * grad, with one warp per head of a pixel.
template <class T>
__global__ void __launch_bounds__(kThreads) delta_kernel(Backward b, Sum<T>* delta) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t pixel = entry / b.sizes.heads, first = entry % b.sizes.heads * b.sizes.C;
  if (pixel >= b.sizes.pixels()) return;
  const T* const out = static_cast<const T*>(b.out.data) + pixel * b.out.pitch + first;
  const T* const grad = static_cast<const T*>(b.grad.data) + pixel * b.grad.pitch + first;
  Sum<T> sum = 0;
#pragma unroll 4
  for (int64_t channel = threadIdx.x % kWarp; channel < b.sizes.C; channel += kWarp)
    sum += device::to_sum(out[channel]) * device::to_sum(grad[channel]);
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  if (threadIdx.x % kWarp == 0) delta[entry] = sum;
}

// totals[block] = the sum of the numbers of each block: every gridDim.x * kThreads-th one from each of its threads on.
template <class In, class Out>
__global__ void __launch_bounds__(kThreads) total_kernel(const In* numbers, int64_t count, Out* totals) {
  double sum = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads)
    sum += numbers[i];
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  double* const of_warps = shared<double>();  // [kThreads / kWarp]
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kThreads / kWarp; ++warp) sum += of_warps[warp];
  totals[blockIdx.x] = static_cast<Out>(sum);
}

// The arguments of sum_kernel, which computes, for each target pixel of each line, the weighted sum of the source
// pixels.
struct WeightedSum {
  Pass pass;
  int heads, channels;  // channels of a head
  unsigned first_line;  // each head of a line counts as a line
  int64_t lines;
  Range targets, sources;  // pixels of each line
  bool targets_see;        // if true, targets are queries and sources are keys of the weights; otherwise vice versa
  bool wide;               // the weights are in Sum<T>, not in T
  const void* weights;
  WeightLayout layout;
  Map values;         // [N,T,H,W,heads,channels]
  MutableMap out;     // [N,T,H,W,heads,channels]
  void* scratch;      // dense, in Sum<T>, or null; if given, passes before the last write here, not to out
  const void* gamma;  // the factor of the sums, or null for 1
  bool add, last;     // add to the result of the previous passes; this is the last pass
};

template <class T, class Shape>
constexpr int kSumShared = (Shape::kWeights + Values<T, Shape>::kRing) * sizeof(Sum<T>);

template <class T, class Shape>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) sum_kernel(WeightedSum a) {
  using S = Sum<T>;
  S* const tile = shared<S>();                   // [kSources, kPitch] weights
  S* const value_ring = tile + Shape::kWeights;  // [Values::kRing]
  unsigned block = block_of_pass(a.pass);
  const unsigned tiles = ceil_div(a.targets.count, Shape::kTargets);
  const Range targets = a.targets.tile(block % tiles, Shape::kTargets);
  block /= tiles;
  const unsigned spans = ceil_div(a.channels, Shape::kSpan);
  const int channel = block % spans * Shape::kSpan, channels = a.channels - channel;
  const unsigned line_index = block / spans;
  const auto this_line = [&] { return HeadLine(a.pass, a.heads, again(a.first_line + line_index)); };
  const int query_side = a.targets_see ? Shape::kTargets : Shape::kSources;
  const int key_side = a.targets_see ? Shape::kSources : Shape::kTargets;
  const auto weight = [&a, start = a.layout.line(line_index)](int query, int key) {
    const int64_t entry = start + a.layout.entry(query, key);
    return a.wide ? static_cast<const S*>(a.weights)[entry] : device::to_sum(static_cast<const T*>(a.weights)[entry]);
  };

  Sums<T, Shape> sums;
  for (int first = 0; first < a.sources.count; first += Shape::kSources) {
    const Range sources{a.sources.first + first, min(Shape::kSources, a.sources.count - first)};
    __syncthreads();  // all threads have used the previous weights
    const Range queries = a.targets_see ? targets : sources, keys = a.targets_see ? sources : targets;
    const int query = threadIdx.x % query_side;  // neighboring queries have neighboring weights
#pragma unroll 4
    for (int key = threadIdx.x / query_side; key < key_side; key += kThreads / query_side) {
      const bool exists =
          query < queries.count && key < keys.count && !a.layout.absent(queries.first + query, keys.first + key);
      tile[a.targets_see ? key * Shape::kPitch + query : query * Shape::kPitch + key] =
          exists ? weight(queries.first + query, keys.first + key) : 0;
    }
    const HeadLine line = this_line();
    Values<T, Shape> values({a.values, line.head * a.channels + channel, line, sources}, channels);
    sums.accumulate(tile, values, sources.count, targets.count, value_ring);
  }

  const S factor = factor_of<S>(a.gamma);
#pragma unroll
  for (auto& row : sums.at)
#pragma unroll
    for (S& element : row) element *= factor;
  const HeadLine line = this_line();
  const auto start_in = [&](int64_t pitch) {  // for one map at a time, to save registers
    return line.pixel(targets.first) * pitch + line.head * a.channels + channel;
  };
  const auto in_scratch = [&](auto&& f) {
    const int64_t pitch = static_cast<int64_t>(a.heads) * a.channels, step = a.pass.step * pitch;
    S* const scratch = static_cast<S*>(a.scratch) + start_in(pitch);
    sums.for_each(targets.count, channels,
                  [&](S& element, int target, int offset) { f(element, scratch[target * step + offset]); });
  };
  const auto in_out = [&](auto&& f) {
    const int64_t step = a.pass.step * a.out.pitch;
    T* const out = static_cast<T*>(a.out.data) + start_in(a.out.pitch);
    sums.for_each(targets.count, channels,
                  [&](S& element, int target, int offset) { f(element, out[target * step + offset]); });
  };
  if (a.add && a.scratch != nullptr) in_scratch([](S& element, const S& before) { element += before; });
  if (a.add && a.scratch == nullptr) in_out([](S& element, const T& before) { element += device::to_sum(before); });
  if (a.scratch != nullptr && !a.last)
    in_scratch([](const S& element, S& to) { to = element; });
  else
    in_out([](const S& element, T& to) { to = device::from_sum<T>(element); });
}

// The most blocks of total_kernel, and the least numbers for each of them.
constexpr int64_t kTotals = 256, kTotalLength = 8 * kThreads;

// Queues kernel launches. After a launch fails, the following ones are skipped.
struct Queue {
  void* stream;
  int error = cudaSuccess;

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
              Arguments... arguments) {
    if (error != cudaSuccess || blocks == 0) return;
    if (blocks > INT32_MAX) {
      error = cudaErrorInvalidConfiguration;
      return;
    }
    error = device::launch(kernel, dim3(static_cast<unsigned>(blocks)), threads, static_cast<int>(shared_bytes), stream,
                           arguments...);
  }

  // Blocks of equal size, with no more threads than squares of products.
  template <class T, Result result>
  void products(Products p) {
    const auto side = [](int pixels) {
      const int tiles = std::max(1, ceil_div(pixels, kSide));
      return ceil_div(ceil_div(pixels, tiles), 8) * 8;
    };
    p.query_side = side(p.queries.count);
    p.key_side = side(p.keys.count);
    const int squares = p.query_side / 8 * (p.key_side / 8);
    const int threads = std::max({squares, p.query_side, p.key_side});  // Pieces needs at least as many as either side
    const int64_t tiles =
        static_cast<int64_t>(ceil_div(p.queries.count, p.query_side)) * ceil_div(p.keys.count, p.key_side);
    launch(product_kernel<T, result>, p.lines * tiles, ceil_div(threads, kWarp) * kWarp, kProductShared<T>, p);
  }
  template <class T, class Shape>
  void sum(const WeightedSum& a) {
    const int64_t spans = ceil_div(a.channels, Shape::kSpan), tiles = ceil_div(a.targets.count, Shape::kTargets);
    launch(sum_kernel<T, Shape>, a.lines * spans * tiles, kThreads, kSumShared<T, Shape>, a);
  }
  // total = the sum of `count` numbers. partial: room for kTotals numbers.
  template <class S>
  void total(const S* numbers, int64_t count, double* partial, S* total) {
    const int64_t blocks = std::clamp<int64_t>(count / kTotalLength, 1, kTotals);
    constexpr int64_t bytes = kThreads / kWarp * sizeof(double);
    if (blocks == 1) return launch(total_kernel<S, S>, 1, kThreads, bytes, numbers, count, total);
    launch(total_kernel<S, double>, blocks, kThreads, bytes, numbers, count, partial);
    launch(total_kernel<double, S>, 1, kThreads, bytes, static_cast<const double*>(partial), blocks, total);
  }
  template <class T>
  void sum(WeightedSum a) {
    const int end = a.sources.first + a.sources.count;
    for (; a.sources.first < end; a.sources.first += a.sources.count, a.add = true) {
      a.sources.count = std::min(end - a.sources.first, kLongestSum<T>);
      a.channels <= kNarrowChannels ? sum<T, Narrow>(a) : sum<T, Wide>(a);
    }
  }
};

template <class T, class Shape>
int run_forward(const Forward& f, void* stream) {
  Queue queue{stream};
  for (const Pass& pass : passes_of(f.sizes, f.axes))
    for (int channel = 0; channel == 0 || channel < f.sizes.C;
         channel += Shape::kSpan)  // runs even without channels, for the normalizers
      queue.launch(forward_kernel<T, Shape>,
                   pass.lines * f.sizes.heads * ceil_div<int64_t>(pass.length, Shape::kTargets), kThreads,
                   kForwardShared<T, Shape>, f, pass, channel);
  return queue.error;
}

template <class T>
int run_primitive(Primitive primitive, const Sizes& sizes, const void* first, const void* second, void* out,
                  void* stream) {
  Queue queue{stream};
  const Sizes picture{sizes.N, 1, 0, sizes.C, 1, sizes.H, sizes.W};
  for (const Pass& pass : passes_of(picture, 1 << kColumn | 1 << kRow)) {
    const Range all{0, pass.length};
    if (primitive == Primitive::score)
      queue.products<T, Result::score>({.pass = pass,
                                        .heads = 1,
                                        .channels = static_cast<int>(sizes.C),
                                        .first_line = 0,
                                        .lines = pass.lines,
                                        .scale = 1,
                                        .gamma = nullptr,
                                        .queries = all,
                                        .keys = all,
                                        .query_side = 0,
                                        .key_side = 0,
                                        .query_map = {first, sizes.C},
                                        .key_map = {second, sizes.C},
                                        .shift = nullptr,
                                        .P = nullptr,
                                        .out = out,
                                        .layout = entries(sizes, pass)});
    else
      queue.sum<T>({.pass = pass,
                    .heads = 1,
                    .channels = static_cast<int>(sizes.C),
                    .first_line = 0,
                    .lines = pass.lines,
                    .targets = all,
                    .sources = all,
                    .targets_see = primitive == Primitive::gather,
                    .wide = false,
                    .weights = first,
                    .layout = entries(sizes, pass),
                    .values = {second, sizes.C},
                    .out = {out, sizes.C},
                    .scratch = nullptr,
                    .gamma = nullptr,
                    .add = !pass.first,
                    .last = pass.last});
  }
  return queue.error;
}

// The number of lines, or of keys of a single line, whose P and dS fit in the workspace at a time.
struct Portion {
  int64_t lines, keys;
};

template <class T>
Portion portion(const Pass& pass, int64_t heads) {
  const int64_t all = pass.lines * heads, length = pass.length, row = row_of(length);
  const int64_t room = kWorkspaceBytes / (2 * sizeof(Sum<T>));  // elements of each matrix
  if (length * row > room) return {1, std::max<int64_t>(kSide, room / row / kSide * kSide)};
  const int64_t rounds = ceil_div(all, room / (length * row));
  return {rounds == 0 ? 0 : ceil_div(all, rounds), length};  // rounds of equal size, so that none has few blocks
}

// The parts of the workspace.
template <class T>
struct Workspace {
  int64_t matrix, delta, query_channels;  // sizes in Sum<T>
  int64_t totals;                         // the numbers of total_kernel
  explicit Workspace(const Backward& b)
      : matrix(0),
        delta(b.sizes.pixels() * b.sizes.heads),
        query_channels(sizeof(T) < sizeof(Sum<T>) ? delta * b.sizes.c : 0),
        totals(b.grad_gamma == nullptr ? 0 : kTotals) {
    for (const Pass& pass : passes_of(b.sizes, b.axes)) {
      const Portion p = portion<T>(pass, b.sizes.heads);
      matrix = std::max(matrix, p.lines * p.keys * row_of(pass.length));
    }
  }
  int64_t bytes() const { return totals * sizeof(double) + (2 * matrix + delta + 2 * query_channels) * sizeof(Sum<T>); }
};

template <class T>
int run_backward(const Backward& b, void* stream) {
  using S = Sum<T>;
  const Workspace<T> workspace(b);
  double* const totals = static_cast<double*>(b.workspace);
  S* const P = reinterpret_cast<S*>(totals + workspace.totals);     // [lines, keys, row_of(queries)]
  S* const dS = P + workspace.matrix;                               // [lines, keys, row_of(queries)]
  S* const delta = dS + workspace.matrix;                           // [N,T,H,W,heads]
  S* const query_scratch = delta + workspace.delta;                 // [N,T,H,W,heads,c], for 16-bit dtypes
  S* const key_scratch = query_scratch + workspace.query_channels;  // [N,T,H,W,heads,c]
  const bool scratch = workspace.query_channels > 0;
  const int heads = static_cast<int>(b.sizes.heads), c = static_cast<int>(b.sizes.c), C = static_cast<int>(b.sizes.C);

  for (const Pass& pass : passes_of(b.sizes, b.axes))
    if (pass.lines * heads > INT32_MAX) return cudaErrorInvalidConfiguration;  // as in the forward

  Queue queue{stream};
  queue.launch(delta_kernel<T>, ceil_div<int64_t>(workspace.delta, kThreads / kWarp), kThreads, 0, b, delta);
  if (b.grad_gamma != nullptr) queue.total<S>(delta, workspace.delta, totals, static_cast<S*>(b.grad_gamma));
  for (const Pass& pass : passes_of(b.sizes, b.axes)) {
    const int64_t length = pass.length, all = pass.lines * heads;
    const Portion size = portion<T>(pass, heads);
    for (int64_t first_line = 0; first_line < all; first_line += size.lines)
      for (int64_t first_key = 0; first_key < length; first_key += size.keys) {
        const int64_t line_count = std::min(size.lines, all - first_line);
        const int64_t key_count = std::min(size.keys, length - first_key);
        const Range keys{static_cast<int>(first_key), static_cast<int>(key_count)};
        const Range queries{0, pass.length};
        Products p{.pass = pass,
                   .heads = heads,
                   .channels = c,
                   .first_line = static_cast<unsigned>(first_line),
                   .lines = line_count,
                   .scale = b.scale,
                   .gamma = b.gamma,
                   .queries = queries,
                   .keys = keys,
                   .query_side = 0,
                   .key_side = 0,
                   .query_map = b.query,
                   .key_map = b.key,
                   .shift = b.normalizer,
                   .P = nullptr,
                   .out = P,
                   .layout = matrices(keys, length)};
        queue.products<T, Result::softmax>(p);

        p.channels = C;
        p.query_map = b.grad;
        p.key_map = b.value;
        p.shift = delta;
        p.P = P;
        p.out = dS;
        queue.products<T, Result::gradient>(p);

        WeightedSum a{.pass = pass,
                      .heads = heads,
                      .channels = C,
                      .first_line = static_cast<unsigned>(first_line),
                      .lines = line_count,
                      .targets = keys,
                      .sources = queries,
                      .targets_see = false,
                      .wide = true,
                      .weights = P,
                      .layout = p.layout,
                      .values = b.grad,
                      .out = b.grad_value,
                      .scratch = nullptr,
                      .gamma = b.gamma,
                      .add = !pass.first,
                      .last = pass.last};
        queue.sum<T>(a);

        a.channels = c;
        a.weights = dS;
        a.values = b.query;
        a.out = b.grad_key;
        a.scratch = scratch ? key_scratch : nullptr;
        a.gamma = nullptr;  // it is in dS
        queue.sum<T>(a);

        a.targets = queries;
        a.sources = keys;
        a.targets_see = true;
        a.values = b.key;
        a.out = b.grad_query;
        a.scratch = scratch ? query_scratch : nullptr;
        a.add = !pass.first || first_key > 0;
        a.last = pass.last && first_key + key_count == length;
        queue.sum<T>(a);
      }
  }
  return queue.error;
}

}  // namespace

int forward(const Forward& arguments, void* stream) {
  return dispatch(arguments.dtype, [&](auto element) {
    using T = decltype(element);
    return arguments.sizes.C <= kNarrowChannels ? run_forward<T, Narrow>(arguments, stream)
                                                : run_forward<T, Widest>(arguments, stream);
  });
}

int backward(const Backward& arguments, void* stream) {
  return dispatch(arguments.dtype, [&](auto element) { return run_backward<decltype(element)>(arguments, stream); });
}

int primitive(Primitive primitive, Dtype dtype, const Sizes& sizes, const void* first, const void* second, void* out,
              void* stream) {
  return dispatch(dtype, [&](auto element) {
    return run_primitive<decltype(element)>(primitive, sizes, first, second, out, stream);
  });
}

int64_t backward_workspace(const Backward& arguments) {
  return dispatch(arguments.dtype, [&](auto element) { return Workspace<decltype(element)>(arguments).bytes(); });
}

int64_t total_bytes() { return kTotals * static_cast<int64_t>(sizeof(double)); }

int total(Dtype dtype, const void* numbers, int64_t count, void* workspace, void* sum, void* stream) {
  Queue queue{stream};
  return dispatch(dtype, [&](auto element) {
    using S = Sum<decltype(element)>;
    queue.total(static_cast<const S*>(numbers), count, static_cast<double*>(workspace), static_cast<S*>(sum));
    return queue.error;
  });
}

}  // namespace cc_attention::general
