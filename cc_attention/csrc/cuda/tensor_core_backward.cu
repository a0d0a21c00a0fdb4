// Backward of the attention on tensor cores (bf16, fp16, tf32; sm_80 and later).
//
// Like the forward, it is a column pass and a row pass. A block processes a whole line, and each warp 16 of its
// queries. Every gradient is the sum of a part from the column and a part from the row. The column pass writes it, and
// the row pass adds to it, without atomics. With P = exp(S - top) / total and S = Q K^T:
//
//     dV = P^T dO      dP = dO V^T      dS = P (dP - delta), delta = rowsum(dO O)      dQ = dS K      dK = dS^T Q
//
// P, later overwritten by dS, is a tile of shared memory in the storage type. Each warp writes the rows of its queries
// and, for the transposed products, reads the columns of some keys. If a line has more keys than that tile, it is
// processed in blocks of keys.
//
// All other data streams through a ring of tile pairs, one by keys and one by queries, with 128 bytes of channels per
// row. First come K and Q for the scores. Then come V and dO; each of their chunks adds to dP and completes its
// channels of dV. Last come K and Q again, for dQ and dK. The column parts of dQ and dK are kept in float32, because
// the two parts may cancel: dS sums to 0 over row and column.
#include "tensor_core.h"

namespace cc_attention::tensor_core {
namespace {

// Operands of the kernel; T is the storage type.
template <class T>
struct Gradients {
  const T* query;                        // [N,H,W,c]
  const T* key;                          // [N,H,W,c]
  const T* value;                        // [N,H,W,C]
  const T* out;                          // [N,H,W,C]
  const Normalizer<float>* normalizers;  // [N,H,W]
  const T* grad_out;                     // [N,H,W,C]
  T* grad_query;                         // [N,H,W,c]
  T* grad_key;                           // [N,H,W,c]
  T* grad_value;                         // [N,H,W,C]
  float* partial_query;                  // [N,H,W,c], grad_query itself if T is float
  float* partial_key;                    // [N,H,W,c], grad_key itself if T is float
  float* delta;                          // [N,H,W]
  Sizes sizes;
};

// The architecture compiled for, such as 90 for sm_90. It changes only how registers are saved, never the results.
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

// Writes old + results to `result` if complete, otherwise to `partial`, to which more will be added.
template <class T, class Partial, int tiles>
__device__ __forceinline__ void write_sum(const Place& place, const float (&results)[tiles][4],
                                          const Runs<Partial, tiles>& old, Partial* partial, T* result, bool complete) {
#pragma unroll
  for (int j = 0; j < tiles; j += 2)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Vec4<float> run = place.run_of(results[j], results[j + 1], half);
      const Vec4<float> before = widen(old.run(j, half));
      for (int i = 0; i < 4; ++i) run.at[i] += before.at[i];
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
template <class T>
struct Delta {
  static constexpr int kRowsAtOnce = kWarp / kRowPieces;
  static constexpr int kPerPiece = 16 / kSize<T>;
  static constexpr int kPieces = kSize<T> == 4 || kArchitecture >= 100 ? 1 : 2;  // pieces of a lane in a part
  static constexpr int kParts = kTile / kRowsAtOnce / kPieces;
  float sums[kParts][kPieces] = {};
  uint32_t out_words[kPieces][4];  // pieces of O, held from read() to add()

  static __device__ __forceinline__ int row(int part, int piece, int lane) {
    return kRowsAtOnce * (part * kPieces + piece) + lane / kRowPieces;
  }
  // Reads a part of O, starting at channel `channel`. Other work between read and add hides the latency.
  __device__ __forceinline__ void read(int part, const T* out, const Line& line, int first_row, int channel,
                                       int channels) {
    const int lane = device::lane();
    const int from = channel + lane % kRowPieces * kPerPiece;
    const int step = static_cast<int>(line.step) * channels;
    int pixel = first_row + row(part, 0, lane);
    const T* source = out + line.first * channels + (pixel * step + from);
#pragma unroll
    for (auto& words : out_words) {
      for (uint32_t& word : words) word = 0;
      if (pixel < line.length && from < channels) memcpy(words, __builtin_assume_aligned(source, 16), 16);
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

  // Writes delta [N,H,W] for the queries of the warp.
  __device__ __forceinline__ void write(float* delta, const Line& line, int first_row) {
    const int lane = device::lane();
#pragma unroll
    for (int i = 0; i < kParts * kPieces; ++i) {
      float sum = sums[i / kPieces][i % kPieces];
      for (int other = 1; other < kRowPieces; other *= 2) sum += __shfl_xor_sync(kAllLanes, sum, other);
      const int pixel = first_row + row(0, i, lane);
      if (lane % kRowPieces == 0 && pixel < line.length) delta[line.pixel(pixel)] = sum;
    }
  }
};

// The next tiles to copy into the ring.
struct Item {
  int first_key = 0, part = 0, channel = 0, stage = 0;
};

// key_tiles: tiles of 16 keys in a block of keys; warps: the maximum in a block, which limits the length of a line.
template <class T, int key_tiles, int warps, int blocks_per_processor>
__global__ void __launch_bounds__(warps* kWarp, blocks_per_processor)
    backward_kernel(const Gradients<T> a, bool column, int stages) {
#if CC_TENSOR_CORES
  constexpr int keys = key_tiles * kTile;
  constexpr int weights_pitch = keys * kSize<T> + 16;
  constexpr int chunk_units = kChunk<T> / 8 / kUnitTiles;

  // The row pass goes from the last image to the first, since the column pass left the last ones in the cache.
  const Line line = line_of(a.sizes, column, column ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
  const int block_warps = blockDim.x / kWarp;
  const int warp = threadIdx.x / kWarp;
  const int queries = block_warps * kTile;
  const int first_row = warp * kTile;
  const int c = static_cast<int>(a.sizes.c), C = static_cast<int>(a.sizes.C);

  unsigned char* weights = device::dynamic_shared();  // [queries] rows of `keys`: P, then dS
  unsigned char* ring = weights + queries * weights_pitch;
  const int item_bytes = (keys + queries) * kPitch;  // a tile by keys, then one by queries
  // Returns the address in `weights` of the lane's part of result j, in row lane.row + 8 * half.
  const auto weights_of = [&](const Lane& lane, int j, int half) {
    return weights + (first_row + lane.row + 8 * half) * weights_pitch + (8 * j + 2 * lane.pair) * kSize<T>;
  };

  // The end of the blocks of keys. It is a constant if even the longest line is one block. This saves registers on
  // sm_100 and later, but costs some on older architectures.
  constexpr bool one_block = key_tiles == warps && (kArchitecture == 0 || kArchitecture >= 100);
  const int keys_end = one_block ? keys : line.length;

  // The items that stream through the ring for each block of keys: K and Q, V and dO, K and Q.
  Item next;
  const auto start_item = [&] {
    const bool values = next.part == 1;
    const int channels = values ? C : c;
    if (next.first_key < keys_end) {
      unsigned char* to = ring + next.stage * item_bytes;
      copy_rows(to, values ? a.value : a.key, line, next.first_key, keys, next.channel, channels);
      copy_rows(to + keys * kPitch, values ? a.grad_out : a.query, line, 0, queries, next.channel, channels);
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
    for (int channel = 0; channel < c; channel += kChunk<T>) {
      const unsigned char* by_keys = take_item();
      multiply_rows<T, key_tiles>(scores, by_keys + (keys + first_row) * kPitch, by_keys, steps_from<T>(channel, c));
    }
    const Lane lane = this_lane();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + lane.row + 8 * half;
      // Rows beyond the line get zeros explicitly: their products with an infinite key would be NaN.
      const int end = row < line.length ? line.length : 0;
      const Normalizer<float> normalizer = end > 0 ? a.normalizers[line.pixel(row)] : Normalizer<float>{0.f, 1.f};
      const float shift = -log2f(normalizer.total);
#pragma unroll
      for (int j = 0; j < 2 * key_tiles; ++j) {
        float p[2];
        for (int i = 0; i < 2; ++i) {
          const int k = first_key + 8 * j + 2 * lane.pair + i;
          const bool seen = k < end && !(column && k == row);
          const float difference = scores[j][2 * half + i] - normalizer.top;  // subtract first: see the forward
          p[i] = seen ? device::exp2_approximate(fmaf(difference, kLog2e, shift)) : 0.f;
        }
        store_weights<T>(weights_of(lane, j, half), p[0], p[1]);
      }
    }

    float grad_weights[2 * key_tiles][4] = {};  // dP
    Delta<T> new_delta;
#pragma unroll 1
    for (int channel = 0; channel < C; channel += kChunk<T>) {
      const unsigned char* by_keys = take_item();
      const unsigned char* grads = by_keys + keys * kPitch;
      const int steps = steps_from<T>(channel, C);
      constexpr int parts = Delta<T>::kParts, part_steps = kRowBytes / kStepBytes / parts;
#pragma unroll
      for (int part = 0; part < parts; ++part) {  // the products hide the latency of O
        if (column && first_block) new_delta.read(part, a.out, line, first_row, channel, C);
        const int from = part * part_steps * kStepBytes, left = steps - part * part_steps;
        multiply_rows<T, key_tiles>(grad_weights, grads + first_row * kPitch + from, by_keys + from,
                                    part < parts - 1 ? min(left, part_steps) : left);
        if (column && first_block) new_delta.add(part, grads + first_row * kPitch);
      }
#pragma unroll 1
      for (int unit = warp; unit < live_tiles * chunk_units; unit += block_warps) {
        const bool second = unit >= live_tiles;
        const int tile = (second ? unit - live_tiles : unit) * kTile, from = second ? kUnitTiles * 8 : 0;
        const Place place(line, first_key + tile, channel + from, C);
        Runs<T, kUnitTiles> columns_part;
        if (!column) columns_part.read(place, a.grad_value);
        float results[kUnitTiles][4] = {};
        multiply_transposed<T>(results, weights + tile * kSize<T>, weights_pitch, grads + from * kSize<T>, queries);
        write_sum(place, results, columns_part, a.grad_value, a.grad_value, true);
      }
    }
    if (column && first_block) new_delta.write(a.delta, line, first_row);

#pragma unroll 1
    for (int channel = 0; channel < c; channel += kChunk<T>) {
      const unsigned char* by_keys = take_item();
      if (channel == 0) {  // no warp reads P any more
        const Lane lane = this_lane();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = first_row + lane.row + 8 * half;
          const float delta = row < line.length ? a.delta[line.pixel(row)] : 0.f;
#pragma unroll
          for (int j = 0; j < 2 * key_tiles; ++j) {
            const float* dp = &grad_weights[j][2 * half];
            float p[2];
            load_pair<T>(p, weights_of(lane, j, half));
            store_weights<T>(weights_of(lane, j, half), p[0] * (dp[0] - delta), p[1] * (dp[1] - delta));
          }
        }
        __syncthreads();
      }
#pragma unroll 1
      for (int from = 0; from < kChunk<T>; from += kUnitTiles * 8) {
        const Place place(line, first_row, channel + from, c);
        Runs<float, kUnitTiles> before;
        if (!column || !first_block) before.read(place, a.partial_query);
        float results[kUnitTiles][4] = {};
        multiply<T>(results, weights + first_row * weights_pitch, weights_pitch, by_keys + from * kSize<T>, keys);
        write_sum(place, results, before, a.partial_query, a.grad_query, !column && last_block);
      }
#pragma unroll 1
      for (int unit = warp; unit < live_tiles * chunk_units; unit += block_warps) {
        const bool second = unit >= live_tiles;
        const int tile = (second ? unit - live_tiles : unit) * kTile, from = second ? kUnitTiles * 8 : 0;
        const Place place(line, first_key + tile, channel + from, c);
        Runs<float, kUnitTiles> before;
        if (!column) before.read(place, a.partial_key);
        float results[kUnitTiles][4] = {};
        multiply_transposed<T>(results, weights + tile * kSize<T>, weights_pitch,
                               by_keys + keys * kPitch + from * kSize<T>, queries);
        write_sum(place, results, before, a.partial_key, a.grad_key, !column);
      }
    }
  }
#else
  __trap();  // compiled for an older architecture than fits() checked: fail instead of leaving the output unwritten
#endif
}

// The block and the kernel, by its number of key tiles, for lines of a given length.
int block_warps(int64_t length) { return static_cast<int>((length + kTile - 1) / kTile); }
int key_tiles_for(int64_t length) { return length <= 64 ? 4 : length <= 112 ? 7 : length <= 144 ? 9 : 6; }

int shared_bytes(Dtype dtype, int64_t length, int stages) {
  const int queries = block_warps(length) * kTile, keys = key_tiles_for(length) * kTile;
  const int weights_pitch = keys * static_cast<int>(element_size(dtype)) + 16;
  return queries * weights_pitch + stages * (keys + queries) * kPitch;
}

template <class T>
cudaError_t run(const Backward& b, const Device& device, void* stream) {
  Gradients<T> a = {static_cast<const T*>(b.query),
                    static_cast<const T*>(b.key),
                    static_cast<const T*>(b.value),
                    static_cast<const T*>(b.out),
                    static_cast<const Normalizer<float>*>(b.normalizer),
                    static_cast<const T*>(b.grad_out),
                    static_cast<T*>(b.grad_query),
                    static_cast<T*>(b.grad_key),
                    static_cast<T*>(b.grad_value)};
  a.sizes = b.sizes;
  float* workspace = static_cast<float*>(b.workspace);
  if constexpr (std::is_same_v<T, float>) {
    a.partial_query = a.grad_query;
    a.partial_key = a.grad_key;
  } else {
    a.partial_query = workspace;
    a.partial_key = workspace += b.sizes.pixels() * b.sizes.c;
    workspace += b.sizes.pixels() * b.sizes.c;
  }
  a.delta = workspace;

  for (const bool column : {true, false}) {
    const int64_t length = column ? b.sizes.H : b.sizes.W;
    const int stages = shared_bytes(b.dtype, length, 2) <= device.shared_memory ? 2 : 1;
    const auto launch = [&](auto kernel) {
      return device::launch(kernel, dim3(static_cast<unsigned>(lines(b.sizes, column))), block_warps(length) * kWarp,
                            shared_bytes(b.dtype, length, stages), stream, a, column, stages);
    };
    cudaError_t error;
    switch (key_tiles_for(length)) {
      case 4:
        error = launch(backward_kernel<T, 4, 4, 2>);
        break;
      case 7:
        error = launch(backward_kernel<T, 7, 7, 2>);
        break;
      case 9:
        error = launch(backward_kernel<T, 9, 9, 1>);
        break;
      default:
        error = launch(backward_kernel<T, 6, 17, 1>);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

bool serves(const Backward& b, const Device& device) {
  return fits(b.dtype, b.sizes, device,
              {b.query, b.key, b.value, b.out, b.grad_out, b.grad_query, b.grad_key, b.grad_value, b.workspace}) &&
         shared_bytes(b.dtype, b.sizes.H, 1) <= device.shared_memory &&
         shared_bytes(b.dtype, b.sizes.W, 1) <= device.shared_memory;
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

// Returns the bytes of delta and, unless dtype is float32, of the partial gradients of query and key.
int64_t backward_workspace(Dtype dtype, const Sizes& sizes) {
  return sizes.pixels() * (dtype == Dtype::float32 ? 1 : 2 * sizes.c + 1) * static_cast<int64_t>(sizeof(float));
}

}  // namespace cc_attention::tensor_core
