// Forward of the attention in exact float32 (float32.h).
//
// There is one pass over the lines of each axis (line.h). A block computes one line of one head, or a part of the
// queries of a long line. It computes the scores with all keys once; they and then their exponentials stay in shared
// memory. Two groups of kLanes threads form a warp, and each group computes whole rows: the scores of its queries,
// their softmax, and its sums of values. The softmax of a later pass starts from the normalizers of the earlier ones,
// and their result is weighted like a value. If all their scores are -inf, its weight is 0.
#include <algorithm>
#include <initializer_list>

#include "float32.h"

namespace cc_attention::float32 {
namespace {

constexpr int kThreads = 128;
constexpr int kGroups = kThreads / kLanes;
constexpr int kRowsAtOnce = 3;  // rows of earlier results that a thread reads before it adds to them
constexpr int kBlocks = 3;      // per multiprocessor, of which each needs at most 168 registers per thread

// How a pass is divided.
struct Division {
  int tile;   // queries in a block
  int tiles;  // blocks per line and head
  int piece;  // keys in a piece of values
  int stage;  // floats in a piece
  Divisor by_tiles;
};

template <int rows>
constexpr int kSide = kGroups * rows + 2;

// rows, keys: number of queries and, at a time, of keys of a thread in the scores.
template <int rows, int keys>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forward_kernel(const Forward f, const Lines lines, const Division division) {
#if CC_TENSOR_CORES
  const Pass& pass = lines.pass;
  constexpr int side = kSide<rows>, key_block = keys * kLanes;
  const int length = pass.length, padded = ceil_div(length, 4) * 4;
  const int c = static_cast<int>(f.sizes.c), C = static_cast<int>(f.sizes.C);
  const unsigned block = block_of_pass(pass);
  const unsigned line_index = division.by_tiles.quotient(block);
  const HeadLine line(lines, line_index);
  const int first_query = static_cast<int>(block - line_index * division.tiles) * division.tile;
  const int queries = min(division.tile, length - first_query);
  const int group = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;

  float* const weights = reinterpret_cast<float*>(device::dynamic_shared());  // [padded / 4, side, 4]
  float* const factors = weights + side * padded;                             // [rows * kGroups] factors of the sums
  float* const carried = factors + rows * kGroups;          // [rows * kGroups] factors of the earlier result
  float* const ring = carried + rows * kGroups;             // [2, stage]
  const int key_rows = min(key_block, length) * kRowPitch;  // offset of the queries in a piece

  // The next piece: keys and queries for each block of keys, whose channels count up to 0, then values for each span of
  // channels.
  const int before_values = -ceil_div(c, kPieceChannels) * kPieceChannels;
  int next_key = 0, next_channel = before_values, next_stage = 0;
  const auto start_piece = [&] {
    float* const to = ring + next_stage * division.stage;
    next_stage = 1 - next_stage;
    if (next_channel < 0) {
      const int count = min(key_block, length - next_key), channel = next_channel - before_values;
      copy_rows<kThreads, kPieceChannels / 4, kRowPitch>(threadIdx.x, to, f.key, line, next_key, count, count, channel,
                                                         c);
      copy_rows<kThreads, kPieceChannels / 4, kRowPitch>(threadIdx.x, to + key_rows, f.query, line, first_query,
                                                         queries, queries, channel, c);
      next_channel += kPieceChannels;
      if (next_channel == 0) {
        next_key += key_block;
        if (next_key < length)
          next_channel = before_values;
        else
          next_key = 0;
      }
    } else if (next_channel < C) {
      const int count = min(division.piece, length - next_key), rows_to = ceil_div(count, 4) * 4;
      const bool wide = C - next_channel > kNarrow;
      if (wide)
        copy_rows<kThreads, kWide / 4, kWide>(threadIdx.x, to, f.value, line, next_key, count, rows_to, next_channel,
                                              C);
      else
        copy_rows<kThreads, kNarrow / 4, kNarrow>(threadIdx.x, to, f.value, line, next_key, count, rows_to,
                                                  next_channel, C);
      next_key += division.piece;
      if (next_key >= length) {
        next_key = 0;
        next_channel += wide ? kWide : kNarrow;
      }
    }
    device::commit_copies();
  };
  // Waits for the next piece, starts copying the one after it, and returns the former.
  const auto take_piece = [&]() -> const float* {
    const float* const piece = ring + (1 - next_stage) * division.stage;
    device::wait_for_copies<0>();
    __syncthreads();  // the piece is visible to all threads, and all have read the previous one
    start_piece();
    return piece;
  };
  start_piece();

#pragma unroll 1
  for (int first_key = 0; first_key < length; first_key += key_block) {
    float scores[rows][keys] = {};
#pragma unroll 1
    for (int channel = 0; channel < c; channel += kPieceChannels) {
      const float* const piece = take_piece();
      multiply_rows<kGroups, kLanes>(scores, piece + key_rows + group * kRowPitch, piece + lane * kRowPitch,
                                     steps_of(channel, c));
    }
    const float scale = static_cast<float>(f.scale);
    float* const own = weights + weight_at<side>(group, first_key + lane);
#pragma unroll
    for (int j = 0; j < keys; ++j) {
      const int key = first_key + lane + j * kLanes;
      if (key >= padded) break;
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        const bool self = !pass.last && first_query + group + i * kGroups == key;
        const float score = self ? -INFINITY : device::multiply(scores[i][j], scale);
        own[j * kLanes * side + i * kGroups * 4] = key < length ? score : 0.f;
      }
    }
  }

  // A thread reads the scores that it has written itself.
#pragma unroll 1
  for (int i = 0; i < rows; ++i) {
    const int query = group + i * kGroups;
    const auto normalizer = [&]() -> Normalizer<float>& {
      return static_cast<Normalizer<float>*>(f.normalizer)[line.entry(first_query + query)];
    };
    const Normalizer<float> before = !pass.first && query < queries ? normalizer() : Normalizer<float>{-INFINITY, 0.f};
    float* const own = weights + weight_at<side>(query, lane);
    float top = before.top, added = 0.f;
#pragma unroll 4
    for (int key = 0; key < length - lane; key += kLanes) top = fmaxf(top, own[key * side]);
    for (int lanes = 1; lanes < kLanes; lanes *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, lanes));
    const float base = top == -INFINITY ? 0.f : top;  // if all are masked, avoids -inf - -inf = NaN
#pragma unroll 4
    for (int key = 0; key < length - lane; key += kLanes) {
      const float weight = exp_difference(own[key * side], base);
      own[key * side] = weight;
      added += weight;
    }
    for (int lanes = 1; lanes < kLanes; lanes *= 2) added += __shfl_xor_sync(kAllLanes, added, lanes);
    const float there = before.total == 0.f ? 0.f : exp_difference(before.top, base) * before.total;
    const float total = there + added;
    if (lane > 0) continue;
    // Without a finite score so far, both weights are 0; without any at all, the result is NaN.
    factors[query] = total == 0.f && !pass.last ? 0.f : 1.f / total;
    carried[query] = there == 0.f ? 0.f : there / total;
    if (query < queries) normalizer() = {top, total};
  }

  // Computes the channels from `channel` on. width: channels of a thread.
  const auto sum_values = [&]<int width>(int channel) {
    float sums[rows][width] = {};
#pragma unroll 1
    for (int first_key = 0; first_key < length; first_key += division.piece) {
      const float* const piece = take_piece();
      add_over_keys<side, kGroups>(sums, weights + weight_at<side>(group, first_key), piece + 4 * lane,
                                   ceil_div(min(division.piece, length - first_key), 4));
    }
    const auto row_of = [&](int i) { return group + i * kGroups; };
    // The rows of the block in a map, [N,T,H,W,heads,C].
    const auto rows_in = [&](auto* data, int64_t pitch) {
      using Element = std::conditional_t<std::is_same_v<decltype(data), void*>, float, const float>;
      const int own_channel = channel + 4 * lane;
      return Rows<Element>{static_cast<Element*>(data) + line.offset(pitch, first_query, C, own_channel),
                           static_cast<int>(line.step * pitch), queries, C - own_channel};
    };
#pragma unroll
    for (int first = 0; first < rows; first += kRowsAtOnce) {
      constexpr int parts = width / 4;
      Quad results[kRowsAtOnce][parts], others[kRowsAtOnce][parts] = {};
      if (!pass.first) read(others, rows_in(static_cast<const void*>(f.out.data), f.out.pitch), first, rows, row_of);
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const int row = min(first + i, rows - 1);
        const float factor = factors[row_of(row)], factor_of_old = carried[row_of(row)];
#pragma unroll
        for (int j = 0; j < width; ++j)
          results[i][j / 4].at[j % 4] = fmaf(factor, sums[row][j], factor_of_old * others[i][j / 4].at[j % 4]);
      }
      write(results, rows_in(f.out.data, f.out.pitch), first, rows, row_of);
      if (!pass.last || f.residual.data == nullptr) continue;
      read(others, rows_in(f.residual.data, f.residual.pitch), first, rows, row_of);
      const float gamma = *static_cast<const float*>(f.gamma);
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i)
#pragma unroll
        for (int j = 0; j < width; ++j) {
          float& other = others[i][j / 4].at[j % 4];
          other = fmaf(gamma, results[i][j / 4].at[j % 4], other);
        }
      write(others, rows_in(f.sum.data, f.sum.pitch), first, rows, row_of);
    }
  };
#pragma unroll 1
  for (int channel = 0; channel < C;) {
    if (C - channel > kNarrow) {
      sum_values.template operator()<8>(channel);
      channel += kWide;
    } else {
      sum_values.template operator()<4>(channel);
      channel += kNarrow;
    }
  }
  device::wait_for_copies<0>();  // the last, empty group
#else
  __trap();  // compiled for an older architecture than fits() checked: fail instead of leaving the output unwritten
#endif
}

// A kernel and a division of a line for it.
struct Choice {
  void (*kernel)(Forward, Lines, Division) = nullptr;
  Division division;
  int shared_bytes;
};

// Returns the kernel that computes the fewest rows of scores and values, of those with two blocks per multiprocessor if
// there are any; without a kernel if none fits.
Choice choose(int length, const Device& device) {
  Choice best;
  int best_cost = 0;
  const auto consider = [&]<int rows, int keys>() {
    const int tiles = ceil_div(length, rows * kGroups), tile = ceil_div(length, tiles);
    // A piece of scores is read up to the last row of the last thread.
    const int score_rows = std::max(keys * kLanes, std::min(keys * kLanes, length) + rows * kGroups);
    const int stage = std::max(kPieceRows * kWide, score_rows * kRowPitch);
    const int64_t padded = ceil_div(length, 4) * 4;
    const int64_t bytes = (kSide<rows> * padded + 2 * rows * kGroups + 2 * stage) * int64_t{sizeof(float)};
    if (bytes > device.shared_memory) return;
    const int key_blocks = ceil_div(length, keys * kLanes);
    // In multiply-adds per thread, for 64 channels of keys and 512 of values. Alone, a block doesn't hide its waits.
    const int64_t alone = 2 * bytes > device.shared_memory ? 2 : 1;
    const int64_t cost = alone * tiles * (rows + 1) * (key_blocks * keys * 64 + padded * 32);
    if (best.kernel != nullptr && cost >= best_cost) return;
    best_cost = static_cast<int>(std::min<int64_t>(cost, INT32_MAX));
    best = {
        forward_kernel<rows, keys>, {tile, tiles, piece_of(length), stage, Divisor(tiles)}, static_cast<int>(bytes)};
  };
  consider.template operator()<5, 9>();
  consider.template operator()<9, 5>();
  consider.template operator()<9, 9>();
  consider.template operator()<13, 7>();
  return best;
}

}  // namespace

bool serves(const Forward& f, const Device& device) {
  if (!fits(f.dtype, f.sizes, f.axes, device,
            {f.query, f.key, f.value, read_only(f.out), f.residual, read_only(f.sum)}))
    return false;
  for (const Pass& pass : passes_of(f.sizes, f.axes)) {
    const Choice choice = choose(pass.length, device);
    if (choice.kernel == nullptr || pass.lines * f.sizes.heads > INT32_MAX / choice.division.tiles) return false;
  }
  return true;
}

int forward(const Forward& f, const Device& device, void* stream) {
  for (const Pass& pass : passes_of(f.sizes, f.axes)) {
    const Choice choice = choose(pass.length, device);
    const int64_t blocks = pass.lines * f.sizes.heads * choice.division.tiles;
    const cudaError_t error =
        device::launch(choice.kernel, dim3(static_cast<unsigned>(blocks)), kThreads, choice.shared_bytes, stream, f,
                       Lines(pass, f.sizes.heads), choice.division);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace cc_attention::float32
