// Small kernels that try each word of device.h and of CUDA that the emulator has, and one that can be told to be wrong.
// tests/test_emulator.py compares with the definitions, and compiles this file with nvcc as well.
#include "device.h"

using namespace cc_attention;
using device::kAllLanes;
using device::kWarp;

namespace {

// One product of a warp: a [16][8 words], b [8][8 words] (its columns side by side), d [16][8] is added to.
template <class T>
__global__ void product(const uint32_t* a, const uint32_t* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32_t left[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
#if CC_TENSOR_CORES
  device::multiply_add<T>(sums, left, b[g * 8 + t], b[g * 8 + t + 4]);
#endif
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// Four matrices [4][8 rows][8] in shared memory -> out [2][32 lanes][4], as they are and transposed.
__global__ void matrices(const uint16_t* rows, uint32_t* out) {
  unsigned char* shared = device::dynamic_shared();
  device::copy_async(shared + threadIdx.x * 16, rows + threadIdx.x * 8, true);
  device::commit_copies();
  device::wait_for_copies<0>();
  __syncwarp();
  for (int transposed = 0; transposed < 2; ++transposed) {
    uint32_t words[4];
    if (transposed)
      device::load_matrices_transposed(words, shared + threadIdx.x * 16);
    else
      device::load_matrices(words, shared + threadIdx.x * 16);
    for (int i = 0; i < 4; ++i) out[(transposed * kWarp + threadIdx.x) * 4 + i] = words[i];
  }
}

// What each of 64 lanes receives -> out [9][64].
__global__ void exchanges(int* out) {
  const int own = threadIdx.x, lane = own % kWarp;
  const double exact = own + 0.5;
  const int received[] = {
      __shfl_sync(kAllLanes, own, 5),
      __shfl_sync(kAllLanes, own, lane + 3, 8),
      __shfl_xor_sync(kAllLanes, own, 6),
      __shfl_down_sync(kAllLanes, own, 4),
      __shfl_down_sync(kAllLanes, own, 2, 4),
      static_cast<int>(2 * __shfl_xor_sync(kAllLanes, exact, 1)),
      static_cast<int>(__ballot_sync(kAllLanes, lane % 3 == 0)),
      __any_sync(kAllLanes, own == 40),
      lane < 8 ? __shfl_xor_sync(0xffu, own, 1) : __shfl_xor_sync(0xffffff00u, own, 2),
  };
  for (int i = 0; i < 9; ++i) out[i * 64 + own] = received[i];
}

// All numbers of 16 bits as float32, and float32 as numbers of 16 bits.
template <class T>
__global__ void widen(const T* in, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = device::to_sum(in[i]);
}
template <class T>
__global__ void narrow(const float* in, T* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = device::from_sum<T>(in[i]);
}

// in [count] -> out [3][count]: rounded to tf32, packed to 16 bits with the number itself negative on top, 2^x.
template <class T>
__global__ void numbers(const float* in, uint32_t* out, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
#if CC_TENSOR_CORES
  out[i] = device::round_tf32(in[i]);
  out[count + i] = device::pack<T>(in[i], -in[i]);
#endif
  const float power = device::exp2_approximate(in[i]);
  memcpy(&out[2 * count + i], &power, sizeof power);
}

// Which thread of which block has been where: out[z][y][x][thread] += its number among all.
__global__ void places(int* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * blockDim.x + threadIdx.x] += block * blockDim.x + threadIdx.x;
}

enum Fault {
  none,
  no_barrier_before_read,  // after the wait for the copies
  no_barrier_after_read,   // before the buffer is filled again
  no_wait,                 // for the copies
  wait_for_too_few,        // one group stays under way that should not
  no_warp_barrier,         // between the lanes' own results and their neighbors'
  copies_left_at_end,
  diverging_collectives,
  diverging_instructions,  // the same one, in two places
  diverging_barriers,
  lane_ended,
  lane_not_in_mask,
  deadlock,
  misaligned_copy,
  misaligned_source,
  copy_out_of_bounds,
  write_behind_end,
  write_before_begin,
  write_behind_variable,
  uninitialized_dynamic,
  uninitialized_variable,
  not_tf32,
};

constexpr int kWarps = 4, kThreads = kWarps * kWarp, kCopied = 4 * kThreads;  // floats that a block copies at a time

// Of each of `rows` rows of in [rows][kCopied], the sums of four neighboring floats, which another warp has copied, and
// of two neighboring lanes -> out [rows][kThreads]. Copies go to two buffers in turn.
__global__ void pipeline(const float* in, float* out, int rows, Fault fault) {
  float* buffers = reinterpret_cast<float*>(device::dynamic_shared());
  __shared__ float sums[kThreads];
  const int thread = threadIdx.x, lane = thread % kWarp;
  const auto start_copy = [&](int row) {
    if (row < rows) device::copy_async(buffers + row % 2 * kCopied + thread * 4, in + row * kCopied + thread * 4, true);
    device::commit_copies();
  };
  start_copy(0);
  for (int row = 0; row < rows; ++row) {
    start_copy(row + 1);
    if (fault == wait_for_too_few)
      device::wait_for_copies<2>();
    else if (fault != no_wait)
      device::wait_for_copies<1>();
    if (fault != no_barrier_before_read) __syncthreads();
    const float* four = buffers + row % 2 * kCopied + (thread + kWarp) % kThreads * 4;
    sums[thread] = four[0] + four[1] + four[2] + four[3];
    if (fault != no_warp_barrier) __syncwarp();
    const float both = sums[thread] + sums[thread ^ 1];
    if (fault != no_barrier_after_read) __syncthreads();
    out[row * kThreads + thread] = both;
  }
  device::wait_for_copies<0>();

  float other = 0;
  uint32_t words[4] = {};
  switch (fault) {
    case copies_left_at_end:
      device::copy_async(buffers + thread * 4, in, true);
      break;
    case diverging_collectives:
      if (lane < 16)
        other = __shfl_sync(kAllLanes, 1.0f, 0);
      else
        other = __shfl_xor_sync(kAllLanes, 1.0f, 1);
      break;
    case diverging_instructions:
      if (lane < 16)
        device::load_matrices(words, buffers + lane * 4);
      else
        device::load_matrices(words, buffers + lane * 4 + 4);
      break;
    case diverging_barriers:
      if (lane < 16)
        __syncthreads();
      else
        __syncthreads();
      break;
    case lane_ended:
      if (thread == 70) return;
      __syncwarp();
      break;
    case lane_not_in_mask:
      __syncwarp(0xffff);
      break;
    case deadlock:
      if (lane < 16)
        __syncthreads();
      else
        __syncwarp();
      break;
    case misaligned_copy:
      device::copy_async(buffers + thread * 4 + 1, in, true);
      break;
    case misaligned_source:
      device::copy_async(buffers + thread * 4, in + 1, true);
      break;
    case copy_out_of_bounds:
      device::copy_async(buffers + 2 * kCopied + thread * 4, in, true);
      break;
    case write_behind_end:
      buffers[2 * kCopied + thread % 3] = 1;
      break;
    case write_before_begin:
      buffers[-1 - thread % 3] = 1;
      break;
    case write_behind_variable:
      sums[kThreads + thread] = 1;
      break;
    case uninitialized_dynamic:
      out[thread] = buffers[2 * kCopied - 1 - thread];
      break;
    case uninitialized_variable:
      out[thread] = sums[thread];
      break;
    case not_tf32: {
#if CC_TENSOR_CORES
      const uint32_t ones[4] = {0x3f800001, 0x3f800001, 0x3f800001, 0x3f800001};
      float d[4] = {};
      device::multiply_add<float>(d, ones, 0x3f800000, 0x3f800000);
      other = d[0];
#endif
      break;
    }
    default:
      break;
  }
  if (other + words[0] == 12345) out[0] = other;  // so that they are not left out
}

enum ChainFault {
  chain_right,
  no_wait_for_counter,
  no_barrier_after_wait,
  no_barrier_before_add,
  no_ticket,
  later_ticket
};

// Blocks that follow each other: out [blocks, threads], out[t, i] = in[t, i] + out[t - 1, (i + 1) % threads].
__global__ void chain(const int* in, int* out, unsigned* counters, ChainFault fault) {
  __shared__ unsigned shared_ticket;
  const int thread = threadIdx.x, threads = blockDim.x;
  if (thread == 0) shared_ticket = fault == no_ticket ? blockIdx.x : device::take_ticket(counters);
  __syncthreads();
  const unsigned ticket = shared_ticket;
  if (thread == 0 && fault != no_wait_for_counter)
    device::wait_for_counter(counters + 1, fault == later_ticket ? ticket + 1 : ticket);
  if (fault != no_barrier_after_wait) __syncthreads();
  const int before = ticket > 0 ? out[(ticket - 1) * threads + (thread + 1) % threads] : 0;
  out[ticket * threads + thread] = in[ticket * threads + thread] + before;
  if (fault != no_barrier_before_add) __syncthreads();
  if (thread == 0) device::add_to_counter(counters + 1);
}

// Loads and products again and again, for the time that they take.
__global__ void busy(float* out, int repeats) {
  unsigned char* row = device::dynamic_shared() + threadIdx.x * 16;
  memset(row, 0, 16);
  __syncthreads();
  float d[4] = {};
#if CC_TENSOR_CORES
  for (int i = 0; i < repeats; ++i) {
    uint32_t words[4];
    device::load_matrices(words, row);
    device::multiply_add<bfloat16>(d, words, words[0], words[1]);
    device::multiply_add<bfloat16>(d, words, words[2], words[3]);
  }
#endif
  out[blockIdx.x * blockDim.x + threadIdx.x] = d[0];
}

}  // namespace

extern "C" int run_product(int dtype, const uint32_t* a, const uint32_t* b, float* d) {
  return dispatch(static_cast<Dtype>(dtype), [&](auto t) -> int {
    if constexpr (std::is_same_v<decltype(t), double>)
      return cudaErrorInvalidConfiguration;
    else
      return device::launch(product<decltype(t)>, 1, kWarp, 0, nullptr, a, b, d);
  });
}

extern "C" int run_matrices(const uint16_t* rows, uint32_t* out) {
  return device::launch(matrices, 1, kWarp, kWarp * 16, nullptr, rows, out);
}

extern "C" int run_exchanges(int* out) { return device::launch(exchanges, 1, 64, 0, nullptr, out); }

extern "C" int run_conversions(int dtype, const uint16_t* halves, float* widened, const float* floats,
                               uint16_t* narrowed) {
  const auto both = [&](auto t) -> int {
    using T = decltype(t);
    const int error = device::launch(widen<T>, 256, 256, 0, nullptr, reinterpret_cast<const T*>(halves), widened);
    return error ? error : device::launch(narrow<T>, 512, 256, 0, nullptr, floats, reinterpret_cast<T*>(narrowed));
  };
  return static_cast<Dtype>(dtype) == Dtype::float16 ? both(float16{}) : both(bfloat16{});
}

extern "C" int run_numbers(int dtype, const float* in, uint32_t* out, int count) {
  const dim3 grid((count + 255) / 256);
  return static_cast<Dtype>(dtype) == Dtype::float16
             ? device::launch(numbers<float16>, grid, 256, 0, nullptr, in, out, count)
             : device::launch(numbers<bfloat16>, grid, 256, 0, nullptr, in, out, count);
}

extern "C" int run_places(int x, int y, int z, int block, int* out) {
  return device::launch(places, dim3(x, y, z), block, 0, nullptr, out);
}

extern "C" int run_pipeline(const float* in, float* out, int rows, int fault) {
  return device::launch(pipeline, 1, kThreads, 2 * kCopied * static_cast<int>(sizeof(float)), nullptr, in, out, rows,
                        static_cast<Fault>(fault));
}

extern "C" int run_chain(const int* in, int* out, unsigned* counters, int blocks, int threads, int fault) {
  const cudaError_t error = device::set_zero(counters, 2 * sizeof *counters, nullptr);
  if (error != cudaSuccess) return error;
  return device::launch(chain, blocks, threads, 0, nullptr, in, out, counters, static_cast<ChainFault>(fault));
}

extern "C" int run_busy(float* out, int blocks, int repeats) {
  return device::launch(busy, blocks, 224, 224 * 16, nullptr, out, repeats);
}
