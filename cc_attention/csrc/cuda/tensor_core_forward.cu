// Forward of the attention on tensor cores (bf16, fp16, tf32; sm_80 and later).
//
// A row or a column is a small attention problem. The column pass, in which a pixel does not attend to itself, writes
// its result and its normalizers. The row pass merges its own result with them, in place. A line without finite scores
// has weight 0.
//
// A block processes one line, and each of its warps up to 16 queries. It computes the scores with all keys of the line
// once. Their exponentials stay in registers, in the storage type, as the left operand of the products with the values.
//
// All data streams through a ring of tile pairs, with 128 bytes of channels per row: one tile holds keys or values, the
// other queries or results. First come key and query, then the values and, in the row pass, the result of the column
// pass. A warp overwrites the latter with its results, which then go to memory in whole rows.
#include "tensor_core.h"

namespace cc_attention::tensor_core {
namespace {

// key_tiles: tiles of 16 keys in the longest line; warps: the maximum in a block.
template <class T, int key_tiles, int warps, int blocks_per_processor>
__global__ void __launch_bounds__(warps* kWarp, blocks_per_processor)
    forward_kernel(const T* __restrict__ query,     // [N,H,W,c]
                   const T* __restrict__ key,       // [N,H,W,c]
                   const T* __restrict__ value,     // [N,H,W,C]
                   T* out,                          // [N,H,W,C]
                   Normalizer<float>* normalizers,  // [N,H,W]
                   Sizes sizes, bool column, int stages) {
#if CC_TENSOR_CORES
  constexpr int keys = key_tiles * kTile;
  constexpr int tiles = kChunk<T> / 8;  // 16 x 8 results of a chunk of channels
  constexpr int steps = keys / kStep<T>;
  const int c = static_cast<int>(sizes.c), C = static_cast<int>(sizes.C);

  // The row pass goes from the last image to the first, since the column pass left the last ones in the cache.
  const Line line = line_of(sizes, column, column ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
  const Lane lane = this_lane();
  const int warp = threadIdx.x / kWarp;
  const int block_queries = blockDim.x / kWarp * kTile;
  const int first_query = blockIdx.y * block_queries;
  const int rows[2] = {first_query + warp * kTile + lane.row, first_query + warp * kTile + lane.row + 8};

  unsigned char* const ring = device::dynamic_shared();  // [stages] pairs of tiles
  const int pair_bytes = (keys + block_queries) * kPitch;
  const int own_rows = (keys + warp * kTile) * kPitch;  // offset of the warp's queries in a pair
  int filling = 1;                                      // the pair that receives the next values
  int next_channel = 0;                                 // the first channel of the next values
  const auto start_values = [&] {
    if (next_channel < C) {
      unsigned char* const to = ring + filling * pair_bytes;
      copy_rows(to, value, line, 0, keys, next_channel, C);
      if (!column)
        copy_rows(to + keys * kPitch, static_cast<const T*>(out), line, first_query, block_queries, next_channel, C);
    }
    device::commit_copies();  // also an empty group, so that the number of newer groups tells which have arrived
    filling = filling + 1 < stages ? filling + 1 : 0;
    next_channel += kChunk<T>;
  };

  // Keys and queries use the first pair of the ring, while the first values are already copied to the others.
  float scores[2 * key_tiles][4] = {};
#pragma unroll 1
  for (int channel = 0; channel < c; channel += kChunk<T>) {
    if (channel > 0) __syncthreads();  // all warps have read the tiles
    copy_rows(ring, key, line, 0, keys, channel, c);
    copy_rows(ring + keys * kPitch, query, line, first_query, block_queries, channel, c);
    device::commit_copies();
    if (channel == 0) {
      start_values();
      if (stages == 3) {
        start_values();
        device::wait_for_copies<2>();
      } else {
        device::wait_for_copies<1>();
      }
    } else {
      device::wait_for_copies<0>();
    }
    __syncthreads();
    multiply_rows<T, key_tiles>(scores, ring + own_rows, ring, steps_from<T>(channel, c));
  }

  Normalizer<float> of_column[2] = {{-INFINITY, 0.f}, {-INFINITY, 0.f}};
  if (!column)
    for (int half = 0; half < 2; ++half)
      if (rows[half] < line.length) of_column[half] = normalizers[line.pixel(rows[half])];

  // Softmax over the line, in base 2 because the hardware supports it. Subtract before multiplying by log2(e): the
  // product of a large score would round the difference away.
  float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int j = 0; j < 2 * key_tiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = 8 * j + 2 * lane.pair + i % 2;
      if (k >= line.length || (column && k == rows[i / 2])) scores[j][i] = -INFINITY;
      largest[i / 2] = fmaxf(largest[i / 2], scores[j][i]);
    }
  float base[2], sum[2] = {0.f, 0.f};  // base is finite, to avoid -inf - -inf = NaN
  for (int half = 0; half < 2; ++half) {
    for (const int other : {1, 2})
      largest[half] = fmaxf(largest[half], __shfl_xor_sync(kAllLanes, largest[half], other));
    base[half] = largest[half] == -INFINITY ? 0.f : largest[half];
  }
  uint32_t weights[steps][4];
#pragma unroll
  for (int j = 0; j < 2 * key_tiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[j][i] = device::exp2_approximate((scores[j][i] - base[i / 2]) * kLog2e);
      sum[i / 2] += scores[j][i];
    }
    keep_as_left<T>(weights, j, scores[j]);
  }
  __syncwarp();                       // all lanes have read the column normalizers, which one lane replaces
  float weight[2], column_weight[2];  // weights of this line's sum of values and of the column result
  for (int half = 0; half < 2; ++half) {
    for (const int other : {1, 2}) sum[half] += __shfl_xor_sync(kAllLanes, sum[half], other);
    float top = largest[half], total = sum[half];
    weight[half] = total == 0.f ? 0.f : 1.f / total;
    column_weight[half] = 0.f;
    if (!column) {  // NaN if the column has no finite score either
      top = fmaxf(largest[half], of_column[half].top);
      const float here = expf(largest[half] - top), there = expf(of_column[half].top - top) * of_column[half].total;
      total = here * sum[half] + there;
      weight[half] = here / total;
      column_weight[half] = there / total;
    }
    if (lane.pair == 0 && rows[half] < line.length) normalizers[line.pixel(rows[half])] = {top, total};
  }

  int arrived = 0;
#pragma unroll 1
  for (int channel = 0; channel < C; channel += kChunk<T>) {
    arrived = arrived + 1 < stages ? arrived + 1 : 0;
    unsigned char* const pair = ring + arrived * pair_bytes;
    if (stages == 3)
      device::wait_for_copies<1>();
    else
      device::wait_for_copies<0>();
    __syncthreads();  // this chunk is visible to all warps, and all have read the previous one
    start_values();

    float results[tiles][4] = {};
#pragma unroll
    for (int step = 0; step < steps; ++step)
#pragma unroll
      for (int j = 0; j < tiles; j += 2) {
        uint32_t b[4];
        load_right_transposed<T>(b, pair + step * kStep<T> * kPitch + j * 8 * kSize<T>, kPitch, lane.index);
        multiply_pair<T>(results[j], results[j + 1], weights[step], b);
      }

    unsigned char* const own = pair + own_rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unsigned char* at = own + (lane.row + 8 * half) * kPitch + 2 * lane.pair * kSize<T>;
#pragma unroll
      for (int j = 0; j < tiles; ++j, at += 8 * kSize<T>) {
        float result[2] = {weight[half] * results[j][2 * half], weight[half] * results[j][2 * half + 1]};
        if (!column) {
          float old[2];
          load_pair<T>(old, at);
          for (int i = 0; i < 2; ++i) result[i] = fmaf(column_weight[half], old[i], result[i]);
        }
        store_pair<T>(at, result[0], result[1]);
      }
    }
    __syncwarp();
    write_rows(out, own, line, first_query + warp * kTile, channel, C);
  }
  device::wait_for_copies<0>();  // the remaining empty groups
#else
  __trap();  // compiled for an older architecture than fits() checked: fail instead of leaving the output unwritten
#endif
}

template <class T, int key_tiles, int warps, int blocks_per_processor>
cudaError_t launch_pass(const Forward& a, const Device& device, bool column, void* stream) {
  const int length = static_cast<int>(column ? a.sizes.H : a.sizes.W);
  const int query_tiles = (length + kTile - 1) / kTile;
  const auto shared_bytes = [](int block_warps, int stages) {
    return stages * (key_tiles + block_warps) * kTile * kPitch;
  };
  int blocks = (query_tiles + warps - 1) / warps, block_warps;
  do block_warps = (query_tiles + blocks - 1) / blocks;
  while (shared_bytes(block_warps, 2) > device.shared_memory && ++blocks <= query_tiles);
  const int stages = shared_bytes(block_warps, 3) <= device.shared_memory ? 3 : 2;
  const dim3 grid(static_cast<unsigned>(lines(a.sizes, column)), blocks);
  return device::launch(forward_kernel<T, key_tiles, warps, blocks_per_processor>, grid, block_warps * kWarp,
                        shared_bytes(block_warps, stages), stream, static_cast<const T*>(a.query),
                        static_cast<const T*>(a.key), static_cast<const T*>(a.value), static_cast<T*>(a.out),
                        static_cast<Normalizer<float>*>(a.normalizer), a.sizes, column, stages);
}

template <class T>
cudaError_t run(const Forward& a, const Device& device, void* stream) {
  for (const bool column : {true, false}) {
    const int64_t length = column ? a.sizes.H : a.sizes.W;
    cudaError_t error;
    if (length <= 64)
      error = launch_pass<T, 4, 4, 4>(a, device, column, stream);
    else if (length <= 112)
      error = launch_pass<T, 7, 7, 2>(a, device, column, stream);
    else if (length <= 144)
      error = launch_pass<T, 9, 9, 1>(a, device, column, stream);
    else
      // tf32 uses eight warps, not nine: nine would occupy the four partitions of a multiprocessor like twelve, and
      // leave too few registers per thread.
      error = launch_pass<T, 17, sizeof(T) == 4 ? 8 : 9, 1>(a, device, column, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

bool serves(const Forward& a, const Device& device) {
  return fits(a.dtype, a.sizes, device, {a.query, a.key, a.value, a.out});
}

int forward(const Forward& a, const Device& device, void* stream) {
  switch (a.dtype) {
    case Dtype::bfloat16:
      return run<bfloat16>(a, device, stream);
    case Dtype::float16:
      return run<float16>(a, device, stream);
    default:
      return run<float>(a, device, stream);
  }
}

}  // namespace cc_attention::tensor_core
