// Small dense matrix products, computed in register tiles of kTileRows rows and kTileVectors vectors, or of more rows
// and fewer vectors.
//
// This file and lines.h are included once for each instruction set, like vector.h, by a .cpp file that also defines
//   kTileRows, kTileVectors     the size of a register tile: its sums, one row of factors and a broadcast fit in the
//                               registers
#pragma once

#include "vector.h"

namespace cc_attention {
namespace {

// Calls body with min(n, kMax) as a compile-time constant; n must be at least 1.
template <int kMax, typename Body>
void with_constant(int64_t n, const Body& body) {
  if constexpr (kMax > 1)
    if (n < kMax) return with_constant<kMax - 1>(n, body);
  body(std::integral_constant<int, kMax>());
}

// Element (i, k) of a matrix at data[i * row + k * column].
template <typename S>
struct Strided {
  const S* data;
  int64_t row, column;
};

template <typename S>
Strided<S> transposed(const Strided<S>& a) {
  return {a.data, a.column, a.row};
}

constexpr int kMostRows = 12;  // of a tile

// The most rows of a tile of `vectors` vectors: those with as many sums as the largest tile, up to kMostRows. A
// processor computes several products at once, and each of them needs a sum of its own.
constexpr int most_rows(int vectors) { return std::min(kMostRows, kTileRows * kTileVectors / vectors); }

// The largest number of products in one sum.
constexpr int64_t kLongestSum = 128;

// Addresses to prefetch: offsets from two arrays, alternately.
struct Prefetches {
  const char* arrays[2];
  const int64_t* offsets;
  int64_t count;

  void prefetch(int64_t i) const { __builtin_prefetch(arrays[i & 1] + offsets[i], 0, 2); }
};

// Two arrays that later products read or write, given per row of this product. They are only prefetched, so they need
// not exist.
struct Ahead {
  const char* arrays[2];         // addresses for the first row
  int64_t rows[2];               // bytes from a row to the next
  int64_t addresses;             // to prefetch for each row, in both arrays
  int64_t offsets[kLongestSum];  // bytes from a row to the addresses of it and of the next ones

  // Prefetches `size` bytes per row in each of the arrays.
  Ahead(const void* first, int64_t first_row, const void* second, int64_t second_row, int64_t size)
      : arrays{static_cast<const char*>(first), static_cast<const char*>(second)},
        rows{first_row, second_row},
        addresses(2 * ceil_div(size, 64)) {
    int64_t step = 0;
    for (int64_t i = 0; i < kMostRows; ++i)
      for (int64_t byte = 0; byte < size && step + 2 <= kLongestSum; byte += 64)
        for (const int64_t row : rows) offsets[step++] = i * row + byte;
  }

  // What `count` rows from row `begin` prefetch, in a product of `depth` steps: at most two addresses per step.
  Prefetches of_rows(int64_t begin, int64_t count, int64_t depth) const {
    return {{arrays[0] + begin * rows[0], arrays[1] + begin * rows[1]},
            offsets,
            std::min({count * addresses, 2 * depth, kLongestSum})};
  }
};

// The second factor of a product. Every tile of the product reads all of its rows.
template <typename S>
struct Panel {
  const S* data;
  int64_t row;
  S* copy;  // if not null, the first tile also packs the rows here, and the other tiles read this copy
  int64_t copy_row;

  Panel at(int64_t k, int64_t column) const {
    return {data + k * row + column, row, copy == nullptr ? nullptr : copy + k * copy_row + column, copy_row};
  }
};

// How the sums of a product go to its output: as g[i, :] = before[i] * out[i, :] + factor[i] * sum[i, :]. With weights,
// those of a softmax over i, g is their gradient, and the output gets the gradient of the arguments of the softmax:
// weights[i, :] * (g[i, :] - mean[:]), where mean is the weighted mean of g.
template <typename S>
struct Merge {
  const S* before = nullptr;  // if null, out is not read
  const S* factor = nullptr;  // if null, 1
  const S* weights = nullptr;
  const S* mean = nullptr;  // one row
  int64_t weights_row = 0;

  Merge at(int64_t row, int64_t column) const {
    return {before == nullptr ? nullptr : before + row, factor == nullptr ? nullptr : factor + row,
            weights == nullptr ? nullptr : weights + row * weights_row + column,
            weights == nullptr ? nullptr : mean + column, weights_row};
  }
};

// out[i, :] gets the sum over k of a[i, k] * b[k, :], as `merge` says.
// Prefetches one address per step: all at once would exceed the outstanding loads of a core. What is left after the
// last step follows then.
template <typename S, int kRows, int kVectors, bool kCopy>
void multiply_tile(int64_t depth, const Strided<S>& a, const Panel<S>& panel, S* out, int64_t out_row,
                   const Merge<S>& merge, const Prefetches& ahead) {
  Vector<S> sum[kRows][kVectors];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[i][v] = Vector<S>{};
  const S* a_column = a.data;
  const int64_t a_row = a.row, a_step = a.column;
  const S* b = panel.data;
  S* copy = panel.copy;
  const int64_t b_row = panel.row, copy_row = panel.copy_row;
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; ++k, a_column += a_step, b += b_row) {
    if (k < ahead.count) ahead.prefetch(k);
    Vector<S> b_vectors[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) b_vectors[v] = load_vector(b + v * kLanes<S>);
    if constexpr (kCopy) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store_vector(copy + v * kLanes<S>, b_vectors[v]);
      copy += copy_row;
    }
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[i][v] += a_column[i * a_row] * b_vectors[v];
  }
  for (int64_t k = depth; k < ahead.count; ++k) ahead.prefetch(k);
  const bool plain = merge.before == nullptr && merge.factor == nullptr && merge.weights == nullptr;
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      S* result = out + i * out_row + v * kLanes<S>;
      Vector<S> own = sum[i][v];
      if (!plain) {
        if (merge.factor != nullptr) own = merge.factor[i] * own;
        if (merge.before != nullptr) own = merge.before[i] * load_vector(result) + own;
        if (merge.weights != nullptr)
          own = load_vector(merge.weights + i * merge.weights_row + v * kLanes<S>) *
                (own - load_vector(merge.mean + v * kLanes<S>));
      }
      store_vector(result, own);
    }
}

// Returns the number of products in one sum. A sum of short sums is more accurate than one long sum. Short lines use
// short sums: there the extra sums cost little, and their rounding is not hidden by other errors. Longer lines use the
// longest sums.
inline int64_t depth_of_sums(int64_t rows) { return rows <= 16 ? 8 : kLongestSum; }

template <typename S>
constexpr S kOnes[kMostRows] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// multiply_tile for all rows of kVectors vectors of columns. Tiles that are not full vectors of the summing type go
// through a temporary tile.
template <int kVectors, typename T, typename S>
void multiply_columns(int64_t rows, int64_t width, int64_t depth, const Strided<S>& a, const Panel<S>& b, T* out,
                      int64_t out_row, const Merge<S>& merge, const Ahead& ahead, bool prefetch) {
  constexpr int64_t kTileColumns = kVectors * kLanes<S>;
  constexpr int kRows = most_rows(kVectors);
  S sums[kRows * kTileColumns] = {};  // the temporary tile
  const int64_t tiles = ceil_div(rows, kRows), block = depth_of_sums(rows);
  if (tiles == 0) return;
  const Panel<S> copied = {b.copy, b.copy_row, nullptr, 0};
  // Multiplies with the tiles that have row `begin` to row `end`, all of the same size.
  const auto run = [&](int64_t begin, int64_t end, auto tile_rows) {
    for (; begin < end; begin += tile_rows) {
      const bool copy = begin == 0 && b.copy != nullptr;
      const Panel<S>& panel = begin == 0 || b.copy == nullptr ? b : copied;
      T* out_tile = out + begin * out_row;
      S* to = sums;
      int64_t to_row = kTileColumns;
      if constexpr (std::is_same_v<T, S>)
        if (width == kTileColumns) to = out_tile, to_row = out_row;
      const bool temporary = to == sums;
      if (temporary && merge.before != nullptr)
        for (int i = 0; i < tile_rows; ++i) convert(out_tile + i * out_row, sums + i * kTileColumns, width);
      Prefetches prefetches = ahead.of_rows(begin, prefetch ? tile_rows : 0, std::min(block, depth));
      for (int64_t k = 0; k < depth; k += block) {
        Merge<S> step = merge.at(begin, 0);
        if (k > 0) step.before = kOnes<S>;
        if (k + block < depth) step.weights = nullptr;
        const Strided<S> factors = {a.data + begin * a.row + k * a.column, a.row, a.column};
        const auto tile =
            copy ? multiply_tile<S, tile_rows(), kVectors, true> : multiply_tile<S, tile_rows(), kVectors, false>;
        tile(std::min(block, depth - k), factors, panel.at(k, 0), to, to_row, step, prefetches);
        prefetches.count = 0;
      }
      if (temporary)
        for (int i = 0; i < tile_rows; ++i) convert(sums + i * kTileColumns, out_tile + i * out_row, width);
    }
  };
  const int64_t size = rows / tiles, larger = (size + 1) * (rows - tiles * size);  // rows in tiles of size + 1
  if (larger > 0) with_constant<kRows>(size + 1, [&](auto tile_rows) { run(0, larger, tile_rows); });
  with_constant<kRows>(size, [&](auto tile_rows) { run(larger, rows, tile_rows); });
}

// multiply_tile for whole matrices: a [rows, depth], b [depth, columns padded to full vectors], out [rows, columns] of
// any storage type.
template <typename T, typename S = Sum<T>>
void multiply(int64_t rows, int64_t columns, int64_t depth, const Strided<S>& a, const Panel<S>& b, T* out,
              int64_t out_row, const Merge<S>& merge, const Ahead& ahead) {
  const int64_t vectors = ceil_div(columns, kLanes<S>), tiles = ceil_div(vectors, kTileVectors);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t column = tile * vectors / tiles * kLanes<S>, end = (tile + 1) * vectors / tiles * kLanes<S>;
    const int64_t width = std::min(end, columns) - column;
    with_constant<kTileVectors>(ceil_div(width, kLanes<S>), [&](auto tile_vectors) {
      multiply_columns<tile_vectors(), T, S>(rows, width, depth, a, b.at(0, column), out + column, out_row,
                                             merge.at(0, column), ahead, tile == 0);
    });
  }
}

// Transposes a kLanes x kLanes square from `from`, with row stride from_row, to `to`, with row stride to_row. Each of
// the log2(kLanes) rounds interleaves rows i and i + kLanes / 2 into rows 2 i and 2 i + 1.
template <typename S, size_t... kLane>
void transpose_square(const S* from, int64_t from_row, S* to, int64_t to_row, std::index_sequence<kLane...>) {
  constexpr int64_t kSize = kLanes<S>;
  Vector<S> rows[kSize], next[kSize];
  for (int64_t i = 0; i < kSize; ++i) rows[i] = load_vector(from + i * from_row);
  for (int64_t round = 1; round < kSize; round *= 2) {
    for (int64_t i = 0; i < kSize / 2; ++i) {
      const Vector<S>&low = rows[i], &high = rows[i + kSize / 2];
      next[2 * i] = shuffle<S, (kLane / 2 + kLane % 2 * kSize)...>(low, high);
      next[2 * i + 1] = shuffle<S, (kSize / 2 + kLane / 2 + kLane % 2 * kSize)...>(low, high);
    }
    for (int64_t i = 0; i < kSize; ++i) rows[i] = next[i];
  }
  for (int64_t i = 0; i < kSize; ++i) store_vector(to + i * to_row, rows[i]);
}

// to[j, i] = from[i, j]. Both matrices are padded to full vectors in both directions.
template <typename S>
void transpose(int64_t rows, int64_t columns, const S* from, int64_t from_row, S* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; i += kLanes<S>)
    for (int64_t j = 0; j < columns; j += kLanes<S>)
      transpose_square(from + i * from_row + j, from_row, to + j * to_row + i, to_row,
                       std::make_index_sequence<kLanes<S>>());
}

}  // namespace
}  // namespace cc_attention
