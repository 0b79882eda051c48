// Matrix products in tiles that fit the registers, and the packed weights that they read.
//
// Units lie in blocks of kLanes, of which the last may be part of one. What a product reads
// of the gates [G, H] of a row lies in the order (block, gate, lane), called packed here.

#pragma once

#include <type_traits>

#include "vectors.h"

constexpr int kPanel = 4;  // Vectors of units side by side in a tile of a packed transpose.

// Adds the products of R rows of a with a panel [count, N kLanes] to R x N sums.
template <int R, int N>
FPTT_INLINE void multiply(
    Vector (&sums)[R][N], const float* a, size_t row_stride, size_t step, size_t count, const float* panel) {
  for (size_t k = 0; k < count; k++, a += step, panel += N * kLanes) {
    Vector w[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) w[n] = load(panel + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const float scalar = a[r * row_stride];
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sums[r][n] += scalar * w[n];
    }
  }
}

template <int R, typename Tile>
FPTT_INLINE void call_tile(int rows, int begin, const Tile& tile) {
  if constexpr (R > 0) {
    if (rows == R) {
      tile(std::integral_constant<int, R>{}, begin);
    } else {
      call_tile<R - 1>(rows, begin, tile);
    }
  }
}

// Calls tile(R, first row) for tiles of nearly equal size that cover the rows.
template <typename Tile>
FPTT_INLINE void for_tiles(int begin, int end, const Tile& tile) {
  for (int left = (end - begin + kRows - 1) / kRows; left > 0; left--) {
    const int rows = (end - begin + left - 1) / left;
    call_tile<kRows>(rows, begin, tile);
    begin += rows;
  }
}

// The sizes of a layer and of its packed arrays.
struct Layer {
  int features, hidden, gates;

  int blocks() const { return (hidden + kLanes - 1) / kLanes; }
  int panels() const { return panels(hidden); }
  static int panels(int columns) { return (columns + kPanel * kLanes - 1) / (kPanel * kLanes); }
  // Units of a block that exist.
  int units(int block) const { return hidden - block * kLanes < kLanes ? hidden - block * kLanes : kLanes; }
  // Floats of a packed row of gates.
  size_t width() const { return static_cast<size_t>(blocks()) * gates * kLanes; }
  // Floats of a packed transpose with so many columns.
  size_t transpose_size(int columns) const { return width() * ((columns + kLanes - 1) / kLanes * kLanes); }
};

// Packs a block of the weights [rows, G, H] to [rows, G, kLanes].
inline void pack_block(const Layer& layer, const float* weights, int rows, int block, float* to) {
  const int units = layer.units(block);
  for (int row = 0; row < rows * layer.gates; row++, to += kLanes) {
    store(to, load(weights + static_cast<size_t>(row) * layer.hidden + block * kLanes, units));
  }
}

// Packs a panel of the transpose of weights [columns, G, H] to [packed gates, N kLanes],
// where N is the number of vectors in the panel.
inline void pack_transposed_panel(const Layer& layer, const float* weights, int columns, int panel, float* to) {
  const int first = panel * kPanel * kLanes;
  const int there = columns - first < kPanel * kLanes ? columns - first : kPanel * kLanes;
  const int size = (there + kLanes - 1) / kLanes * kLanes;
  for (int block = 0; block < layer.blocks(); block++) {
    for (int gate = 0; gate < layer.gates; gate++, to += kLanes * size) {
      const int units = layer.units(block);
      const float* from = weights + gate * layer.hidden + block * kLanes;
      // Squares of kLanes x kLanes, so that what is read and written stays in the cache.
      for (int square = 0; square < size; square += kLanes) {
        for (int column = square; column < square + kLanes; column++) {
          const size_t row = static_cast<size_t>(first + column) * layer.gates * layer.hidden;
          for (int lane = 0; lane < kLanes; lane++) {
            to[lane * size + column] = column < there && lane < units ? from[row + lane] : 0.0f;
          }
        }
      }
    }
  }
}

template <int N, typename Function>
FPTT_INLINE void call_panel(int vectors, const Function& function) {
  if constexpr (N > 0) {
    if (vectors == N) {
      function(std::integral_constant<int, N>{});
    } else {
      call_panel<N - 1>(vectors, function);
    }
  }
}

// Computes a panel of the product of packed rows [begin, end) with a packed transpose, and
// calls keep(row, column, vector) for each vector of it. Rows are [blocks][row_count][G kLanes].
//
// The sums of up to kGroup rows stay in memory while a part of the panel that fits the cache
// serves them all.
template <typename Keep>
FPTT_INLINE void transposed_product(
    const Layer& layer, const float* packed, size_t row_count, const float* transposed, int columns, int panel,
    int begin, int end, const Keep& keep) {
  constexpr int kGroup = 8 * kRows;
  constexpr int kBlocks = 8;
  const int first = panel * kPanel * kLanes;
  const int left = (columns - first + kLanes - 1) / kLanes;
  const size_t width = layer.gates * kLanes;
  call_panel<kPanel>(left < kPanel ? left : kPanel, [&](auto vectors) {
    constexpr int N = decltype(vectors)::value;
    const float* const weights = transposed + layer.width() * first;
    for (int group = begin; group < end; group += kGroup) {
      const int group_end = group + kGroup < end ? group + kGroup : end;
      Vector sums[kGroup][N];
      std::memset(sums, 0, sizeof(sums[0]) * (group_end - group));
      for (int some = 0; some < layer.blocks(); some += kBlocks) {
        const int some_end = some + kBlocks < layer.blocks() ? some + kBlocks : layer.blocks();
        for_tiles(group, group_end, [&](auto size, int row) {
          constexpr int R = decltype(size)::value;
          Vector tile[R][N];
          std::memcpy(tile, sums[row - group], sizeof(tile));
          for (int block = some; block < some_end; block++) {
            multiply(
                tile, packed + (block * row_count + row) * width, width, 1, width, weights + block * width * N * kLanes);
          }
          std::memcpy(sums[row - group], tile, sizeof(tile));
        });
      }
      for (int row = group; row < group_end; row++) {
        for (int n = 0; n < N; n++) keep(row, first + n * kLanes, sums[row - group][n]);
      }
    }
  });
}

// Adds to (or with `first` sets) rows [begin, end) of a block of the gradient [rows, G, H]
// of the weights that multiplied `a`: the sum over the steps of `multiply_all`.
template <int G, typename MultiplyAll>
FPTT_INLINE void add_weight_gradient(
    const Layer& layer, int begin, int end, int block, bool first, float* gradient, const MultiplyAll& multiply_all) {
  const int units = layer.units(block);
  for_tiles(begin, end, [&](auto size, int row) {
    constexpr int R = decltype(size)::value;
    Vector sums[R][G] = {};
    multiply_all(sums, row);
    for (int r = 0; r < R; r++) {
      for (int gate = 0; gate < G; gate++) {
        float* to = gradient + (static_cast<size_t>(row + r) * G + gate) * layer.hidden + block * kLanes;
        store(to, first ? sums[r][gate] : sums[r][gate] + load(to, units), units);
      }
    }
  });
}
