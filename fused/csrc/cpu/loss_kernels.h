// The operators of upsampled logits on the CPU, compiled once for each instruction set (see
// ../../../cc_attention/csrc/cpu/vector.h).
//
// Row y of the upsampled picture lies between two rows of the logits. These two rows are interpolated horizontally
// once, for all rows y between them; each row y is then a weighted sum of the two. The gradient takes the same way
// back: the rows y are summed into two rows of full width, which are then summed into columns. A task is the interval
// between two rows of the logits. It writes the gradient of its upper row, and that of its lower row into a buffer of
// its own, so that the sums have the same order for any number of threads.
//
// A vector holds consecutive pixels of a row. All classes of a block of kLanes pixels are adjacent in memory.
#pragma once

#include "../../../cc_attention/csrc/cpu/vector.h"
#include "instruction_sets.h"

namespace fused {
namespace {

using namespace cc_attention;

constexpr int64_t kLossGrain = 1 << 15;  // upsampled logits below which a task is not worth a thread

// An array of vectors, zero at first.
template <typename S>
class Vectors {
 public:
  explicit Vectors(int64_t count = 0) : blocks_(count) {}
  S* data() { return blocks_.data()->elements; }
  const S* data() const { return blocks_.data()->elements; }

 private:
  struct alignas(kVectorBytes) Block {
    S elements[kLanes<S>];
  };
  std::vector<Block> blocks_;
};

// Where the pixels of an axis are interpolated: pixel i between the lines lower[i] and upper[i] of the logits.
template <typename S>
struct Axis {
  std::vector<int32_t> lower, upper;
  std::vector<S> lower_weight, upper_weight;

  int64_t size() const { return static_cast<int64_t>(lower.size()); }

  void add(const Axis& other, int64_t i) {
    lower.push_back(other.lower[i]);
    upper.push_back(other.upper[i]);
    lower_weight.push_back(other.lower_weight[i]);
    upper_weight.push_back(other.upper_weight[i]);
  }

  // Repeats the last pixel up to a whole number of blocks.
  void pad() {
    while (size() % kLanes<S> != 0) add(*this, size() - 1);
  }
};

template <typename S>
Axis<S> upsampling(int64_t lines, int64_t pixels) {
  Axis<S> axis;
  const S scale = pixels > 1 ? static_cast<S>(lines - 1) / static_cast<S>(pixels - 1) : S(0);
  for (int64_t i = 0; i < pixels; ++i) {
    const S position = scale * static_cast<S>(i);
    const int64_t lower = lines == pixels ? i : std::min(static_cast<int64_t>(position), lines - 1);
    const int64_t upper = lines == pixels ? i : std::min(lower + 1, lines - 1);
    const S weight = upper == lower ? S(0) : std::min(std::max(position - static_cast<S>(lower), S(0)), S(1));
    axis.lower.push_back(static_cast<int32_t>(lower));
    axis.upper.push_back(static_cast<int32_t>(upper));
    axis.lower_weight.push_back(1 - weight);
    axis.upper_weight.push_back(weight);
  }
  return axis;
}

// Returns, for each line, the first pixel whose lower line it is or comes after it; and the number of pixels.
template <typename S>
std::vector<int64_t> first_pixels(const Axis<S>& axis, int64_t lines, int64_t pixels) {
  std::vector<int64_t> first(lines + 1, pixels);
  for (int64_t i = pixels - 1; i >= 0; --i)
    for (int64_t line = axis.lower[i]; line >= 0 && first[line] > i; --line) first[line] = i;
  return first;
}

// Interpolates a row of the logits [C][W], classes `stride` elements apart, horizontally: out[block][class][lane].
// Not inlined, like the softmax below: a compiler may combine products and sums in different ways in different places.
template <typename S>
[[gnu::noinline]] void widen(const S* row, int64_t stride, int64_t C, const Axis<S>& columns, S* out) {
  for (int64_t first = 0; first < columns.size(); first += kLanes<S>) {
    const int32_t* lower = columns.lower.data() + first;
    const int32_t* upper = columns.upper.data() + first;
    const Vector<S> lower_weight = load_vector(columns.lower_weight.data() + first);
    const Vector<S> upper_weight = load_vector(columns.upper_weight.data() + first);
    for (int64_t c = 0; c < C; ++c, out += kLanes<S>) {
      const S* line = row + c * stride;
      Vector<S> left, right;
      for (int64_t lane = 0; lane < kLanes<S>; ++lane) {
        left[lane] = line[lower[lane]];
        right[lane] = line[upper[lane]];
      }
      vector_at(out) = left * lower_weight + right * upper_weight;
    }
  }
}

// The transpose of `widen` for two rows at once. Column j of a result is a sum over the pixels between the columns
// j - 1 and j + 1. `first` is first_pixels(columns, W, w).
template <typename S>
void narrow(const S* wide[2], int64_t C, int64_t W, const Axis<S>& columns, const std::vector<int64_t>& first,
            S* out[2], const int64_t stride[2]) {
  std::vector<int64_t> place(first[W]);
  for (int64_t x = 0; x < first[W]; ++x) place[x] = x / kLanes<S> * C * kLanes<S> + x % kLanes<S>;
  for (int64_t c = 0; c < C; ++c) {
    const S* above = wide[0] + c * kLanes<S>;
    const S* below = wide[1] + c * kLanes<S>;
    S carried[2] = {};
    for (int64_t j = 0; j < W; ++j) {
      S here[2] = {}, next[2] = {};
      for (int64_t x = first[j]; x < first[j + 1]; ++x) {
        const S lower = columns.lower_weight[x], upper = columns.upper_weight[x];
        here[0] += lower * above[place[x]];
        here[1] += lower * below[place[x]];
        next[0] += upper * above[place[x]];
        next[1] += upper * below[place[x]];
      }
      for (int64_t k = 0; k < 2; ++k) {
        out[k][c * stride[k] + j] = carried[k] + here[k];
        carried[k] = next[k];
      }
    }
  }
}

// x = log(x) for x of at least 1, or NaN. With x = 2^n m and m between sqrt(1/2) and sqrt(2), log(m) is a series in
// t = (m - 1) / (m + 1): 2 (t + t^3 / 3 + t^5 / 5 + ...).
inline void logarithm(Vector<float>& x) {
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  const Bits bits = reinterpret_cast<Bits>(x);
  const Bits exponent = (bits - 0x3f3504f3) >> 23;  // the bits of sqrt(1/2)
  const Vector<float> m = reinterpret_cast<Vector<float>>(bits - (exponent << 23));
  const Vector<float> n = __builtin_convertvector(exponent, Vector<float>);
  const Vector<float> t = (m - 1.f) / (m + 1.f), square = t * t;
  Vector<float> series = square * (1 / 9.f) + 1 / 7.f;
  for (float coefficient : {1 / 5.f, 1 / 3.f}) series = series * square + coefficient;
  const Vector<float> low = (t + t) * square * series + n * 0x1.7f7d1cp-20f;
  x = x == x ? n * 0x1.62e4p-1f + ((t + t) + low) : x;  // log(2) in two parts, as in `exponential`
}

inline void logarithm(Vector<double>& x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = std::log(x[i]);
}

// The softmax of kLanes pixels.
template <typename S>
struct Softmax {
  Vector<S> shifted;      // logit of the label, minus the largest logit; NaN if the label is not a class
  Vector<S> total;        // sum over classes of exp(logit - largest logit)
  Vector<S> probability;  // of the label
};

// The logits of a block are above_weight * above + below_weight * below. `labels` are classes as numbers of type S.
// Stores exp(logit - largest logit) of each class in `exponentials`.
template <typename S>
[[gnu::noinline]] void softmax(const S* above, const S* below, S above_weight, S below_weight, int64_t C,
                               const S* labels, S* exponentials, Softmax<S>& result) {
  Vector<S> largest = Vector<S>{} - std::numeric_limits<S>::infinity();
  for (int64_t c = 0; c < C; ++c) {
    const Vector<S> logit =
        vector_at(const_cast<S*>(above), c) * above_weight + vector_at(const_cast<S*>(below), c) * below_weight;
    largest = logit > largest ? logit : largest;
    vector_at(exponentials, c) = logit;
  }
  const Vector<S> label = load_vector(labels);
  Vector<S> shifted = Vector<S>{} + std::numeric_limits<S>::quiet_NaN(), total{};
  for (int64_t c = 0; c < C; ++c) {
    Vector<S> x = vector_at(exponentials, c) - largest;
    shifted = label == static_cast<S>(c) ? x : shifted;
    exponential(x);
    vector_at(exponentials, c) = x;
    total += x;
  }
  Vector<S> probability = shifted;
  exponential(probability);
  result = {shifted, total, probability / total};
}

// The rows of the logits of all samples, interpolated horizontally. It keeps the two that were read last; of these, one
// must have an even index and one an odd index.
template <typename S>
class WideRows {
 public:
  WideRows(const LossSizes& sizes, const S* logits, const Axis<S>& columns)
      : sizes_(sizes), logits_(logits), columns_(columns) {
    for (Vectors<S>& row : rows_) row = Vectors<S>(columns.size() / kLanes<S> * sizes.C);
  }

  // Row `row` of sample n: [block][class][lane].
  const S* operator()(int64_t n, int64_t row) {
    const int64_t index = n * sizes_.H + row, slot = index % 2;
    if (kept_[slot] != index) {
      const S* source = logits_ + (n * sizes_.C * sizes_.H + row) * sizes_.W;
      widen(source, sizes_.H * sizes_.W, sizes_.C, columns_, rows_[slot].data());
      kept_[slot] = index;
    }
    return rows_[slot].data();
  }

 private:
  const LossSizes& sizes_;
  const S* logits_;
  const Axis<S>& columns_;
  Vectors<S> rows_[2];
  int64_t kept_[2] = {-1, -1};
};

// The geometry of an upsampled picture.
template <typename S>
struct Upsampling {
  explicit Upsampling(const LossSizes& sizes)
      : rows(upsampling<S>(sizes.H, sizes.h)),
        columns(upsampling<S>(sizes.W, sizes.w)),
        first_row(first_pixels(rows, sizes.H, sizes.h)) {
    columns.pad();
  }

  int64_t blocks() const { return columns.size() / kLanes<S>; }

  Axis<S> rows, columns;
  std::vector<int64_t> first_row;
};

// Calls body(begin, end) in parallel on ranges of all intervals: interval n * H + i of row i of sample n.
template <typename Body>
void for_each_interval(const LossSizes& s, const Body& body) {
  const int64_t work = std::max<int64_t>(1, s.C * s.h * s.w / s.H);
  torch::stable::parallel_for(0, s.N * s.H, std::max<int64_t>(1, kLossGrain / work), body);
}

// The label of a pixel as a number of type S: -1 if the label is ignored, C if it is not a class.
template <typename S>
S read_label(int64_t label, int64_t ignored, int64_t C) {
  return static_cast<S>(label == ignored ? -1 : label < 0 || label >= C ? C : label);
}

struct DoubleTotals {
  double loss = 0, weight = 0;
};

// The loss of the pixels between two rows of the logits.
template <typename S>
class LossInterval {
 public:
  LossInterval(const SegmentationLoss& arguments, const Upsampling<S>& upsampling)
      : a_(arguments),
        upsampling_(upsampling),
        wide_(arguments.input.sizes, static_cast<const S*>(arguments.input.logits), upsampling.columns),
        exponentials_(arguments.input.sizes.C),
        limit_(arguments.threshold ? *static_cast<const S*>(arguments.threshold) : std::numeric_limits<S>::infinity()) {
    if (a_.grad)
      for (Vectors<S>& grad : grad_) grad = Vectors<S>(upsampling.blocks() * a_.input.sizes.C);
  }

  // Adds up the loss, and leaves the gradients of the two rows, of full width, in grad(0) and grad(1).
  DoubleTotals run(int64_t n, int64_t interval) {
    const LossSizes& s = a_.input.sizes;
    const int64_t first = upsampling_.first_row[interval], last = upsampling_.first_row[interval + 1];
    const S* above = wide_(n, interval);
    const S* below = wide_(n, upsampling_.rows.upper[first]);
    std::fill_n(losses_, kLanes<S>, 0);
    std::fill_n(weights_, kLanes<S>, 0);
    for (int64_t block = 0; block < upsampling_.blocks(); ++block) {
      const int64_t x = block * kLanes<S>, offset = x * s.C;
      if (a_.grad)
        for (Vectors<S>& grad : grad_) std::fill_n(grad.data() + offset, s.C * kLanes<S>, S(0));
      for (int64_t y = first; y < last; ++y)
        pixels(a_.target + (n * s.h + y) * s.w + x, std::min(kLanes<S>, s.w - x), above + offset, below + offset, y,
               offset);
    }
    return {std::accumulate(losses_, losses_ + kLanes<S>, 0.0), std::accumulate(weights_, weights_ + kLanes<S>, 0.0)};
  }

  const S* grad(int64_t k) const { return grad_[k].data(); }

 private:
  void pixels(const int64_t* target, int64_t count, const S* above, const S* below, int64_t y, int64_t offset) {
    const int64_t C = a_.input.sizes.C;
    alignas(kVectorBytes) S labels[kLanes<S>];
    S largest = -1;
    for (int64_t lane = 0; lane < kLanes<S>; ++lane) {
      labels[lane] = lane < count ? read_label<S>(target[lane], a_.ignored, C) : S(-1);
      largest = std::max(largest, labels[lane]);
    }
    if (largest < 0) return;
    const Vector<S> label = vector_at(labels);
    const S above_weight = upsampling_.rows.lower_weight[y], below_weight = upsampling_.rows.upper_weight[y];
    Softmax<S> result;
    softmax(above, below, above_weight, below_weight, C, labels, exponentials_.data(), result);
    const Vector<S> zero{};
    Vector<S> counts = label < zero ? zero : zero + S(1);
    if (a_.threshold) counts = result.probability > limit_ ? zero : counts;
    Vector<S> weight = counts;
    if (const S* class_weights = static_cast<const S*>(a_.class_weights))
      for (int64_t lane = 0; lane < kLanes<S>; ++lane)
        if (counts[lane] != 0 && labels[lane] < C) weight[lane] = class_weights[static_cast<int64_t>(labels[lane])];
    Vector<S> loss = result.total;
    logarithm(loss);
    loss = counts != zero ? weight * (loss - result.shifted) : zero;
    for (int64_t lane = 0; lane < kLanes<S>; ++lane) {
      losses_[lane] += static_cast<double>(loss[lane]);
      weights_[lane] += static_cast<double>(weight[lane]);
    }
    if (!a_.grad) return;
    const Vector<S> factor = weight / result.total;
    S* grad_above = grad_[0].data() + offset;
    S* grad_below = grad_[1].data() + offset;
    for (int64_t c = 0; c < C; ++c) {
      Vector<S> grad = vector_at(exponentials_.data(), c) * factor - (label == static_cast<S>(c) ? weight : zero);
      grad = counts != zero ? grad : zero;
      vector_at(grad_above, c) += above_weight * grad;
      vector_at(grad_below, c) += below_weight * grad;
    }
  }

  const SegmentationLoss& a_;
  const Upsampling<S>& upsampling_;
  WideRows<S> wide_;
  Vectors<S> exponentials_, grad_[2];
  const S limit_;
  double losses_[kLanes<S>], weights_[kLanes<S>];
};

template <typename S>
void segmentation_loss_of(const SegmentationLoss& a) {
  const LossSizes& s = a.input.sizes;
  const Upsampling<S> upsampling(s);
  const std::vector<int64_t> first_column = first_pixels(upsampling.columns, s.W, s.w);
  const int64_t intervals = s.N * s.H, row = s.C * s.W;
  std::vector<DoubleTotals> totals(intervals);
  S* grad = static_cast<S*>(a.grad);
  const std::unique_ptr<S[]> below(grad ? new S[intervals * row] : nullptr);  // [interval][C][W]
  const auto below_of = [&](int64_t interval) { return below.get() + interval * row; };
  for_each_interval(s, [&](int64_t begin, int64_t end) {
    LossInterval<S> loss(a, upsampling);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t n = k / s.H, i = k % s.H;
      const bool empty = upsampling.first_row[i] == upsampling.first_row[i + 1];
      if (!empty) totals[k] = loss.run(n, i);
      if (!grad) continue;
      S* out[2] = {grad + (n * s.C * s.H + i) * s.W, below_of(k)};
      const int64_t stride[2] = {s.H * s.W, s.W};
      if (empty) {
        for (int64_t c = 0; c < s.C; ++c) std::fill_n(out[0] + c * stride[0], s.W, S(0));
        std::fill_n(out[1], row, S(0));
        continue;
      }
      const S* wide[2] = {loss.grad(0), loss.grad(1)};
      narrow(wide, s.C, s.W, upsampling.columns, first_column, out, stride);
    }
  });
  DoubleTotals total;
  for (const DoubleTotals& part : totals) {
    total.loss += part.loss;
    total.weight += part.weight;
  }
  static_cast<S*>(a.totals)[0] = static_cast<S>(total.loss);
  static_cast<S*>(a.totals)[1] = static_cast<S>(total.weight);
  if (!grad || s.H == s.h) return;  // without upsampling, a row y has no lower row
  for_each_interval(s, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t c = 0; k % s.H != 0 && c < s.C; ++c) {
        S* out = grad + ((k / s.H * s.C + c) * s.H + k % s.H) * s.W;
        const S* added = below_of(k - 1) + c * s.W;
        for (int64_t j = 0; j < s.W; ++j) out[j] += added[j];
      }
  });
}

// Where scipy.ndimage.zoom samples an axis (see CoarseProbability).
struct CoarseSample {
  int64_t lower, upper, nearest;
  double weight;  // of `upper`
  bool inside;
};

inline std::vector<CoarseSample> coarse_samples(int64_t pixels, int64_t samples) {
  std::vector<CoarseSample> result(samples);
  const double last = static_cast<double>(pixels - 1);
  const double step = samples > 1 ? last / static_cast<double>(samples - 1) : 1;
  for (int64_t i = 0; i < samples; ++i) {
    const double exact = static_cast<double>(i) * step, position = std::min(exact, last);
    const int64_t lower = static_cast<int64_t>(position);
    result[i] = {lower, std::min(lower + 1, pixels - 1), static_cast<int64_t>(std::min(position + 0.5, last)),
                 position - static_cast<double>(lower), exact <= last};
  }
  return result;
}

template <typename S>
void coarse_probability_of(const CoarseProbability& a) {
  const LossSizes& s = a.input.sizes;
  const S* logits = static_cast<const S*>(a.input.logits);
  const std::vector<CoarseSample> rows = coarse_samples(s.h, a.rows), columns = coarse_samples(s.w, a.columns);
  if (s.N * a.rows * a.columns == 0) return;
  const Axis<S> all_rows = upsampling<S>(s.H, s.h), all_columns = upsampling<S>(s.W, s.w);
  Axis<S> pixels;  // the lower and the upper pixel of each sample
  for (const CoarseSample& column : columns) {
    pixels.add(all_columns, column.lower);
    pixels.add(all_columns, column.upper);
  }
  pixels.pad();
  const int64_t grain = std::max<int64_t>(1, kLossGrain / (s.C * pixels.size() * 2));
  torch::stable::parallel_for(0, s.N * a.rows, grain, [&](int64_t begin, int64_t end) {
    const int64_t count = pixels.size() / kLanes<S>;
    Vectors<S> above(count * s.C), below(count * s.C), exponentials(s.C), labels(count), probabilities[2];
    for (Vectors<S>& row : probabilities) row = Vectors<S>(count);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t n = k / a.rows;
      const CoarseSample& row = rows[k % a.rows];
      const int64_t* target = a.target + (n * s.h + row.nearest) * s.w;
      for (int64_t j = 0; j < a.columns; ++j) {
        const int64_t label = row.inside && columns[j].inside ? target[columns[j].nearest] : 0;
        labels.data()[2 * j] = labels.data()[2 * j + 1] = read_label<S>(label, a.ignored, s.C);
      }
      for (int64_t side = 0; side < 2; ++side) {
        const int64_t y = side ? row.upper : row.lower;
        const S* sample = logits + n * s.C * s.H * s.W;
        widen(sample + all_rows.lower[y] * s.W, s.H * s.W, s.C, pixels, above.data());
        widen(sample + all_rows.upper[y] * s.W, s.H * s.W, s.C, pixels, below.data());
        for (int64_t block = 0; block < count; ++block) {
          const int64_t x = block * kLanes<S>;
          Softmax<S> result;
          softmax(above.data() + x * s.C, below.data() + x * s.C, all_rows.lower_weight[y], all_rows.upper_weight[y],
                  s.C, labels.data() + x, exponentials.data(), result);
          vector_at(probabilities[side].data(), block) = result.probability;
        }
      }
      S* out = static_cast<S*>(a.probability) + k * a.columns;
      for (int64_t j = 0; j < a.columns; ++j) {
        const double wx = columns[j].weight, wy = row.weight;
        const S* p0 = probabilities[0].data() + 2 * j;
        const S* p1 = probabilities[1].data() + 2 * j;
        const double between =
            p0[0] * (1 - wy) * (1 - wx) + p0[1] * (1 - wy) * wx + p1[0] * wy * (1 - wx) + p1[1] * wy * wx;
        if (labels.data()[2 * j] < 0)
          out[j] = std::numeric_limits<S>::infinity();
        else
          out[j] = row.inside && columns[j].inside ? static_cast<S>(between) : S(0);
      }
    }
  });
}

template <typename S>
void upsampled_classes_of(const UpsampledClasses& a) {
  const LossSizes& s = a.input.sizes;
  const Upsampling<S> upsampling(s);
  for_each_interval(s, [&](int64_t begin, int64_t end) {
    WideRows<S> wide(s, static_cast<const S*>(a.input.logits), upsampling.columns);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t n = k / s.H, i = k % s.H, first = upsampling.first_row[i], last = upsampling.first_row[i + 1];
      if (first == last) continue;
      const S* above = wide(n, i);
      const S* below = wide(n, upsampling.rows.upper[first]);
      for (int64_t x = 0; x < s.w; x += kLanes<S>)
        for (int64_t y = first; y < last; ++y) {
          const S above_weight = upsampling.rows.lower_weight[y], below_weight = upsampling.rows.upper_weight[y];
          Vector<S> largest = Vector<S>{} - std::numeric_limits<S>::infinity(), index{}, unknown{};
          for (int64_t c = 0; c < s.C; ++c) {
            const Vector<S> logit = vector_at(const_cast<S*>(above) + x * s.C, c) * above_weight +
                                    vector_at(const_cast<S*>(below) + x * s.C, c) * below_weight;
            index = logit > largest ? Vector<S>{} + static_cast<S>(c) : index;
            largest = logit > largest ? logit : largest;
            unknown = logit == logit ? unknown : Vector<S>{} + S(255);
          }
          index = unknown > index ? unknown : index;
          uint8_t* classes = a.classes + (n * s.h + y) * s.w + x;
          for (int64_t lane = 0; lane < std::min(kLanes<S>, s.w - x); ++lane)
            classes[lane] = static_cast<uint8_t>(index[lane]);
        }
    }
  });
}

void segmentation_loss(const SegmentationLoss& a) {
  a.input.wide ? segmentation_loss_of<double>(a) : segmentation_loss_of<float>(a);
}

void coarse_probability(const CoarseProbability& a) {
  a.input.wide ? coarse_probability_of<double>(a) : coarse_probability_of<float>(a);
}

void upsampled_classes(const UpsampledClasses& a) {
  a.input.wide ? upsampled_classes_of<double>(a) : upsampled_classes_of<float>(a);
}

}  // namespace
}  // namespace fused
