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
  ImageOrder order;  // if the kernel takes two passes, of which `pass` is the later one
};

// key_tiles: tiles of 16 keys in the longest line; warps: the maximum in a block.
template <class T, int key_tiles, int warps, int blocks_per_processor, bool in_image_order>
__global__ void __launch_bounds__(warps* kWarp, blocks_per_processor) forward_kernel(const Operands<T> a, int stages) {
#if CC_TENSOR_CORES
  constexpr int keys = key_tiles * kTile;
  constexpr int tiles = kChunk<T> / 8;  // 16 x 8 results of a chunk of channels
  constexpr int steps = keys / kStep<T>;

  const Work work = work_of_block<in_image_order>(a);
  const Line line = work.line;
  const int head = work.head;
  const Lane lane = this_lane();
  const int warp = threadIdx.x / kWarp;
  const int block_queries = blockDim.x / kWarp * kTile;
  const int first_query = blockIdx.y * block_queries;
  const int rows[2] = {first_query + warp * kTile + lane.row, first_query + warp * kTile + lane.row + 8};

  unsigned char* const ring = device::dynamic_shared() + kHeaderBytes<in_image_order>;  // [stages] pairs of tiles
  const bool with_residual = a.residual.data != nullptr && (!in_image_order || work.last);
  const int residual_bytes = with_residual ? block_queries * kPitch : 0;  // of its tile
  const int pair_bytes = (keys + block_queries) * kPitch + residual_bytes;
  const int own_rows = (keys + warp * kTile) * kPitch;  // offset of the warp's queries in a pair
  int filling = 1;                                      // the pair that receives the next values
  const int end = (head + 1) * a.C;                     // of the values' channels
  int next_channel = head * a.C;                        // the first channel of the next values
  const auto start_values = [&] {
    if (next_channel < end) {
      unsigned char* const to = ring + filling * pair_bytes;
      copy_rows(to, a.value, line, 0, keys, next_channel, end);
      if (!work.first) copy_rows(to + keys * kPitch, a.out, line, first_query, block_queries, next_channel, end);
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
      if constexpr (in_image_order) work.wait(a.order);
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
  if (!work.first)
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
      if (k >= line.length || (!work.last && k == rows[i / 2])) scores[j][i] = -INFINITY;
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
    if (!work.first) {
      top = fmaxf(top, before[half].top);
      here = expf(largest[half] - base_of(top));
      there = expf(before[half].top - base_of(top)) * before[half].total;
    }
    const float total = fmaf(here, sum[half], there);
    const bool none = total == 0.f && !work.last;  // no finite score so far; if there is none at all, NaN
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
        if (!work.first) {
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
  if constexpr (in_image_order) work.finish(a.order);
#else
  __trap();  // compiled for an older architecture than fits() checked: fail instead of leaving the output unwritten
#endif
}

// How a line of the given length is divided over blocks.
struct Shape {
  int key_tiles, blocks, warps, stages, shared_bytes;
  Shape(int64_t length, Dtype dtype, bool with_residual, bool in_image_order, const Device& device)
      : key_tiles(most_tiles(length)) {
    // tf32 uses eight warps for the longest lines, not nine: nine would occupy the four partitions of a multiprocessor
    // like twelve, and leave too few registers per thread.
    const int most_warps = key_tiles < 17 ? key_tiles : dtype == Dtype::float32 ? 8 : 9;
    const int query_tiles = tiles_of(length);
    const auto bytes = [&](int stages) {
      const int header = in_image_order ? kHeaderBytes<true> : 0;
      return header + stages * (key_tiles + (with_residual ? 2 : 1) * warps) * kTile * kPitch;
    };
    blocks = (query_tiles + most_warps - 1) / most_warps;
    do warps = (query_tiles + blocks - 1) / blocks;
    while (bytes(2) > device.shared_memory && ++blocks <= query_tiles);
    // With the larger pairs of a residual, a third one would take the place of another block.
    const int blocks_per_processor = key_tiles == 4 ? 4 : key_tiles == 7 ? 2 : 1;
    const int room = device.shared_memory / (with_residual ? blocks_per_processor : 1);
    stages = bytes(3) <= room ? 3 : 2;
    shared_bytes = bytes(stages);
  }
};

// Returns whether the last two passes are one launch in image order: if the same kernel serves both, with one block for
// each line.
bool in_image_order(const Forward& f, const Device& device) {
  const Passes passes = passes_of(f.sizes, f.axes);
  if (!device.untested || element_size(f.dtype) != 2 || passes.count < 2) return false;
  const Pass &earlier = passes.at[passes.count - 2], &later = passes.at[passes.count - 1];
  const int64_t length = std::max(earlier.length, later.length);
  return most_tiles(length) <= kLongestInOrder && most_tiles(earlier.length) == most_tiles(later.length) &&
         Shape(length, f.dtype, f.residual.data != nullptr, true, device).blocks == 1 &&
         (earlier.lines + later.lines) * f.sizes.heads <= INT32_MAX;
}

template <class T, int key_tiles, int warps, int blocks_per_processor>
auto kernel_of(bool in_image_order) {
  if constexpr (kImageOrder<T>)
    if (in_image_order) return forward_kernel<T, key_tiles, warps, blocks_per_processor, true>;
  return forward_kernel<T, key_tiles, warps, blocks_per_processor, false>;
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
                {},
                {}};
  const auto launch_pass = [&](int64_t length, unsigned lines, bool both) {
    if (a.pass.last) a.residual = typed<T>(f.residual);
    const Shape shape(length, f.dtype, a.residual.data != nullptr, both, device);
    const auto launch = [&](auto kernel) {
      return device::launch(kernel, dim3(lines, shape.blocks), shape.warps * kWarp, shape.shared_bytes, stream, a,
                            shape.stages);
    };
    switch (shape.key_tiles) {
      case 4:
        return launch(kernel_of<T, 4, 4, 4>(both));
      case 7:
        return launch(kernel_of<T, 7, 7, 2>(both));
      case 9:
        return launch(kernel_of<T, 9, 9, 1>(both));
      default:
        return launch(forward_kernel<T, 17, (sizeof(T) == 4 ? 8 : 9), 1, false>);
    }
  };
  return for_each_launch(a, f.sizes, f.axes, in_image_order(f, device), f.workspace, stream, launch_pass);
}

}  // namespace

bool serves(const Forward& f, const Device& device) {
  return fits(f.dtype, f.sizes, f.axes, device,
              {f.query, f.key, f.value, read_only(f.out), f.residual, read_only(f.sum)});
}

int64_t forward_workspace(const Forward& f, const Device& device) {
  if (!in_image_order(f, device)) return 0;
  return ImageOrder::counter_bytes(ImageOrder::images_of(f.sizes, passes_of(f.sizes, f.axes).end()[-2]));
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
