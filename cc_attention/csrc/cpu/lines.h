// Criss-cross attention on the CPU, compiled once for each instruction set (see product.h).
//
// A line is a row or a column of pixels, and a separate attention problem. Its maps are [pixels, channels] with a
// constant stride between pixels. All rows come first and write the outputs; all columns follow and add to them. A line
// is processed in chunks of channels. Each chunk is packed and converted to the summing type, so it stays in the
// caches.
//
// bfloat16 is converted to float32 as well: its own instruction (vdpbf16ps) computes half as many products per second
// on the processors measured (a Xeon of 2023).
#pragma once

#include "instruction_sets.h"
#include "product.h"

namespace cc_attention {
namespace {

constexpr int64_t kChunk = 64;       // channels; a multiple of the lanes of every vector
constexpr int64_t kGrain = 1 << 16;  // multiplications below which a task is not worth a thread

struct Line {
  int64_t first, step, count;  // in pixels: index of the first, stride, number
  int64_t next;                // pixels from this line to the next
  bool column;                 // in a column, a pixel does not attend to itself

  int64_t pixel(int64_t i) const { return first + i * step; }
};

// Calls body in parallel on ranges of lines, for the columns or the rows of all samples. body gets a function that
// calls its argument with each Line of the range.
template <typename Body>
void for_each_line(const Sizes& s, bool column, int64_t channels, const Body& body) {
  const int64_t count = column ? s.H : s.W, lines = s.N * (column ? s.W : s.H);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, count * count * channels));
  torch::stable::parallel_for(0, lines, grain, [&](int64_t begin, int64_t end) {
    body([&](const auto& each) {
      for (int64_t i = begin; i < end; ++i)
        each(column ? Line{i / s.W * s.H * s.W + i % s.W, s.W, s.H, 1, true} : Line{i * s.W, 1, s.W, s.W, false});
    });
  });
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
template <typename S>
struct Workspace {
  // A row of an [n, n] matrix is an odd number of whole vectors, so that rows do not compete for the same cache sets.
  explicit Workspace(int64_t n)
      : n(n),
        row((ceil_div(n, kLanes<S>) | 1) * kLanes<S>),
        padded(ceil_div(n, kLanes<S>) * kLanes<S>),
        scores(n * row),
        products(n * row),
        rows(padded * kChunk),
        columns(kChunk * row),
        maximum(n),
        sum(n),
        scale(n),
        ones(n) {
    std::fill_n(ones.data(), n, S(1));
  }

  int64_t n, row, padded;
  Buffer<S> scores, products;           // [n, row]
  Buffer<S> rows;                       // [padded, kChunk], a chunk of a line's channels
  Buffer<S> columns;                    // [kChunk, row], its transpose
  Buffer<S> maximum, sum, scale, ones;  // [n]

  Strided<S> scores_matrix() { return {scores.data(), row, 1}; }
  Strided<S> products_matrix() { return {products.data(), row, 1}; }
  Strided<S> rows_matrix() { return {rows.data(), kChunk, 1}; }
};

// Copies a chunk of the channels of a line from [pixels, channels] to [n, kChunk], padded with zeros to whole vectors.
template <typename T, typename S>
void load(const T* map, int64_t channels, int64_t begin, int64_t width, const Line& line, S* rows) {
  for (int64_t i = 0; i < line.count; ++i) {
    const T* from = map + line.pixel(i) * channels + begin;
    convert(from, rows + i * kChunk, width);
    for (int64_t j = width; j % kLanes<S> != 0; ++j) rows[i * kChunk + j] = 0;
  }
}

// Returns the next chunk in two maps, for prefetching: the next channels of this line, or the first of the next line.
template <typename T>
Ahead chunk_after(const T* first, const T* second, int64_t channels, int64_t begin, const Line& line) {
  const int64_t next = begin + kChunk < channels ? begin + kChunk : line.next * channels;
  const int64_t offset = line.first * channels + next, size = sizeof(T);
  return {first + offset, second + offset, line.step * channels * size, std::min(kChunk, channels) * size};
}

template <typename Body>
void for_each_chunk(int64_t channels, const Body& body) {
  for (int64_t begin = 0; begin < channels; begin += kChunk) body(begin, std::min(kChunk, channels - begin));
}

// out[i, j] = sum over channels of a[pixel i] * b[pixel j], [n, row]. a, b [pixels, channels]
template <typename T, typename S>
void line_scores(const T* a, const T* b, int64_t channels, const Line& line, Workspace<S>& w, S* out) {
  if (channels == 0) std::fill_n(out, w.n * w.row, S(0));
  for_each_chunk(channels, [&](int64_t begin, int64_t width) {
    load(b, channels, begin, width, line, w.rows.data());
    transpose(w.n, width, w.rows.data(), kChunk, w.columns.data(), w.row);
    Strided<S> factors = w.rows_matrix();
    if constexpr (std::is_same_v<T, S>)
      factors = {a + line.first * channels + begin, line.step * channels, 1};
    else
      load(a, channels, begin, width, line, w.rows.data());
    multiply(w.n, w.padded, width, factors, {w.columns.data(), w.row}, out, w.row, begin == 0 ? nullptr : w.ones.data(),
             chunk_after(a, b, channels, begin, line));
  });
}

// out[pixel i] = scale[i] * out[pixel i] + sum over j of weights[i, j] * map[pixel j]. map, out [pixels, channels]
template <typename T, typename S>
void line_sums(const Strided<S>& weights, const T* map, int64_t channels, const Line& line, Workspace<S>& w, T* out,
               const S* scale) {
  for_each_chunk(channels, [&](int64_t begin, int64_t width) {
    const int64_t offset = line.first * channels + begin, row = line.step * channels;
    Panel<S> panel = {w.rows.data(), kChunk};
    if constexpr (std::is_same_v<T, S>)
      if (width == kChunk) panel = {map + offset, row, w.rows.data(), kChunk};
    if (panel.copy == nullptr) load(map, channels, begin, width, line, w.rows.data());
    multiply(w.n, width, w.n, weights, panel, out + offset, row, scale,
             chunk_after(map, static_cast<const T*>(out), channels, begin, line));
  });
}

// Replaces the scores of a line by softmax weights, and updates the normalizers.
//
// Row pass: the softmax over the row, or zeros for a pixel whose scores are all -inf; the normalizers of the row.
// Column pass: the column's part of the softmax over row and column, or NaN if all scores are -inf; the normalizers of
// both; w.scale, the factor by which the row's result must be scaled.
//
// Each loop computes one quantity for all pixels: short chains of operations of different pixels can overlap.
template <typename S>
void line_softmax(const Line& line, Workspace<S>& w, Normalizer<S>* normalizers) {
  constexpr S kNone = -std::numeric_limits<S>::infinity();
  const int64_t vectors = w.padded / kLanes<S>;
  for (int64_t i = 0; i < w.n; ++i) {
    S* scores = &w.scores[i * w.row];
    std::fill(scores + w.n, scores + w.padded, kNone);
    if (line.column) scores[i] = kNone;
    const auto larger = [&](const Vector<S>& a, const Vector<S>& b) { return a > b ? a : b; };
    Vector<S> maxima = vector_at(scores);
    for (int64_t j = 1; j < vectors; ++j) maxima = larger(vector_at(scores, j), maxima);
    const S maximum = reduce<S>(maxima, larger);
    w.maximum[i] = line.column ? std::max(maximum, normalizers[line.pixel(i)].top) : maximum;
  }
  for (int64_t i = 0; i < w.n; ++i) {
    const S base = w.maximum[i] == kNone ? 0 : w.maximum[i];  // avoids -inf - -inf = NaN
    Vector<S> sums = {};
    for (int64_t j = 0; j < vectors; ++j) {
      Vector<S>& power = vector_at(&w.scores[i * w.row], j);
      power -= base;
      exponential(power);
      sums += power;
    }
    w.sum[i] = reduce<S>(sums, [&](const Vector<S>& a, const Vector<S>& b) { return a + b; });
  }
  for (int64_t i = 0; i < w.n; ++i) {
    Normalizer<S>& normalizer = normalizers[line.pixel(i)];
    const S row = line.column ? std::exp(normalizer.top - w.maximum[i]) * normalizer.total : S(0);
    const S total = row + w.sum[i], factor = total == 0 ? 0 : 1 / total;
    w.scale[i] = row * factor;
    normalizer = {w.maximum[i], total};
    for (int64_t j = 0; j < vectors; ++j) vector_at(&w.scores[i * w.row], j) *= factor;
  }
}

template <typename T>
void forward(const Forward& f) {
  using S = Sum<T>;
  const Sizes& s = f.sizes;
  const T *query = static_cast<const T*>(f.query), *key = static_cast<const T*>(f.key);
  for (bool column : {false, true}) {
    for_each_line(s, column, s.c + s.C, [&](const auto& lines) {
      Workspace<S> w(column ? s.H : s.W);
      lines([&](const Line& line) {
        line_scores(query, key, s.c, line, w, w.scores.data());
        line_softmax(line, w, static_cast<Normalizer<S>*>(f.normalizer));
        line_sums(w.scores_matrix(), static_cast<const T*>(f.value), s.C, line, w, static_cast<T*>(f.out),
                  column ? w.scale.data() : nullptr);
      });
    });
  }
}

// Replaces the scores of a line by the softmax weights that the forward computed.
template <typename S>
void line_probabilities(const Line& line, const Normalizer<S>* normalizers, Workspace<S>& w) {
  for (int64_t i = 0; i < w.n; ++i) {
    S* scores = &w.scores[i * w.row];
    const Normalizer<S> normalizer = normalizers[line.pixel(i)];
    const S factor = 1 / normalizer.total;
    for (int64_t j = 0; j < w.padded / kLanes<S>; ++j) {
      Vector<S> power = vector_at(scores, j) - normalizer.top;
      exponential(power);
      vector_at(scores, j) = power * factor;
    }
    if (line.column) scores[i] = 0;
  }
}

// delta[pixel i] = sum over channels of grad_out * out.
template <typename T, typename S>
void line_delta(const T* grad_out, const T* out, int64_t channels, const Line& line, S* delta) {
  for (int64_t i = 0; i < line.count; ++i) {
    const int64_t pixel = line.pixel(i) * channels;
    S sums[kChunk] = {};
    for_each_chunk(channels, [&](int64_t begin, int64_t width) {
      const T *a = grad_out + pixel + begin, *b = out + pixel + begin;
      for (int64_t j = 0; j < width; ++j) sums[j] += static_cast<S>(a[j]) * static_cast<S>(b[j]);
    });
    delta[line.pixel(i)] = std::accumulate(sums, sums + kChunk, S(0));
  }
}

// Replaces w.products, the gradients of the softmax weights, by the gradients of the scores.
template <typename S>
void line_score_gradients(const Line& line, const S* delta, Workspace<S>& w) {
  for (int64_t i = 0; i < w.n; ++i)
    for (int64_t j = 0; j < w.padded / kLanes<S>; ++j) {
      Vector<S>& gradient = vector_at(&w.products[i * w.row], j);
      gradient = vector_at(&w.scores[i * w.row], j) * (gradient - delta[line.pixel(i)]);
    }
}

template <typename T>
void backward(const Backward& b) {
  using S = Sum<T>;
  const Sizes& s = b.sizes;
  const T *query = static_cast<const T*>(b.query), *key = static_cast<const T*>(b.key);
  const T *value = static_cast<const T*>(b.value), *grad_out = static_cast<const T*>(b.grad_out);
  Buffer<S> delta(s.pixels());
  for (bool column : {false, true}) {
    for_each_line(s, column, 3 * s.c + 2 * s.C, [&](const auto& lines) {
      Workspace<S> w(column ? s.H : s.W);
      const S* scale = column ? w.ones.data() : nullptr;
      lines([&](const Line& line) {
        line_scores(query, key, s.c, line, w, w.scores.data());
        line_probabilities(line, static_cast<const Normalizer<S>*>(b.normalizer), w);
        if (!column) line_delta(grad_out, static_cast<const T*>(b.out), s.C, line, delta.data());
        line_sums(transposed(w.scores_matrix()), grad_out, s.C, line, w, static_cast<T*>(b.grad_value), scale);
        line_scores(grad_out, value, s.C, line, w, w.products.data());
        line_score_gradients(line, delta.data(), w);
        line_sums(w.products_matrix(), key, s.c, line, w, static_cast<T*>(b.grad_query), scale);
        line_sums(transposed(w.products_matrix()), query, s.c, line, w, static_cast<T*>(b.grad_key), scale);
      });
    });
  }
}

// Returns the index, in weights [N,L,H,W], of the weight with which pixel `from` of a line attends to pixel `seen`.
inline int64_t weight_index(const Sizes& s, const Line& line, int64_t from, int64_t seen) {
  const int64_t l = line.column ? s.W + column_entry(seen, from) : seen;
  const int64_t n = line.first / (s.H * s.W), pixel = line.pixel(from) % (s.H * s.W);
  return (n * s.L() + l) * s.H * s.W + pixel;
}

template <typename T>
void primitive(Primitive primitive, const Sizes& s, const T* first, const T* second, T* out) {
  using S = Sum<T>;
  for (bool column : {false, true}) {
    for_each_line(s, column, s.C, [&](const auto& lines) {
      Workspace<S> w(column ? s.H : s.W);
      const auto for_each_weight = [&](const Line& line, const auto& body) {
        for (int64_t seen = 0; seen < w.n; ++seen)
          for (int64_t from = 0; from < w.n; ++from)
            if (!column || seen != from) body(weight_index(s, line, from, seen), w.scores[seen * w.row + from]);
      };
      lines([&](const Line& line) {
        if (primitive == Primitive::score) {
          line_scores(second, first, s.C, line, w, w.scores.data());
          for_each_weight(line, [&](int64_t index, S score) { out[index] = static_cast<T>(score); });
          return;
        }
        for_each_weight(line, [&](int64_t index, S& weight) { weight = static_cast<S>(first[index]); });
        const Strided<S> weights = w.scores_matrix();  // [seen, from]; the diagonal of a column stays 0
        line_sums(primitive == Primitive::gather ? transposed(weights) : weights, second, s.C, line, w, out,
                  column ? w.ones.data() : nullptr);
      });
    });
  }
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
