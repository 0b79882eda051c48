// The parts that all cells' kernels share.
//
// Legend: S steps, B batch, H hidden, R members of a population, G gates. All arrays are
// row-major float32; the mask is bool.
//
// A block of 4H threads owns kRows rows of one member's batch, 1 or 2, for the whole
// window, so blocks never wait for each other. One row per block is the least work per
// step, and is used while every block can have a multiprocessor of its own. Two rows use
// each weight that is read twice. (Reasoned, not measured.)
//
// The recurrent weights stay on the chip, GH/4 of them per thread: those that do not fit
// into registers are in shared memory, ordered so that a warp reads consecutive words.
// Threads that share a sum are neighbors in a warp and add by shuffles. A step passes
// values to the next one through two alternating buffers in shared memory, so one barrier
// per step suffices: a thread that writes to a buffer has passed a barrier since the last
// step that read it. Operands of the next step are fetched from memory before the sums of
// this step; backward, before the barrier, because ptxas was measured to delay the loads
// until the step needs them.

#pragma once

#include <string>

#include "platform.h"

namespace ffi = xla::ffi;

using Array = ffi::Buffer<ffi::F32>;
using Mask = ffi::Buffer<ffi::PRED>;
using Output = ffi::Result<Array>;

struct Shape {
  int num_steps, batch;
};

__device__ __forceinline__ float read(const float* array, size_t index, bool there) { return there ? array[index] : 0.0f; }

__device__ __forceinline__ float dot(const float4& a, const float4& b, float sum) {
  sum += a.x * b.x;
  sum += a.y * b.y;
  sum += a.z * b.z;
  return sum + a.w * b.w;
}

__device__ __forceinline__ float add_up(float value, int lanes) { return value + __shfl_xor_sync(0xffffffffu, value, lanes); }

// Adds a and b over two threads `lanes` apart; the first keeps the sum of a, the second
// the sum of b.
__device__ __forceinline__ float add_one_of(float a, float b, bool second, int lanes) {
  return (second ? b : a) + __shfl_xor_sync(0xffffffffu, second ? a : b, lanes);
}

// Adds over two threads `lanes` apart; of two rows, each thread keeps its own.
template <int kRows>
__device__ __forceinline__ float add_row(const float (&rows)[kRows], int row, int lanes) {
  if constexpr (kRows == 2) {
    return add_one_of(rows[0], rows[1], row, lanes);
  } else {
    return add_up(rows[0], lanes);
  }
}

// A block's rows and their places, counted in 32 bits to save registers: no memory holds
// 2^32 rows of H numbers.
struct Rows {
  unsigned member, first, batch, num_steps;

  __device__ __forceinline__ Rows(const Shape& shape, int rows)
      : member(blockIdx.y), first(blockIdx.x * rows), batch(shape.batch), num_steps(shape.num_steps) {}
  __device__ __forceinline__ bool has(int row) const { return first + row < batch; }
  __device__ __forceinline__ size_t of_state(int row) const { return member * batch + first + row; }  // Index into [R, B].
  __device__ __forceinline__ size_t of_step(int step, int row) const {  // Index into [R, S, B].
    return member * num_steps * batch + first + row + step * batch;
  }
};

// A thread's weights in float4: the first kHeld of kNumber are in registers, the others
// in shared memory.
template <int kThreads, int kNumber, int kHeld>
struct Weights {
  static constexpr int kStored = (kNumber - kHeld) * kThreads;
  float4 held[kHeld];
  float4* stored;  // [kNumber - kHeld, kThreads]

  __device__ __forceinline__ void set(int number, const float4& w) {
    if (number < kHeld) {
      held[number < kHeld ? number : 0] = w;
    } else {
      stored[(number - kHeld) * kThreads + threadIdx.x] = w;
    }
  }
  __device__ __forceinline__ float4 get(int number) const {
    return number < kHeld ? held[number < kHeld ? number : 0] : stored[(number - kHeld) * kThreads + threadIdx.x];
  }
};

// The product h w_h of a step forward. Each of a unit's four threads sums a quarter for all
// gates and rows. Then 4 / kRows of them finish each row, and one of these writes.
template <int H, int kGates, int kRows, int kHeldWeights>
struct ForwardProduct {
  static constexpr int kThreads = 4 * H, kChunks = H / 16;
  using OwnWeights = Weights<kThreads, kChunks * kGates, kHeldWeights / 4>;
  static constexpr int kShared = OwnWeights::kStored + 2 * kRows * H / 4;
  const int part = threadIdx.x % 4, unit = threadIdx.x / 4, row = part % kRows;
  OwnWeights weights;
  float4* hidden;  // [2, kRows, H / 4]

  __device__ __forceinline__ ForwardProduct(const float* w_h, float4* shared) : hidden(shared + OwnWeights::kStored) {
    weights.stored = shared;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk++) {
#pragma unroll
      for (int gate = 0; gate < kGates; gate++) {
        const float* w = w_h + (16 * chunk + 4 * part) * kGates * H + gate * H + unit;
        weights.set(chunk * kGates + gate, make_float4(w[0], w[kGates * H], w[2 * kGates * H], w[3 * kGates * H]));
      }
    }
  }

  __device__ __forceinline__ void hand_on(int step, float h) {  // Passes h on to step `step`.
    if (part < kRows) reinterpret_cast<float*>(hidden)[((step % 2) * kRows + row) * H + unit] = h;
  }

  __device__ __forceinline__ void sum_up(int step, float (&sum)[kGates][kRows]) const {
    const float4* const now = hidden + (step % 2) * kRows * H / 4 + part;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk++) {
      float4 before[kRows];
#pragma unroll
      for (int r = 0; r < kRows; r++) before[r] = now[r * H / 4 + 4 * chunk];
#pragma unroll
      for (int gate = 0; gate < kGates; gate++) {
        const float4 w = weights.get(chunk * kGates + gate);
#pragma unroll
        for (int r = 0; r < kRows; r++) sum[gate][r] = dot(before[r], w, sum[gate][r]);
      }
    }
  }
};

// The product dz w_hᵀ of a step backward. Each of eight threads per pair of units sums an
// eighth for both units and all rows. Then kTwins of them hold the sum of one unit and row.
template <int H, int kGates, int kRows, int kHeldWeights>
struct BackwardProduct {
  static constexpr int kThreads = 4 * H, kChunks = kGates * H / 32, kTwins = 4 / kRows;
  using OwnWeights = Weights<kThreads, kChunks * 2, kHeldWeights / 4>;
  static constexpr int kShared = OwnWeights::kStored + 2 * kRows * kGates * H / 4;
  const int part = threadIdx.x % 8, unit = threadIdx.x / 4, row = part / kTwins % kRows, twin = part % kTwins;
  OwnWeights weights;
  float4* handed;  // [2, kRows, kGates H / 4]

  __device__ __forceinline__ BackwardProduct(const float* w_h, float4* shared) : handed(shared + OwnWeights::kStored) {
    weights.stored = shared;
    const float4* const first = reinterpret_cast<const float4*>(w_h + unit / 2 * 2 * kGates * H) + part;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk++) {
#pragma unroll
      for (int u = 0; u < 2; u++) weights.set(chunk * 2 + u, first[u * kGates * H / 4 + 8 * chunk]);
    }
  }

  __device__ __forceinline__ void hand_on(int step, int gate, float dz) {
    reinterpret_cast<float*>(handed)[((step % 2) * kRows + row) * kGates * H + gate * H + unit] = dz;
  }

  __device__ __forceinline__ float sum_up(int step) const {
    const float4* const now = handed + (step % 2) * kRows * kGates * H / 4 + part;
    float sum[2][kRows] = {};
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk++) {
      float4 dz[kRows];
#pragma unroll
      for (int r = 0; r < kRows; r++) dz[r] = now[r * kGates * H / 4 + 8 * chunk];
#pragma unroll
      for (int u = 0; u < 2; u++) {
        const float4 w = weights.get(chunk * 2 + u);
#pragma unroll
        for (int r = 0; r < kRows; r++) sum[u][r] = dot(dz[r], w, sum[u][r]);
      }
    }
    float of_unit[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) of_unit[r] = add_one_of(sum[0][r], sum[1][r], part & 4, 4);
    return add_up(add_row(of_unit, row, 2), 1);
  }
};

template <int H, typename Window>
ffi::Error run_of_size(const Window& window, unsigned members, Stream stream) {
  const unsigned batch = window.shape.batch;
  if (size_t{members} * batch <= num_multiprocessors()) return window.template start<H, 1>(dim3(batch, members), stream);
  return window.template start<H, 2>(dim3((batch + 1) / 2, members), stream);
}

// The shape of a window [..., S, B, H]; all leading axes are members.
template <typename Window>
ffi::Error run(Window window, const ffi::AnyBuffer::Dimensions& steps, Stream stream) {
  const size_t rank = steps.size();
  unsigned members = 1;
  for (size_t axis = 0; axis + 3 < rank; axis++) members *= static_cast<unsigned>(steps[axis]);
  window.shape = {static_cast<int>(steps[rank - 3]), static_cast<int>(steps[rank - 2])};
  switch (steps[rank - 1]) {
    case 32: return run_of_size<32>(window, members, stream);
    case 64: return run_of_size<64>(window, members, stream);
    case 128: return run_of_size<128>(window, members, stream);
  }
  return ffi::Error::InvalidArgument("no kernel for H = " + std::to_string(steps[rank - 1]));
}
