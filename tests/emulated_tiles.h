// Intel's tile instructions in plain C++, so that any processor with AVX-512 BF16 can test
// the kernels that use them. Wrong use ends the process. Unlike the processor, it does not
// count denormal numbers as 0.

#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

struct EmulatedTiles {
  uint8_t config[64] = {};
  uint32_t data[8][16][16] = {};

  int bytes(int tile) const {
    if (config[0] != 1) std::abort();  // There is no configuration.
    return config[16 + 2 * tile];
  }
  int rows(int tile) const { return config[48 + tile]; }
};

inline thread_local EmulatedTiles emulated_tiles;

inline std::atomic<long> emulated_product_count{0};

extern "C" long emulated_products() { return emulated_product_count; }

inline void load_emulated_config(const void* from) {
  // The instruction also sets all tiles to 0.
  emulated_tiles = EmulatedTiles{};
  std::memcpy(emulated_tiles.config, from, 64);
}

inline void load_emulated_tile(int tile, const void* from, size_t stride) {
  std::memset(emulated_tiles.data[tile], 0, sizeof(emulated_tiles.data[tile]));
  const size_t bytes = emulated_tiles.bytes(tile);
  for (int row = 0; row < emulated_tiles.rows(tile); row++) {
    std::memcpy(emulated_tiles.data[tile][row], static_cast<const char*>(from) + row * stride, bytes);
  }
}

inline void store_emulated_tile(int tile, void* to, size_t stride) {
  const size_t bytes = emulated_tiles.bytes(tile);
  for (int row = 0; row < emulated_tiles.rows(tile); row++) {
    std::memcpy(static_cast<char*>(to) + row * stride, emulated_tiles.data[tile][row], bytes);
  }
}

inline float half_of_pair(uint32_t pair, int half) {
  const uint32_t bits = half ? pair & 0xffff0000u : pair << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void multiply_emulated_tiles(int sums, int a, int w) {
  EmulatedTiles& tiles = emulated_tiles;
  const int rows = tiles.rows(sums), lanes = tiles.bytes(sums) / 4, pairs = tiles.bytes(a) / 4;
  if (tiles.rows(a) != rows || tiles.bytes(w) != 4 * lanes || tiles.rows(w) != pairs) std::abort();
  emulated_product_count++;
  for (int row = 0; row < rows; row++) {
    for (int lane = 0; lane < lanes; lane++) {
      float halves[2] = {};
      for (int k = 0; k < pairs; k++) {
        for (int half = 0; half < 2; half++) {
          halves[half] += half_of_pair(tiles.data[a][row][k], half) * half_of_pair(tiles.data[w][k][lane], half);
        }
      }
      float sum;
      std::memcpy(&sum, &tiles.data[sums][row][lane], 4);
      sum += halves[0] + halves[1];
      std::memcpy(&tiles.data[sums][row][lane], &sum, 4);
    }
  }
}

#define _tile_loadconfig(config) load_emulated_config(config)
#define _tile_release() (emulated_tiles = EmulatedTiles{}, void())
#define _tile_loadd(tile, from, stride) load_emulated_tile(tile, from, stride)
#define _tile_stored(tile, to, stride) store_emulated_tile(tile, to, stride)
#define _tile_dpbf16ps(sums, a, w) multiply_emulated_tiles(sums, a, w)
