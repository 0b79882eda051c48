// Products of 16 rows by the tile registers of Intel's AMX, with FPTT_TILES.
//
// A tile register holds 16 rows of 64 bytes. Its product sums over 16 pairs of bfloat16 at
// once. Vectors of such a processor multiply pairs of bfloat16 more slowly than float32: a
// batch of pixel MNIST took 603 ms by them, 414 ms in float32 and 187 ms by tiles.

#pragma once

#include "vectors.h"

#ifdef FPTT_TILES

#ifndef FPTT_BFLOAT16
#error "FPTT_TILES needs FPTT_BFLOAT16."
#endif
static_assert(kLanes == 16 && kPair == 2);

constexpr int kTileRows = 16;
constexpr int kTilePairs = 16;              // Pairs that a product sums over.
constexpr int kHalfPairs = kTilePairs / 2;  // Those of a shorter product, for what is left.

// The tile registers of a thread, in use as long as this object lives.
class TileRegisters {
 public:
  TileRegisters() { _tile_loadconfig(&kConfig); }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];  // Of a row.
    uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64);

  // Registers 0 to 3 hold sums, 4 the rows and 5 the panel; 6 and 7 are rows and panel of a
  // shorter product. It is constant data, since compilers may drop stores of a local variable
  // that only the instruction reads.
  static constexpr Config kConfig = {
      1, 0, {}, {64, 64, 64, 64, 64, 64, 4 * kHalfPairs, 64}, {16, 16, 16, 16, 16, 16, 16, kHalfPairs}};
};

// Adds the product of the rows in a register with vector `index` of a panel to register
// `index`. It is a macro because the instructions take register numbers as literals.
#define FPTT_ADD_PRODUCT(index, rows, vectors)         \
  if constexpr (N > index) {                           \
    _tile_loadd(vectors, w + index * kLanes, kBytes);  \
    _tile_dpbf16ps(index, rows, vectors);              \
  }

// 16 x N sums in tile registers. There is one such object at a time.
template <int N>
class TileSums {
  static_assert(N >= 1 && N <= 4);
  static constexpr size_t kBytes = 4 * N * kLanes;  // From a row of sums, or a pair, to the next.

 public:
  FPTT_INLINE explicit TileSums(const Vector (*from)[N]) {
    order_memory();
    _tile_loadd(0, from[0], kBytes);
    if constexpr (N > 1) _tile_loadd(1, from[0] + 1, kBytes);
    if constexpr (N > 2) _tile_loadd(2, from[0] + 2, kBytes);
    if constexpr (N > 3) _tile_loadd(3, from[0] + 3, kBytes);
  }

  // Adds the products of 16 rows of a, whose `count` pairs are side by side, with a panel
  // [count, N kLanes]. The count is a multiple of kHalfPairs.
  FPTT_INLINE void add(const Operand* a, size_t row_stride, size_t count, const Operand* panel) const {
    order_memory();
    size_t k = 0;
    for (; k + kTilePairs <= count; k += kTilePairs) {
      const Operand* const w = panel + k * N * kLanes;
      _tile_loadd(4, a + k, 4 * row_stride);
      FPTT_ADD_PRODUCT(0, 4, 5)
      FPTT_ADD_PRODUCT(1, 4, 5)
      FPTT_ADD_PRODUCT(2, 4, 5)
      FPTT_ADD_PRODUCT(3, 4, 5)
    }
    if (k == count) return;
    const Operand* const w = panel + k * N * kLanes;
    _tile_loadd(6, a + k, 4 * row_stride);
    FPTT_ADD_PRODUCT(0, 6, 7)
    FPTT_ADD_PRODUCT(1, 6, 7)
    FPTT_ADD_PRODUCT(2, 6, 7)
    FPTT_ADD_PRODUCT(3, 6, 7)
  }

  FPTT_INLINE void store(Vector (*to)[N]) const {
    _tile_stored(0, to[0], kBytes);
    if constexpr (N > 1) _tile_stored(1, to[0] + 1, kBytes);
    if constexpr (N > 2) _tile_stored(2, to[0] + 2, kBytes);
    if constexpr (N > 3) _tile_stored(3, to[0] + 3, kBytes);
    order_memory();
  }

 private:
  // Keeps the compiler from moving its loads and stores across the instructions of tiles:
  // those of GCC do not say that they read memory.
  FPTT_INLINE static void order_memory() { asm volatile("" ::: "memory"); }
};

#undef FPTT_ADD_PRODUCT

#else

// Rounding up to these changes nothing.
constexpr int kTileRows = 1, kTilePairs = 1;

// Stands for tile registers where there are none.
class TileRegisters {
 public:
  TileRegisters() {}
};

#endif
