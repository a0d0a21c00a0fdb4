// Kernels for exact float32 products on sm_80 and later: one block computes a line of one head, or a part of it.
//
// Three kinds of products do nearly all the work of a block. All their operands are in shared memory, in their order in
// global memory or, for weights (P and dS), in groups of four keys, so that a thread reads 16 bytes at a time:
//
//   multiply_rows     products of the rows of two maps: Q K^T and dO V^T
//   add_over_keys     weighted sums over keys: P V and dS K
//   add_over_queries  weighted sums over queries: P^T dO and dS^T Q
//
// A thread holds up to 104 sums in registers. For lines of 97 pixels and 128 channels, a step of four keys of
// add_over_keys takes 21 loads of 16 bytes from shared memory for 416 multiply-adds, four steps of add_over_queries
// take 24 for 416, and four channels of multiply_rows 18 for 308. By arithmetic, multiply-adds are the bound: with one
// warp in each of four partitions, which load 128 bytes per cycle together, these loads take 116, 128 and 100 of 416,
// 416 and 308 cycles if addresses that threads of a warp share are read once. Measurements have to show whether they
// are.
//
// The maps stream from global memory through a ring of two pieces. A thread starts copying the next piece before it
// works on the current one, and there is one barrier per piece.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "device.h"
#include "line.h"
#include "tensor_core.h"

namespace cc_attention::float32 {

using device::kAllLanes;
using tensor_core::Divisor;
using tensor_core::read_only;
using Quad = Vec4<float>;

constexpr int kLanes = 16;           // neighboring threads, which hold neighboring keys or channels
constexpr int kPieceChannels = 16;   // channels in a piece of multiply_rows
constexpr int kRowPitch = 20;        // floats of a row of such a piece; eight rows lie in different banks
constexpr int kPieceRows = 32;       // maximum rows in a piece of weighted sums
constexpr int kWide = 8 * kLanes;    // channels in a piece of weighted sums with eight channels per thread
constexpr int kNarrow = 4 * kLanes;  // the same with four channels per thread

constexpr int kLongestLine = 4096;  // longer ones don't fit in shared memory in any case
constexpr int kMostRows = 512;      // a thread computes addresses up to so many pixels behind a line

template <class I>
constexpr CC_HOST_DEVICE I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

__device__ __forceinline__ Quad load_quad(const float* from) { return *reinterpret_cast<const Quad*>(from); }
// Stores to global memory.
__device__ __forceinline__ void store_quad(float* to, const Quad& quad) {
  uint32_t words[4];
  memcpy(words, quad.at, sizeof words);
  device::store_words(to, words);
}

#ifndef CC_EMULATOR
// Starts reading an address of global memory into the L2 cache.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
#else
inline void prefetch(const void*) {}
#endif

// Returns exp(a - b). Subtract before multiplying by log2(e): the product of a large b would round the difference away.
__device__ __forceinline__ float exp_difference(float a, float b) {
  return device::exp2_approximate((a - b) * 1.4426950408889634f);
}

// The lines of a pass, each head of which counts as one. Heads of the same line have neighboring indices.
struct Lines {
  Pass pass;
  int heads;
  Divisor by_heads, by_step;
  Lines(const Pass& pass, int64_t heads)
      : pass(pass), heads(static_cast<int>(heads)), by_heads(heads), by_step(pass.step) {}
};

struct HeadLine : LineOf<int64_t> {
  int head, heads;
  __device__ __forceinline__ HeadLine(const Lines& lines, unsigned index) : heads(lines.heads) {
    const unsigned line = lines.by_heads.quotient(index), outside = lines.by_step.quotient(line);
    head = static_cast<int>(index - line * heads);
    first = outside * (lines.pass.step * (lines.pass.length - 1)) + line;
    step = lines.pass.step;
    length = lines.pass.length;
  }
  // Returns the index of a pixel in [N,T,H,W,heads].
  __device__ __forceinline__ int64_t entry(int i) const { return pixel(i) * heads + head; }
  // Returns the offset of channel `channel` of the head in pixel i of a map with `channels` channels per head.
  __device__ __forceinline__ int64_t offset(int64_t pitch, int i, int channels, int channel) const {
    return pixel(i) * pitch + head * channels + channel;
  }
};

// Returns x. What follows from the result is computed again, and does not hold registers from an earlier use on.
__device__ __forceinline__ unsigned again(unsigned x) { return x + device::lane() / device::kWarp; }

__device__ __forceinline__ unsigned block_of_pass(const Pass& pass) {
  return pass.backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
}

// Starts copying `rows` pixels of a map to rows of shared memory: the 4 * quads channels from channel `channel` of the
// head on, as far as they exist. The rows up to `padded` get zeros.
template <int threads, int quads, int pitch>
__device__ __forceinline__ void copy_rows(int thread, float* to, const Map& map, const HeadLine& line, int first,
                                          int rows, int padded, int channel, int channels) {
  constexpr int apart = threads / quads;
  channel += thread % quads * 4;
  if (channel >= channels) return;
  int row = thread / quads;
  const float* from = static_cast<const float*>(map.data) + line.offset(map.pitch, first + row, channels, channel);
  const int64_t step = apart * line.step * map.pitch;
  to += row * pitch + thread % quads * 4;
#pragma unroll 1
  for (; row < padded; row += apart, from += step, to += apart * pitch)
    device::copy_async(to, row < rows ? from : static_cast<const float*>(map.data), row < rows);
}

// sums[i][j] += products of rows i * a_apart at `a` with rows j * b_apart at `b`, over 4 * steps channels.
template <int a_apart, int b_apart, int a_rows, int b_rows>
__device__ __forceinline__ void multiply_rows(float (&sums)[a_rows][b_rows], const float* a, const float* b,
                                              int steps) {
#pragma unroll 1
  for (; steps > 0; --steps, a += 4, b += 4) {
    Quad right[b_rows];
#pragma unroll
    for (int j = 0; j < b_rows; ++j) right[j] = load_quad(b + j * b_apart * kRowPitch);
#pragma unroll
    for (int i = 0; i < a_rows; ++i) {
      const Quad left = load_quad(a + i * a_apart * kRowPitch);
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int j = 0; j < b_rows; ++j) sums[i][j] = fmaf(left.at[k], right[j].at[k], sums[i][j]);
    }
  }
}

// Returns the number of steps of multiply_rows for a piece from channel `channel` on.
__device__ __forceinline__ int steps_of(int channel, int channels) {
  return min(kPieceChannels, channels - channel) / 4;
}

// Weights of queries and keys in shared memory, [key / 4, side, key % 4]. With side = 2 or 6 modulo 8, weights of
// neighboring groups of keys lie in different banks.
template <int side>
constexpr CC_HOST_DEVICE int weight_at(int query, int key) {
  return (key / 4 * side + query) * 4 + key % 4;
}

// sums[i] += weighted sums over 4 * quads keys. weights: those of the first query and key; a thread's queries are
// `groups` apart. values: row of the first key, at the thread's first channel.
template <int side, int groups, int rows, int channels>
__device__ __forceinline__ void add_over_keys(float (&sums)[rows][channels], const float* weights, const float* values,
                                              int quads) {
  constexpr int pitch = channels * kLanes;
#pragma unroll 1
  for (; quads > 0; --quads, weights += 4 * side, values += 4 * pitch) {
    Quad value[4][channels / 4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int part = 0; part < channels / 4; ++part) value[k][part] = load_quad(values + k * pitch + part * kNarrow);
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      const Quad weight = load_quad(weights + i * groups * 4);
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int j = 0; j < channels; ++j) sums[i][j] = fmaf(weight.at[k], value[k][j / 4].at[j % 4], sums[i][j]);
    }
  }
}

// The keys of a thread in add_over_queries: as many groups of four as there are, then single ones.
template <int groups, int rows>
struct Keys {
  static constexpr int kQuads = rows / 4, kSingles = rows % 4;
  int group;
  __device__ __forceinline__ int quad(int i) const { return 4 * (group + groups * i); }
  __device__ __forceinline__ int single(int i) const { return 4 * groups * kQuads + group + groups * i; }
  __device__ __forceinline__ int at(int i) const {
    return i < 4 * kQuads ? quad(i / 4) + i % 4 : single(i - 4 * kQuads);
  }
};

// sums[i] += weighted sums over `count` queries, for the thread's keys. weights: those of the first query. values: its
// row, at the thread's first channel.
template <int side, int groups, int rows, int channels>
__device__ __forceinline__ void add_over_queries(float (&sums)[rows][channels], const Keys<groups, rows>& keys,
                                                 const float* weights, const float* values, int count) {
  constexpr int pitch = channels * kLanes, quads = rows / 4, singles = rows % 4;
  const float* quad_weights = weights + weight_at<side>(0, keys.quad(0));
  const float* single_weights = weights + weight_at<side>(0, keys.single(0));
  constexpr int quads_apart = groups * side * 4, singles_apart = groups / 4 * side * 4;
  static_assert(groups % 4 == 0);
#pragma unroll 2
  for (; count > 0; --count, quad_weights += 4, single_weights += 4, values += pitch) {
    Quad value[channels / 4];
#pragma unroll
    for (int part = 0; part < channels / 4; ++part) value[part] = load_quad(values + part * kNarrow);
    const auto add = [&](float (&row)[channels], float weight) {
#pragma unroll
      for (int j = 0; j < channels; ++j) row[j] = fmaf(weight, value[j / 4].at[j % 4], row[j]);
    };
#pragma unroll
    for (int i = 0; i < quads; ++i) {
      const Quad weight = load_quad(quad_weights + i * quads_apart);
#pragma unroll
      for (int k = 0; k < 4; ++k) add(sums[4 * i + k], weight.at[k]);
    }
#pragma unroll
    for (int i = 0; i < singles; ++i) add(sums[4 * quads + i], single_weights[i * singles_apart]);
  }
}

// The part of a map that a thread reads and writes: some of `count` rows, which are `step` elements apart, from the
// first on. Of each, it has four channels there, of `channels` from there on, and at every further kNarrow channels.
template <class Element>
struct Rows {
  Element* first;
  int step, count, channels;

  // Calls act(i, part, whether it exists, its address) for `at_once` of the thread's rows, which are `rows` in all.
  // row_of: returns the row with a number. The addresses are computed again each time, and hold no registers in
  // between.
  template <int at_once, int parts, class RowOf, class Act>
  __device__ __forceinline__ void for_each(int start, int rows, RowOf&& row_of, Act&& act) const {
    Element* const from = first + again(0);
#pragma unroll
    for (int i = 0; i < at_once; ++i) {
      const int row = row_of(start + i);
#pragma unroll
      for (int part = 0; part < parts; ++part)
        act(i, part, start + i < rows && row < count && part * kNarrow < channels, from + row * step + part * kNarrow);
    }
  }
};

// Reads four channels of rows of a map. What doesn't exist is 0.
template <int at_once, int parts, class RowOf>
__device__ __forceinline__ void read(Quad (&quads)[at_once][parts], const Rows<const float>& map, int start, int rows,
                                     RowOf&& row_of) {
  map.for_each<at_once, parts>(start, rows, row_of, [&](int i, int part, bool exists, const float* from) {
    quads[i][part] = exists ? load_quad(from) : Quad{};
  });
}
template <int at_once, int parts, class RowOf>
__device__ __forceinline__ void write(const Quad (&quads)[at_once][parts], const Rows<float>& map, int start, int rows,
                                      RowOf&& row_of) {
  map.for_each<at_once, parts>(start, rows, row_of, [&](int i, int part, bool exists, float* to) {
    if (exists) store_quad(to, quads[i][part]);
  });
}

// The number of rows in a piece of weighted sums: pieces of nearly equal size, a multiple of four.
inline int piece_of(int rows) { return ceil_div(ceil_div(rows, ceil_div(rows, kPieceRows)), 4) * 4; }

// Returns whether the kernels support arguments with these maps on the device, except for the lengths of lines:
// float32, sm_80 for asynchronous copies, channels and addresses that allow copies of 16 bytes in every pixel and head,
// and offsets within a line that fit in an int.
inline bool fits(Dtype dtype, const Sizes& sizes, int axes, const Device& device, std::initializer_list<Map> maps) {
  if (dtype != Dtype::float32 || device.capability < 80) return false;
  if (sizes.c <= 0 || sizes.C <= 0 || sizes.c % 4 != 0 || sizes.C % 4 != 0) return false;
  int64_t pitch = 0;
  for (const Map& map : maps) {
    if (reinterpret_cast<uintptr_t>(map.data) % 16 != 0 || map.pitch % 4 != 0) return false;
    pitch = std::max(pitch, map.pitch);
  }
  for (const Pass& pass : passes_of(sizes, axes))
    if (pass.length > kLongestLine || (pass.length + kMostRows) * pass.step * pitch > INT32_MAX) return false;
  return true;
}

// serves returns whether these kernels support the arguments on the device. The others are specified in kernels.h.
bool serves(const Forward& arguments, const Device& device);
bool serves(const Backward& arguments, const Device& device);
int forward(const Forward& arguments, const Device& device, void* stream);
int backward(const Backward& arguments, const Device& device, void* stream);
int64_t backward_workspace(const Backward& arguments, const Device& device);

}  // namespace cc_attention::float32
