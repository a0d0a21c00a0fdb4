// The activated batch norm on the CPU, compiled once for each instruction set (see
// ../../../cc_attention/csrc/cpu/vector.h).
//
// All passes are limited by the memory. A map is processed vector by vector, in float32 or float64, and a vector is
// either of consecutive pixels of one channel or of consecutive channels of one pixel. Sums are in float64 throughout:
// squares of float32 numbers are exact there, and no shift is needed for data whose mean is far from zero.
#pragma once

#include "../../../cc_attention/csrc/cpu/vector.h"
#include "instruction_sets.h"

namespace fused {
namespace {

using namespace cc_attention;

constexpr int64_t kTask = 1 << 15;         // elements that are worth a thread
constexpr int64_t kNearNumbers = 1 << 12;  // numbers that stay in the first-level cache
constexpr int64_t kStrip = 512;            // channels whose sums stay there
constexpr int64_t kSumRows = 128;          // pixels of a partial sum of a channels_last map, at least
constexpr int64_t kPartialSums = 64;       // partial sums of a channels_last map, at most
constexpr std::integral_constant<int64_t, 8> kRowsTogether{};  // pixels that are added to the sums of channels at once

// The number of elements of a whole vector, as a constant. An int64_t in its place is the length of a last, shorter
// one.
template <typename S>
using Whole = std::integral_constant<int64_t, kLanes<S>>;

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// The bits of a vector of float32, signed for comparisons, and a vector of as many 16-bit numbers at any address.
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes), may_alias));
typedef int32_t SignedBits __attribute__((vector_size(kVectorBytes), may_alias));
typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2), may_alias, aligned(2)));

inline Bits bits_of(const Vector<float>& vector) { return reinterpret_cast<Bits>(vector); }

inline Vector<float> float_of(const Bits& bits) { return reinterpret_cast<Vector<float>>(bits); }

// Selects where a < b, for numbers below 2^31.
inline Bits select_less(const Bits& a, int32_t b, const Bits& less, const Bits& otherwise) {
  return reinterpret_cast<SignedBits>(a) < b ? less : otherwise;
}

// The type of the argument is only a tag.
inline Vector<float> widen(const Bits& bits, BFloat16) { return float_of(bits << 16); }  // the upper half of a float32

inline Bits narrow(const Vector<float>& x, BFloat16) {
  const Bits bits = bits_of(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to the nearest, ties to even
  return x == x ? rounded : Bits{} + 0x7fc0;
}

// float16 has 5 bits of exponent with a bias of 15, and 10 bits of mantissa.
inline Vector<float> widen(const Bits& bits, Half) {
  const Bits magnitude = (bits & 0x7fff) << 13, normal = magnitude + ((127 - 15) << 23);
  const Bits subnormal = bits_of(float_of(normal + (1 << 23)) - 0x1p-14f);  // takes off the leading 1
  const Bits finite = select_less(magnitude, 0x0400 << 13, subnormal, normal);
  return float_of(select_less(magnitude, 0x7c00 << 13, finite, magnitude | 0x7f800000) | (bits & 0x8000) << 16);
}

inline Bits narrow(const Vector<float>& x, Half) {
  const Bits bits = bits_of(x), sign = bits & 0x80000000, magnitude = bits ^ sign;
  const Bits normal = (magnitude - ((127 - 15) << 23) + 0x0fff + (magnitude >> 13 & 1)) >> 13;
  const Bits subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;  // the sum has the spacing of the results
  const Bits infinite = select_less(magnitude, 0x7f800001, Bits{} + 0x7c00, Bits{} + 0x7e00);  // or NaN
  const Bits finite = select_less(magnitude, 0x38800000, subnormal, normal);                   // 2^-14
  return select_less(magnitude, 0x47800000, finite, infinite) | sign >> 16;                    // 2^16
}

// Returns a whole vector in the summing type. AVX-512 has instructions for what takes several operations elsewhere, or
// in the code of GCC 12 for the general expression.
template <typename T>
Vector<Sum<T>> load_whole(const T* from) {
  if constexpr (std::is_same_v<T, Sum<T>>) {
    return load_vector(from);
#ifdef __x86_64__
  } else if constexpr (sizeof(T) == 2 && kVectorBytes == 64) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if constexpr (std::is_same_v<T, Half>)
      return reinterpret_cast<Vector<float>>(_mm512_maskz_cvtph_ps(0xffff, halves));
    else
      return widen(reinterpret_cast<Bits>(_mm512_maskz_cvtepu16_epi32(0xffff, halves)), T());
#endif
  } else {
    return widen(__builtin_convertvector(*reinterpret_cast<const HalfBits*>(from), Bits), T());
  }
}

template <typename T>
void store_whole(T* to, const Vector<Sum<T>>& vector) {
  if constexpr (std::is_same_v<T, Sum<T>>) {
    store_vector(to, vector);
#ifdef __x86_64__
  } else if constexpr (sizeof(T) == 2 && kVectorBytes == 64) {
    __m256i halves;
    if constexpr (std::is_same_v<T, Half>)
      halves = _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(vector), _MM_FROUND_TO_NEAREST_INT);
    else
      halves = _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(narrow(vector, T())));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
#endif
  } else {
    *reinterpret_cast<HalfBits*>(to) = __builtin_convertvector(narrow(vector, T()), HalfBits);
  }
}

// Returns `count` elements in the summing type, followed by zeros.
template <typename T, typename Count>
Vector<Sum<T>> load(const T* from, Count count) {
  if constexpr (std::is_same_v<Count, Whole<Sum<T>>>) {
    return load_whole(from);
  } else {
    T lanes[kLanes<Sum<T>>] = {};
    std::copy_n(from, count, lanes);
    return load_whole(lanes);
  }
}

template <typename T, typename Count>
void store(T* to, const Vector<Sum<T>>& vector, Count count) {
  if constexpr (std::is_same_v<Count, Whole<Sum<T>>>) {
    store_whole(to, vector);
  } else {
    T lanes[kLanes<Sum<T>>];
    store_whole(lanes, vector);
    std::copy_n(lanes, count, to);
  }
}

// kNumbers numbers of each channel. Those of one vector of channels follow each other: a vector of the first numbers, a
// vector of the second numbers, and so on. The last vectors are padded with zeros.
template <typename S, int kNumbers>
class Table {
 public:
  explicit Table(int64_t channels) : values_(kNumbers * ceil_div(channels, kLanes<S>) * kLanes<S>) {}
  S& at(int number, int64_t channel) { return values_[index(number, channel)]; }
  S at(int number, int64_t channel) const { return values_[index(number, channel)]; }

  // The address of the first numbers of a vector of channels.
  const S* vectors(int64_t channel) const { return values_.data() + kNumbers * channel; }

 private:
  static int64_t index(int number, int64_t channel) {
    return (channel / kLanes<S> * kNumbers + number) * kLanes<S> + channel % kLanes<S>;
  }

  std::vector<S> values_;
};

// The numbers that belong to a vector of pixels of one channel: each is the same in all lanes.
template <typename S, int kNumbers>
struct OfOneChannel {
  OfOneChannel(const Table<S, kNumbers>& table, int64_t channel) {
    for (int i = 0; i < kNumbers; ++i) values[i] = Vector<S>{} + table.at(i, channel);
  }
  const Vector<S>& operator[](int number) const { return values[number]; }

  Vector<S> values[kNumbers];
};

// The numbers that belong to a vector of channels of one pixel.
template <typename S, int kNumbers>
struct OfChannels {
  OfChannels(const Table<S, kNumbers>& table, int64_t channel) : first(table.vectors(channel)) {}
  Vector<S> operator[](int number) const { return load_vector(first + number * kLanes<S>); }

  const S* first;
};

// The planes of one sample and channel in a map that is not channels_last, cut into equal pieces. The cut depends on
// nothing but the size of the map.
struct Pieces {
  explicit Pieces(const MapSizes& s)
      : s(s), each(std::max<int64_t>(1, ceil_div(s.P, kTask))), count(s.P == 0 ? 0 : s.N * s.C * each) {}

  // Calls body(index, channel, begin, end) in parallel; the elements begin <= i < end belong to the piece.
  template <typename Body>
  void run(const Body& body) const {
    torch::stable::parallel_for(0, count, kTask / std::max<int64_t>(1, ceil_div(s.P, each)),
                                [&](int64_t first, int64_t last) {
                                  for (int64_t i = first; i < last; ++i) {
                                    const int64_t plane = i / each, part = i % each, start = plane * s.P;
                                    body(i, plane % s.C, start + s.P * part / each, start + s.P * (part + 1) / each);
                                  }
                                });
  }

  const MapSizes s;
  const int64_t each, count;
};

// Calls body(i, count) with the vectors of the elements begin <= i < end.
template <typename S, typename Body>
void for_each_vector(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kLanes<S> <= end; i += kLanes<S>) body(i, Whole<S>());
  if (i < end) body(i, end - i);
}

// Calls body(i) for 0 <= i < count, where count is mostly `usual`, a constant.
template <typename Usual, typename Body>
void for_each_row(Usual usual, int64_t count, const Body& body) {
  if (count == usual)
    for (int64_t i = 0; i < usual; ++i) body(i);
  else
    for (int64_t i = 0; i < count; ++i) body(i);
}

// Calls body(offset, numbers, count) in parallel with every vector of a map: the offset of its first element, the
// numbers of its channels, and how many elements it has.
// The loops use copies of body: stores of vectors may alias everything that has an address.
template <typename S, int kNumbers, typename Body>
void for_each_vector_of_map(const MapSizes& s, const Table<S, kNumbers>& table, const Body& body) {
  if (s.N == 0 || s.C == 0 || s.P == 0) return;
  if (s.channels_last) {
    const auto run = [&](auto rows) {
      const int64_t groups = ceil_div(s.N * s.P, rows);
      torch::stable::parallel_for(0, groups, ceil_div(kTask, rows * s.C), [&](int64_t first, int64_t last) {
        const Body copy = body;
        for (int64_t row = first * rows; row < std::min(last * rows, s.N * s.P); row += rows)
          for_each_vector<S>(0, s.C, [&](int64_t channel, auto count) {
            const OfChannels<S, kNumbers> numbers(table, channel);
            for_each_row(rows, std::min<int64_t>(rows, s.N * s.P - row),
                         [&](int64_t i) { copy((row + i) * s.C + channel, numbers, count); });
          });
      });
    };
    // Several pixels at once read the numbers less often, but a single one reads the memory in order.
    if (kNumbers * s.C <= kNearNumbers)
      run(std::integral_constant<int64_t, 1>());
    else
      run(std::integral_constant<int64_t, 4>());
  } else {
    Pieces(s).run([&](int64_t, int64_t channel, int64_t begin, int64_t end) {
      const Body copy = body;
      const OfOneChannel<S, kNumbers> numbers(table, channel);
      for_each_vector<S>(begin, end, [&](int64_t offset, auto count) { copy(offset, numbers, count); });
    });
  }
}

// A vector in float64.
template <typename S>
struct Wide {
  static constexpr int kParts = sizeof(double) / sizeof(S);
  typedef double All __attribute__((vector_size(kParts * kVectorBytes)));

  explicit Wide(const Vector<S>& vector) {
    const All all = __builtin_convertvector(vector, All);
    std::memcpy(parts, &all, sizeof(parts));
  }

  Vector<double> parts[kParts];
};

// Two sums for each lane of a vector, in float64.
template <typename S>
struct Sums {
  static constexpr int kParts = Wide<S>::kParts;
  static constexpr int64_t kSize = 2 * kLanes<S>;  // all first sums, then all second sums

  void add(const Vector<S>& first_terms, const Vector<S>& second_terms) {
    const Wide<S> first(first_terms), second(second_terms);
    for (int i = 0; i < kParts; ++i) {
      sums[0][i] += first.parts[i];
      sums[1][i] += second.parts[i];
    }
  }

  // Adds x to the first sums and x * x to the second.
  void add_squares(const Vector<S>& x) {
    const Wide<S> wide(x);
    for (int i = 0; i < kParts; ++i) {
      sums[0][i] += wide.parts[i];
      sums[1][i] += wide.parts[i] * wide.parts[i];
    }
  }

  // Returns the first or the second sum over all lanes.
  double total(int which) const {
    Vector<double> lanes = sums[which][0];
    for (int i = 1; i < kParts; ++i) lanes += sums[which][i];
    return reduce<double>(lanes, [&](const Vector<double>& a, const Vector<double>& b) { return a + b; });
  }

  Vector<double> sums[2][kParts] = {};
};

// Calls body(offset, numbers, count, sums) like for_each_vector_of_map; it adds to the sums. Then calls
// finish(channel, first, second) with the sums of each channel. The partial sums do not depend on the threads.
template <typename S, int kNumbers, typename Body, typename Finish>
void sum_over_pixels(const MapSizes& s, const Table<S, kNumbers>& table, const Body& body, const Finish& finish) {
  if (!s.channels_last) {
    const Pieces pieces(s);
    std::vector<double> partial(2 * pieces.count);
    pieces.run([&](int64_t index, int64_t channel, int64_t begin, int64_t end) {
      const Body copy = body;
      const OfOneChannel<S, kNumbers> numbers(table, channel);
      Sums<S> sums;
      for_each_vector<S>(begin, end, [&](int64_t offset, auto count) { copy(offset, numbers, count, sums); });
      partial[2 * index] = sums.total(0);
      partial[2 * index + 1] = sums.total(1);
    });
    for (int64_t channel = 0; channel < s.C; ++channel) {
      double first = 0, second = 0;
      for (int64_t plane = channel; plane < pieces.count / pieces.each; plane += s.C)
        for (int64_t i = plane * pieces.each; i < (plane + 1) * pieces.each; ++i) {
          first += partial[2 * i];
          second += partial[2 * i + 1];
        }
      finish(channel, first, second);
    }
    return;
  }
  const int64_t rows = s.N * s.P, each = std::max(kSumRows, ceil_div(rows, kPartialSums)),
                blocks = ceil_div(rows, each);
  const int64_t strips = ceil_div(s.C, kStrip), size = ceil_div(s.C, kLanes<S>) * Sums<S>::kSize;
  std::vector<double> partial(std::max<int64_t>(1, blocks) * size);
  torch::stable::parallel_for(0, blocks * strips, 1, [&](int64_t first, int64_t last) {
    const Body copy = body;
    for (int64_t task = first; task < last; ++task) {
      const int64_t block = task / strips, strip = task % strips * kStrip;
      const int64_t end_row = std::min(rows, (block + 1) * each), end = std::min(s.C, strip + kStrip);
      double* block_sums = &partial[block * size];
      for (int64_t row = block * each; row < end_row; row += kRowsTogether) {
        const int64_t together = std::min<int64_t>(kRowsTogether, end_row - row);
        for_each_vector<S>(strip, end, [&](int64_t channel, auto count) {
          const OfChannels<S, kNumbers> numbers(table, channel);
          Sums<S> sums;
          std::memcpy(sums.sums, block_sums + 2 * channel, sizeof(sums.sums));
          for_each_row(kRowsTogether, together,
                       [&](int64_t i) { copy((row + i) * s.C + channel, numbers, count, sums); });
          std::memcpy(block_sums + 2 * channel, sums.sums, sizeof(sums.sums));
        });
      }
    }
  });
  for (int64_t block = 1; block < blocks; ++block)
    for (int64_t i = 0; i < size; ++i) partial[i] += partial[block * size + i];
  for (int64_t channel = 0; channel < s.C; ++channel) {
    const double* sums = &partial[channel / kLanes<S> * Sums<S>::kSize + channel % kLanes<S>];
    finish(channel, sums[0], sums[kLanes<S>]);
  }
}

// What the activation does with numbers that are not positive: it multiplies them with the slope, or sets them to 0.
// The product with 0 would not do: that of infinity is NaN.
template <typename S>
struct Negative {
  typedef std::conditional_t<sizeof(S) == 4, int32_t, int64_t> Lanes __attribute__((vector_size(kVectorBytes)));

  explicit Negative(const Norm& norm)
      : slope(norm.activation == Activation::identity ? S(1) : static_cast<S>(norm.slope)),
        kept(norm.activation == Activation::relu ? 0 : -1) {}

  // Returns the product where the mask is set, and otherwise x.
  Vector<S> where(const Lanes& mask, const Vector<S>& x) const {
    const Lanes product = reinterpret_cast<Lanes>(x * slope) & (Lanes{} + kept);
    return mask ? reinterpret_cast<Vector<S>>(product) : x;
  }

  S slope;
  std::conditional_t<sizeof(S) == 4, int32_t, int64_t> kept;  // bits of the product
};

// The numbers of a channel.
enum Number { kMean, kScale, kBias, kInverse, kOffset = kInverse, kFactor };

// Returns a table with the numbers that z depends on: z = (x - mean) * scale + bias.
template <typename S, int kNumbers>
Table<S, kNumbers> table_of(const Norm& norm) {
  const int64_t channels = norm.sizes.C;
  Table<S, kNumbers> table(channels);
  const S* statistics = static_cast<const S*>(norm.statistics);
  const S *weight = static_cast<const S*>(norm.weight), *bias = static_cast<const S*>(norm.bias);
  for (int64_t i = 0; i < channels; ++i) {
    table.at(kMean, i) = statistics[i];
    table.at(kScale, i) = (std::abs(weight[i]) + static_cast<S>(norm.eps)) * statistics[channels + i];
    table.at(kBias, i) = bias[i];
  }
  return table;
}

// Written as one expression, so that the forward and the backward round alike: the compiler fuses the multiplication
// and the addition in both or in neither.
template <typename V>
V affine(const V& x, const V& factor, const V& summand) {
  return x * factor + summand;
}

template <typename T>
void sum_map(const NormSums& a) {
  using S = Sum<T>;
  const MapSizes& s = a.sizes;
  const T* x = static_cast<const T*>(a.x);
  sum_over_pixels(
      s, Table<S, 1>(s.C),
      [x](int64_t offset, const auto&, auto count, Sums<S>& sums) { sums.add_squares(load(x + offset, count)); },
      [&](int64_t channel, double sum, double squares) {
        a.sums[channel] = sum;
        a.sums[s.C + channel] = squares;
      });
  a.sums[2 * s.C] = static_cast<double>(s.N * s.P);
}

template <typename T>
void normalize_map(const NormApply& a) {
  using S = Sum<T>;
  const T *x = static_cast<const T*>(a.x), *residual = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.y);
  const Negative<S> negative(a.norm);
  for_each_vector_of_map(a.norm.sizes, table_of<S, 3>(a.norm), [=](int64_t offset, const auto& numbers, auto count) {
    Vector<S> z = affine<Vector<S>>(load(x + offset, count) - numbers[kMean], numbers[kScale], numbers[kBias]);
    if (residual != nullptr) z += load(residual + offset, count);
    store(y + offset, negative.where(z < Vector<S>{}, z), count);  // NaN stays
  });
}

// What determines the sign of z.
enum class Mask { none, output, input };

// The largest number that becomes 0 in the storage type: half of its smallest one.
template <typename T>
constexpr float kRoundsToZero = std::is_same_v<T, Half>       ? 0x1p-25f
                                : std::is_same_v<T, BFloat16> ? 0x1p-134f
                                                              : 0.f;

// The gradient of z.
template <typename T, Mask kMask>
struct GradientOfZ {
  using S = Sum<T>;

  GradientOfZ(const Norm& norm, const void* y, const void* grad)
      : y(static_cast<const T*>(y)), grad(static_cast<const T*>(grad)), negative(norm) {}

  template <typename Numbers, typename Count>
  Vector<S> operator()(int64_t offset, const Vector<S>& centered, const Numbers& numbers, Count count) const {
    const Vector<S> all = load(grad + offset, count);
    if constexpr (kMask == Mask::none)
      return all;
    else if constexpr (kMask == Mask::output)
      return negative.where(load(y + offset, count) <= Vector<S>{}, all);
    else
      return negative.where(
          affine<Vector<S>>(centered, numbers[kScale], numbers[kBias]) <= Vector<S>{} + S(kRoundsToZero<T>), all);
  }

  const T *y, *grad;
  Negative<S> negative;
};

// Calls body with the GradientOfZ of the arguments.
template <typename T, typename Body>
void with_gradient(const Norm& norm, const void* y, const void* grad, bool masked, const Body& body) {
  if (masked || norm.activation == Activation::identity)
    body(GradientOfZ<T, Mask::none>(norm, y, grad));
  else if (y != nullptr)
    body(GradientOfZ<T, Mask::output>(norm, y, grad));
  else
    body(GradientOfZ<T, Mask::input>(norm, y, grad));
}

template <typename T>
void sum_gradients(const NormBackwardSums& a) {
  using S = Sum<T>;
  const int64_t channels = a.norm.sizes.C;
  const S* inverse = static_cast<const S*>(a.norm.statistics) + channels;
  Table<S, 4> table = table_of<S, 4>(a.norm);
  for (int64_t i = 0; i < channels; ++i) table.at(kInverse, i) = inverse[i];
  const T* x = static_cast<const T*>(a.x);
  T* masked = static_cast<T*>(a.masked);
  S *sums = static_cast<S*>(a.sums), *grad_weight = static_cast<S*>(a.grad_weight);
  const S* weight = static_cast<const S*>(a.norm.weight);
  with_gradient<T>(a.norm, a.y, a.grad, false, [&](const auto& gradient) {
    sum_over_pixels(
        a.norm.sizes, table,
        [=](int64_t offset, const auto& numbers, auto count, Sums<S>& sums) {
          const Vector<S> centered = load(x + offset, count) - numbers[kMean];
          const Vector<S> grad = gradient(offset, centered, numbers, count);
          sums.add(grad, grad * (centered * numbers[kInverse]));
          if (masked != nullptr) store(masked + offset, grad, count);
        },
        [&](int64_t channel, double first, double second) {
          sums[channel] = static_cast<S>(first);
          sums[channels + channel] = static_cast<S>(second);
          grad_weight[channel] = static_cast<S>(weight[channel] < 0 ? -second : second);
        });
  });
}

// With s0 and s1 the two sums, the gradient of x is
//   scale * (grad - s0 / count - (x - mean) * inverse * s1 / count) = scale * grad - ((x - mean) * factor + offset)
// and without sums scale * grad. The two cases have code of their own: in common code, the compiler would fuse the
// multiplication and the subtraction in some loops only, and the bits would depend on the loop.
template <typename T, bool kConstant>
void input_gradient(const NormBackwardInput& a) {
  using S = Sum<T>;
  const int64_t channels = a.norm.sizes.C;
  Table<S, 5> table = table_of<S, 5>(a.norm);
  if constexpr (!kConstant) {
    const S* inverse = static_cast<const S*>(a.norm.statistics) + channels;
    const S* sums = static_cast<const S*>(a.sums);
    for (int64_t i = 0; i < channels; ++i) {
      const double scale = table.at(kScale, i) / *a.count;
      table.at(kOffset, i) = static_cast<S>(scale * sums[i]);
      table.at(kFactor, i) = static_cast<S>(scale * sums[channels + i] * inverse[i]);
    }
  }
  const T* x = static_cast<const T*>(a.x);
  T* grad_x = static_cast<T*>(a.grad_x);
  with_gradient<T>(a.norm, a.y, a.grad, a.masked, [&](const auto& gradient) {
    for_each_vector_of_map(a.norm.sizes, table, [=](int64_t offset, const auto& numbers, auto count) {
      const Vector<S> centered = load(x + offset, count) - numbers[kMean];
      const Vector<S> scaled = numbers[kScale] * gradient(offset, centered, numbers, count);
      if constexpr (kConstant)
        store(grad_x + offset, scaled, count);
      else
        store(grad_x + offset, scaled - affine<Vector<S>>(centered, numbers[kFactor], numbers[kOffset]), count);
    });
  });
}

// Calls body with a value of the storage type of dtype.
template <typename Body>
void with_norm_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32:
      return body(float());
    case Dtype::float64:
      return body(double());
    case Dtype::float16:
      return body(Half());
    case Dtype::bfloat16:
      return body(BFloat16());
  }
}

void norm_sums(const NormSums& a) {
  with_norm_type(a.dtype, [&](auto type) { sum_map<decltype(type)>(a); });
}

void norm_apply(const NormApply& a) {
  with_norm_type(a.norm.dtype, [&](auto type) { normalize_map<decltype(type)>(a); });
}

void norm_backward_sums(const NormBackwardSums& a) {
  with_norm_type(a.norm.dtype, [&](auto type) { sum_gradients<decltype(type)>(a); });
}

void norm_backward_input(const NormBackwardInput& a) {
  with_norm_type(a.norm.dtype, [&](auto type) {
    a.sums == nullptr ? input_gradient<decltype(type), true>(a) : input_gradient<decltype(type), false>(a);
  });
}

}  // namespace
}  // namespace fused
