// What the host code asks of each device: three primitives over raw pointers. No torch header here, so that the CUDA
// files compile in seconds and read as plain CUDA.
//
// Shapes: N batch, C channels, H rows, W columns, L = H + W - 1 positions of a criss-cross. Position l of pixel (y, x):
//   l <  W   the pixel (y, l) of its row, itself included;
//   l >= W   the pixel (other_row(l - W, y), x) of its column, itself left out.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CC_HOST_DEVICE __host__ __device__
#else
#define CC_HOST_DEVICE
#endif

namespace cc_attention {

struct Sizes {
  int64_t N, C, H, W;
  CC_HOST_DEVICE int64_t L() const { return H + W - 1; }
};

enum class Dtype { float32, float64, float16, bfloat16 };

// Sums run in float32 (float64 for float64), whatever the storage type.
enum class Primitive {
  score,    // a [N,C,H,W], b [N,C,H,W] -> [N,L,H,W]: out[l, p] = sum over c of a[c, p] * b[c, position l of p]
  gather,   // w [N,L,H,W], v [N,C,H,W] -> [N,C,H,W]: out[c, p] = sum over l of w[l, p] * v[c, position l of p]
  scatter,  // w [N,L,H,W], g [N,C,H,W] -> [N,C,H,W]: the transpose of gather, as a sum over the pixels q that see p:
            //                                        out[c, p] = sum over q of w[l with position l of q = p, q] * g[c, q]
};

// Row of column entry j of a pixel in row y.
CC_HOST_DEVICE inline int64_t other_row(int64_t j, int64_t y) { return j < y ? j : j + 1; }

// The column entry under which a pixel in row y finds row target (target != y): the inverse of other_row.
CC_HOST_DEVICE inline int64_t column_entry(int64_t target, int64_t y) { return target < y ? target : target - 1; }

// All tensors contiguous. Every output element is written by one thread in a fixed order of additions: no atomics, and
// the result is the same bits whatever the number of threads.
void run_cpu(Primitive primitive, Dtype dtype, const Sizes& sizes, const void* first, const void* second, void* out);

// Queues the work on the stream (a cudaStream_t) and returns the cudaError_t of the launch.
int run_cuda(Primitive primitive, Dtype dtype, const Sizes& sizes, const void* first, const void* second, void* out,
             void* stream);

}  // namespace cc_attention
