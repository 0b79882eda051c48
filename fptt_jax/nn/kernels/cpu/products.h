// Matrix products in tiles that fit the registers, and the packed operands that they read.
//
// Units lie in blocks of kLanes, of which the last may be part of one. What belongs to the G
// gates of a row lies in the order (block, gate, lane), called packed here.

#pragma once

#include <algorithm>
#include <type_traits>

#include "tiles.h"
#include "vectors.h"

constexpr int kPanel = 4;  // Vectors of units side by side in a tile of a packed transpose.
constexpr int kPart = 8 * kRows;  // Rows of a weight gradient that are one task.
static_assert(kPart % kTileRows == 0);

#ifdef FPTT_TILES
template <int N>
FPTT_INLINE void multiply_tiles(
    Vector (&sums)[kTileRows][N], const Operand* a, size_t row_stride, size_t count, const Operand* panel);
#endif

// Adds the products of R rows of a with a panel [count, N kLanes] to R x N sums. All loops over
// the sums are unrolled, or the compiler would keep them in memory. With FPTT_TILES and
// kTileRows rows, the operands of a row must be side by side: the step is 1.
template <int R, int N>
FPTT_INLINE void multiply(
    Vector (&sums)[R][N], const Operand* a, size_t row_stride, size_t step, size_t count, const Operand* panel) {
#ifdef FPTT_TILES
  if constexpr (R == kTileRows) {
    multiply_tiles(sums, a, row_stride, count, panel);
    return;
  }
#endif
  for (size_t k = 0; k < count; k++, a += step, panel += N * kLanes) {
    Operands w[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) w[n] = load_operands(panel + n * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Operand scalar = a[r * row_stride];
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) add_product(sums[r][n], scalar, w[n]);
    }
  }
}

#ifdef FPTT_TILES
// Adds the products of 16 rows: by tiles as far as whole tiles or halves go, the rest by vectors.
template <int N>
FPTT_INLINE void multiply_tiles(
    Vector (&sums)[kTileRows][N], const Operand* a, size_t row_stride, size_t count, const Operand* panel) {
  const size_t whole = count / kHalfPairs * kHalfPairs;
  if (whole > 0) {
    const TileSums<N> tiles(sums);
    tiles.add(a, row_stride, whole, panel);
    tiles.store(sums);
  }
  if (whole == count) return;
  constexpr int kSome = 4;
  for (int r = 0; r < kTileRows; r += kSome) {
    Vector some[kSome][N];
    std::memcpy(some, sums + r, sizeof(some));
    multiply(some, a + r * row_stride + whole, row_stride, 1, count - whole, panel + whole * N * kLanes);
    std::memcpy(sums + r, some, sizeof(some));
  }
}
#endif

// Most rows of a tile of N vectors. With fewer than 12 sums, additions would wait for each other.
constexpr int tile_rows(int vectors) { return std::max(kRows, 12 / vectors); }

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

// Calls tile(R, first row) for tiles of nearly equal size that cover the rows. With FPTT_TILES
// as many tiles as possible have kTileRows rows.
template <int Most, typename Tile>
FPTT_INLINE void for_tiles(int begin, int end, const Tile& tile) {
#ifdef FPTT_TILES
  for (; end - begin >= kTileRows; begin += kTileRows) tile(std::integral_constant<int, kTileRows>{}, begin);
#endif
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
// that read it. Rows are padded to pairs, as the caller counts them. Those of a chunk are
// padded to whole tile registers; `clear_columns` must set what the padding holds to 0.
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
    // Else it would depend on `begin`, and so on the threads, which rows fill a tile register.
    static_assert(kGroup % kTileRows == 0);
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
          for_tiles<tile_rows(N)>(group, group_end, [&](auto size, int row_index) {
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
    constexpr size_t kCount = kWidth / kPair;
#ifdef FPTT_TILES
    if constexpr (R == kTileRows) {
      const TileSums<N> tiles(sums);
      for (int block = begin; block < end; block++) {
        tiles.add(row(first, block), kCount, kCount, weights + block * kCount * N * kLanes);
      }
      return tiles.store(sums);
    }
#endif
    Vector tile[R][N];
    std::memcpy(tile, sums, sizeof(tile));
    for (int block = begin; block < end; block++) {
      multiply(tile, row(first, block), kCount, 1, kCount, weights + block * kCount * N * kLanes);
    }
    std::memcpy(sums, tile, sizeof(tile));
  }

  // Sets pairs [begin, end) of by_column to 0.
  void clear_columns(size_t begin, size_t end) const {
    for (int block = 0; block < units.blocks(); block++) {
      std::memset(by_column + block * rows * kWidth / kPair + begin * kWidth, 0, (end - begin) * kWidth * sizeof(Operand));
    }
  }

  // Adds to (or with `set` sets) rows [begin, end) of a block of the gradient [rows, G, H] of
  // weights: the sum over `count` operands of columns that store_columns has arranged.
  FPTT_INLINE void add_weight_gradient(
      const Operand* columns, size_t count, int begin, int end, int block, bool set, float* gradient) const {
#ifdef FPTT_TILES
    for (int row = begin; row < end; row += kTileRows, columns += kTileRows * count) {
      Vector sums[kTileRows][G] = {};
      const TileSums<G> tiles(sums);
      for (size_t k = 0; k < count; k += kTilePairs) {
        tiles.add(columns + k * kTileRows, kTilePairs, kTilePairs, column(block) + k * kWidth);
      }
      tiles.store(sums);
      store_gradient(sums, row, end, block, set, gradient);
    }
#else
    for_tiles<tile_rows(G)>(begin, end, [&](auto size, int row) {
      constexpr int R = decltype(size)::value;
      Vector sums[R][G] = {};
      multiply(sums, columns + row - begin, 1, kPart, count, column(block));
      store_gradient(sums, row, end, block, set, gradient);
    });
#endif
  }

  // Adds to (or sets) a block of the gradient [G, H] of a bias: the sum over `count` operands.
  FPTT_INLINE void add_bias_gradient(size_t count, int block, bool set, float* gradient) const {
    Vector ones[kPair];
    for (Vector& one : ones) one = 1.0f - Vector{};
    Operand one[kLanes];
    store_operands(one, join(ones));
    Vector sums[1][G] = {};
    multiply(sums, one, 1, 0, count, column(block));
    store_gradient(sums, 0, 1, block, set, gradient);
  }

  // Adds to (or sets) R rows of a block of a gradient, as far as the rows exist.
  template <int R>
  FPTT_INLINE void store_gradient(
      const Vector (&sums)[R][G], int row, int end, int block, bool set, float* gradient) const {
    const int there = units.in_block(block);
    for (int r = 0; r < R && row + r < end; r++) {
      for (int gate = 0; gate < G; gate++) {
        float* const to = gradient + (static_cast<size_t>(row + r) * G + gate) * units.count + block * kLanes;
        store(to, set ? sums[r][gate] : sums[r][gate] + load(to, there), there);
      }
    }
  }
};

// Stores operands of kLanes columns, one pair of rows of them, among up to kPart columns of
// `count` pairs: [pair, kPart], or with tiles [tile of columns, tile of pairs, column, pair].
FPTT_INLINE void store_columns(Operand* columns, size_t count, size_t pair, int column, Operands v) {
#ifdef FPTT_TILES
  Operand* const tile = columns + column * count + pair / kTilePairs * kTileRows * kTilePairs;
  const Integers lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Integers places = lanes * kTilePairs + static_cast<int>(pair % kTilePairs);
  _mm512_i32scatter_epi32(tile, reinterpret_cast<__m512i>(places), reinterpret_cast<__m512i>(v), sizeof(Operand));
#else
  store_operands(columns + pair * kPart + column, v);
#endif
}
