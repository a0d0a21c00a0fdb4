// GPU primitives: number types, instructions without a C++ equivalent, and kernel launches. Each wrapper is one or a
// few instructions, so little code can be tested only on a GPU. With CC_EMULATOR defined, tests/kernels/emulator
// implements the same names on the CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../kernels.h"

#ifdef CC_EMULATOR
#include "emulator.h"
#else
#include <cuda_runtime.h>
#endif

// mma.sync with bf16 or tf32 operands and cp.async need sm_80. For older architectures, the kernels that use them have
// an empty body.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define CC_TENSOR_CORES 1
#else
#define CC_TENSOR_CORES 0
#endif

namespace cc_attention {

// Storage types of 16 bits. Arithmetic on a storage type T is done in Sum<T>.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Four neighboring elements, loaded or stored in one instruction.
template <class T>
struct alignas(4 * sizeof(T)) Vec4 {
  T at[4];
};

// Calls f with a value of the storage type of dtype.
template <class F>
auto dispatch(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::float64:
      return f(double{});
    case Dtype::float16:
      return f(float16{});
    case Dtype::bfloat16:
      return f(bfloat16{});
    default:
      return f(float{});
  }
}

namespace device {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

__device__ __forceinline__ float to_sum(float x) { return x; }
__device__ __forceinline__ double to_sum(double x) { return x; }
__device__ __forceinline__ float to_sum(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

// Rounds to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_sum(Sum<T> x);
template <>
__device__ __forceinline__ float from_sum<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ double from_sum<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ bfloat16 from_sum<bfloat16>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

#ifndef CC_EMULATOR

// Returns the thread's lane in its warp. The asm is volatile so that values derived from the lane are recomputed where
// they are needed, and do not hold a register throughout the kernel.
__device__ __forceinline__ int lane() {
  int result;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(result));
  return result;
}

__device__ __forceinline__ float to_sum(float16 x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
}
template <>
__device__ __forceinline__ float16 from_sum<float16>(float x) {
  float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}

// One rounding each. The compiler does not fuse them with other operations, so the same expression gives the same bits
// in every kernel.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
// Returns a * b + c.
__device__ __forceinline__ float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fused_multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }

// Returns 2^x, accurate to two units in the last place; 2^-inf is 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Returns the dynamic shared memory of the block, aligned to 128 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  return shared_memory;
}

// Returns the next number of a counter in global memory: 0, 1, ... Blocks get their numbers in the order in which they
// start.
__device__ __forceinline__ unsigned take_ticket(unsigned* counter) { return atomicAdd(counter, 1); }
// Adds 1 to a counter in global memory. What the thread has written before is visible to those who waited for it, and
// so is what other threads of the block wrote before a barrier.
__device__ __forceinline__ void add_to_counter(unsigned* counter) {
  asm volatile("fence.acq_rel.gpu; red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
// Waits until a counter in global memory is at least `least`. Other threads of the block need a barrier after it.
__device__ __forceinline__ void wait_for_counter(const unsigned* counter, unsigned least) {
  for (;;) {
    unsigned count;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
    if (count >= least) break;
    __nanosleep(200);
  }
}

// Stores 16 bytes to global memory, aligned to 16, in one instruction. The compiler splits some assignments of a uint4.
__device__ __forceinline__ void store_words(void* global, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Starts an asynchronous copy of 16 bytes from global to shared memory, both aligned to 16. If not valid, zeros are
// written and nothing is read. The thread sees the data after waiting for its group, other threads after a further
// barrier.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
// Closes a group of all copies since the last group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of the thread's groups are incomplete.
template <int pending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ldmatrix: loads four matrices of eight rows of 16 bytes. Lane 8 * i + r passes the address of row r of matrix i. In
// out[i], lane l gets the 32 bits at byte 4 * (l % 4) of row l / 4 of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same for 16-bit elements, with each matrix transposed: lane l gets element (2 * (l % 4), l / 4) and the one
// below.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

#if CC_TENSOR_CORES

// d += a b on the tensor core of a warp, with float32 sums. a is 16 x K, b is K x 8 and d is 16 x 8. K elements take 32
// bytes: 16 elements of 16 bits, or 8 of tf32. Lane 4 g + t holds d (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
// A row of a has 8 words of 32 bits. In words, the lane holds a (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4) and
// b^T (g, t), (g, t + 4).
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                       uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<float>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounds float32 to the nearest tf32, ties away from zero. Without it, the tensor core truncates.
__device__ __forceinline__ uint32_t round_tf32(float x) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
  return result;
}

// Packs two sums as 16-bit elements, `low` in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<bfloat16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
template <>
__device__ __forceinline__ uint32_t pack<float16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

#else

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return from_sum<T>(low).bits | static_cast<uint32_t>(from_sum<T>(high).bits) << 16;
}

#endif  // CC_TENSOR_CORES

// Queues the writing of zeros to global memory.
inline cudaError_t set_zero(void* memory, int64_t bytes, void* stream) {
  return cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
}

// Queues kernel<<<grid, block, shared_bytes, stream>>>(arguments...).
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int block, int shared_bytes, void* stream,
                   Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {  // more must be requested
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

#else
#include "emulator_device.h"
#endif  // CC_EMULATOR

}  // namespace device
}  // namespace cc_attention
