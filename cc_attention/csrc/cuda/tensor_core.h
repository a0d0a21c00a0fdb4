// What the tensor-core kernels are made of: tiles of shared memory, the operands that a warp takes from them, the way
// of its results to memory.
//
// Storage types are bfloat16, float16, and float, whose products are those of tf32. A product step takes 32 bytes of
// the contraction, 16 or 8 elements, and then both widths are the same to the loads of row-major operands. Only the
// transposed loads differ: ldmatrix transposes 16-bit elements; of tf32 each lane takes its words one by one, and there
// word t and word t + 4 of a step stand for elements 2t and 2t + 1. That is the order in which a lane holds the results
// of the last product, so that these become operands of the next without moving.
#pragma once

#include <initializer_list>

#include "device.h"
#include "line.h"

namespace cc_attention::tensor_core {

using device::kAllLanes;
using device::kWarp;

// A tile has rows of 128 bytes of channels and 16 more, so that eight rows lie in different banks.
constexpr int kRowBytes = 128;
constexpr int kRowPieces = kRowBytes / 16;
constexpr int kPitch = kRowBytes + 16;

constexpr int kTile = 16;       // rows of a product's left operand; keys and queries come in tiles of as many
constexpr int kStepBytes = 32;  // of the contraction, in one product

template <class T>
constexpr int kSize = sizeof(T);
template <class T>
constexpr int kStep = kStepBytes / kSize<T>;  // elements of the contraction, in one product
template <class T>
constexpr int kChunk = kRowBytes / kSize<T>;  // channels in a row of a tile

constexpr float kLog2e = 1.4426950408889634f;

// The place of a lane in the fragments of a product: it holds elements (row, 2 * pair), (row, 2 * pair + 1) of each 16
// x 8 result, and the same of row + 8.
struct Lane {
  int index, row, pair;
};
__device__ __forceinline__ Lane this_lane() {
  const int index = device::lane();
  return {index, index / 4, index % 4};
}

// Starts to copy rows first .. first + rows - 1 of a line of feature map [N,H,W,channels] into a tile, the 128 bytes
// from channel `channel` on; zeros beyond the line and the channels.
template <class T>
__device__ __forceinline__ void copy_rows(unsigned char* tile, const T* feature_map, const Line& line, int first,
                                          int rows, int channel, int channels) {
  const int piece = threadIdx.x % kRowPieces, apart = blockDim.x / kRowPieces;
  const int from = channel + piece * (16 / kSize<T>);
  int row = threadIdx.x / kRowPieces;
  const int present = from < channels ? line.length - first : 0;  // rows
  const int step = static_cast<int>(line.step) * channels;
  const T* source = feature_map + line.first * channels + ((first + row) * step + from);
  unsigned char* to = tile + row * kPitch + piece * 16;
#pragma unroll 1
  for (; row < rows; row += apart, source += apart * step, to += apart * kPitch)
    device::copy_async(to, row < present ? source : feature_map, row < present);
}

template <class T>
__device__ __forceinline__ void round_words(uint32_t (&words)[4]) {
  if constexpr (std::is_same_v<T, float>) {
    for (uint32_t& word : words) {
      float value;
      memcpy(&value, &word, sizeof value);
      word = device::round_tf32(value);
    }
  }
}

// Of an address that the compiler cannot see to be a multiple of 4; it would load byte by byte.
__device__ __forceinline__ uint32_t word_at(const unsigned char* address) {
  uint32_t word;
  memcpy(&word, __builtin_assume_aligned(address, 4), sizeof word);
  return word;
}

// The 16 x kStep left operand at `tile`, whose rows are the operand's.
template <class T>
__device__ __forceinline__ void load_left(uint32_t (&operand)[4], const unsigned char* tile, int pitch, int lane) {
  device::load_matrices(operand, tile + lane % 16 * pitch + lane / 16 * 16);
  round_words<T>(operand);
}

// Two kStep x 8 right operands, words 0, 1 and words 2, 3, from 16 rows at `tile` that are the operands' columns.
template <class T>
__device__ __forceinline__ void load_right(uint32_t (&operands)[4], const unsigned char* tile, int pitch, int lane) {
  device::load_matrices(operands, tile + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 16);
  round_words<T>(operands);
}

// The left operand whose transpose, kStep rows of 16 elements, is at `tile`.
template <class T>
__device__ __forceinline__ void load_left_transposed(uint32_t (&operand)[4], const unsigned char* tile, int pitch,
                                                     int lane) {
  if constexpr (std::is_same_v<T, float>) {
    const unsigned char* word = tile + 2 * (lane % 4) * pitch + lane / 4 * 4;
    for (int i = 0; i < 4; ++i) operand[i] = word_at(word + i / 2 * pitch + i % 2 * 32);
    round_words<T>(operand);
  } else {
    device::load_matrices_transposed(operand, tile + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 16);
  }
}

// The left operand at `tile` for a product with transposed right operands, whose order of elements it has to share.
template <class T>
__device__ __forceinline__ void load_left_results(uint32_t (&operand)[4], const unsigned char* tile, int pitch,
                                                  int lane) {
  if constexpr (std::is_same_v<T, float>) {
    const unsigned char* words = tile + lane / 4 * pitch + lane % 4 * 8;
    for (int i = 0; i < 4; ++i) operand[i] = word_at(words + i % 2 * 8 * pitch + i / 2 * 4);
    round_words<T>(operand);
  } else {
    load_left<T>(operand, tile, pitch, lane);
  }
}

// Two right operands side by side, words 0, 1 and words 2, 3: the kStep rows of 16 elements at `tile` are their rows.
template <class T>
__device__ __forceinline__ void load_right_transposed(uint32_t (&operands)[4], const unsigned char* tile, int pitch,
                                                      int lane) {
  if constexpr (std::is_same_v<T, float>) {
    const unsigned char* word = tile + 2 * (lane % 4) * pitch + lane / 4 * 4;
    for (int i = 0; i < 4; ++i) operands[i] = word_at(word + i % 2 * pitch + i / 2 * 32);
    round_words<T>(operands);
  } else {
    device::load_matrices_transposed(operands, tile + lane % 16 * pitch + lane / 16 * 16);
  }
}

// first, second += left times the one and the other right operand.
template <class T>
__device__ __forceinline__ void multiply_pair(float (&first)[4], float (&second)[4], const uint32_t (&left)[4],
                                              const uint32_t (&right)[4]) {
  device::multiply_add<T>(first, left, right[0], right[1]);
  device::multiply_add<T>(second, left, right[2], right[3]);
}

// scores[j] += the 16 rows at `left` times the 8 rows 8j .. 8j + 7 at `right`, over `steps` steps of both rows'
// channels.
template <class T, int tiles>
__device__ __forceinline__ void multiply_rows(float (&scores)[2 * tiles][4], const unsigned char* left,
                                              const unsigned char* right, int steps) {
  const int lane = device::lane();
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    uint32_t a[4];
    load_left<T>(a, left + step * kStepBytes, kPitch, lane);
#pragma unroll
    for (int j = 0; j < tiles; ++j) {
      uint32_t b[4];
      load_right<T>(b, right + j * kTile * kPitch + step * kStepBytes, kPitch, lane);
      multiply_pair<T>(scores[2 * j], scores[2 * j + 1], a, b);
    }
  }
}

// Keeps results j, 16 x 8, as part of the left operands of the next product; of 16-bit elements two make up a step.
template <class T, int steps>
__device__ __forceinline__ void keep_as_left(uint32_t (&operands)[steps][4], int j, const float (&results)[4]) {
  if constexpr (std::is_same_v<T, float>) {
    for (int i = 0; i < 4; ++i) operands[j][i] = device::round_tf32(results[i % 2 * 2 + i / 2]);
  } else {
    for (int i = 0; i < 2; ++i) operands[j / 2][j % 2 * 2 + i] = device::pack<T>(results[2 * i], results[2 * i + 1]);
  }
}

// Steps of the contraction that a tile from channel `channel` on has.
template <class T>
__device__ __forceinline__ int steps_from(int channel, int channels) {
  const int left = channels - channel < kChunk<T> ? channels - channel : kChunk<T>;
  return (left + kStep<T> - 1) / kStep<T>;
}

// Where 16 rows of results belong: pixels row .. row + 15 of a line, from channel `channel` on. They leave the
// fragments as runs of four neighboring channels: lanes of even and odd `pair` swap halves of two neighboring 16 x 8
// results, numbers j (even) and j + 1, and hold then four channels of row lane.row + 8 * half.
struct Place {
  int64_t first;  // element of the lane's run of results 0 and 1 in the first 8 rows, in a feature map [N,H,W,channels]
  int apart;      // elements to the run in the others
  int left[2];    // channels from there on, none beyond the line

  __device__ __forceinline__ Place(const Line& line, int row, int channel, int channels) {
    const Lane lane = this_lane();
    const int odd = lane.pair % 2;
    channel += 8 * odd + 2 * (lane.pair - odd);
    row += lane.row;
    const int step = static_cast<int>(line.step) * channels;
    first = line.first * channels + (row * step + channel);
    apart = 8 * step;
    for (int half = 0; half < 2; ++half) left[half] = row + 8 * half < line.length ? channels - channel : 0;
  }

  __device__ __forceinline__ Vec4<float> run_of(const float (&left)[4], const float (&right)[4], int half) const {
    const bool odd = device::lane() % 2;
    const float kept[2] = {odd ? right[2 * half] : left[2 * half], odd ? right[2 * half + 1] : left[2 * half + 1]};
    const float sent[2] = {odd ? left[2 * half] : right[2 * half], odd ? left[2 * half + 1] : right[2 * half + 1]};
    float got[2];
    for (int i = 0; i < 2; ++i) got[i] = __shfl_xor_sync(kAllLanes, sent[i], 1);
    return {{odd ? got[0] : kept[0], odd ? got[1] : kept[1], odd ? kept[0] : got[0], odd ? kept[1] : got[1]}};
  }

  // Whether the lane's run of results j and j + 1 exists.
  __device__ __forceinline__ bool has(int j, int half) const { return 8 * j < left[half]; }
  template <class T>
  __device__ __forceinline__ T* run(T* feature_map, int j, int half) const {
    return feature_map + first + (half ? apart : 0) + 8 * j;
  }
};

// The runs of a block of results, read before the products that are added to them, so that these hide the wait. Words,
// for elements of 16 bits would be taken apart, and waited for, at once.
template <class T, int tiles>
struct Runs {
  uint32_t at[tiles / 2][2][kSize<T>] = {};

  __device__ __forceinline__ void read(const Place& place, const T* feature_map) {
#pragma unroll
    for (int j = 0; j < tiles; j += 2)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (place.has(j, half))
          memcpy(at[j / 2][half], __builtin_assume_aligned(place.run(feature_map, j, half), 4 * kSize<T>),
                 4 * kSize<T>);
  }
  __device__ __forceinline__ Vec4<T> run(int j, int half) const {
    Vec4<T> result;
    memcpy(&result, at[j / 2][half], sizeof result);
    return result;
  }
};

template <class T>
__device__ __forceinline__ Vec4<float> widen(const Vec4<T>& run) {
  Vec4<float> result;
  for (int i = 0; i < 4; ++i) result.at[i] = device::to_sum(run.at[i]);
  return result;
}

template <class T>
__device__ __forceinline__ Vec4<T> narrow(const Vec4<float>& run) {
  if constexpr (std::is_same_v<T, float>) {
    return run;
  } else {
    const uint32_t words[2] = {device::pack<T>(run.at[0], run.at[1]), device::pack<T>(run.at[2], run.at[3])};
    Vec4<T> result;
    memcpy(&result, words, sizeof result);
    return result;
  }
}

// Two neighboring elements of shared memory.
template <class T>
__device__ __forceinline__ void store_pair(unsigned char* to, float first, float second) {
  if constexpr (std::is_same_v<T, float>) {
    const float pair[2] = {first, second};
    memcpy(__builtin_assume_aligned(to, 8), pair, 8);
  } else {
    const uint32_t word = device::pack<T>(first, second);
    memcpy(__builtin_assume_aligned(to, 4), &word, 4);
  }
}
template <class T>
__device__ __forceinline__ void load_pair(float (&pair)[2], const unsigned char* from) {
  struct alignas(2 * sizeof(T)) Pair {
    T at[2];
  };
  const Pair stored = *reinterpret_cast<const Pair*>(from);
  for (int i = 0; i < 2; ++i) pair[i] = device::to_sum(stored.at[i]);
}

// Writes a warp's 16 rows at `tile` to pixels first .. first + 15 of a line, the 128 bytes from channel `channel` on.
template <class T>
__device__ __forceinline__ void write_rows(T* feature_map, const unsigned char* tile, const Line& line, int first,
                                           int channel, int channels) {
  constexpr int apart = kWarp / kRowPieces;
  const int lane = device::lane();
  const int from = channel + lane % kRowPieces * (16 / kSize<T>);
  if (from >= channels) return;
  int row = lane / kRowPieces;
  const int step = static_cast<int>(line.step) * channels;
  T* to = feature_map + line.first * channels + ((first + row) * step + from);
  const unsigned char* source = tile + row * kPitch + lane % kRowPieces * 16;
#pragma unroll
  for (int i = 0; i < kTile / apart; ++i, row += apart, to += apart * step, source += apart * kPitch) {
    if (first + row >= line.length) break;
    struct alignas(16) Piece {
      T at[16 / kSize<T>];
    };
    *reinterpret_cast<Piece*>(to) = *reinterpret_cast<const Piece*>(source);
  }
}

constexpr int kLongestLine = 272;
constexpr int kMostChannels = 8192;  // elements of a line are counted in int

// What both directions need: sm_80, 16-bit elements or leave to use tf32, channels and addresses for copies of 16
// bytes, lines that a block can hold.
inline bool fits(Dtype dtype, const Sizes& sizes, const Device& device, std::initializer_list<const void*> operands) {
  if (device.capability < 80 || dtype == Dtype::float64 || (dtype == Dtype::float32 && !device.tf32)) return false;
  for (const void* operand : operands)
    if (reinterpret_cast<uintptr_t>(operand) % 16 != 0) return false;
  const int64_t size = element_size(dtype);
  return sizes.c > 0 && sizes.C > 0 && sizes.c * size % 16 == 0 && sizes.C * size % 16 == 0 &&
         sizes.c <= kMostChannels && sizes.C <= kMostChannels && sizes.H <= kLongestLine && sizes.W <= kLongestLine;
}

// Whether these kernels can serve the arguments on the device, and queue them there (as kernels.h says).
bool serves(const Forward& arguments, const Device& device);
bool serves(const Backward& arguments, const Device& device);
int forward(const Forward& arguments, const Device& device, void* stream);
int backward(const Backward& arguments, const Device& device, void* stream);
int64_t backward_workspace(Dtype dtype, const Sizes& sizes);

}  // namespace cc_attention::tensor_core
