// The general kernels. They use scalar arithmetic in Sum<T>, so float32 products are not rounded to tf32. They have no
// requirements on sizes, alignment or architecture.
//
// Rows and columns are lines (line.h). There is one pass for each kind: first the columns, in which a pixel does not
// attend to itself, then the rows, which add to the result of the columns in place. Two device functions do nearly all
// the work of a block:
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
// Forward: one kernel with multiply, an online softmax and accumulate. The softmax of the rows starts from the
// normalizers of the columns, so the column result is weighted like a value. If all column scores are -inf, its weight
// is 0.
//
// Backward, with P = exp(score - top) / total, dP = dO V^T, dS = P (dP - delta) and delta = sum over C of dO * O:
// product_kernel writes P and dS of some lines to the workspace. Then dV = P^T dO, dK = dS^T Q and dQ = dS K are
// weighted sums, computed by the kernel of the primitives gather and scatter. So each product is computed once. The
// workspace has a fixed size for any batch: it holds P and dS of some lines, or of some keys of one line, at a time.
//
// Between the passes of 16-bit dtypes, dQ and dK are kept in float32, since the two parts may cancel. The other results
// are averages, which do not cancel, and are kept in the output.
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

// The pixels of a Range in a feature map.
template <class T>
struct Pixels {
  const T* first;
  int64_t step;  // elements
  int count;
  __device__ __forceinline__ Pixels(const void* map, int channels, const Line& line, Range range)
      : first(static_cast<const T*>(map) + line.pixel(range.first) * channels),
        step(line.step * channels),
        count(range.count) {}
};

// The row pass goes backwards. It starts with what the column pass used last, which is still in the L2 cache.
__device__ __forceinline__ unsigned block_of_pass(bool column) {
  return column ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
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
// Both sides must have the same stride between pixels.
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
    b_pieces.load(a.step, left);
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

  // Calls f(sum, target, offset) for the sums that exist; offset is relative to the first channel of the first target.
  template <class F>
  __device__ __forceinline__ void for_each(int targets, int channels, int64_t step, F&& f) {
    int64_t offset = first_target * step + first_channel;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i, offset += step) {
      if (first_target + i >= targets) break;
#pragma unroll
      for (int j = 0; j < Shape::kChannels; ++j)
        if (first_channel + j * Shape::kLanes < channels) f(at[i][j], first_target + i, offset + j * Shape::kLanes);
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

// Computes up to Shape::kSpan channels of the result, starting at `channel`. There is one block per line and tile of
// queries. The last launch of the row pass writes the final normalizers.
template <class T, class Shape>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) forward_kernel(Forward f, bool column, int channel) {
  using S = Sum<T>;
  constexpr int kReaders = kThreads / Shape::kTargets;  // threads that share the softmax of a query
  S* const tile = shared<S>();                          // [kSources, kPitch] scores, then weights
  S* const tops = tile + kForwardTile<T, Shape>;        // [kTargets] largest score of a query so far
  S* const totals = tops + Shape::kTargets;             // [kTargets] sum of the exponentials relative to it
  S* const factors = totals + Shape::kTargets;          // [kTargets] factors that the sums must be multiplied by
  S* const value_ring = factors + Shape::kTargets;      // [Values::kRing]

  const int length = static_cast<int>(column ? f.sizes.H : f.sizes.W);
  const int c = static_cast<int>(f.sizes.c), C = static_cast<int>(f.sizes.C);
  const unsigned block = block_of_pass(column), tiles = ceil_div(length, Shape::kTargets);
  const Line line = line_of(f.sizes, column, block / tiles);
  const Range queries = Range{0, length}.tile(block % tiles, Shape::kTargets);
  const auto normalizer = [&](int query) -> Normalizer<S>& {
    return static_cast<Normalizer<S>*>(f.normalizer)[line.pixel(queries.first + query)];
  };
  const Normalizer<S> none{-INFINITY, 0};
  const int query = threadIdx.x / kReaders, reader = threadIdx.x % kReaders;  // role in the softmax

  if (reader == 0) {
    const Normalizer<S> before = !column && query < queries.count ? normalizer(query) : none;
    tops[query] = before.top;
    totals[query] = before.total;
  }
  Sums<T, Shape> sums;
  for (int first = 0; first < length; first += Shape::kSources) {
    const Range keys{first, min(Shape::kSources, length - first)};
    S scores[4][4];
    __syncthreads();  // all threads have used the previous tile
    multiply<T, Shape::kTargets, Shape::kSources, 1, 1>(scores, Square<1>(queries.count, keys.count),
                                                        {f.query, c, line, queries}, {f.key, c, line, keys}, c, tile);
    __syncthreads();  // the scores overwrite the pieces
    if (const Square<1> square(queries.count, keys.count); square.active) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Vec4<S> quad;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool self = queries.first + square.a(i) == keys.first + square.b(j);
          quad.at[i] = column && self ? -INFINITY : scores[i][j];
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
    Pixels<T> value_pixels(f.value, C, line, keys);
    value_pixels.first += channel;
    Values<T, Shape> values(value_pixels, C - channel);
    __syncthreads();

#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
#pragma unroll
      for (auto& element : sums.at[i]) element *= factors[sums.first_target + i];
    sums.accumulate(tile, values, keys.count, queries.count, value_ring);
  }

  // The column result is weighted by the column total, as if it were the exponential of one score.
  __syncthreads();
  S* const carried = tile;  // [kTargets]
  if (threadIdx.x < queries.count) {
    const S top = tops[threadIdx.x], total = totals[threadIdx.x];
    factors[threadIdx.x] = total == 0 ? 0 : 1 / total;
    const Normalizer<S> before = column ? none : normalizer(threadIdx.x);
    carried[threadIdx.x] = column ? 0 : exp_difference(before.top, top) * before.total / total;
    if (column || channel + Shape::kSpan >= C) normalizer(threadIdx.x) = {top, total};
  }
  __syncthreads();
  T* const out = static_cast<T*>(f.out) + line.pixel(queries.first) * C + channel;
  sums.for_each(queries.count, C - channel, line.step * C, [&](S element, int target, int64_t offset) {
    element *= factors[target];
    if (!column) element += device::to_sum(out[offset]) * carried[target];
    out[offset] = device::from_sum<T>(element);
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

// The layout of the row or column entries in weights [N,L,H,W].
WeightLayout entries(const Sizes& s, bool column) {
  const int64_t plane = s.H * s.W;
  if (column) return {s.W * plane, s.W, s.L() * plane, 1, s.W, plane, 0, true};
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
  softmax,   // P = exp(x - top) / total
  gradient,  // dS = P (x - delta)
};

// The arguments of product_kernel, which computes the products of all query pixels with all key pixels of each line.
struct Products {
  Sizes sizes;
  bool column;
  int channels;  // channels of the maps
  int64_t first_line, lines;
  Range queries, keys;       // pixels of each line
  int query_side, key_side;  // pixels per block, at most kSide
  const void* query_map;     // [N,H,W,channels]
  const void* key_map;       // [N,H,W,channels]
  const void* shift;         // [N,H,W] normalizers or delta
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
                                             const Line& line, const Range& queries, const Range& keys, int64_t start,
                                             bool first, bool last) {
  using S = Sum<T>;
  using Quad = Vec4<S>;
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    if (square.a(i) >= queries.count) continue;
    const int64_t first_entry = start + p.layout.entry(queries.first + square.a(i), keys.first);
    S shifts[4], factors[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t pixel = line.pixel(queries.first + min(square.a(i + k), queries.count - 1));
      shifts[k] = 0;
      factors[k] = 1;
      if (!last) continue;
      if constexpr (result == Result::gradient) {
        shifts[k] = static_cast<const S*>(p.shift)[pixel];
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
        for (int k = 0; k < 4; ++k) quad.at[k] = P.at[k] * (quad.at[k] - shifts[k]);
      }
      if (last && result == Result::softmax) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const bool self = p.column && queries.first + square.a(i + k) == keys.first + square.b(j);
          quad.at[k] = self ? 0 : exp_difference(quad.at[k], shifts[k]) * factors[k];
        }
      }
      *to = quad;
    }
  }
}

template <class T, Result result>
__global__ void __launch_bounds__(kProductThreads, kBlocks<T>) product_kernel(Products p) {
  using S = Sum<T>;
  unsigned block = block_of_pass(p.column);
  const unsigned query_tiles = ceil_div(p.queries.count, p.query_side);
  const unsigned key_tiles = ceil_div(p.keys.count, p.key_side);
  const Range queries = p.queries.tile(block % query_tiles, p.query_side);
  block /= query_tiles;
  const Range keys = p.keys.tile(block % key_tiles, p.key_side);
  const int64_t line_index = block / key_tiles;
  const Line line = line_of(p.sizes, p.column, p.first_line + line_index);

  const Square<2> square(queries.count, keys.count);
  const int64_t start = p.layout.line(line_index);
  S products[8][8];
  Range span{0, 0};  // range of channels
  do {               // runs once even without channels, to write zeros
    span = {span.first + span.count, min(p.channels - span.first - span.count, kLongestSum<T>)};
    Pixels<T> query_pixels(p.query_map, p.channels, line, queries), key_pixels(p.key_map, p.channels, line, keys);
    query_pixels.first += span.first;
    key_pixels.first += span.first;
    __syncthreads();  // all threads have read the previous pieces
    multiply<T, kSide, kSide, 2, 2>(products, square, query_pixels, key_pixels, span.count, shared<S>());
    if (!square.active) continue;
    constexpr bool only = !std::is_same_v<T, Sum<T>>;  // 16-bit types have one span
    const bool first = only || span.first == 0, last = only || span.first + span.count >= p.channels;
    if constexpr (result == Result::score)
      write_scores<T>(p, products, queries, keys, start, first);
    else
      write_matrix<T, result>(p, products, square, line, queries, keys, start, first, last);
  } while (span.first + span.count < p.channels);
}

// delta [N,H,W] = sum over C of out * grad_out, with one warp per pixel.
template <class T>
__global__ void __launch_bounds__(kThreads) delta_kernel(Backward b, Sum<T>* delta) {
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (pixel >= b.sizes.pixels()) return;
  const T* const out = static_cast<const T*>(b.out) + pixel * b.sizes.C;
  const T* const grad = static_cast<const T*>(b.grad_out) + pixel * b.sizes.C;
  Sum<T> sum = 0;
#pragma unroll 4
  for (int64_t channel = threadIdx.x % kWarp; channel < b.sizes.C; channel += kWarp)
    sum += device::to_sum(out[channel]) * device::to_sum(grad[channel]);
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  if (threadIdx.x % kWarp == 0) delta[pixel] = sum;
}

// The arguments of sum_kernel, which computes, for each target pixel of each line, the weighted sum of the source
// pixels.
struct WeightedSum {
  Sizes sizes;
  bool column;
  int channels;
  int64_t first_line, lines;
  Range targets, sources;  // pixels of each line
  bool targets_see;        // if true, targets are queries and sources are keys of the weights; otherwise vice versa
  bool wide;               // the weights are in Sum<T>, not in T
  const void* weights;
  WeightLayout layout;
  const void* values;  // [N,H,W,channels]
  void* out;           // [N,H,W,channels]
  void* scratch;       // [N,H,W,channels] in Sum<T> or null; if given, passes before the last write here, not to out
  bool add, last;      // add to the result of the previous passes; this is the last pass
};

template <class T, class Shape>
constexpr int kSumShared = (Shape::kWeights + Values<T, Shape>::kRing) * sizeof(Sum<T>);

template <class T, class Shape>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) sum_kernel(WeightedSum a) {
  using S = Sum<T>;
  S* const tile = shared<S>();                   // [kSources, kPitch] weights
  S* const value_ring = tile + Shape::kWeights;  // [Values::kRing]
  unsigned block = block_of_pass(a.column);
  const unsigned tiles = ceil_div(a.targets.count, Shape::kTargets);
  const Range targets = a.targets.tile(block % tiles, Shape::kTargets);
  block /= tiles;
  const unsigned spans = ceil_div(a.channels, Shape::kSpan);
  const int channel = block % spans * Shape::kSpan, channels = a.channels - channel;
  const int64_t line_index = block / spans;
  const Line line = line_of(a.sizes, a.column, a.first_line + line_index);
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
    Pixels<T> value_pixels(a.values, a.channels, line, sources);
    value_pixels.first += channel;
    Values<T, Shape> values(value_pixels, channels);
    sums.accumulate(tile, values, sources.count, targets.count, value_ring);
  }

  const int64_t start = line.pixel(targets.first) * a.channels + channel;
  T* const out = static_cast<T*>(a.out) + start;
  S* const scratch = static_cast<S*>(a.scratch) + start;
  sums.for_each(targets.count, channels, line.step * a.channels, [&](S element, int, int64_t offset) {
    if (a.add) element += a.scratch ? scratch[offset] : device::to_sum(out[offset]);
    if (a.scratch && !a.last)
      scratch[offset] = element;
    else
      out[offset] = device::from_sum<T>(element);
  });
}

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
  for (const bool column : {true, false})
    for (int channel = 0; channel == 0 || channel < f.sizes.C;
         channel += Shape::kSpan)  // runs even without channels, for the normalizers
      queue.launch(forward_kernel<T, Shape>,
                   lines(f.sizes, column) * ceil_div<int64_t>(column ? f.sizes.H : f.sizes.W, Shape::kTargets),
                   kThreads, kForwardShared<T, Shape>, f, column, channel);
  return queue.error;
}

template <class T>
int run_primitive(Primitive primitive, const Sizes& sizes, const void* first, const void* second, void* out,
                  void* stream) {
  Queue queue{stream};
  for (const bool column : {true, false}) {
    const Range all{0, static_cast<int>(column ? sizes.H : sizes.W)};
    if (primitive == Primitive::score)
      queue.products<T, Result::score>({.sizes = sizes,
                                        .column = column,
                                        .channels = static_cast<int>(sizes.C),
                                        .first_line = 0,
                                        .lines = lines(sizes, column),
                                        .queries = all,
                                        .keys = all,
                                        .query_side = 0,
                                        .key_side = 0,
                                        .query_map = first,
                                        .key_map = second,
                                        .shift = nullptr,
                                        .P = nullptr,
                                        .out = out,
                                        .layout = entries(sizes, column)});
    else
      queue.sum<T>({.sizes = sizes,
                    .column = column,
                    .channels = static_cast<int>(sizes.C),
                    .first_line = 0,
                    .lines = lines(sizes, column),
                    .targets = all,
                    .sources = all,
                    .targets_see = primitive == Primitive::gather,
                    .wide = false,
                    .weights = first,
                    .layout = entries(sizes, column),
                    .values = second,
                    .out = out,
                    .scratch = nullptr,
                    .add = !column,
                    .last = !column});
  }
  return queue.error;
}

// The number of lines, or of keys of a single line, whose P and dS fit in the workspace at a time.
struct Portion {
  int64_t lines, keys;
};

template <class T>
Portion portion(const Sizes& sizes, bool column) {
  const int64_t all = lines(sizes, column), length = column ? sizes.H : sizes.W, row = row_of(length);
  const int64_t room = kWorkspaceBytes / (2 * sizeof(Sum<T>));  // elements of each matrix
  if (length * row > room) return {1, std::max<int64_t>(kSide, room / row / kSide * kSide)};
  const int64_t rounds = ceil_div(all, room / (length * row));
  return {rounds == 0 ? 0 : ceil_div(all, rounds), length};  // rounds of equal size, so that none has few blocks
}

// The parts of the workspace.
template <class T>
struct Workspace {
  int64_t pixels, query_channels, matrix;  // sizes in Sum<T>
  explicit Workspace(const Sizes& s)
      : pixels(s.pixels()), query_channels(sizeof(T) < sizeof(Sum<T>) ? pixels * s.c : 0), matrix(0) {
    for (const bool column : {true, false}) {
      const Portion p = portion<T>(s, column);
      matrix = std::max(matrix, p.lines * p.keys * row_of(column ? s.H : s.W));
    }
  }
  int64_t bytes() const { return (pixels + 2 * query_channels + 2 * matrix) * sizeof(Sum<T>); }
};

template <class T>
int run_backward(const Backward& b, void* stream) {
  using S = Sum<T>;
  const Sizes& sizes = b.sizes;
  const Workspace<T> workspace(sizes);
  S* const P = static_cast<S*>(b.workspace);                        // [lines, keys, row_of(queries)]
  S* const dS = P + workspace.matrix;                               // [lines, keys, row_of(queries)]
  S* const delta = dS + workspace.matrix;                           // [N,H,W]
  S* const query_scratch = delta + workspace.pixels;                // [N,H,W,c], for 16-bit dtypes
  S* const key_scratch = query_scratch + workspace.query_channels;  // [N,H,W,c]
  const bool scratch = workspace.query_channels > 0;
  const int c = static_cast<int>(sizes.c), C = static_cast<int>(sizes.C);

  Queue queue{stream};
  queue.launch(delta_kernel<T>, ceil_div<int64_t>(sizes.pixels(), kThreads / kWarp), kThreads, 0, b, delta);
  for (const bool column : {true, false}) {
    const int64_t length = column ? sizes.H : sizes.W;
    const Portion size = portion<T>(sizes, column);
    for (int64_t first_line = 0; first_line < lines(sizes, column); first_line += size.lines)
      for (int64_t first_key = 0; first_key < length; first_key += size.keys) {
        const int64_t line_count = std::min(size.lines, lines(sizes, column) - first_line);
        const int64_t key_count = std::min(size.keys, length - first_key);
        const Range keys{static_cast<int>(first_key), static_cast<int>(key_count)};
        const Range queries{0, static_cast<int>(length)};
        Products p{.sizes = sizes,
                   .column = column,
                   .channels = c,
                   .first_line = first_line,
                   .lines = line_count,
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
        p.query_map = b.grad_out;
        p.key_map = b.value;
        p.shift = delta;
        p.P = P;
        p.out = dS;
        queue.products<T, Result::gradient>(p);

        WeightedSum a{.sizes = sizes,
                      .column = column,
                      .channels = C,
                      .first_line = first_line,
                      .lines = line_count,
                      .targets = keys,
                      .sources = queries,
                      .targets_see = false,
                      .wide = true,
                      .weights = P,
                      .layout = p.layout,
                      .values = b.grad_out,
                      .out = b.grad_value,
                      .scratch = nullptr,
                      .add = !column,
                      .last = !column};
        queue.sum<T>(a);

        a.channels = c;
        a.weights = dS;
        a.values = b.query;
        a.out = b.grad_key;
        a.scratch = scratch ? key_scratch : nullptr;
        queue.sum<T>(a);

        a.targets = queries;
        a.sources = keys;
        a.targets_see = true;
        a.values = b.key;
        a.out = b.grad_query;
        a.scratch = scratch ? query_scratch : nullptr;
        a.add = !column || first_key > 0;
        a.last = !column && first_key + key_count == length;
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

int64_t backward_workspace(Dtype dtype, const Sizes& sizes) {
  return dispatch(dtype, [&](auto element) { return Workspace<decltype(element)>(sizes).bytes(); });
}

}  // namespace cc_attention::general
