// Backward of the attention in exact float32 (float32.h).
//
// Like the forward, it is one pass over the lines of each axis, and every gradient is the sum of the parts from the
// passes: the first pass writes it, and the others add to it, without atomics. A block computes a whole line of one
// head. With P = exp(S - top) / total and S = scale Q K^T, where gamma is 1 without a residual:
//
//     dV = gamma P^T dO      dP = dO V^T      dS = gamma scale P (dP - delta), delta = rowsum(dO O)
//     dQ = dS K              dK = dS^T Q
//
// All of them are computed in this order. P, then dP and then dS are a matrix in shared memory. dP takes the place of P
// after a part of its channels, because a sum of sums has a smaller rounding error than one long sum; the P of each
// thread waits in the workspace, where it stays in the L2 cache. A line with more keys than that matrix is processed in
// blocks of keys. The gradient of gamma is the sum of delta.
#include "float32.h"
#include "general.h"

namespace cc_attention::float32 {
namespace {

constexpr int kLongestSum = 128;  // channels of dP that a thread adds up before the sum goes to shared memory
static_assert(kLongestSum % kPieceChannels == 0);

// Whether to compute an address again where it is used. It saves registers on some architectures and takes more on
// others, and never changes the results.
#ifdef __CUDA_ARCH__
constexpr bool kRecompute = __CUDA_ARCH__ < 1000;
#else
constexpr bool kRecompute = false;
#endif

// The division of a line over the threads of a block. In the products of rows, a thread has queries that are
// query_groups apart and keys that are key_groups apart. In the weighted sums, groups of kLanes threads have rows in
// turn. longest: maximum pixels of a line, of which at most query_groups * query_rows queries and, at a time,
// key_groups * key_rows keys. rows_at_once: rows of earlier results that a thread reads before it adds to them.
template <int threads, int query_groups, int query_rows, int key_groups, int key_rows, int longest, int blocks,
          int rows_at_once = 3>
struct Shape {
  static constexpr int kThreads = threads, kBlocks = blocks, kLongest = longest, kRowsAtOnce = rows_at_once;
  static constexpr int kQueryGroups = query_groups, kQueryRows = query_rows;
  static constexpr int kKeyGroups = key_groups, kKeyRows = key_rows;
  static constexpr int kQueries = query_groups * query_rows, kKeys = std::min(longest, key_groups* key_rows);
  static constexpr int kGroups = threads / kLanes;
  static constexpr int kQuerySums = ceil_div(longest, kGroups), kKeySums = ceil_div(kKeys, kGroups);
  static constexpr int kSide = (longest + 1) / 4 * 4 + 2;                          // the next one of weight_at
  static constexpr int kDeltas = ceil_div(longest, threads * 4 / kPieceChannels);  // rows of delta per thread
  static constexpr int kProducts = query_rows * key_rows;
  static_assert(query_groups * key_groups <= threads && longest <= kQueries && longest <= kSide);
};
using Short = Shape<128, 11, 6, 11, 6, 66, 3>;
using Medium = Shape<128, 9, 11, 14, 7, 98, 3>;     // 97 pixels: 95 % of the lanes' products exist
using Long = Shape<256, 13, 10, 19, 7, 130, 2, 2>;  // reading three rows at once takes too many registers
using Longer = Shape<256, 32, 6, 8, 7, 190, 2>;
using Longest = Shape<256, 32, 9, 8, 7, 272, 2>;

// The products of rows of a thread. The last threads have those of others, and do not keep them.
template <class S>
struct Own {
  int query, key, queries;
  __device__ __forceinline__ explicit Own(int length) {
    const int thread = again(threadIdx.x), place = thread / S::kKeyGroups;
    key = thread % S::kKeyGroups;
    query = min(place, S::kQueryGroups - 1);
    queries = place < S::kQueryGroups ? length : 0;
  }
  __device__ __forceinline__ int query_of(int i) const { return query + i * S::kQueryGroups; }
  __device__ __forceinline__ int key_of(int j) const { return key + j * S::kKeyGroups; }
  __device__ __forceinline__ int weight(int i, int j) const { return weight_at<S::kSide>(query_of(i), key_of(j)); }
};

// rowsum(dO O) of a line. Four neighboring threads share the channels of a piece.
template <class S>
struct Delta {
  static constexpr int kQuads = kPieceChannels / 4, kApart = S::kThreads / kQuads;
  float sums[S::kDeltas] = {};
  static __device__ __forceinline__ int thread() { return again(threadIdx.x); }

  // Calls act(i, address, row) for the thread's rows of O, at its part of the piece of channels from `channel` on.
  template <class Act>
  static __device__ __forceinline__ void for_rows(const Backward& b, const HeadLine& line, int channel, Act&& act) {
    const int C = static_cast<int>(b.sizes.C), step = kApart * static_cast<int>(line.step * b.out.pitch);
    const int first = thread() / kQuads;
    channel += thread() % kQuads * 4;
    const float* from = static_cast<const float*>(b.out.data) + line.offset(b.out.pitch, first, C, channel);
    const int length = channel < C ? line.length : 0;
#pragma unroll
    for (int i = 0; i < S::kDeltas; ++i, from += step)
      if (first + i * kApart < length) act(i, from, first + i * kApart);
  }
  static __device__ __forceinline__ void start(const Backward& b, const HeadLine& line, int channel) {
    for_rows(b, line, channel, [](int, const float* from, int) { prefetch(from); });
  }
  // Adds the products with the piece of dO.
  __device__ __forceinline__ void add(const Backward& b, const HeadLine& line, int channel, const float* grads) {
    Quad outs[S::kDeltas] = {};
    for_rows(b, line, channel, [&](int i, const float* from, int) { outs[i] = load_quad(from); });
    for_rows(b, line, channel, [&](int i, const float*, int row) {
      const Quad grad = load_quad(grads + row * kRowPitch + thread() % kQuads * 4);
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[i] = fmaf(outs[i].at[k], grad.at[k], sums[i]);
    });
  }
  // Writes the sums to `delta`, [length] in shared memory, and to `deltas`, [N,T,H,W,heads].
  __device__ __forceinline__ void write(float* delta, float* deltas, const HeadLine& line) {
#pragma unroll
    for (int i = 0; i < S::kDeltas; ++i) {
      for (int lanes = 1; lanes < kQuads; lanes *= 2) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], lanes);
      const int row = thread() / kQuads + i * kApart;
      if (thread() % kQuads > 0 || row >= line.length) continue;
      delta[row] = sums[i];
      deltas[line.entry(row)] = sums[i];
    }
  }
};

// How a line is divided.
struct Division {
  int keys;         // in a block of keys
  int query_piece;  // queries in a piece of values
  int key_piece;    // keys in a piece of values
  int stage;        // floats in a piece
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    backward_kernel(const Backward b, const Lines lines, const Division division, float* const deltas,
                    float* const saved) {
#if CC_TENSOR_CORES
  const Pass& pass = lines.pass;
  constexpr int side = S::kSide, groups = S::kGroups;
  const int length = pass.length;
  const int c = static_cast<int>(b.sizes.c), C = static_cast<int>(b.sizes.C);
  const unsigned block = block_of_pass(pass);
  const HeadLine line(lines, block);

  float* const weights = reinterpret_cast<float*>(device::dynamic_shared());  // [keys / 4, side, 4]: P, dP, dS
  float* const delta = weights + side * division.keys;                        // [length]
  float* const ring = delta + ceil_div(length, 4) * 4;                        // [2, stage]

  // Each of these starts copying a piece to `to`: the channels from `channel` on of
  // - the keys of a block and all queries, for products of rows,
  const auto copy_products = [&](float* to, bool scores, int first_key, int channel) {
    constexpr int quads = kPieceChannels / 4;
    const int keys = min(division.keys, length - first_key), channels = scores ? c : C, thread = again(threadIdx.x);
    copy_rows<S::kThreads, quads, kRowPitch>(thread, to, scores ? b.key : b.value, line, first_key, keys, keys, channel,
                                             channels);
    copy_rows<S::kThreads, quads, kRowPitch>(thread, to + keys * kRowPitch, scores ? b.query : b.grad, line, 0, length,
                                             length, channel, channels);
  };
  // - queries from row `first` on, for weighted sums, in dO or in Q,
  const auto copy_queries = [&](float* to, bool of_grad, int first, int channel) {
    const int count = min(division.query_piece, length - first), thread = again(threadIdx.x);
    if (of_grad && C - channel > kNarrow)
      copy_rows<S::kThreads, kWide / 4, kWide>(thread, to, b.grad, line, first, count, count, channel, C);
    else
      copy_rows<S::kThreads, kNarrow / 4, kNarrow>(thread, to, of_grad ? b.grad : b.query, line, first, count, count,
                                                   channel, of_grad ? C : c);
  };
  // - keys of a block from row `first` on, for weighted sums.
  const auto copy_keys = [&](float* to, int first_key, int first, int channel) {
    const int count = min(division.key_piece, min(division.keys, length - first_key) - first);
    copy_rows<S::kThreads, kNarrow / 4, kNarrow>(again(threadIdx.x), to, b.key, line, first_key + first, count,
                                                 ceil_div(count, 4) * 4, channel, c);
  };
  // Waits for the next piece, starts copying the one after it, and returns the former.
  int filling = 0;  // the place of the next piece
  const auto take_piece = [&](auto&& copy_next) -> const float* {
    const float* const piece = ring + filling * division.stage;
    filling = 1 - filling;
    device::wait_for_copies<0>();
    __syncthreads();  // the piece is visible to all threads, and all have read the previous one
    copy_next(ring + filling * division.stage);
    device::commit_copies();
    return piece;
  };
  copy_products(ring, true, 0, 0);
  device::commit_copies();

  if (!pass.first) {
    for (int i = threadIdx.x; i < length; i += S::kThreads) delta[i] = deltas[line.entry(i)];
  }

#pragma unroll 1
  for (int first_key = 0; first_key < length; first_key += division.keys) {
    const int keys = min(division.keys, length - first_key), padded = ceil_div(keys, 4) * 4;
    const unsigned own_block = kRecompute ? again(block) : block;
    float* const saved_weights = saved + static_cast<int64_t>(own_block) * S::kProducts * S::kThreads + threadIdx.x;
    float products[S::kQueryRows][S::kKeyRows] = {};
    const auto multiply = [&](const float* piece, int channel, int channels) {
      const Own<S> own(length);
      multiply_rows<S::kQueryGroups, S::kKeyGroups>(products, piece + (keys + own.query) * kRowPitch,
                                                    piece + own.key * kRowPitch, steps_of(channel, channels));
    };
    // Writes the products in the place of the weights, or adds them, and clears them.
    const auto keep_products = [&](bool add) {
      const Own<S> own(length);
#pragma unroll
      for (int i = 0; i < S::kQueryRows; ++i) {
        const bool exists = own.query_of(i) < own.queries;
#pragma unroll
        for (int j = 0; j < S::kKeyRows; ++j) {
          float& weight = weights[own.weight(i, j)];
          if (exists && own.key_of(j) < keys) weight = add ? weight + products[i][j] : products[i][j];
          products[i][j] = 0.f;
        }
      }
    };
    // Calls act(weight, query, key, place in saved_weights) for all weights of the thread. Registers hold none of them.
    const auto for_weights = [&](auto&& act) {
      const Own<S> own(length);
#pragma unroll 1
      for (int i = 0; i < S::kQueryRows && own.query_of(i) < own.queries; ++i) {
        const auto act_on_key = act(own.query_of(i));
#pragma unroll
        for (int j = 0; j < S::kKeyRows; ++j)
          if (own.key_of(j) < keys)
            act_on_key(weights[own.weight(i, j)], own.key_of(j), saved_weights[(i * S::kKeyRows + j) * S::kThreads]);
      }
    };

    // P
#pragma unroll 1
    for (int channel = 0; channel < c; channel += kPieceChannels) {
      const float* const piece = take_piece([&](float* to) {
        const int next = channel + kPieceChannels;
        next < c ? copy_products(to, true, first_key, next) : copy_queries(to, true, 0, 0);
      });
      multiply(piece, channel, c);
    }
    keep_products(false);
    for_weights([&](int query) {
      const auto normalizer = static_cast<const Normalizer<float>*>(b.normalizer)[line.entry(query)];
      return [&, query, top = normalizer.top, factor = 1.f / normalizer.total](float& weight, int key, float& saved) {
        const bool self = !pass.last && first_key + key == query;
        const float score = device::multiply(weight, static_cast<float>(b.scale));
        weight = saved = self ? 0.f : exp_difference(score, top) * factor;
      };
    });
    for (int key = keys; key < padded; ++key)  // add_over_keys takes groups of four
      for (int query = threadIdx.x; query < length; query += S::kThreads) weights[weight_at<side>(query, key)] = 0.f;

    const auto this_group = [] { return static_cast<int>(again(threadIdx.x)) / kLanes; };
    const auto this_lane = [] { return static_cast<int>(again(threadIdx.x)) % kLanes; };
    const float gamma = b.gamma == nullptr ? 1.f : *static_cast<const float*>(b.gamma);
    // Writes factor * sums, or adds it, to the thread's rows of the channels of a map from `channel` on: those of the
    // `count` pixels from the first one on.
    const auto write_sums = [&](const auto& sums, float factor, const MutableMap& map, bool add, int first, int count,
                                int channels, int channel, auto&& row_of) {
      constexpr int rows = std::extent_v<std::remove_reference_t<decltype(sums)>>;
      constexpr int width = std::extent_v<std::remove_reference_t<decltype(sums)>, 1>, parts = width / 4;
      channel += 4 * this_lane();
#pragma unroll
      for (int start = 0; start < rows; start += S::kRowsAtOnce) {
        const Rows<float> to{static_cast<float*>(map.data) + line.offset(map.pitch, first, channels, channel),
                             static_cast<int>(line.step * map.pitch), count, channels - channel};
        Quad results[S::kRowsAtOnce][parts] = {};
        if (add) read(results, {to.first, to.step, to.count, to.channels}, start, rows, row_of);
#pragma unroll
        for (int i = 0; i < S::kRowsAtOnce; ++i)
#pragma unroll
          for (int j = 0; j < width; ++j) {
            float& result = results[i][j / 4].at[j % 4];
            result = fmaf(factor, sums[min(start + i, rows - 1)][j], result);
          }
        write(results, to, start, rows, row_of);
      }
    };

    // dV
    const auto sum_gradients = [&]<int width>(int channel) {
      const Keys<groups, S::kKeySums> own{this_group()};
      float sums[S::kKeySums][width] = {};
#pragma unroll 1
      for (int first = 0; first < length; first += division.query_piece) {
        const float* const piece = take_piece([&](float* to) {
          const int next = first + division.query_piece;
          if (next < length || channel + width * kLanes < C)
            copy_queries(to, true, next < length ? next : 0, next < length ? channel : channel + width * kLanes);
          else
            copy_products(to, false, first_key, 0);
        });
        add_over_queries<side>(sums, own, weights + weight_at<side>(first, 0), piece + 4 * this_lane(),
                               min(division.query_piece, length - first));
      }
      write_sums(sums, gamma, b.grad_value, !pass.first, first_key, keys, C, channel, [&](int i) { return own.at(i); });
    };
#pragma unroll 1
    for (int channel = 0; channel < C;) {
      if (C - channel > kNarrow) {
        sum_gradients.template operator()<8>(channel);
        channel += kWide;
      } else {
        sum_gradients.template operator()<4>(channel);
        channel += kNarrow;
      }
    }

    // dP and dS
    const bool first_delta = pass.first && first_key == 0;
    Delta<S> new_delta;
#pragma unroll 1
    for (int channel = 0; channel < C; channel += kPieceChannels) {
      const float* const piece = take_piece([&](float* to) {
        const int next = channel + kPieceChannels;
        next < C ? copy_products(to, false, first_key, next) : copy_keys(to, first_key, 0, 0);
      });
      if (channel > 0 && channel % kLongestSum == 0) keep_products(channel > kLongestSum);
      if (first_delta) new_delta.start(b, line, channel);  // the products hide most of the latency
      multiply(piece, channel, C);
      if (first_delta) new_delta.add(b, line, channel, piece + keys * kRowPitch);
    }
    keep_products(C > kLongestSum);
    if (first_delta) {
      new_delta.write(delta, deltas, line);
      __syncthreads();
    }
    for_weights([&](int query) {
      const float factor = gamma * static_cast<float>(b.scale);
      return [=, shift = factor * delta[query]](float& weight, int, const float& saved) {
        weight = saved * (factor * weight - shift);
      };
    });

    // dQ
#pragma unroll 1
    for (int channel = 0; channel < c; channel += kNarrow) {
      const int group = this_group();
      float sums[S::kQuerySums][4] = {};
#pragma unroll 1
      for (int first = 0; first < keys; first += division.key_piece) {
        const float* const piece = take_piece([&](float* to) {
          const int next = first + division.key_piece;
          if (next < keys || channel + kNarrow < c)
            copy_keys(to, first_key, next < keys ? next : 0, next < keys ? channel : channel + kNarrow);
          else
            copy_queries(to, false, 0, 0);
        });
        add_over_keys<side, groups>(sums, weights + weight_at<side>(group, first), piece + 4 * this_lane(),
                                    ceil_div(min(division.key_piece, keys - first), 4));
      }
      write_sums(sums, 1.f, b.grad_query, !pass.first || first_key > 0, 0, length, c, channel,
                 [&](int i) { return group + i * groups; });
    }

    // dK
#pragma unroll 1
    for (int channel = 0; channel < c; channel += kNarrow) {
      const Keys<groups, S::kKeySums> own{this_group()};
      float sums[S::kKeySums][4] = {};
#pragma unroll 1
      for (int first = 0; first < length; first += division.query_piece) {
        const float* const piece = take_piece([&](float* to) {
          const int next = first + division.query_piece;
          if (next < length || channel + kNarrow < c)
            copy_queries(to, false, next < length ? next : 0, next < length ? channel : channel + kNarrow);
          else if (first_key + division.keys < length)
            copy_products(to, true, first_key + division.keys, 0);
        });
        add_over_queries<side>(sums, own, weights + weight_at<side>(first, 0), piece + 4 * this_lane(),
                               min(division.query_piece, length - first));
      }
      write_sums(sums, 1.f, b.grad_key, !pass.first, first_key, keys, c, channel, [&](int i) { return own.at(i); });
    }
  }
  device::wait_for_copies<0>();  // the last, empty group
#else
  __trap();  // compiled for an older architecture than fits() checked: fail instead of leaving the output unwritten
#endif
}

// A kernel and a division of a line for it.
struct Choice {
  void (*kernel)(Backward, Lines, Division, float*, float*) = nullptr;
  int threads, products;  // of a block, and products of rows of each thread
  Division division;
  int shared_bytes;
};

// Returns the first kernel that fits, from those for short lines to those for long ones; without a kernel if none does.
Choice choose(int length, const Device& device) {
  Choice choice;
  const auto consider = [&]<class S>(S) {
    if (choice.kernel != nullptr || length > S::kLongest) return;
    const int keys = ceil_div(ceil_div(length, ceil_div(length, S::kKeys)), 4) * 4;
    // A piece of products is read up to the last row of the last thread.
    const int rows = std::max(S::kKeyGroups * S::kKeyRows, std::min(keys, length) + S::kQueries);
    const int stage = std::max(kPieceRows * kWide, rows * kRowPitch);
    const int floats = S::kSide * keys + ceil_div(length, 4) * 4 + 2 * stage;
    const int bytes = floats * static_cast<int>(sizeof(float));
    if (bytes > device.shared_memory) return;
    const int key_piece = piece_of(std::min(keys, length));
    choice = {backward_kernel<S>, S::kThreads, S::kProducts, {keys, piece_of(length), key_piece, stage}, bytes};
  };
  consider(Short{});
  consider(Medium{});
  consider(Long{});
  consider(Longer{});
  consider(Longest{});
  return choice;
}

// The parts of the workspace: numbers of general::total, delta, P of all blocks.
struct Workspace {
  int64_t totals, delta, saved;  // totals in bytes, the others in floats
  Workspace(const Backward& b, const Device& device) {
    totals = b.grad_gamma == nullptr ? 0 : general::total_bytes();
    delta = b.sizes.pixels() * b.sizes.heads;
    saved = 0;
    for (const Pass& pass : passes_of(b.sizes, b.axes)) {
      const Choice choice = choose(pass.length, device);
      saved = std::max(saved, pass.lines * b.sizes.heads * choice.products * choice.threads);
    }
  }
};

}  // namespace

bool serves(const Backward& b, const Device& device) {
  if (!fits(b.dtype, b.sizes, b.axes, device,
            {b.query, b.key, b.value, b.out, b.grad, read_only(b.grad_query), read_only(b.grad_key),
             read_only(b.grad_value)}))
    return false;
  for (const Pass& pass : passes_of(b.sizes, b.axes))
    if (choose(pass.length, device).kernel == nullptr || pass.lines * b.sizes.heads > INT32_MAX) return false;
  return true;
}

int backward(const Backward& b, const Device& device, void* stream) {
  const Workspace sizes(b, device);
  float* const delta = reinterpret_cast<float*>(static_cast<unsigned char*>(b.workspace) + sizes.totals);
  for (const Pass& pass : passes_of(b.sizes, b.axes)) {
    const Choice choice = choose(pass.length, device);
    const dim3 grid(static_cast<unsigned>(pass.lines * b.sizes.heads));
    const cudaError_t error = device::launch(choice.kernel, grid, choice.threads, choice.shared_bytes, stream, b,
                                             Lines(pass, b.sizes.heads), choice.division, delta, delta + sizes.delta);
    if (error != cudaSuccess) return error;
  }
  if (b.grad_gamma == nullptr) return cudaSuccess;
  return general::total(b.dtype, delta, sizes.delta, b.workspace, b.grad_gamma, stream);
}

int64_t backward_workspace(const Backward& b, const Device& device) {
  const Workspace sizes(b, device);
  return sizes.totals + (sizes.delta + sizes.saved) * static_cast<int64_t>(sizeof(float));
}

}  // namespace cc_attention::float32
