// Matrix products in tiles that fit the registers, and the packed operands that they read.
//
// Units lie in blocks of kLanes, of which the last may be part of one. What belongs to the G
// gates of a row lies in the order (block, gate, lane), called packed here.

#pragma once

#include <type_traits>

#include "vectors.h"

constexpr int kPanel = 4;  // Vectors of units side by side in a tile of a packed transpose.
constexpr int kPart = 8 * kRows;  // Rows of a weight gradient that are one task.

// Adds the products of R rows of a with a panel [count, N kLanes] to R x N sums.
template <int R, int N>
FPTT_INLINE void multiply(
    Vector (&sums)[R][N], const Operand* a, size_t row_stride, size_t step, size_t count, const Operand* panel) {
  for (size_t k = 0; k < count; k++, a += step, panel += N * kLanes) {
    Operands w[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) w[n] = load_operands(panel + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Operand scalar = a[r * row_stride];
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) add_product(sums[r][n], scalar, w[n]);
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
template <int Most = kRows, typename Tile>
FPTT_INLINE void for_tiles(int begin, int end, const Tile& tile) {
  for (int left = (end - begin + Most - 1) / Most; left > 0; left--) {
    const int rows = (end - begin + left - 1) / left;
    call_tile<Most>(rows, begin, tile);
    begin += rows;
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

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

// Units of a layer, or columns of a matrix.
struct Units {
  int count;

  int blocks() const { return divide_up(count, kLanes); }
  int panels() const { return divide_up(count, kPanel * kLanes); }
  int parts() const { return divide_up(count, kPart); }
  // Units of a block that exist.
  int in_block(int block) const { return count - block * kLanes < kLanes ? count - block * kLanes : kLanes; }
  size_t padded() const { return static_cast<size_t>(blocks()) * kLanes; }
  // Operands in a packed row of G gates.
  size_t packed(int gates) const { return padded() * gates / kPair; }
};

// Packs a block of the weights [rows, G, H] to operands [rows, G, kLanes], for sums over rows.
template <int G>
void pack_block(Units units, const float* weights, int rows, int block, Operand* to) {
  const int there = units.in_block(block);
  for (int row = 0; row < rows; row += kPair) {
    for (int gate = 0; gate < G; gate++, to += kLanes) {
      Vector v[kPair] = {};
      for (int i = 0; i < kPair && row + i < rows; i++) {
        v[i] = load(weights + (static_cast<size_t>(row + i) * G + gate) * units.count + block * kLanes, there);
      }
      store_operands(to, join(v));
    }
  }
}

// Packs a panel of the transpose of weights [columns, G, H] to operands [packed gates, N kLanes],
// for sums over gates, where N is the number of vectors in the panel.
template <int G>
void pack_transposed_panel(Units units, const float* weights, Units columns, int panel, Operand* to) {
  const int first = panel * kPanel * kLanes;
  const int size = static_cast<int>(columns.padded()) - first < kPanel * kLanes ? columns.padded() - first : kPanel * kLanes;
  for (int block = 0; block < units.blocks(); block++) {
    for (int gate = 0; gate < G; gate++, to += kLanes / kPair * size) {
      const float* const from = weights + gate * units.count + block * kLanes;
      // Squares of kLanes x kLanes, so that what is read and written stays in the cache.
      for (int square = 0; square < size; square += kLanes) {
        float transposed[kLanes][kLanes];
        for (int column = 0; column < kLanes; column++) {
          Vector v{};
          if (first + square + column < columns.count) {
            v = load(from + static_cast<size_t>(first + square + column) * G * units.count, units.in_block(block));
          }
          for (int lane = 0; lane < kLanes; lane++) transposed[lane][column] = v[lane];
        }
        for (int lane = 0; lane < kLanes; lane += kPair) {
          Vector v[kPair];
          for (int i = 0; i < kPair; i++) v[i] = load(transposed[lane + i]);
          store_operands(to + lane / kPair * size + square, join(v));
        }
      }
    }
  }
}

// The gradient dz of the products of a chunk of rows, packed for the two kinds of products
// that read it. Rows are padded to pairs, as the caller counts them.
template <int G>
struct PackedGradient {
  static constexpr int kWidth = G * kLanes;

  Units units;
  size_t rows;        // Of the chunk.
  Operand *by_row;    // [block, row, gate, lane], neighbors are lanes.
  Operand *by_column; // [block, row, gate, lane], neighbors are rows.

  static size_t size(Units units, size_t rows) { return units.packed(G) * rows; }
  const Operand* row(size_t row, int block) const { return by_row + (block * rows + row) * kWidth / kPair; }
  const Operand* column(int block) const { return by_column + block * rows * kWidth / kPair; }

  FPTT_INLINE void keep(size_t row, int block, const Vector (&dz)[kPair][G]) const {
    const size_t start = (block * rows + row) * kWidth / kPair;
    for (int gate = 0; gate < G; gate++) {
      Vector v[kPair];
      for (int i = 0; i < kPair; i++) v[i] = dz[i][gate];
      store_operands(by_column + start + gate * kLanes, join(v));
      if (kPair == 1) continue;  // Both orders are one array.
      for (int i = 0; i < kPair; i++) store_row(by_row + start + (i * G + gate) * kLanes / kPair, dz[i][gate]);
    }
  }

  // Computes a panel of the product of rows [begin, end), counted from `first`, with a packed
  // transpose, and calls add(row, column, vector) for each vector of it.
  //
  // The sums of up to kGroup rows stay in memory while a part of the panel that fits the
  // cache serves them all.
  template <typename Add>
  FPTT_INLINE void multiply_transposed(
      size_t first, const Operand* transposed, Units columns, int panel, int begin, int end, const Add& add) const {
    constexpr int kGroup = 8 * kRows, kBlocks = 8;
    const int column = panel * kPanel * kLanes;
    const int left = columns.blocks() - panel * kPanel;
    call_panel<kPanel>(left < kPanel ? left : kPanel, [&](auto vectors) {
      constexpr int N = decltype(vectors)::value;
      const Operand* const weights = transposed + units.packed(G) * column;
      for (int group = begin; group < end; group += kGroup) {
        const int group_end = group + kGroup < end ? group + kGroup : end;
        Vector sums[kGroup][N];
        std::memset(sums, 0, sizeof(sums[0]) * (group_end - group));
        for (int some = 0; some < units.blocks(); some += kBlocks) {
          const int some_end = some + kBlocks < units.blocks() ? some + kBlocks : units.blocks();
          for_tiles(group, group_end, [&](auto size, int row_index) {
            add_blocks<decltype(size)::value, N>(sums + (row_index - group), first + row_index, weights, some, some_end);
          });
        }
        for (int r = group; r < group_end; r++) {
          for (int n = 0; n < N; n++) add(r, column + n * kLanes, sums[r - group][n]);
        }
      }
    });
  }

  // Adds the products of R rows with the weights of the gates of blocks [begin, end).
  template <int R, int N>
  FPTT_INLINE void add_blocks(Vector (*sums)[N], size_t first, const Operand* weights, int begin, int end) const {
    Vector tile[R][N];
    std::memcpy(tile, sums, sizeof(tile));
    constexpr size_t kCount = kWidth / kPair;
    for (int block = begin; block < end; block++) {
      multiply(tile, row(first, block), kCount, 1, kCount, weights + block * kCount * N * kLanes);
    }
    std::memcpy(sums, tile, sizeof(tile));
  }

  // Adds to (or with `set` sets) rows [begin, end) of a block of the gradient [rows, G, H] of
  // weights: the sum over `count` operands of a, whose numbers for one row are `stride` apart.
  FPTT_INLINE void add_weight_gradient(
      const Operand* a, size_t stride, size_t count, int begin, int end, int block, bool set, float* gradient) const {
    const int there = units.in_block(block);
    for_tiles(begin, end, [&](auto size, int row_index) {
      constexpr int R = decltype(size)::value;
      Vector sums[R][G] = {};
      multiply(sums, a + row_index - begin, 1, stride, count, column(block));
      for (int r = 0; r < R; r++) {
        for (int gate = 0; gate < G; gate++) {
          float* const to = gradient + (static_cast<size_t>(row_index + r) * G + gate) * units.count + block * kLanes;
          store(to, set ? sums[r][gate] : sums[r][gate] + load(to, there), there);
        }
      }
    });
  }
};
