// CUDA's language on the CPU, so that the tests run the very .cu files where there is no GPU: g++ -x c++ -DCC_EMULATOR.
//
// A block runs on one OS thread, each of its CUDA threads as a fiber (a stack of its own) that runs until it has to
// wait for others: at a barrier or a collective of its warp. Then the schedule says who goes on. Lanes of a warp run
// apart between collectives: nothing may rely on lock-step. A collective is carried out once, by the lane that arrives
// last, on the operands of all.
//
// Blocks that wait for each other (by counters in global memory) run on OS threads at the same time, or in turns: then
// only some blocks are resident at a time, one of them runs until it waits or has changed a counter, and the schedule
// says which goes on. If all of them wait, the launch ends as a deadlock.
//
// What is undefined on a GPU is made to show: shared memory starts as NaN, a copy arrives at the wait for it and not
// before, a wrong use ends the launch with an error code and a message (emulator_error).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static thread_local  // an OS thread has one block at a time

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
using cudaStream_t = struct CUstream_st*;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

namespace emulator {

using Where = std::source_location;

// Something that lanes of a warp do together. `execute` gets the argument of each lane in the mask.
struct Operation {
  const char* name;
  bool aligned;  // all lanes must be at the same instruction, not only at one of this kind
  void (*execute)(void* const* arguments, uint32_t mask);
};

// Returns when all lanes of the mask have called it and the operation is done.
void collective(const Operation& operation, uint32_t mask, void* argument, Where where);
void block_barrier(Where where);

// Ends the launch; the message tells where the thread is.
[[noreturn]] void fail(const char* text);

// Where a random schedule may let another thread go on, besides the waits.
void interrupt();

unsigned take_ticket(unsigned* counter, Where where);
void add_to_counter(unsigned* counter, Where where);
void wait_for_counter(const unsigned* counter, unsigned least, Where where);

void copy_async(void* shared, const void* global, bool valid, Where where);
void commit_copies();
void wait_for_copies(int pending, Where where);

// Fails unless 16 bytes at p are shared memory and aligned.
void check_shared_row(const char* name, const void* p, Where where);

const dim3& thread_index();
const dim3& block_index();
const dim3& block_size();
const dim3& grid_size();
unsigned char* dynamic_shared();

// Runs call(kernel) in each thread of the grid.
cudaError_t launch(dim3 grid, int block, int shared_bytes, void (*call)(const void*), const void* kernel);

template <class T>
struct Shuffle {
  T value;
  int lane;    // of the source
  T received;  // NaN bits where the source takes no part
};

template <class T>
void execute_shuffle(void* const* arguments, uint32_t mask) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    auto& own = *static_cast<Shuffle<T>*>(arguments[std::countr_zero(rest)]);
    if (mask >> own.lane & 1)
      own.received = static_cast<const Shuffle<T>*>(arguments[own.lane])->value;
    else
      memset(&own.received, 0xff, sizeof own.received);
  }
}

template <class T>
T shuffle(const Operation& operation, uint32_t mask, T value, int lane, Where where) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "CUDA shuffles numbers of 32 and 64 bits");
  Shuffle<T> operand{value, lane, value};
  collective(operation, mask, &operand, where);
  return operand.received;
}

// The lane a shuffle takes its value from: `other` in the group of `width` lanes, its own where that is outside.
inline int source_lane(int other, int width) {
  const int own = thread_index().x % 32, first = own / width * width;
  return other < first || other >= first + width ? own : other;
}

struct Vote {
  bool predicate;
  uint32_t ballot;
};

inline void execute_vote(void* const* arguments, uint32_t mask) {
  uint32_t ballot = 0;
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    ballot |= static_cast<uint32_t>(static_cast<const Vote*>(arguments[lane])->predicate) << lane;
  }
  for (uint32_t rest = mask; rest; rest &= rest - 1)
    static_cast<Vote*>(arguments[std::countr_zero(rest)])->ballot = ballot;
}

inline uint32_t vote(const Operation& operation, uint32_t mask, bool predicate, Where where) {
  Vote operand{predicate, 0};
  collective(operation, mask, &operand, where);
  return operand.ballot;
}

}  // namespace emulator

inline void __syncthreads(emulator::Where where = emulator::Where::current()) { emulator::block_barrier(where); }

inline void __syncwarp(unsigned mask = 0xffffffff, emulator::Where where = emulator::Where::current()) {
  static constexpr emulator::Operation operation{"__syncwarp", false, [](void* const*, uint32_t) {}};
  emulator::collective(operation, mask, nullptr, where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulator::Where where = emulator::Where::current()) {
  static constexpr emulator::Operation operation{"__shfl_sync", false, emulator::execute_shuffle<T>};
  const int first = threadIdx.x % 32 / width * width;
  return emulator::shuffle(operation, mask, value, first + (source & (width - 1)), where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  emulator::Where where = emulator::Where::current()) {
  static constexpr emulator::Operation operation{"__shfl_xor_sync", false, emulator::execute_shuffle<T>};
  const int own = threadIdx.x % 32;
  return emulator::shuffle(operation, mask, value, emulator::source_lane(own ^ lanes, width), where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int lanes, int width = 32,
                   emulator::Where where = emulator::Where::current()) {
  static constexpr emulator::Operation operation{"__shfl_down_sync", false, emulator::execute_shuffle<T>};
  const int own = threadIdx.x % 32;
  return emulator::shuffle(operation, mask, value, emulator::source_lane(own + lanes, width), where);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int lanes, int width = 32,
                 emulator::Where where = emulator::Where::current()) {
  static constexpr emulator::Operation operation{"__shfl_up_sync", false, emulator::execute_shuffle<T>};
  const int own = threadIdx.x % 32;
  return emulator::shuffle(operation, mask, value, emulator::source_lane(own - lanes, width), where);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate, emulator::Where where = emulator::Where::current()) {
  static constexpr emulator::Operation operation{"__ballot_sync", false, emulator::execute_vote};
  return emulator::vote(operation, mask, predicate, where);
}

inline bool __any_sync(unsigned mask, bool predicate, emulator::Where where = emulator::Where::current()) {
  static constexpr emulator::Operation operation{"__any_sync", false, emulator::execute_vote};
  return emulator::vote(operation, mask, predicate, where) != 0;
}

inline bool __all_sync(unsigned mask, bool predicate, emulator::Where where = emulator::Where::current()) {
  static constexpr emulator::Operation operation{"__all_sync", false, emulator::execute_vote};
  return emulator::vote(operation, mask, predicate, where) == mask;
}
