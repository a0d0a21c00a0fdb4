// Vectors of the instruction set, conversions and exp.
//
// This file is included once for each instruction set, by the .cpp file that names it and defines kVectorBytes, the
// width of a vector register. Everything is in an unnamed namespace, so that the linker cannot merge the code of
// different instruction sets.
#pragma once

#include "instruction_sets.h"

namespace cc_attention {
namespace {

// The type in which values of storage type T are summed.
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename S>
constexpr int64_t kLanes = kVectorBytes / sizeof(S);

template <typename S>
struct VectorOf {
  typedef S type __attribute__((vector_size(kVectorBytes), may_alias));
  typedef S anywhere __attribute__((vector_size(kVectorBytes), may_alias, aligned(alignof(S))));
};

template <typename S>
using Vector = typename VectorOf<S>::type;

// Returns vector number `index` of an array that is aligned to kVectorBytes.
template <typename S>
Vector<S>& vector_at(S* data, int64_t index = 0) {
  return reinterpret_cast<Vector<S>*>(data)[index];
}

// Load and store at any address that is aligned for S. The vector is passed by value: clang assumes that a reference to
// a vector is aligned to kVectorBytes.
template <typename S>
Vector<S> load_vector(const S* data) {
  return *reinterpret_cast<const typename VectorOf<S>::anywhere*>(data);
}

template <typename S>
void store_vector(S* data, Vector<S> vector) {
  *reinterpret_cast<typename VectorOf<S>::anywhere*>(data) = vector;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Converts from the storage type to the summing type, or back, in steps of at most kStep elements.
template <int64_t kStep, typename From, typename To>
[[gnu::always_inline]] inline void convert_steps(const From* from, To* to, int64_t count) {
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep)
#ifdef __clang__
#pragma clang loop unroll(disable) vectorize(enable)  // otherwise clang vectorizes the outer loop, at half the speed
#endif
    // kStep is a constant, so that this loop becomes one vector operation
    for (int64_t lane = 0; lane < kStep; ++lane) to[i + lane] = static_cast<To>(from[i + lane]);
  if constexpr (kStep > 1)
    if (i < count) convert_steps<kStep / 2>(from + i, to + i, count - i);
}

// Converts from the storage type to the summing type, or back.
template <typename From, typename To>
void convert(const From* from, To* to, int64_t count) {
  constexpr int64_t kStep = kLanes<float>;
  if (count == kStep / 2) return convert_steps<kStep>(from, to, kStep / 2);  // a constant: one operation
  convert_steps<kStep>(from, to, count);
}

// Returns the selected lanes of the concatenation of a and b.
template <typename S, int64_t... kLane>
Vector<S> shuffle(const Vector<S>& a, const Vector<S>& b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kLane...);
#else  // GCC has __builtin_shufflevector since version 12
  typedef std::conditional_t<sizeof(S) == 4, int32_t, int64_t> Lanes __attribute__((vector_size(kVectorBytes)));
  return __builtin_shuffle(a, b, Lanes{kLane...});
#endif
}

// Combines the lanes of a vector in pairs, lane i with lane i + kHalf, until one is left.
// Write `combine` as a lambda with [&]: GCC also turns a lambda without captures into a plain function, which would
// lack the instruction set of the file.
template <typename S, int64_t kHalf = kLanes<S> / 2, typename Combine, size_t... kLane>
S reduce(const Vector<S>& vector, const Combine& combine, std::index_sequence<kLane...> lanes) {
  const Vector<S> combined = combine(vector, shuffle<S, (kLane ^ kHalf)...>(vector, vector));
  if constexpr (kHalf == 1)
    return combined[0];
  else
    return reduce<S, kHalf / 2>(combined, combine, lanes);
}

template <typename S, typename Combine>
S reduce(const Vector<S>& vector, const Combine& combine) {
  return reduce<S>(vector, combine, std::make_index_sequence<kLanes<S>>());
}

// x = exp(x), accurate to 2 units in the last place down to -20, and to 5 from there: as if x were 3e-9 larger or
// smaller relative to itself, a tenth of a rounding. Subnormal results become 0, and exp(x) must not overflow. It is
// computed as 2^n e^r with an integer n and |r| <= log(2) / 2. The chain of operations is as short as possible:
// processors do not look ahead far enough to hide it.
inline void exponential(Vector<float>& x) {
  constexpr float kRound = 0x1.8p23f + 127;  // such a sum has no fractional bits, and n + 127 in its lowest bits
  const Vector<float> shifted = x * 0x1.715476p0f + kRound, n = shifted - kRound;
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  const Bits exponent = reinterpret_cast<Bits>(shifted) << 23;
  const Vector<float> two_to_the_n = reinterpret_cast<Vector<float>>(exponent);
  Vector<float> r;
  if constexpr (kVectorBytes > 16)
    r = x - n * 0x1.62e43p-1f;  // one rounding: compilers fuse this by default
  else
    r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // log(2) in two parts, the first exact with n
  // The polynomial 1 + r + r^2 q(r) with the smallest largest relative error, 3e-9.
  const Vector<float> square = r * r, low = r * 0x1.555492p-3f + 0x1.fffffcp-2f;
  const Vector<float> high = square * 0x1.6a23cep-10f + (r * 0x1.123a2p-7f + 0x1.5558f2p-5f);
  const Vector<float> less_one = square * (square * high + low) + r;
  x = x < -87.f ? Vector<float>{} : less_one * two_to_the_n + two_to_the_n;
}

inline void exponential(Vector<double>& x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
}

}  // namespace
}  // namespace cc_attention
