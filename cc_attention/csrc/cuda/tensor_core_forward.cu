// Forward of the attention on tensor cores (bf16, fp16, tf32; sm_80 and later).
//
// A line of one head is a small attention problem, and there is one pass for each axis (line.h). The first pass writes
// its result and its normalizers. Each later pass merges its own result with them, in place. A line without finite
// scores has weight 0.
//
// A block processes one line of one head, and each of its warps up to 16 queries. It computes the scores with all keys
// of the line once. Their exponentials stay in registers, in the storage type, as the left operand of the products with
// the values.
//
// All data streams through a ring of tile pairs, with 128 bytes of channels per row: one tile holds keys or values, the
// other queries or results. First come key and query, then the values and, except in the first pass, the result of the
// earlier passes. A warp overwrites the latter with its results, which then go to memory in whole rows. If the last
// pass adds to a residual, a pair has a third tile, for the residual and then the sum.
#include "tensor_core.h"

namespace cc_attention::tensor_core {
namespace {

// Operands of the kernel; T is the storage type.
template <class T>
struct Operands {
  FeatureMap<const T> query, key;  // [N,T,H,W,heads,c]
  FeatureMap<const T> value;       // [N,T,H,W,heads,C]
  FeatureMap<T> out;               // [N,T,H,W,heads,C]
  FeatureMap<const T> residual;    // [N,T,H,W,heads,C]; data is null if there is none, or in another pass than the last
  FeatureMap<T> sum;               // [N,T,H,W,heads,C]
  const float* gamma;
  Normalizer<float>* normalizers;  // [N,T,H,W,heads]
  float scale;
  int heads, c, C;
  Pass pass;
  Divisor by_heads, by_step;
};

// key_tiles: tiles of 16 keys in the longest line; warps: the maximum in a block.
template <class T, int key_tiles, int warps, int blocks_per_processor>
__global__ void __launch_bounds__(warps* kWarp, blocks_per_processor) forward_kernel(const Operands<T> a, int stages) {
#if CC_TENSOR_CORES
  constexpr int keys = key_tiles * kTile;
  constexpr int tiles = kChunk<T> / 8;  // 16 x 8 results of a chunk of channels
  constexpr int steps = keys / kStep<T>;

  int head;
  const Line line = line_of_block(a, head);
  const Lane lane = this_lane();
  const int warp = threadIdx.x / kWarp;
  const int block_queries = blockDim.x / kWarp * kTile;
  const int first_query = blockIdx.y * block_queries;
  const int rows[2] = {first_query + warp * kTile + lane.row, first_query + warp * kTile + lane.row + 8};

  unsigned char* const ring = device::dynamic_shared();                                // [stages] pairs of tiles
  const int residual_bytes = a.residual.data != nullptr ? block_queries * kPitch : 0;  // of its tile
  const int pair_bytes = (keys + block_queries) * kPitch + residual_bytes;
  const int own_rows = (keys + warp * kTile) * kPitch;  // offset of the warp's queries in a pair
  int filling = 1;                                      // the pair that receives the next values
  const int end = (head + 1) * a.C;                     // of the values' channels
  int next_channel = head * a.C;                        // the first channel of the next values
  const auto start_values = [&] {
    if (next_channel < end) {
      unsigned char* const to = ring + filling * pair_bytes;
      copy_rows(to, a.value, line, 0, keys, next_channel, end);
      if (!a.pass.first) copy_rows(to + keys * kPitch, a.out, line, first_query, block_queries, next_channel, end);
      if (residual_bytes > 0)
        copy_rows(to + (keys + block_queries) * kPitch, a.residual, line, first_query, block_queries, next_channel,
                  end);
    }
    device::commit_copies();  // also an empty group, so that the number of newer groups tells which have arrived
    filling = filling + 1 < stages ? filling + 1 : 0;
    next_channel += kChunk<T>;
  };

  // Keys and queries use the first pair of the ring, while the first values are already copied to the others.
  float scores[2 * key_tiles][4] = {};
#pragma unroll 1
  for (int done = 0; done < a.c; done += kChunk<T>) {
    const int channel = head * a.c + done, channels_end = (head + 1) * a.c;
    if (done > 0) __syncthreads();  // all warps have read the tiles
    copy_rows(ring, a.key, line, 0, keys, channel, channels_end);
    copy_rows(ring + keys * kPitch, a.query, line, first_query, block_queries, channel, channels_end);
    device::commit_copies();
    if (done == 0) {
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
    multiply_rows<T, key_tiles>(scores, ring + own_rows, ring, steps_from<T>(done, a.c));
  }

  const auto normalizer_of = [&](int row) -> Normalizer<float>& {
    return a.normalizers[line.pixel(row) * a.heads + head];
  };
  Normalizer<float> before[2] = {{-INFINITY, 0.f}, {-INFINITY, 0.f}};  // of the earlier passes
  if (!a.pass.first)
    for (int half = 0; half < 2; ++half)
      if (rows[half] < line.length) before[half] = normalizer_of(rows[half]);

  // Softmax over the line, in base 2 because the hardware supports it. Subtract before multiplying by log2(e): the
  // product of a large score would round the difference away.
  float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int j = 0; j < 2 * key_tiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = 8 * j + 2 * lane.pair + i % 2;
      scores[j][i] = device::multiply(scores[j][i], a.scale);
      if (k >= line.length || (!a.pass.last && k == rows[i / 2])) scores[j][i] = -INFINITY;
      largest[i / 2] = fmaxf(largest[i / 2], scores[j][i]);
    }
  const auto base_of = [](float top) { return top == -INFINITY ? 0.f : top; };  // to avoid -inf - -inf = NaN
  float base[2], sum[2] = {0.f, 0.f};
  for (int half = 0; half < 2; ++half) {
    for (const int other : {1, 2})
      largest[half] = fmaxf(largest[half], __shfl_xor_sync(kAllLanes, largest[half], other));
    base[half] = base_of(largest[half]);
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
  __syncwarp();                       // all lanes have read the earlier normalizers, which one lane replaces
  float weight[2], before_weight[2];  // weights of this line's sum of values and of the earlier result
  for (int half = 0; half < 2; ++half) {
    for (const int other : {1, 2}) sum[half] += __shfl_xor_sync(kAllLanes, sum[half], other);
    float top = largest[half], here = 1.f, there = 0.f;
    if (!a.pass.first) {
      top = fmaxf(top, before[half].top);
      here = expf(largest[half] - base_of(top));
      there = expf(before[half].top - base_of(top)) * before[half].total;
    }
    const float total = fmaf(here, sum[half], there);
    const bool none = total == 0.f && !a.pass.last;  // no finite score so far; if there is none at all, NaN
    weight[half] = none ? 0.f : here / total;
    before_weight[half] = none ? 0.f : there / total;
    if (lane.pair == 0 && rows[half] < line.length) normalizer_of(rows[half]) = {top, total};
  }

  int arrived = 0;
#pragma unroll 1
  for (int channel = head * a.C; channel < end; channel += kChunk<T>) {
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
    const float gamma = residual_bytes > 0 ? *a.gamma : 0.f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unsigned char* at = own + (lane.row + 8 * half) * kPitch + 2 * lane.pair * kSize<T>;
#pragma unroll
      for (int j = 0; j < tiles; ++j, at += 8 * kSize<T>) {
        float result[2] = {weight[half] * results[j][2 * half], weight[half] * results[j][2 * half + 1]};
        if (!a.pass.first) {
          float old[2];
          load_pair<T>(old, at);
          for (int i = 0; i < 2; ++i) result[i] = fmaf(before_weight[half], old[i], result[i]);
        }
        if (residual_bytes > 0) {
          float with[2];
          load_pair<T>(with, at + block_queries * kPitch);
          for (int i = 0; i < 2; ++i) with[i] = fmaf(gamma, result[i], with[i]);
          store_pair<T>(at + block_queries * kPitch, with[0], with[1]);
        }
        store_pair<T>(at, result[0], result[1]);
      }
    }
    __syncwarp();
    write_rows(a.out, own, line, first_query + warp * kTile, channel, end);
    if (residual_bytes > 0)
      write_rows(a.sum, own + block_queries * kPitch, line, first_query + warp * kTile, channel, end);
  }
  device::wait_for_copies<0>();  // the remaining empty groups
#else
  __trap();  // compiled for an older architecture than fits() checked: fail instead of leaving the output unwritten
#endif
}

template <class T, int key_tiles, int warps, int blocks_per_processor>
cudaError_t launch_pass(const Operands<T>& a, const Device& device, void* stream) {
  const int query_tiles = tiles_of(a.pass.length);
  const auto shared_bytes = [&](int block_warps, int stages) {
    return stages * (key_tiles + (a.residual.data == nullptr ? 1 : 2) * block_warps) * kTile * kPitch;
  };
  int blocks = (query_tiles + warps - 1) / warps, block_warps;
  do block_warps = (query_tiles + blocks - 1) / blocks;
  while (shared_bytes(block_warps, 2) > device.shared_memory && ++blocks <= query_tiles);
  // With the larger pairs of a residual, a third one would take the place of another block.
  const int room = device.shared_memory / (a.residual.data == nullptr ? 1 : blocks_per_processor);
  const int stages = shared_bytes(block_warps, 3) <= room ? 3 : 2;
  const dim3 grid(static_cast<unsigned>(a.pass.lines * a.heads), blocks);
  return device::launch(forward_kernel<T, key_tiles, warps, blocks_per_processor>, grid, block_warps * kWarp,
                        shared_bytes(block_warps, stages), stream, a, stages);
}

template <class T>
cudaError_t run(const Forward& f, const Device& device, void* stream) {
  Operands<T> a{typed<T>(f.query),
                typed<T>(f.key),
                typed<T>(f.value),
                typed<T>(f.out),
                {},
                typed<T>(f.sum),
                static_cast<const float*>(f.gamma),
                static_cast<Normalizer<float>*>(f.normalizer),
                static_cast<float>(f.scale),
                static_cast<int>(f.sizes.heads),
                static_cast<int>(f.sizes.c),
                static_cast<int>(f.sizes.C),
                {},
                Divisor(f.sizes.heads),
                {}};
  for (const Pass& pass : passes_of(f.sizes, f.axes)) {
    a.pass = pass;
    a.by_step = Divisor(pass.step);
    if (pass.last) a.residual = typed<T>(f.residual);
    cudaError_t error;
    if (pass.length <= 64)
      error = launch_pass<T, 4, 4, 4>(a, device, stream);
    else if (pass.length <= 112)
      error = launch_pass<T, 7, 7, 2>(a, device, stream);
    else if (pass.length <= 144)
      error = launch_pass<T, 9, 9, 1>(a, device, stream);
    else
      // tf32 uses eight warps, not nine: nine would occupy the four partitions of a multiprocessor like twelve, and
      // leave too few registers per thread.
      error = launch_pass<T, 17, sizeof(T) == 4 ? 8 : 9, 1>(a, device, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

bool serves(const Forward& f, const Device& device) {
  return fits(f.dtype, f.sizes, f.axes, device,
              {f.query, f.key, f.value, read_only(f.out), f.residual, read_only(f.sum)});
}

int forward(const Forward& f, const Device& device, void* stream) {
  switch (f.dtype) {
    case Dtype::bfloat16:
      return run<bfloat16>(f, device, stream);
    case Dtype::float16:
      return run<float16>(f, device, stream);
    default:
      return run<float>(f, device, stream);
  }
}

}  // namespace cc_attention::tensor_core
