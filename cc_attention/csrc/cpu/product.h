// Small dense matrix products, computed in register tiles of kTileRows rows and kTileVectors vectors.
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

// The largest number of products in one sum.
constexpr int64_t kLongestSum = 128;

// Memory that later products read or write, given per row of this product. It is only prefetched, so it need not exist.
struct Ahead {
  const char* data;              // address for the first row
  int64_t row;                   // bytes from a row to the next
  int64_t offsets[kLongestSum];  // bytes from there to the address to prefetch at each step of a tile's sum

  // Prefetches `size` bytes per row in each of two arrays.
  Ahead(const void* first, const void* second, int64_t row, int64_t size)
      : data(static_cast<const char*>(first)), row(row), offsets() {
    const int64_t second_offset = reinterpret_cast<intptr_t>(second) - reinterpret_cast<intptr_t>(first);
    int64_t step = 0;
    for (int64_t i = 0; i < kTileRows; ++i)
      for (int64_t byte = 0; byte < size && step + 2 <= kLongestSum; byte += 64)
        for (const int64_t place : {int64_t(0), second_offset}) offsets[step++] = place + i * row + byte;
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

// How the sums of a product go to its output: out[i, :] = before[i] * out[i, :] + factor[i] * sum[i, :].
template <typename S>
struct Merge {
  const S* before;  // if null, out is not read
  const S* factor;  // if null, 1

  Merge at(int64_t row) const {
    return {before == nullptr ? nullptr : before + row, factor == nullptr ? nullptr : factor + row};
  }
};

// out[i, :] gets the sum over k of a[i, k] * b[k, :], as `merge` says.
// Prefetches one address per step: all at once would exceed the outstanding loads of a core.
template <typename S, int kRows, int kVectors, bool kCopy>
void multiply_tile(int64_t depth, const Strided<S>& a, const Panel<S>& panel, S* out, int64_t out_row,
                   const Merge<S>& merge, const char* ahead, const int64_t* ahead_offsets) {
  Vector<S> sum[kRows][kVectors];
#pragma GCC unroll 8
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
    __builtin_prefetch(ahead + ahead_offsets[k], 0, 2);
    Vector<S> b_vectors[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) b_vectors[v] = load_vector(b + v * kLanes<S>);
    if constexpr (kCopy) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store_vector(copy + v * kLanes<S>, b_vectors[v]);
      copy += copy_row;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[i][v] += a_column[i * a_row] * b_vectors[v];
  }
  const bool plain = merge.before == nullptr && merge.factor == nullptr;
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      S* result = out + i * out_row + v * kLanes<S>;
      Vector<S> own = sum[i][v];
      if (!plain) {
        if (merge.factor != nullptr) own = merge.factor[i] * own;
        if (merge.before != nullptr) own = merge.before[i] * load_vector(result) + own;
      }
      store_vector(result, own);
    }
}

// Returns the number of products in one sum. A sum of short sums is more accurate than one long sum. Short lines use
// short sums: there the extra sums cost little, and their rounding is not hidden by other errors. Longer lines use the
// longest sums.
inline int64_t depth_of_sums(int64_t rows) { return rows <= 16 ? 8 : kLongestSum; }

template <typename S>
constexpr S kOnes[] = {1, 1, 1, 1, 1, 1, 1, 1};

// multiply_tile for whole matrices: a [rows, depth], b [depth, columns padded to full vectors], out [rows, columns] of
// any storage type. Tiles that are not full vectors of the summing type go through a temporary tile.
template <typename T, typename S = Sum<T>>
void multiply(int64_t rows, int64_t columns, int64_t depth, const Strided<S>& a, const Panel<S>& b, T* out,
              int64_t out_row, const Merge<S>& merge, const Ahead& ahead) {
  constexpr int64_t kTileColumns = kTileVectors * kLanes<S>;
  const int64_t tiles = ceil_div(rows, kTileRows), block = depth_of_sums(rows);
  const int64_t tile_size = tiles == 0 ? 0 : rows / tiles, larger_tiles = rows - tiles * tile_size;
  const int64_t all_vectors = ceil_div(columns, kLanes<S>), column_tiles = ceil_div(all_vectors, kTileVectors);
  const Panel<S> copied = {b.copy, b.copy_row, nullptr, 0};
  for (int64_t column_tile = 0; column_tile < column_tiles; ++column_tile) {
    const int64_t column = column_tile * all_vectors / column_tiles * kLanes<S>;
    const int64_t end = (column_tile + 1) * all_vectors / column_tiles * kLanes<S>;
    const int64_t width = std::min(end, columns) - column;
    with_constant<kTileVectors>(ceil_div(width, kLanes<S>), [&](auto vectors) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t begin = tile * tile_size + std::min(tile, larger_tiles);
        const Strided<S> a_tile = {a.data + begin * a.row, a.row, a.column};
        T* out_tile = out + begin * out_row + column;
        const Merge<S> first = merge.at(begin), later = {kOnes<S>, first.factor};
        const bool copy = tile == 0 && b.copy != nullptr;
        const Panel<S>& panel = tile == 0 || b.copy == nullptr ? b : copied;
        with_constant<kTileRows>(tile_size + (tile < larger_tiles), [&](auto tile_rows) {
          const auto run = [&](S* sums, int64_t sums_row) {
            const auto run_tile = [&](auto copying) {
              for (int64_t k = 0; k < depth; k += block)
                multiply_tile<S, tile_rows(), vectors(), copying()>(
                    std::min(block, depth - k), {a_tile.data + k * a.column, a.row, a.column}, panel.at(k, column),
                    sums, sums_row, k == 0 ? first : later, ahead.data + begin * ahead.row, ahead.offsets);
            };
            copy ? run_tile(std::true_type()) : run_tile(std::false_type());
          };
          if constexpr (std::is_same_v<T, S>) {
            if (width == vectors * kLanes<S>) return run(out_tile, out_row);
          }
          S sums[kTileRows * kTileColumns];
          if (merge.before != nullptr)
            for (int i = 0; i < tile_rows; ++i) convert(out_tile + i * out_row, sums + i * kTileColumns, width);
          run(sums, kTileColumns);
          for (int i = 0; i < tile_rows; ++i) convert(sums + i * kTileColumns, out_tile + i * out_row, width);
        });
      }
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
