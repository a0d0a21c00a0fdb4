// The interface between the host code (ops.cpp) and the kernels of each device, over raw pointers. It includes no torch
// header, so the CUDA files compile in seconds and the emulator of the tests can run them.
//
// Shapes: N batch, T frames (1 for pictures), H rows, W columns; c channels of query and key and C channels of value in
// each head. A pixel is one position of T, H, W.
//
// Each head of a pixel attends to the pixels of its lines: its row (axis W), its column (axis H) and the same place in
// all frames (axis T), or to those of some of these axes. The pixel itself is counted once: it belongs to the line of
// the last axis that is used, in the order T, H, W.
//
// Feature maps are [N,T,H,W,pitch] with the channels of the heads one after the other at the beginning of the pitch
// (channels_last). So views of some channels of a larger map are read in place. A line of any axis is then the same
// problem: pixels with a constant stride and contiguous channels.
//
// The primitives know pictures of one head only. There, a pixel attends to L = H + W - 1 positions. Position l of pixel
// (y, x) is
//   l <  W   pixel (y, l) of its row, itself included;
//   l >= W   pixel (other_row(l - W, y), x) of its column, itself excluded.
// Weights over positions are dense [N,L,H,W].
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
  int64_t N, heads, c, C, T, H, W;
  CC_HOST_DEVICE int64_t L() const { return H + W - 1; }
  CC_HOST_DEVICE int64_t picture() const { return T * H * W; }
  CC_HOST_DEVICE int64_t pixels() const { return N * T * H * W; }
};

// The axes along which pixels attend, as a set: (1 << axis) | ...
enum Axis { kFrames, kColumn, kRow };

// The first channel of the first pixel of a feature map, and the elements from a pixel to the next.
struct Map {
  const void* data;
  int64_t pitch;
};
struct MutableMap {
  void* data;
  int64_t pitch;
};

// The softmax of a pixel is exp(score - top) / total. Two numbers are kept because a single one, the log-sum-exp, would
// lose the total to rounding if top is large. If all scores are -inf, top is -inf as well.
template <class S>
struct alignas(2 * sizeof(S)) Normalizer {
  S top;    // the largest score
  S total;  // the sum of exp(score - top)
};

// out = softmax(scale * scores) * value. The scores of a pixel are the dot products of its query with the keys at its
// positions. If there is a residual: sum = residual + gamma * out.
struct Forward {
  Dtype dtype;
  Sizes sizes;
  int axes;           // set of Axis, not empty
  double scale;       // of the scores
  Map query;          // [N,T,H,W,heads,c]
  Map key;            // [N,T,H,W,heads,c]
  Map value;          // [N,T,H,W,heads,C]
  MutableMap out;     // [N,T,H,W,heads,C]
  void* normalizer;   // [N,T,H,W,heads] Normalizer of float, or of double for float64
  Map residual;       // [N,T,H,W,heads,C]; data is null if there is none
  MutableMap sum;     // [N,T,H,W,heads,C]; data is null if there is none. On the CPU, it may be out
  const void* gamma;  // one float, or double for float64; null if there is no residual
  void* workspace;    // forward_workspace_cuda(...) bytes, aligned to 16; unused on the CPU
};

// The scores are recomputed from query and key, and the softmax from the scores and the normalizer.
struct Backward {
  Dtype dtype;
  Sizes sizes;
  int axes;
  double scale;
  Map query;               // [N,T,H,W,heads,c]
  Map key;                 // [N,T,H,W,heads,c]
  Map value;               // [N,T,H,W,heads,C]
  Map out;                 // [N,T,H,W,heads,C] of the forward
  const void* normalizer;  // [N,T,H,W,heads] of the forward
  Map grad;                // [N,T,H,W,heads,C]: the gradient of sum if there is a residual, otherwise of out
  const void* gamma;       // of the forward; null if there is no residual
  MutableMap grad_query;   // [N,T,H,W,heads,c]
  MutableMap grad_key;     // [N,T,H,W,heads,c]
  MutableMap grad_value;   // [N,T,H,W,heads,C]
  void* grad_gamma;        // one float, or double for float64; null if there is no residual
  void* workspace;         // backward_workspace_cuda(...) bytes, aligned to 16; unused on the CPU
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

// The primitives use N, C, H and W only. If an output is empty, nothing is computed.
void forward_cpu(const Forward& arguments);
void backward_cpu(const Backward& arguments);
void primitive_cpu(Primitive primitive, Dtype dtype, const Sizes& sizes, const void* first, const void* second,
                   void* out);

// The properties of a GPU that the choice of a kernel depends on.
struct Device {
  int capability;     // 10 * major + minor: 75, 80, 90, ...
  int shared_memory;  // maximum bytes per block
  bool tf32;          // float32 products may run on tensor cores
  bool untested;      // kernels that no GPU has run yet may be chosen
};

// These queue their work on the stream (a cudaStream_t) and return the cudaError_t of the launches as an int.
int forward_cuda(const Forward& arguments, const Device& device, void* stream);
int backward_cuda(const Backward& arguments, const Device& device, void* stream);
int primitive_cuda(Primitive primitive, Dtype dtype, const Sizes& sizes, const void* first, const void* second,
                   void* out, void* stream);
int64_t forward_workspace_cuda(const Forward& arguments, const Device& device);
int64_t backward_workspace_cuda(const Backward& arguments, const Device& device);

}  // namespace cc_attention
