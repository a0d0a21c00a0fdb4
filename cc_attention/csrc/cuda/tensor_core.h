// Building blocks of the tensor-core kernels: tiles of shared memory, loads of a warp's operands from them, and writing
// results to memory.
//
// Storage types are bfloat16, float16, and float with tf32 products. A step of a product takes 32 bytes of the
// contraction: 16 elements of 16 bits, or 8 of tf32. Loads of row-major operands are then the same for both widths.
// Only transposed loads differ: ldmatrix transposes 16-bit elements, but for tf32 each lane loads its words one by one.
// There, words t and t + 4 of a step hold elements 2t and 2t + 1. A lane holds the results of a product in the same
// order, so they become operands of the next product without moving between lanes.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "device.h"
#include "line.h"

namespace cc_attention::tensor_core {

using device::kAllLanes;
using device::kWarp;

// A row of a tile is 128 bytes of channels and 16 bytes of padding, so that eight rows lie in different banks.
constexpr int kRowBytes = 128;
constexpr int kRowPieces = kRowBytes / 16;
constexpr int kPitch = kRowBytes + 16;

constexpr int kTile = 16;       // rows of the left operand of a product; also the queries or keys of a tile
constexpr int kStepBytes = 32;  // bytes of the contraction in one step

template <class T>
constexpr int kSize = sizeof(T);
template <class T>
constexpr int kStep = kStepBytes / kSize<T>;  // elements of the contraction in one step
template <class T>
constexpr int kChunk = kRowBytes / kSize<T>;  // channels in a row of a tile

constexpr float kLog2e = 1.4426950408889634f;

// The position of a lane in the fragments of a product. Of each 16 x 8 result, it holds elements (row, 2 * pair) and
// (row, 2 * pair + 1), and the same two of row + 8.
struct Lane {
  int index, row, pair;
};
__device__ __forceinline__ Lane this_lane() {
  const int index = device::lane();
  return {index, index / 4, index % 4};
}

using Line = LineOf<unsigned>;  // fits checks that pixels have indices below 2^31, which take fewer registers

// Divides numbers below 2^31. It takes no division, so the compiler can keep quotients of a block index in the
// registers that all threads of a warp share.
struct Divisor {
  unsigned multiplier, shift;
  Divisor() = default;
  explicit Divisor(int64_t divisor) : shift(31) {
    while (int64_t{1} << (shift - 31) < divisor) ++shift;
    multiplier = static_cast<unsigned>(((int64_t{1} << shift) + divisor - 1) / divisor);
  }
  __device__ __forceinline__ unsigned quotient(unsigned n) const {
    return static_cast<unsigned>(static_cast<uint64_t>(n) * multiplier >> shift);
  }
};

// The last two passes of a call in one launch, image by image: the earlier pass of image 0 and then, for each image,
// the earlier pass of the next image and the later pass of this one. So the later pass finds in the L2 cache what the
// earlier pass has read and written. An image is what both passes divide into lines: a frame, or a video if one pass is
// along T.
//
// Blocks take their work in the order in which they start. A block of the later pass waits for all blocks of the
// earlier pass of its image. These have started before, so they don't wait for it, however few blocks run at a time.
struct ImageOrder {
  Pass earlier;
  Divisor by_earlier_step, by_image;
  unsigned images, earlier_blocks, later_blocks;  // blocks of a pass in an image
  unsigned* counters;  // the next ticket; then, for each image, the blocks of the earlier pass that are done

  static int64_t images_of(const Sizes& sizes, const Pass& earlier) {
    return sizes.pixels() / (earlier.step * earlier.length);
  }
  static int64_t counter_bytes(int64_t images) { return (images + 1) * static_cast<int64_t>(sizeof(unsigned)); }
  int64_t blocks() const { return static_cast<int64_t>(images) * (earlier_blocks + later_blocks); }
};

inline ImageOrder image_order(const Sizes& sizes, const Pass& earlier, const Pass& later, void* counters) {
  const int64_t images = ImageOrder::images_of(sizes, earlier);
  const auto blocks = [&](const Pass& pass) { return static_cast<unsigned>(pass.lines / images * sizes.heads); };
  return {
      earlier,         Divisor(earlier.step), Divisor(blocks(earlier) + blocks(later)), static_cast<unsigned>(images),
      blocks(earlier), blocks(later),         static_cast<unsigned*>(counters)};
}

// Bytes at the beginning of the shared memory of a block in image order: the number of its image.
template <bool in_image_order>
constexpr int kHeaderBytes = in_image_order ? 16 : 0;

// Sets the pass in the operands `a` of each launch of a call and calls launch(length, lines, both): the length of the
// longest line, the number of lines of all heads, and whether the launch takes the last two passes in image order. Then
// the counters are set to zero first. It stops at the first error.
template <class Operands, class Launch>
cudaError_t for_each_launch(Operands& a, const Sizes& sizes, int axes, bool in_order, void* counters, void* stream,
                            Launch&& launch) {
  const Passes passes = passes_of(sizes, axes);
  for (const Pass& pass : passes) {
    if (in_order && &pass == passes.end() - 2) continue;  // the next launch takes it too
    a.pass = pass;
    a.by_step = Divisor(pass.step);
    const bool both = in_order && pass.last;
    int64_t length = pass.length, lines = pass.lines * sizes.heads;
    if (both) {
      const Pass& earlier = passes.end()[-2];
      a.order = image_order(sizes, earlier, pass, counters);
      const cudaError_t error = device::set_zero(counters, ImageOrder::counter_bytes(a.order.images), stream);
      if (error != cudaSuccess) return error;
      length = std::max(earlier.length, pass.length);
      lines = a.order.blocks();
    }
    const cudaError_t error = launch(length, static_cast<unsigned>(lines), both);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// The work of a block: a line of one head in one pass.
struct Work {
  Line line;
  int head;
  bool first, last;  // pass

  // In image order: waits until the earlier pass of the image is complete, if this is the later one.
  __device__ __forceinline__ void wait(const ImageOrder& order) const {
    if (!last) return;
    if (threadIdx.x == 0) device::wait_for_counter(done(order), order.earlier_blocks);
    __syncthreads();
  }
  // In image order: counts a block of the earlier pass, whose results are written.
  __device__ __forceinline__ void finish(const ImageOrder& order) const {
    if (last) return;
    __syncthreads();
    if (threadIdx.x == 0) device::add_to_counter(done(order));
  }

 private:
  static __device__ __forceinline__ unsigned* done(const ImageOrder& order) {
    return order.counters + 1 + *reinterpret_cast<const unsigned*>(device::dynamic_shared());
  }
};

// Returns the work of block number `block` of a pass. The heads of a line have neighboring blocks.
template <class Operands>
__device__ __forceinline__ Work work_of(const Operands& a, const Pass& pass, const Divisor& by_step, unsigned block) {
  const unsigned index = a.by_heads.quotient(block), outside = by_step.quotient(index);
  return {{outside * (static_cast<unsigned>(pass.step) * (pass.length - 1)) + index, pass.step, pass.length},
          static_cast<int>(block - index * a.heads),
          pass.first,
          pass.last};
}

// Returns the work of this block.
template <bool in_image_order, class Operands>
__device__ __forceinline__ Work work_of_block(const Operands& a) {
  if constexpr (in_image_order) {
    const ImageOrder& order = a.order;
    unsigned* const shared = reinterpret_cast<unsigned*>(device::dynamic_shared());  // image, block, whether earlier
    if (threadIdx.x == 0) {
      unsigned block = device::take_ticket(order.counters), image = 0;
      bool earlier = true;
      if (block >= order.earlier_blocks) {
        block -= order.earlier_blocks;
        image = order.by_image.quotient(block);
        block -= image * (order.earlier_blocks + order.later_blocks);
        const bool more = image + 1 < order.images;  // there is a next image
        earlier = more && block < order.earlier_blocks;
        if (earlier)
          ++image;
        else if (more)
          block -= order.earlier_blocks;
      }
      shared[0] = image;
      shared[1] = block + image * (earlier ? order.earlier_blocks : order.later_blocks);
      shared[2] = earlier;
    }
    __syncthreads();
    return shared[2] ? work_of(a, order.earlier, order.by_earlier_step, shared[1])
                     : work_of(a, a.pass, a.by_step, shared[1]);
  } else {
    return work_of(a, a.pass, a.by_step, a.pass.backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  }
}

// A feature map of all heads, [N,T,H,W,pitch]. The channels of a head are a range of its channels.
template <class T>
struct FeatureMap {
  T* data;
  int pitch;
};
template <class T>
FeatureMap<const T> typed(const Map& map) {
  return {static_cast<const T*>(map.data), static_cast<int>(map.pitch)};
}
template <class T>
FeatureMap<T> typed(const MutableMap& map) {
  return {static_cast<T*>(map.data), static_cast<int>(map.pitch)};
}
inline Map read_only(const MutableMap& map) { return {map.data, map.pitch}; }

// Starts copying pixels first .. first + rows - 1 of a line of a feature map into a tile: the 128 bytes that start at
// channel `channel`. Beyond the line and from channel `end` on, the tile gets zeros.
template <class T>
__device__ __forceinline__ void copy_rows(unsigned char* tile, const FeatureMap<T>& map, const Line& line, int first,
                                          int rows, int channel, int end) {
  const int piece = threadIdx.x % kRowPieces, apart = blockDim.x / kRowPieces;
  const int from = channel + piece * (16 / kSize<T>);
  int row = threadIdx.x / kRowPieces;
  const int present = from < end ? line.length - first : 0;  // rows that exist
  const int step = static_cast<int>(line.step) * map.pitch;
  const T* source = map.data + static_cast<int64_t>(line.first) * map.pitch + ((first + row) * step + from);
  unsigned char* to = tile + row * kPitch + piece * 16;
#pragma unroll 1
  for (; row < rows; row += apart, source += apart * step, to += apart * kPitch)
    device::copy_async(to, row < present ? source : map.data, row < present);
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

// Loads a word. Without the alignment hint, the compiler would load it byte by byte.
__device__ __forceinline__ uint32_t word_at(const unsigned char* address) {
  uint32_t word;
  memcpy(&word, __builtin_assume_aligned(address, 4), sizeof word);
  return word;
}

// Loads the 16 x kStep left operand, whose rows are the rows at `tile`.
template <class T>
__device__ __forceinline__ void load_left(uint32_t (&operand)[4], const unsigned char* tile, int pitch, int lane) {
  device::load_matrices(operand, tile + lane % 16 * pitch + lane / 16 * 16);
  round_words<T>(operand);
}

// Loads two kStep x 8 right operands, as words 0, 1 and words 2, 3. Their columns are the 16 rows at `tile`.
template <class T>
__device__ __forceinline__ void load_right(uint32_t (&operands)[4], const unsigned char* tile, int pitch, int lane) {
  device::load_matrices(operands, tile + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 16);
  round_words<T>(operands);
}

// Loads the left operand whose transpose, kStep rows of 16 elements, is at `tile`.
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

// Loads the left operand at `tile` for a product with transposed right operands, in their order of elements.
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

// Loads two right operands side by side, as words 0, 1 and words 2, 3, from kStep rows of 16 elements at `tile`.
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

// Adds to `first` and `second` the products of `left` with the two operands in `right`.
template <class T>
__device__ __forceinline__ void multiply_pair(float (&first)[4], float (&second)[4], const uint32_t (&left)[4],
                                              const uint32_t (&right)[4]) {
  device::multiply_add<T>(first, left, right[0], right[1]);
  device::multiply_add<T>(second, left, right[2], right[3]);
}

// scores[j] += products of the 16 rows at `left` with rows 8j .. 8j + 7 at `right`, over `steps` steps of their
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

// Stores result j, 16 x 8, as part of the left operands of the next product. With 16-bit elements, two results fill a
// step.
template <class T, int steps>
__device__ __forceinline__ void keep_as_left(uint32_t (&operands)[steps][4], int j, const float (&results)[4]) {
  if constexpr (std::is_same_v<T, float>) {
    for (int i = 0; i < 4; ++i) operands[j][i] = device::round_tf32(results[i % 2 * 2 + i / 2]);
  } else {
    for (int i = 0; i < 2; ++i) operands[j / 2][j % 2 * 2 + i] = device::pack<T>(results[2 * i], results[2 * i + 1]);
  }
}

// Returns the number of steps of the contraction in a tile of channels `channel` .. end - 1.
template <class T>
__device__ __forceinline__ int steps_from(int channel, int end) {
  const int left = end - channel < kChunk<T> ? end - channel : kChunk<T>;
  return (left + kStep<T> - 1) / kStep<T>;
}

// The destination of 16 rows of results in a feature map: pixels row .. row + 15 of a line, from channel `channel` up
// to `end`. A lane writes runs of four neighboring channels. To form them, lanes with even and odd `pair` swap halves
// of two neighboring 16 x 8 results, j (even) and j + 1. A lane then holds four channels of row lane.row + 8 * half.
struct Place {
  int64_t first;  // offset, in elements of the map, of the lane's run of results 0 and 1 in the first 8 rows
  int apart;      // elements from there to the run in the last 8 rows
  int left[2];    // channels from there on, by half; 0 beyond the line

  __device__ __forceinline__ Place(const Line& line, int row, int channel, int end, int pitch) {
    const Lane lane = this_lane();
    const int odd = lane.pair % 2;
    channel += 8 * odd + 2 * (lane.pair - odd);
    row += lane.row;
    const int step = static_cast<int>(line.step) * pitch;
    first = static_cast<int64_t>(line.first) * pitch + (row * step + channel);
    apart = 8 * step;
    for (int half = 0; half < 2; ++half) left[half] = row + 8 * half < line.length ? end - channel : 0;
  }

  __device__ __forceinline__ Vec4<float> run_of(const float (&left)[4], const float (&right)[4], int half) const {
    const bool odd = device::lane() % 2;
    const float kept[2] = {odd ? right[2 * half] : left[2 * half], odd ? right[2 * half + 1] : left[2 * half + 1]};
    const float sent[2] = {odd ? left[2 * half] : right[2 * half], odd ? left[2 * half + 1] : right[2 * half + 1]};
    float got[2];
    for (int i = 0; i < 2; ++i) got[i] = __shfl_xor_sync(kAllLanes, sent[i], 1);
    return {{odd ? got[0] : kept[0], odd ? got[1] : kept[1], odd ? kept[0] : got[0], odd ? kept[1] : got[1]}};
  }

  // Returns whether the lane's run of results j and j + 1 exists.
  __device__ __forceinline__ bool has(int j, int half) const { return 8 * j < left[half]; }
  template <class T>
  __device__ __forceinline__ T* run(T* feature_map, int j, int half) const {
    return feature_map + first + (half ? apart : 0) + 8 * j;
  }
};

// The previous values of a block of results. They are read before the products that are added to them, so that the
// products hide the latency. They are held as words: the compiler would unpack 16-bit elements at once, and wait for
// them.
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

// Store and load two neighboring elements of shared memory.
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

// Writes the 16 rows at `tile` of a warp to pixels first .. first + 15 of a line: 128 bytes, from channel `channel` up
// to `end`.
template <class T>
__device__ __forceinline__ void write_rows(const FeatureMap<T>& map, const unsigned char* tile, const Line& line,
                                           int first, int channel, int end) {
  constexpr int apart = kWarp / kRowPieces;
  const int lane = device::lane();
  const int from = channel + lane % kRowPieces * (16 / kSize<T>);
  if (from >= end) return;
  int row = lane / kRowPieces;
  const int step = static_cast<int>(line.step) * map.pitch;
  T* to = map.data + static_cast<int64_t>(line.first) * map.pitch + ((first + row) * step + from);
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

// The kernels that are also compiled for image order: those for elements of 16 bits, with up to 9 tiles of 16 keys. An
// image of float32 takes too much of the L2 cache.
template <class T>
constexpr bool kImageOrder = sizeof(T) == 2;
constexpr int kLongestInOrder = 9;

inline int tiles_of(int64_t length) { return static_cast<int>((length + kTile - 1) / kTile); }

// Returns the tiles of the longest line that the kernel for lines of the given length serves.
inline int most_tiles(int64_t length) { return length <= 64 ? 4 : length <= 112 ? 7 : length <= 144 ? 9 : 17; }

// Returns whether forward and backward kernels support the arguments. They need sm_80, 16-bit elements or permission to
// use tf32, channels and addresses that allow copies of 16 bytes in every pixel and head, lines that fit in a block,
// and offsets of pixels, and of elements within a line, that fit in an int.
inline bool fits(Dtype dtype, const Sizes& sizes, int axes, const Device& device, std::initializer_list<Map> maps) {
  if (device.capability < 80 || dtype == Dtype::float64 || (dtype == Dtype::float32 && !device.tf32)) return false;
  const int64_t size = element_size(dtype);
  if (sizes.c <= 0 || sizes.C <= 0 || sizes.c * size % 16 != 0 || sizes.C * size % 16 != 0) return false;
  if (sizes.pixels() * sizes.heads > INT32_MAX) return false;
  int64_t pitch = 0;
  for (const Map& map : maps) {
    if (reinterpret_cast<uintptr_t>(map.data) % 16 != 0 || map.pitch * size % 16 != 0) return false;
    pitch = map.pitch > pitch ? map.pitch : pitch;
  }
  for (const Pass& pass : passes_of(sizes, axes)) {
    if (pass.length > kLongestLine) return false;
    // The first rows of the threads of copy_rows lie up to a quarter of a block behind the last tile. A block that also
    // serves longer lines of another pass may have more tiles than this line.
    const int64_t rows = most_tiles(pass.length) * (kTile + kTile / 4);
    if (rows * pass.step * pitch > INT32_MAX) return false;
  }
  return true;
}

// serves returns whether these kernels support the arguments on the device. The others are specified in kernels.h.
bool serves(const Forward& arguments, const Device& device);
bool serves(const Backward& arguments, const Device& device);
int forward(const Forward& arguments, const Device& device, void* stream);
int backward(const Backward& arguments, const Device& device, void* stream);
int64_t forward_workspace(const Forward& arguments, const Device& device);
int64_t backward_workspace(const Backward& arguments, const Device& device);

}  // namespace cc_attention::tensor_core
