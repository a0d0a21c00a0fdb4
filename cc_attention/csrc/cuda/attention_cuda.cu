// The three primitives on CUDA: one thread per output element, neighbouring threads on neighbouring pixels of a row, so
// that reads along x coalesce. Plain and exact; the yardstick for anything faster.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "../kernels.h"

namespace cc_attention {
namespace {

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Written out, because PyTorch's build flags switch the implicit conversions of the half types off.
__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline void store(float* out, float value) { *out = value; }
__device__ inline void store(double* out, double value) { *out = value; }
__device__ inline void store(__half* out, float value) { *out = __float2half(value); }
__device__ inline void store(__nv_bfloat16* out, float value) { *out = __float2bfloat16(value); }

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;  // the grid-stride loops cover what lies beyond

// a [N,C,H,W], b [N,C,H,W] -> out [N,L,H,W]
template <typename T>
__global__ void score_kernel(Sizes s, const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out) {
  const int64_t plane = s.H * s.W;
  const int64_t total = s.N * s.L() * plane;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < total; index += step) {
    const int64_t x = index % s.W, y = index / s.W % s.H, l = index / plane % s.L(), n = index / plane / s.L();
    const int64_t position = l < s.W ? y * s.W + l : other_row(l - s.W, y) * s.W + x;
    const T* a_pixel = a + n * s.C * plane + y * s.W + x;
    const T* b_pixel = b + n * s.C * plane + position;
    Sum<T> sum = 0;
    for (int64_t c = 0; c < s.C; ++c, a_pixel += plane, b_pixel += plane) sum += widen(*a_pixel) * widen(*b_pixel);
    store(out + index, sum);
  }
}

// w [N,L,H,W], v [N,C,H,W] -> out [N,C,H,W]; a scatter takes, for each position of its pixel, the weight which that
// position gives to the pixel in place of the weight which the pixel gives to the position.
template <typename T, bool kScatter>
__global__ void weighted_sum_kernel(Sizes s, const T* __restrict__ w, const T* __restrict__ v, T* __restrict__ out) {
  const int64_t plane = s.H * s.W;
  const int64_t total = s.N * s.C * plane;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < total; index += step) {
    const int64_t x = index % s.W, y = index / s.W % s.H, n = index / plane / s.C;
    const T* w_sample = w + n * s.L() * plane;
    const T* v_plane = v + index / plane * plane;
    Sum<T> sum = 0;
    for (int64_t l = 0; l < s.W; ++l) {
      const int64_t weight = kScatter ? (x * s.H + y) * s.W + l : (l * s.H + y) * s.W + x;
      sum += widen(w_sample[weight]) * widen(v_plane[y * s.W + l]);
    }
    for (int64_t j = 0; j < s.H - 1; ++j) {
      const int64_t row = other_row(j, y);
      const int64_t weight =
          kScatter ? ((s.W + column_entry(y, row)) * s.H + row) * s.W + x : ((s.W + j) * s.H + y) * s.W + x;
      sum += widen(w_sample[weight]) * widen(v_plane[row * s.W + x]);
    }
    store(out + index, sum);
  }
}

template <typename T>
cudaError_t run(Primitive primitive, const Sizes& s, const void* first, const void* second, void* out,
                cudaStream_t stream) {
  const int64_t total = s.N * (primitive == Primitive::score ? s.L() : s.C) * s.H * s.W;
  if (total == 0) return cudaSuccess;  // a grid of no blocks is a launch error
  const auto blocks = static_cast<unsigned>(std::min((total + kThreads - 1) / kThreads, kMaxBlocks));
  const auto kernel = primitive == Primitive::score    ? score_kernel<T>
                      : primitive == Primitive::gather ? weighted_sum_kernel<T, false>
                                                       : weighted_sum_kernel<T, true>;
  kernel<<<blocks, kThreads, 0, stream>>>(s, static_cast<const T*>(first), static_cast<const T*>(second),
                                          static_cast<T*>(out));
  return cudaGetLastError();
}

}  // namespace

int run_cuda(Primitive primitive, Dtype dtype, const Sizes& sizes, const void* first, const void* second, void* out,
             void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case Dtype::float32: return run<float>(primitive, sizes, first, second, out, cuda_stream);
    case Dtype::float64: return run<double>(primitive, sizes, first, second, out, cuda_stream);
    case Dtype::float16: return run<__half>(primitive, sizes, first, second, out, cuda_stream);
    case Dtype::bfloat16: return run<__nv_bfloat16>(primitive, sizes, first, second, out, cuda_stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cc_attention
