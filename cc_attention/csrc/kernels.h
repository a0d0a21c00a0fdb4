// The interface between the host code (ops.cpp) and the kernels of each device, over raw pointers. It includes no torch
// header, so the CUDA files compile in seconds and the emulator of the tests can run them.
//
// Shapes: N batch, c channels of query and key, C channels of value, H rows, W columns. Each pixel attends to the
// L = H + W - 1 positions of its row and column. Position l of pixel (y, x) is
//   l <  W   pixel (y, l) of its row, itself included;
//   l >= W   pixel (other_row(l - W, y), x) of its column, itself excluded.
//
// Feature maps are dense [N,H,W,channels] (channels_last). A row and a column are then the same problem: a line of
// pixels with a constant stride and contiguous channels. Weights over positions are dense [N,L,H,W].
//
// Sums run in float32 for every storage type (float64 for float64). Every output element is summed in a fixed order,
// without atomics, so results are bit-identical in every run and for any number of threads.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(CC_EMULATOR)
#define CC_HOST_DEVICE __host__ __device__
#else
#define CC_HOST_DEVICE
#endif

namespace cc_attention {

enum class Dtype { float32, float64, float16, bfloat16 };

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

struct Sizes {
  int64_t N, c, C, H, W;
  CC_HOST_DEVICE int64_t L() const { return H + W - 1; }
  CC_HOST_DEVICE int64_t pixels() const { return N * H * W; }
};

// The softmax of a pixel is exp(score - top) / total. Two numbers are kept because a single one, the log-sum-exp, would
// lose the total to rounding if top is large. If all scores are -inf, top is -inf as well.
template <class S>
struct alignas(2 * sizeof(S)) Normalizer {
  S top;    // the largest score
  S total;  // the sum of exp(score - top)
};

// out = softmax(scores) * value. The scores of a pixel are the dot products of its query with the keys at its
// positions.
struct Forward {
  Dtype dtype;
  Sizes sizes;
  const void* query;  // [N,H,W,c]
  const void* key;    // [N,H,W,c]
  const void* value;  // [N,H,W,C]
  void* out;          // [N,H,W,C]
  void* normalizer;   // [N,H,W] Normalizer of float, or of double for float64
};

// The scores are recomputed from query and key, and the softmax from the scores and the normalizer.
struct Backward {
  Dtype dtype;
  Sizes sizes;
  const void* query;       // [N,H,W,c]
  const void* key;         // [N,H,W,c]
  const void* value;       // [N,H,W,C]
  const void* out;         // [N,H,W,C] of the forward
  const void* normalizer;  // [N,H,W] of the forward
  const void* grad_out;    // [N,H,W,C]
  void* grad_query;        // [N,H,W,c]
  void* grad_key;          // [N,H,W,c]
  void* grad_value;        // [N,H,W,C]
  void* workspace;         // workspace_bytes(...) bytes, aligned to 16
};

// The building blocks of ca_weight, ca_map and their gradients (see the table in ops.cpp).
enum class Primitive {
  score,    // a, b [N,H,W,C] -> [N,L,H,W]: out[l, p] = sum over channels of a[p] * b[position l of p]
  gather,   // w [N,L,H,W], v [N,H,W,C] -> [N,H,W,C]: out[p] = sum over l of w[l, p] * v[position l of p]
  scatter,  // w [N,L,H,W], g [N,H,W,C] -> [N,H,W,C]: the transpose of gather: a sum over the pixels q that attend to p,
            //                                        out[p] = sum over q of w[l with position l of q = p, q] * g[q]
};

// The row of column entry j of a pixel in row y.
CC_HOST_DEVICE inline int64_t other_row(int64_t j, int64_t y) { return j < y ? j : j + 1; }

// The column entry of row `target` for a pixel in row y (target != y): the inverse of other_row.
CC_HOST_DEVICE inline int64_t column_entry(int64_t target, int64_t y) { return target < y ? target : target - 1; }

// The primitives ignore Sizes::c. If an output is empty, nothing is computed.
void forward_cpu(const Forward& arguments);
void backward_cpu(const Backward& arguments);
void primitive_cpu(Primitive primitive, Dtype dtype, const Sizes& sizes, const void* first, const void* second,
                   void* out);

// The properties of a GPU that the choice of a kernel depends on.
struct Device {
  int capability;     // 10 * major + minor: 75, 80, 90, ...
  int shared_memory;  // maximum bytes per block
  bool tf32;          // float32 products may run on tensor cores
};

// These queue their work on the stream (a cudaStream_t) and return the cudaError_t of the launches as an int.
int forward_cuda(const Forward& arguments, const Device& device, void* stream);
int backward_cuda(const Backward& arguments, const Device& device, void* stream);
int primitive_cuda(Primitive primitive, Dtype dtype, const Sizes& sizes, const void* first, const void* second,
                   void* out, void* stream);
int64_t backward_workspace_cuda(Dtype dtype, const Sizes& sizes);

}  // namespace cc_attention
