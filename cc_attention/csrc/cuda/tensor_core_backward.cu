// Backward of the attention on tensor cores (bf16, fp16, tf32; sm_80 and later).
//
// Like the forward, it is one pass for each axis. A block processes a whole line of one head, and each warp 16 of its
// queries. Every gradient is the sum of the parts from the passes. The first pass writes it, and the others add to it,
// without atomics. With P = exp(S - top) / total and S = scale Q K^T, where gamma is 1 without a residual:
//
//     dV = gamma P^T dO      dP = dO V^T      dS = gamma scale P (dP - delta), delta = rowsum(dO O)
//     dQ = dS K              dK = dS^T Q
//
// P, later overwritten by dS, is a tile of shared memory in the storage type. Each warp writes the rows of its queries
// and, for the transposed products, reads the columns of some keys. If a line has more keys than that tile, it is
// processed in blocks of keys.
//
// All other data streams through a ring of tile pairs, one by keys and one by queries, with 128 bytes of channels per
// row. First come K and Q for the scores. Then come V and dO; each of their chunks adds to dP and completes its
// channels of dV. Last come K and Q again, for dQ and dK. The parts of dQ and dK are kept in float32 until the last
// pass, because they may cancel: dS sums to 0 over the lines of a query. The gradient of gamma is the sum of delta.
#include "general.h"
#include "tensor_core.h"

namespace cc_attention::tensor_core {
namespace {

// Operands of the kernel; T is the storage type.
template <class T>
struct Gradients {
  FeatureMap<const T> query, key;        // [N,T,H,W,heads,c]
  FeatureMap<const T> value, out, grad;  // [N,T,H,W,heads,C]
  const Normalizer<float>* normalizers;  // [N,T,H,W,heads]
  const float* gamma;                    // null without a residual
  FeatureMap<T> grad_query, grad_key;    // [N,T,H,W,heads,c]
  FeatureMap<T> grad_value;              // [N,T,H,W,heads,C]
  FeatureMap<float> partial_query;       // [N,T,H,W,heads,c], grad_query itself if T is float
  FeatureMap<float> partial_key;         // [N,T,H,W,heads,c], grad_key itself if T is float
  float* delta;                          // [N,T,H,W,heads]
  float scale;
  int heads, c, C;
  Pass pass;
  Divisor by_heads, by_step;
  ImageOrder order;  // if the kernel takes two passes, of which `pass` is the later one
  __device__ __forceinline__ float factor() const { return gamma == nullptr ? 1.f : *gamma; }
};

// The virtual architecture, such as 80 for sm_80 and sm_90 (setup.py). It changes only how registers are saved, never
// the results.
#ifdef __CUDA_ARCH__
constexpr int kArchitecture = __CUDA_ARCH__ / 10;
#else
constexpr int kArchitecture = 0;  // not a GPU
#endif

constexpr int kUnitTiles = 4;  // 16 x 8 results that a warp computes at a time

template <class T>
__device__ __forceinline__ void multiply_unit(float (&results)[kUnitTiles][4], const uint32_t (&left)[4],
                                              const unsigned char* right, int lane) {
#pragma unroll
  for (int j = 0; j < kUnitTiles; j += 2) {
    uint32_t b[4];
    load_right_transposed<T>(b, right + j * 8 * kSize<T>, kPitch, lane);
    multiply_pair<T>(results[j], results[j + 1], left, b);
  }
}

// results += A B, for 16 rows of A at `weights` and 32 columns of B at `right`, summed over `length` columns of A.
template <class T>
__device__ __forceinline__ void multiply(float (&results)[kUnitTiles][4], const unsigned char* weights, int pitch,
                                         const unsigned char* right, int length) {
  const int lane = device::lane();
#pragma unroll 1
  for (int k = 0; k < length; k += kStep<T>) {
    uint32_t a[4];
    load_left_results<T>(a, weights + k * kSize<T>, pitch, lane);
    multiply_unit<T>(results, a, right + k * kPitch, lane);
  }
}

// results += A^T B, for 16 columns of A at `weights` and 32 columns of B at `right`, summed over `length` rows of A.
template <class T>
__device__ __forceinline__ void multiply_transposed(float (&results)[kUnitTiles][4], const unsigned char* weights,
                                                    int pitch, const unsigned char* right, int length) {
  const int lane = device::lane();
#pragma unroll 1
  for (int k = 0; k < length; k += kStep<T>) {
    uint32_t a[4];
    load_left_transposed<T>(a, weights + k * pitch, pitch, lane);
    multiply_unit<T>(results, a, right + k * kPitch, lane);
  }
}

// Writes old + factor * results to `result` if complete, otherwise to `partial`, to which more will be added.
template <class T, class Partial, int tiles>
__device__ __forceinline__ void write_sum(const Place& place, const float (&results)[tiles][4], float factor,
                                          const Runs<Partial, tiles>& old, Partial* partial, T* result, bool complete) {
#pragma unroll
  for (int j = 0; j < tiles; j += 2)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Vec4<float> run = place.run_of(results[j], results[j + 1], half);
      const Vec4<float> before = widen(old.run(j, half));
      for (int i = 0; i < 4; ++i) run.at[i] = fmaf(factor, run.at[i], before.at[i]);
      if (!place.has(j, half)) continue;
      if (complete)
        *reinterpret_cast<Vec4<T>*>(place.run(result, j, half)) = narrow<T>(run);
      else
        *reinterpret_cast<Vec4<Partial>*>(place.run(partial, j, half)) = narrow<Partial>(run);
    }
}

// Stores two neighboring weights, rounded to tf32 if T is float.
template <class T>
__device__ __forceinline__ void store_weights(unsigned char* to, float first, float second) {
  if constexpr (std::is_same_v<T, float>) {
    const uint32_t words[2] = {device::round_tf32(first), device::round_tf32(second)};
    memcpy(__builtin_assume_aligned(to, 8), words, 8);
  } else {
    store_pair<T>(to, first, second);
  }
}

// rowsum(dO O) of the 16 queries of a warp. Pieces of 16 bytes give coalesced reads. The rows are processed in parts,
// to save registers.
//
// few_registers: in smaller parts.
template <class T, bool few_registers>
struct Delta {
  static constexpr int kRowsAtOnce = kWarp / kRowPieces;
  static constexpr int kPerPiece = 16 / kSize<T>;
  static constexpr int kPieces = kSize<T> == 4 || few_registers ? 1 : 2;  // pieces of a lane in a part
  static constexpr int kParts = kTile / kRowsAtOnce / kPieces;
  float sums[kParts][kPieces] = {};
  uint32_t out_words[kPieces][4];  // pieces of O, held from read() to add()

  static __device__ __forceinline__ int row(int part, int piece, int lane) {
    return kRowsAtOnce * (part * kPieces + piece) + lane / kRowPieces;
  }
  // Reads a part of O, starting at channel `channel`. Other work between read and add hides the latency.
  __device__ __forceinline__ void read(int part, const FeatureMap<const T>& out, const Line& line, int first_row,
                                       int channel, int end) {
    const int lane = device::lane();
    const int from = channel + lane % kRowPieces * kPerPiece;
    const int step = static_cast<int>(line.step) * out.pitch;
    int pixel = first_row + row(part, 0, lane);
    const T* source = out.data + static_cast<int64_t>(line.first) * out.pitch + (pixel * step + from);
#pragma unroll
    for (auto& words : out_words) {
      for (uint32_t& word : words) word = 0;
      if (pixel < line.length && from < end) memcpy(words, __builtin_assume_aligned(source, 16), 16);
      pixel += kRowsAtOnce;
      source += kRowsAtOnce * step;
    }
  }
  // Adds the products of that part. grads: the tile of dO for the same channels, at the rows of the warp.
  __device__ __forceinline__ void add(int part, const unsigned char* grads) {
    struct alignas(16) Piece {
      T at[kPerPiece];
    };
    const int lane = device::lane();
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      Piece o;
      memcpy(&o, out_words[i], sizeof o);
      const Piece grad = *reinterpret_cast<const Piece*>(grads + row(part, i, lane) * kPitch + lane % kRowPieces * 16);
      float& sum = sums[part][i];
      for (int k = 0; k < kPerPiece; ++k) sum = fmaf(device::to_sum(o.at[k]), device::to_sum(grad.at[k]), sum);
    }
  }

  // Writes delta [N,T,H,W,heads] for the queries of the warp.
  __device__ __forceinline__ void write(float* delta, const Line& line, int first_row, int heads, int head) {
    const int lane = device::lane();
#pragma unroll
    for (int i = 0; i < kParts * kPieces; ++i) {
      float sum = sums[i / kPieces][i % kPieces];
      for (int other = 1; other < kRowPieces; other *= 2) sum += __shfl_xor_sync(kAllLanes, sum, other);
      const int pixel = first_row + row(0, i, lane);
      if (lane % kRowPieces == 0 && pixel < line.length) delta[line.pixel(pixel) * heads + head] = sum;
    }
  }
};

// The next tiles to copy into the ring.
struct Item {
  int first_key = 0, part = 0, channel = 0, stage = 0;
};

// key_tiles: tiles of 16 keys in a block of keys; warps: the maximum in a block, which limits the length of a line.
template <class T, int key_tiles, int warps, int blocks_per_processor, bool in_image_order>
__global__ void __launch_bounds__(warps* kWarp, blocks_per_processor)
    backward_kernel(const Gradients<T> a, int stages) {
#if CC_TENSOR_CORES
  constexpr int keys = key_tiles * kTile;
  constexpr int weights_pitch = keys * kSize<T> + 16;
  constexpr int chunk_units = kChunk<T> / 8 / kUnitTiles;

  const Work work = work_of_block<in_image_order>(a);
  const Line line = work.line;
  const int head = work.head;
  const int block_warps = blockDim.x / kWarp;
  const int warp = threadIdx.x / kWarp;
  const int queries = block_warps * kTile;
  const int first_row = warp * kTile;

  unsigned char* weights =
      device::dynamic_shared() + kHeaderBytes<in_image_order>;  // [queries] rows of `keys`: P, then dS
  unsigned char* ring = weights + queries * weights_pitch;
  const int item_bytes = (keys + queries) * kPitch;  // a tile by keys, then one by queries
  // Returns the address in `weights` of the lane's part of result j, in row lane.row + 8 * half.
  const auto weights_of = [&](const Lane& lane, int j, int half) {
    return weights + (first_row + lane.row + 8 * half) * weights_pitch + (8 * j + 2 * lane.pair) * kSize<T>;
  };

  // The end of the blocks of keys. It is a constant if even the longest line is one block, which saves registers.
  constexpr bool one_block = key_tiles == warps;
  const int keys_end = one_block ? keys : line.length;

  // The items that stream through the ring for each block of keys: K and Q, V and dO, K and Q.
  Item next;
  const auto start_item = [&] {
    const bool values = next.part == 1;
    const int channels = values ? a.C : a.c;
    if (next.first_key < keys_end) {
      unsigned char* to = ring + next.stage * item_bytes;
      const int start = head * channels;
      copy_rows(to, values ? a.value : a.key, line, next.first_key, keys, start + next.channel, start + channels);
      copy_rows(to + keys * kPitch, values ? a.grad : a.query, line, 0, queries, start + next.channel,
                start + channels);
      device::commit_copies();
    }
    next.stage = stages - 1 - next.stage;
    next.channel += kChunk<T>;
    if (next.channel < channels) return;
    next.channel = 0;
    next.part = next.part == 2 ? 0 : next.part + 1;
    if (next.part == 0) next.first_key += keys;
  };
  if (stages == 2) start_item();
  // Waits for the next item, starts copying the one after it, and returns the keys' tile. The queries' tile follows it.
  const auto take_item = [&]() -> const unsigned char* {
    if (stages == 1) {
      __syncthreads();  // all warps have read the previous item
      start_item();
    }
    device::wait_for_copies<0>();
    __syncthreads();  // the item is visible to all warps, and all have read the previous one
    if (stages == 2) start_item();
    return ring + next.stage * item_bytes;  // with two stages, the item after the next uses the same stage as this one
  };

#pragma unroll 1
  for (int first_key = 0; first_key < keys_end; first_key += keys) {
    const bool first_block = first_key == 0, last_block = first_key + keys >= keys_end;
    const int keys_left = line.length - first_key;
    const int live_tiles = keys_left < keys ? (keys_left + kTile - 1) / kTile : key_tiles;

    float scores[2 * key_tiles][4] = {};
#pragma unroll 1
    for (int channel = 0; channel < a.c; channel += kChunk<T>) {
      const unsigned char* by_keys = take_item();
      multiply_rows<T, key_tiles>(scores, by_keys + (keys + first_row) * kPitch, by_keys, steps_from<T>(channel, a.c));
    }
    const Lane lane = this_lane();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + lane.row + 8 * half;
      // Rows beyond the line get zeros explicitly: their products with an infinite key would be NaN.
      const int end = row < line.length ? line.length : 0;
      const Normalizer<float> normalizer =
          end > 0 ? a.normalizers[line.pixel(row) * a.heads + head] : Normalizer<float>{0.f, 1.f};
      const float shift = -log2f(normalizer.total);
#pragma unroll
      for (int j = 0; j < 2 * key_tiles; ++j) {
        float p[2];
        for (int i = 0; i < 2; ++i) {
          const int k = first_key + 8 * j + 2 * lane.pair + i;
          const bool seen = k < end && (work.last || k != row);
          const float score = device::multiply(scores[j][2 * half + i], a.scale);
          const float difference = score - normalizer.top;  // subtract first: see the forward
          p[i] = seen ? device::exp2_approximate(fmaf(difference, kLog2e, shift)) : 0.f;
        }
        store_weights<T>(weights_of(lane, j, half), p[0], p[1]);
      }
    }

    if constexpr (in_image_order)
      if (first_block) work.wait(a.order);
    float grad_weights[2 * key_tiles][4] = {};  // dP
    using DeltaSum = Delta<T, in_image_order || kArchitecture >= 100>;
    DeltaSum new_delta;
#pragma unroll 1
    for (int channel = 0; channel < a.C; channel += kChunk<T>) {
      const unsigned char* by_keys = take_item();
      const unsigned char* grads = by_keys + keys * kPitch;
      const int steps = steps_from<T>(channel, a.C);
      constexpr int parts = DeltaSum::kParts, part_steps = kRowBytes / kStepBytes / parts;
#pragma unroll
      for (int part = 0; part < parts; ++part) {  // the products hide the latency of O
        if (work.first && first_block)
          new_delta.read(part, a.out, line, first_row, head * a.C + channel, (head + 1) * a.C);
        const int from = part * part_steps * kStepBytes, left = steps - part * part_steps;
        multiply_rows<T, key_tiles>(grad_weights, grads + first_row * kPitch + from, by_keys + from,
                                    part < parts - 1 ? min(left, part_steps) : left);
        if (work.first && first_block) new_delta.add(part, grads + first_row * kPitch);
      }
#pragma unroll 1
      for (int unit = warp; unit < live_tiles * chunk_units; unit += block_warps) {
        const bool second = unit >= live_tiles;
        const int tile = (second ? unit - live_tiles : unit) * kTile, from = second ? kUnitTiles * 8 : 0;
        const Place place(line, first_key + tile, head * a.C + channel + from, (head + 1) * a.C, a.grad_value.pitch);
        Runs<T, kUnitTiles> before;
        if (!work.first) before.read(place, a.grad_value.data);
        float results[kUnitTiles][4] = {};
        multiply_transposed<T>(results, weights + tile * kSize<T>, weights_pitch, grads + from * kSize<T>, queries);
        write_sum(place, results, a.factor(), before, a.grad_value.data, a.grad_value.data, true);
      }
    }
    if (work.first && first_block) new_delta.write(a.delta, line, first_row, a.heads, head);

#pragma unroll 1
    for (int channel = 0; channel < a.c; channel += kChunk<T>) {
      const unsigned char* by_keys = take_item();
      if (channel == 0) {  // no warp reads P any more
        const Lane lane = this_lane();
        const float factor = a.factor() * a.scale;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = first_row + lane.row + 8 * half;
          const float delta = row < line.length ? factor * a.delta[line.pixel(row) * a.heads + head] : 0.f;
#pragma unroll
          for (int j = 0; j < 2 * key_tiles; ++j) {
            const float* dp = &grad_weights[j][2 * half];
            float p[2];
            load_pair<T>(p, weights_of(lane, j, half));
            store_weights<T>(weights_of(lane, j, half), p[0] * fmaf(factor, dp[0], -delta),
                             p[1] * fmaf(factor, dp[1], -delta));
          }
        }
        __syncthreads();
      }
      const auto place_of = [&](int pitch, int row, int from) {
        return Place(line, row, head * a.c + channel + from, (head + 1) * a.c, pitch);
      };
#pragma unroll 1
      for (int from = 0; from < kChunk<T>; from += kUnitTiles * 8) {
        Runs<float, kUnitTiles> before;
        if (!work.first || !first_block)
          before.read(place_of(a.partial_query.pitch, first_row, from), a.partial_query.data);
        float results[kUnitTiles][4] = {};
        multiply<T>(results, weights + first_row * weights_pitch, weights_pitch, by_keys + from * kSize<T>, keys);
        const bool complete = work.last && last_block;
        const int pitch = complete ? a.grad_query.pitch : a.partial_query.pitch;
        write_sum(place_of(pitch, first_row, from), results, 1.f, before, a.partial_query.data, a.grad_query.data,
                  complete);
      }
#pragma unroll 1
      for (int unit = warp; unit < live_tiles * chunk_units; unit += block_warps) {
        const bool second = unit >= live_tiles;
        const int tile = (second ? unit - live_tiles : unit) * kTile, from = second ? kUnitTiles * 8 : 0;
        Runs<float, kUnitTiles> before;
        if (!work.first) before.read(place_of(a.partial_key.pitch, first_key + tile, from), a.partial_key.data);
        float results[kUnitTiles][4] = {};
        multiply_transposed<T>(results, weights + tile * kSize<T>, weights_pitch,
                               by_keys + keys * kPitch + from * kSize<T>, queries);
        const int pitch = work.last ? a.grad_key.pitch : a.partial_key.pitch;
        write_sum(place_of(pitch, first_key + tile, from), results, 1.f, before, a.partial_key.data, a.grad_key.data,
                  work.last);
      }
    }
  }
  if constexpr (in_image_order) work.finish(a.order);
#else
  __trap();  // compiled for an older architecture than fits() checked: fail instead of leaving the output unwritten
#endif
}

int shared_bytes(Dtype dtype, int64_t length, int key_tiles, int stages) {
  const int queries = tiles_of(length) * kTile, keys = key_tiles * kTile;
  const int weights_pitch = keys * static_cast<int>(element_size(dtype)) + 16;
  return queries * weights_pitch + stages * (keys + queries) * kPitch;
}

// Kernels for long lines, which they divide into blocks of keys. The second fits in the shared memory of any device.
constexpr int kLongKeyTiles = 6;
constexpr int kFewKeyTiles = 2;

// Returns the number of key tiles of the kernel for lines of the given length, or 0 if none fits in the shared memory.
int key_tiles_for(Dtype dtype, int64_t length, const Device& device) {
  const int usual = most_tiles(length) > kLongestInOrder ? kLongKeyTiles : most_tiles(length);
  const int few = device.untested ? kFewKeyTiles : usual;
  for (const int key_tiles : {usual, kLongKeyTiles, few})
    if (shared_bytes(dtype, length, key_tiles, 1) <= device.shared_memory) return key_tiles;
  return 0;
}

// Returns whether the last two passes are one launch in image order, with the kernel for the longer lines.
bool in_image_order(const Backward& b, const Device& device) {
  const Passes passes = passes_of(b.sizes, b.axes);
  if (!device.untested || element_size(b.dtype) != 2 || passes.count < 2) return false;
  const Pass &earlier = passes.end()[-2], &later = passes.end()[-1];
  const int key_tiles = key_tiles_for(b.dtype, later.length, device);
  const int bytes = shared_bytes(b.dtype, std::max(earlier.length, later.length), key_tiles, 1) + kHeaderBytes<true>;
  return key_tiles > kFewKeyTiles && key_tiles != kLongKeyTiles && bytes <= device.shared_memory &&
         key_tiles_for(b.dtype, earlier.length, device) == key_tiles &&
         (earlier.lines + later.lines) * b.sizes.heads <= INT32_MAX;
}

// The parts of the workspace: numbers of general::total, partial gradients of query and key, delta, counters. Partial
// gradients are those of other passes than the last, or of some keys.
struct Workspace {
  int64_t totals, channels, delta;  // totals in bytes, the others in floats
  int64_t counters = 0;             // in bytes
  Workspace(const Backward& b, const Device& device) {
    const Passes passes = passes_of(b.sizes, b.axes);
    bool partial = passes.count > 1;
    for (const Pass& pass : passes) partial |= pass.length > key_tiles_for(b.dtype, pass.length, device) * kTile;
    totals = b.grad_gamma == nullptr ? 0 : general::total_bytes();
    delta = b.sizes.pixels() * b.sizes.heads;
    channels = partial && b.dtype != Dtype::float32 ? delta * b.sizes.c : 0;
    if (in_image_order(b, device))
      counters = ImageOrder::counter_bytes(ImageOrder::images_of(b.sizes, passes.end()[-2]));
  }
  int64_t bytes() const { return totals + (2 * channels + delta) * static_cast<int64_t>(sizeof(float)) + counters; }
};

template <class T, int key_tiles, int warps, int blocks_per_processor>
auto kernel_of(bool in_image_order) {
  if constexpr (kImageOrder<T>)
    if (in_image_order) return backward_kernel<T, key_tiles, warps, blocks_per_processor, true>;
  return backward_kernel<T, key_tiles, warps, blocks_per_processor, false>;
}

template <class T>
int run(const Backward& b, const Device& device, void* stream) {
  const Workspace sizes(b, device);
  float* const workspace = reinterpret_cast<float*>(static_cast<unsigned char*>(b.workspace) + sizes.totals);
  const int channels = static_cast<int>(b.sizes.heads * b.sizes.c);
  Gradients<T> a{typed<T>(b.query),
                 typed<T>(b.key),
                 typed<T>(b.value),
                 typed<T>(b.out),
                 typed<T>(b.grad),
                 static_cast<const Normalizer<float>*>(b.normalizer),
                 static_cast<const float*>(b.gamma),
                 typed<T>(b.grad_query),
                 typed<T>(b.grad_key),
                 typed<T>(b.grad_value),
                 {workspace, channels},
                 {workspace + sizes.channels, channels},
                 workspace + 2 * sizes.channels,
                 static_cast<float>(b.scale),
                 static_cast<int>(b.sizes.heads),
                 static_cast<int>(b.sizes.c),
                 static_cast<int>(b.sizes.C),
                 {},
                 Divisor(b.sizes.heads),
                 {},
                 {}};
  if constexpr (std::is_same_v<T, float>) {
    a.partial_query = a.grad_query;
    a.partial_key = a.grad_key;
  }

  const auto launch_pass = [&](int64_t length, unsigned lines, bool both) {
    const int key_tiles = key_tiles_for(b.dtype, length, device);
    const auto bytes = [&](int stages) {
      return shared_bytes(b.dtype, length, key_tiles, stages) + (both ? kHeaderBytes<true> : 0);
    };
    const int stages = bytes(2) <= device.shared_memory ? 2 : 1;
    const auto launch = [&](auto kernel) {
      return device::launch(kernel, dim3(lines), tiles_of(length) * kWarp, bytes(stages), stream, a, stages);
    };
    switch (key_tiles) {
      case 4:
        return launch(kernel_of<T, 4, 4, 4>(both));
      case 7:
        return launch(kernel_of<T, 7, 7, 2>(both));
      case 9:
        return launch(kernel_of<T, 9, 9, 1>(both));
      case kLongKeyTiles:
        return launch(backward_kernel<T, kLongKeyTiles, 17, 1, false>);
      default:
        return launch(backward_kernel<T, kFewKeyTiles, 17, 1, false>);
    }
  };
  const cudaError_t error =
      for_each_launch(a, b.sizes, b.axes, sizes.counters > 0, a.delta + sizes.delta, stream, launch_pass);
  if (error != cudaSuccess) return error;
  if (b.grad_gamma == nullptr) return cudaSuccess;
  return general::total(b.dtype, a.delta, sizes.delta, b.workspace, b.grad_gamma, stream);
}

}  // namespace

bool serves(const Backward& b, const Device& device) {
  if (!fits(b.dtype, b.sizes, b.axes, device,
            {b.query, b.key, b.value, b.out, b.grad, read_only(b.grad_query), read_only(b.grad_key),
             read_only(b.grad_value)}))
    return false;
  for (const Pass& pass : passes_of(b.sizes, b.axes))
    if (key_tiles_for(b.dtype, pass.length, device) == 0) return false;
  return true;
}

int backward(const Backward& b, const Device& device, void* stream) {
  switch (b.dtype) {
    case Dtype::bfloat16:
      return run<bfloat16>(b, device, stream);
    case Dtype::float16:
      return run<float16>(b, device, stream);
    default:
      return run<float>(b, device, stream);
  }
}

int64_t backward_workspace(const Backward& b, const Device& device) { return Workspace(b, device).bytes(); }

}  // namespace cc_attention::tensor_core
