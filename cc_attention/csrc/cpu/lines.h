// Criss-cross attention on the CPU, compiled once for each instruction set (see product.h).
//
// A line is the pixels along one axis, for one head: a separate attention problem. Its maps are [pixels, channels] with
// a constant stride between pixels. There is one pass over all lines of each axis. The first one is along the last
// axis; its lines include the pixel itself, and it writes the outputs. The others add to them. A line is processed in
// chunks of channels. Each chunk is packed and converted to the summing type, so it stays in the caches.
//
// bfloat16 is converted to float32 as well: on a Xeon of 2023, its own instruction (vdpbf16ps) computes half as many
// products per second. Other processors have faster ones (docs/performance.md), which are not used.
#pragma once

#include "instruction_sets.h"
#include "product.h"

namespace cc_attention {
namespace {

constexpr int64_t kChunk = 64;       // channels; a multiple of the lanes of every vector
constexpr int64_t kGrain = 1 << 16;  // multiplications below which a task is not worth a thread

// A pass over all lines of an axis.
struct Pass {
  Axis axis;
  bool first, last;
};

// Calls body with each pass.
template <typename Body>
void for_each_pass(int axes, const Body& body) {
  bool first = true;
  for (const Axis axis : {kRow, kColumn, kFrames}) {
    if (!(axes & 1 << axis)) continue;
    axes &= ~(1 << axis);
    body(Pass{axis, first, axes == 0});
    first = false;
  }
}

struct Line {
  int64_t first, step, count;  // in pixels: index of the first, stride, number
  int64_t next;                // pixels from this line to the next
  int64_t head, heads;
  bool self;  // whether a pixel attends to itself

  int64_t pixel(int64_t i) const { return first + i * step; }
  // The index of a head's pixel in [pixels, heads].
  int64_t entry(int64_t i) const { return pixel(i) * heads + head; }
};

inline int64_t length(const Sizes& s, Axis axis) { return axis == kRow ? s.W : axis == kColumn ? s.H : s.T; }

// Calls body in parallel on ranges of lines, for all samples and heads. body gets a function that calls its argument
// with each Line of the range. multiplications: the number for a pair of pixels.
template <typename Body>
void for_each_line(const Sizes& s, const Pass& pass, int64_t multiplications, const Body& body) {
  const int64_t count = length(s, pass.axis), lines = count == 0 ? 0 : s.pixels() / count * s.heads;
  const int64_t step = pass.axis == kRow ? 1 : pass.axis == kColumn ? s.W : s.H * s.W;
  const int64_t next = pass.axis == kRow ? s.W : 1;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, count * count * multiplications));
  torch::stable::parallel_for(0, lines, grain, [&](int64_t begin, int64_t end) {
    body([&](const auto& each) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t line = i / s.heads;  // the lines of a block of `step` pixels start next to each other
        each(Line{line / step * step * count + line % step, step, count, next, i % s.heads, s.heads, pass.first});
      }
    });
  });
}

// The channels of one head of a feature map: [pixels, channels], pitch elements from a pixel to the next.
template <typename T>
struct Channels {
  T* data;
  int64_t pitch, count;

  // The address of a channel of a line's first pixel, and the elements from a pixel of the line to the next.
  T* at(const Line& line, int64_t channel) const { return data + line.first * pitch + channel; }
  int64_t row(const Line& line) const { return line.step * pitch; }
};

template <typename T>
Channels<const T> channels_of(const Map& map, int64_t count, const Line& line) {
  return {static_cast<const T*>(map.data) + line.head * count, map.pitch, count};
}
template <typename T>
Channels<T> channels_of(const MutableMap& map, int64_t count, const Line& line) {
  return {static_cast<T*>(map.data) + line.head * count, map.pitch, count};
}

// An array of zeros, aligned to cache lines.
template <typename S>
class Buffer {
 public:
  explicit Buffer(int64_t size) : blocks_(ceil_div(size, kBlock)) {}
  S* data() { return blocks_.data()->elements; }
  S& operator[](int64_t i) { return data()[i]; }

 private:
  static constexpr int64_t kBlock = 64 / sizeof(S);
  struct alignas(64) Block {
    S elements[kBlock];
  };
  std::vector<Block> blocks_;
};

// Buffers of a thread for lines of n pixels.
//
// The matrices of a line are [seen, from]: a row for each pixel that is attended to, and the pixels that attend to it
// next to each other. So a vector has one number of each of several pixels, and maxima and sums over what a pixel
// attends to need no reduction within a vector. No result depends on the lanes after pixel n.
template <typename S>
struct Workspace {
  // A row of a matrix is an odd number of whole vectors, so that rows do not compete for the same cache sets.
  explicit Workspace(int64_t n)
      : n(n),
        vectors(ceil_div(n, kLanes<S>)),
        row((vectors | 1) * kLanes<S>),
        scores(n * row),
        products(n * row),
        rows(vectors * kLanes<S> * kChunk),
        columns(kChunk * row),
        maximum(row),
        sum(row),
        before(row),
        factor(row),
        scale(n),
        ones(n) {
    std::fill_n(ones.data(), n, S(1));
  }

  int64_t n, vectors, row;
  Buffer<S> scores, products;              // [n, row]
  Buffer<S> rows;                          // [n padded to vectors, kChunk], a chunk of a line's channels
  Buffer<S> columns;                       // [kChunk, row], its transpose
  Buffer<S> maximum, sum, before, factor;  // [row], of the pixels that attend; backward: sum is the mean of gradients
  Buffer<S> scale, ones;                   // [n]

  Strided<S> scores_matrix() { return {scores.data(), row, 1}; }
  Strided<S> products_matrix() { return {products.data(), row, 1}; }
  Strided<S> rows_matrix() { return {rows.data(), kChunk, 1}; }
};

// Copies a chunk of the channels of the pixels of a line, from pixel `first`, to w.rows.
template <typename T, typename S>
void load(const Channels<const T>& map, int64_t begin, int64_t width, const Line& line, Workspace<S>& w,
          int64_t first = 0) {
  const T* from = map.at(line, begin) + first * map.row(line);
  for (int64_t i = first; i < line.count; ++i, from += map.row(line)) convert(from, &w.rows[i * kChunk], width);
}

// Copies a chunk of the channels of a line to w.columns. What is not whole vectors, or of another type, goes through
// w.rows.
template <typename T, typename S>
void load_transposed(const Channels<const T>& map, int64_t begin, int64_t width, const Line& line, Workspace<S>& w) {
  int64_t whole = 0;
  if constexpr (std::is_same_v<T, S>)
    if (width % kLanes<S> == 0) {
      whole = line.count / kLanes<S> * kLanes<S>;
      transpose(whole, width, map.at(line, begin), map.row(line), w.columns.data(), w.row);
    }
  load(map, begin, width, line, w, whole);
  transpose(w.n - whole, width, w.rows.data() + whole * kChunk, kChunk, w.columns.data() + whole, w.row);
}

// Returns the next chunk in two maps, for prefetching: the next channels of this line, or the first ones of the next
// head or line.
template <typename T>
Ahead chunk_after(const Channels<const T>& first, const Channels<const T>& second, int64_t begin, const Line& line) {
  const auto next = [&](const Channels<const T>& map) {
    const T* own = map.at(line, 0);
    if (begin + kChunk < first.count) return own + begin + kChunk;
    return line.head + 1 < line.heads ? own + map.count : own + line.next * map.pitch - line.head * map.count;
  };
  const int64_t size = sizeof(T);
  return {next(first), first.row(line) * size, next(second), second.row(line) * size,
          std::min(kChunk, first.count) * size};
}

template <typename Body>
void for_each_chunk(int64_t channels, const Body& body) {
  for (int64_t begin = 0; begin < channels; begin += kChunk) body(begin, std::min(kChunk, channels - begin));
}

// out[i, j] = scale * sum over channels of a[pixel i] * b[pixel j], [n, row]. With weights in `merge`, out gets the
// gradient that Merge describes.
template <typename T, typename S>
void line_scores(const Channels<const T>& a, const Channels<const T>& b, const Line& line, S scale, Workspace<S>& w,
                 S* out, Merge<S> merge = {}) {
  if (a.count == 0) std::fill_n(out, w.n * w.row, S(0));
  if (scale != 1) std::fill_n(w.scale.data(), w.n, scale);
  merge.factor = scale == 1 ? nullptr : w.scale.data();
  const S* const weights = merge.weights;
  for_each_chunk(a.count, [&](int64_t begin, int64_t width) {
    load_transposed(b, begin, width, line, w);
    Strided<S> factors = w.rows_matrix();
    if constexpr (std::is_same_v<T, S>)
      factors = {a.at(line, begin), a.row(line), 1};
    else
      load(a, begin, width, line, w);
    merge.before = begin == 0 ? nullptr : w.ones.data();
    merge.weights = begin + width == a.count ? weights : nullptr;
    multiply(w.n, w.vectors * kLanes<S>, width, factors, {w.columns.data(), w.row}, out, w.row, merge,
             chunk_after(a, b, begin, line));
  });
}

// out[pixel i] gets the sum over j of weights[i, j] * map[pixel j], as `merge` says.
template <typename T, typename S>
void line_sums(const Strided<S>& weights, const Channels<const T>& map, const Line& line, Workspace<S>& w,
               const Channels<T>& out, const Merge<S>& merge) {
  for_each_chunk(map.count, [&](int64_t begin, int64_t width) {
    Panel<S> panel = {w.rows.data(), kChunk};
    if constexpr (std::is_same_v<T, S>)
      if (width == kChunk) panel = {map.at(line, begin), map.row(line), w.rows.data(), kChunk};
    if (panel.copy == nullptr) load(map, begin, width, line, w);
    multiply(w.n, width, w.n, weights, panel, out.at(line, begin), out.row(line), merge,
             chunk_after(map, {out.data, out.pitch, out.count}, begin, line));
  });
}

// Calls body for the vectors of a row of a matrix, up to two cache lines at a time: with the index of the first vector,
// and the number of vectors as a compile-time constant.
template <typename S, typename Body>
void for_each_columns(const Workspace<S>& w, const Body& body) {
  constexpr int kMost = 128 / kVectorBytes;
  for (int64_t begin = 0; begin < w.vectors; begin += kMost)
    with_constant<kMost>(w.vectors - begin, [&](auto count) { body(begin, count); });
}

// Replaces the scores of a line by their exponentials, and updates the normalizers. The softmax weights are w.factor
// times the exponentials.
//
// First pass: the softmax over the line; the normalizers of the line. Other passes: the line's part of the softmax over
// all lines so far; the normalizers of all of them; w.before, the factor by which the result so far must be scaled. A
// pixel whose scores are all -inf gets zeros, and NaN in the last pass.
template <typename S>
void line_softmax(const Line& line, bool last, Workspace<S>& w, Normalizer<S>* normalizers) {
  constexpr S kNone = -std::numeric_limits<S>::infinity();
  constexpr int64_t kShort = 16;  // a sum of short sums is more accurate than one long sum
  for (int64_t i = 0; i < w.n; ++i) {
    const Normalizer<S> so_far = line.self ? Normalizer<S>{kNone, 0} : normalizers[line.entry(i)];
    w.maximum[i] = so_far.top;
    w.before[i] = so_far.total;
    if (!line.self) w.scores[i * w.row + i] = kNone;
  }
  for_each_columns(w, [&](int64_t begin, auto count) {
    S* const scores = w.scores.data() + begin * kLanes<S>;
    Vector<S> base[count()], sums[count()];
    for (int v = 0; v < count(); ++v) base[v] = vector_at(w.maximum.data(), begin + v);
    for (int64_t j = 0; j < w.n; ++j)
      for (int v = 0; v < count(); ++v) {
        const Vector<S>& score = vector_at(scores + j * w.row, v);
        base[v] = score > base[v] ? score : base[v];
      }
    for (int v = 0; v < count(); ++v) {
      const Vector<S> maximum = base[v], top = vector_at(w.maximum.data(), begin + v);
      vector_at(w.maximum.data(), begin + v) = maximum;
      base[v] = maximum == kNone ? Vector<S>{} : maximum;  // avoids -inf - -inf = NaN
      sums[v] = top - base[v];
      exponential(sums[v]);
      vector_at(w.before.data(), begin + v) *= sums[v];
      sums[v] = Vector<S>{};
    }
    for (int64_t first = 0; first < w.n; first += kShort) {
      Vector<S> short_sums[count()] = {};
      for (int64_t j = first; j < std::min(first + kShort, w.n); ++j)
        for (int v = 0; v < count(); ++v) {
          Vector<S> power = vector_at(scores + j * w.row, v) - base[v];
          exponential(power);
          vector_at(scores + j * w.row, v) = power;
          short_sums[v] += power;
        }
      for (int v = 0; v < count(); ++v) sums[v] += short_sums[v];
    }
    for (int v = 0; v < count(); ++v) vector_at(w.sum.data(), begin + v) = sums[v];
  });
  const S of_none = last ? std::numeric_limits<S>::quiet_NaN() : S(0);
  for (int64_t i = 0; i < w.n; ++i) {
    const S total = w.before[i] + w.sum[i];
    w.factor[i] = total == 0 ? of_none : 1 / total;
    w.before[i] *= w.factor[i];
    normalizers[line.entry(i)] = {w.maximum[i], total};
  }
}

// sum[pixel i] = residual[pixel i] + gamma * out[pixel i]
template <typename T, typename S>
void line_residual(const Channels<const T>& residual, S gamma, const Channels<T>& out, const Line& line,
                   const Channels<T>& sum) {
  for (int64_t i = 0; i < line.count; ++i) {
    const T* a = residual.at(line, i * residual.row(line));
    const T* b = out.at(line, i * out.row(line));
    T* to = sum.at(line, i * sum.row(line));
    for (int64_t j = 0; j < out.count; ++j) to[j] = static_cast<T>(static_cast<S>(a[j]) + gamma * static_cast<S>(b[j]));
  }
}

template <typename T>
void forward(const Forward& f) {
  using S = Sum<T>;
  const Sizes& s = f.sizes;
  for_each_pass(f.axes, [&](const Pass& pass) {
    for_each_line(s, pass, s.c + s.C, [&](const auto& lines) {
      Workspace<S> w(length(s, pass.axis));
      lines([&](const Line& line) {
        line_scores(channels_of<T>(f.key, s.c, line), channels_of<T>(f.query, s.c, line), line, static_cast<S>(f.scale),
                    w, w.scores.data());
        line_softmax(line, pass.last, w, static_cast<Normalizer<S>*>(f.normalizer));
        const Channels<T> out = channels_of<T>(f.out, s.C, line);
        line_sums(transposed(w.scores_matrix()), channels_of<T>(f.value, s.C, line), line, w, out,
                  Merge<S>{pass.first ? nullptr : w.before.data(), w.factor.data()});
        if (pass.last && f.residual.data != nullptr)
          line_residual(channels_of<T>(f.residual, s.C, line), *static_cast<const S*>(f.gamma), out, line,
                        channels_of<T>(f.sum, s.C, line));
      });
    });
  });
}

// Replaces the scores of a line by gamma times the softmax weights that the forward computed.
template <typename S>
void line_probabilities(const Line& line, S gamma, const Normalizer<S>* normalizers, Workspace<S>& w) {
  for (int64_t i = 0; i < w.n; ++i) {
    const Normalizer<S> normalizer = normalizers[line.entry(i)];
    w.maximum[i] = normalizer.top;
    w.factor[i] = gamma / normalizer.total;
  }
  for_each_columns(w, [&](int64_t begin, auto count) {
    for (int64_t j = 0; j < w.n; ++j)
      for (int v = 0; v < count(); ++v) {
        Vector<S>& score = vector_at(&w.scores[j * w.row], begin + v);
        Vector<S> power = score - vector_at(w.maximum.data(), begin + v);
        exponential(power);
        score = power * vector_at(w.factor.data(), begin + v);
      }
  });
  if (!line.self)
    for (int64_t i = 0; i < w.n; ++i) w.scores[i * w.row + i] = 0;
}

// delta[pixel i] = sum over channels of grad * out.
template <typename T, typename S>
void line_delta(const Channels<const T>& grad, const Channels<const T>& out, const Line& line, S* delta) {
  constexpr int64_t kVectors = kChunk / kLanes<S>;
  for (int64_t i = 0; i < line.count; ++i) {
    alignas(kVectorBytes) S sums[kChunk] = {};
    if (line.head + 1 < line.heads)  // the next head, which is not what processors prefetch themselves
      for (int64_t j = 0; j < out.count; j += 64 / sizeof(T))
        __builtin_prefetch(out.at(line, out.count + j + i * out.row(line)), 0, 2);
    for_each_chunk(out.count, [&](int64_t begin, int64_t width) {
      const T *a = grad.at(line, begin + i * grad.row(line)), *b = out.at(line, begin + i * out.row(line));
      for (int64_t j = 0; j < width; ++j) sums[j] += static_cast<S>(a[j]) * static_cast<S>(b[j]);
    });
    for (int64_t v = 1; v < kVectors; ++v) vector_at(sums) += vector_at(sums, v);
    delta[line.entry(i)] = std::accumulate(sums, sums + kLanes<S>, S(0));
  }
}

template <typename T>
void backward(const Backward& b) {
  using S = Sum<T>;
  const Sizes& s = b.sizes;
  const S scale = static_cast<S>(b.scale), gamma = b.gamma == nullptr ? S(1) : *static_cast<const S*>(b.gamma);
  Buffer<S> delta(s.pixels() * s.heads);
  for_each_pass(b.axes, [&](const Pass& pass) {
    for_each_line(s, pass, 3 * s.c + 2 * s.C, [&](const auto& lines) {
      Workspace<S> w(length(s, pass.axis));
      const Merge<S> add = {pass.first ? nullptr : w.ones.data(), nullptr};
      lines([&](const Line& line) {
        const auto query = channels_of<T>(b.query, s.c, line), key = channels_of<T>(b.key, s.c, line);
        const auto grad = channels_of<T>(b.grad, s.C, line);
        line_scores(key, query, line, scale, w, w.scores.data());
        line_probabilities(line, gamma, static_cast<const Normalizer<S>*>(b.normalizer), w);
        if (pass.first) line_delta(grad, channels_of<T>(b.out, s.C, line), line, delta.data());
        line_sums(w.scores_matrix(), grad, line, w, channels_of<T>(b.grad_value, s.C, line), add);
        for (int64_t i = 0; i < w.n; ++i) w.sum[i] = scale * delta[line.entry(i)];
        line_scores(channels_of<T>(b.value, s.C, line), grad, line, scale, w, w.products.data(),
                    {nullptr, nullptr, w.scores.data(), w.sum.data(), w.row});
        line_sums(transposed(w.products_matrix()), key, line, w, channels_of<T>(b.grad_query, s.c, line), add);
        line_sums(w.products_matrix(), query, line, w, channels_of<T>(b.grad_key, s.c, line), add);
      });
    });
  });
  if (b.grad_gamma != nullptr) {
    double sum = 0;
    for (int64_t i = 0; i < s.pixels() * s.heads; ++i) sum += delta[i];
    *static_cast<S*>(b.grad_gamma) = static_cast<S>(sum);
  }
}

// Returns the index, in weights [N,L,H,W], of the weight with which pixel `from` of a line attends to pixel `seen`.
inline int64_t weight_index(const Sizes& s, const Line& line, int64_t from, int64_t seen) {
  const int64_t l = line.self ? seen : s.W + column_entry(seen, from);
  const int64_t n = line.first / (s.H * s.W), pixel = line.pixel(from) % (s.H * s.W);
  return (n * s.L() + l) * s.H * s.W + pixel;
}

template <typename T>
void primitive(Primitive primitive, const Sizes& sizes, const T* first, const T* second, T* out) {
  using S = Sum<T>;
  Sizes s = sizes;
  s.heads = s.T = 1;
  for_each_pass(1 << kRow | 1 << kColumn, [&](const Pass& pass) {
    for_each_line(s, pass, s.C, [&](const auto& lines) {
      Workspace<S> w(length(s, pass.axis));
      const auto for_each_weight = [&](const Line& line, const auto& body) {
        for (int64_t seen = 0; seen < w.n; ++seen)
          for (int64_t from = 0; from < w.n; ++from)
            if (line.self || seen != from) body(weight_index(s, line, from, seen), w.scores[seen * w.row + from]);
      };
      const Channels<const T> a = {first, s.C, s.C}, b = {second, s.C, s.C};
      lines([&](const Line& line) {
        if (primitive == Primitive::score) {
          line_scores(b, a, line, S(1), w, w.scores.data());
          for_each_weight(line, [&](int64_t index, S score) { out[index] = static_cast<T>(score); });
          return;
        }
        for_each_weight(line, [&](int64_t index, S& weight) { weight = static_cast<S>(first[index]); });
        const Strided<S> weights = w.scores_matrix();  // [seen, from]; without the pixel itself, the diagonal stays 0
        line_sums(primitive == Primitive::gather ? transposed(weights) : weights, b, line, w,
                  Channels<T>{out, s.C, s.C}, Merge<S>{pass.first ? nullptr : w.ones.data(), nullptr});
      });
    });
  });
}

// Calls body with a value of the storage type of dtype.
template <typename Body>
void with_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32:
      return body(float());
    case Dtype::float64:
      return body(double());
    case Dtype::float16:
      return body(torch::headeronly::Half());
    case Dtype::bfloat16:
      return body(torch::headeronly::BFloat16());
  }
}

void run_forward(const Forward& arguments) {
  with_type(arguments.dtype, [&](auto type) { forward<decltype(type)>(arguments); });
}

void run_backward(const Backward& arguments) {
  with_type(arguments.dtype, [&](auto type) { backward<decltype(type)>(arguments); });
}

void run_primitive(Primitive which, Dtype dtype, const Sizes& sizes, const void* first, const void* second, void* out) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    primitive(which, sizes, static_cast<const T*>(first), static_cast<const T*>(second), static_cast<T*>(out));
  });
}

}  // namespace
}  // namespace cc_attention
