// The platform of the kernels: an NVIDIA GPU (nvcc), or for tests an emulation on the CPU
// (any C++17 compiler).
//
// A kernel declares its dynamic shared memory by SHARED_MEMORY and is started by `launch`.
// Everything else that it uses is plain CUDA.

#pragma once

#include <cstddef>
#include <string>

#include "xla/ffi/api/ffi.h"

#ifdef __CUDACC__

#include <cuda_runtime.h>

using Stream = cudaStream_t;
using StreamContext = xla::ffi::PlatformStream<cudaStream_t>;

#define SHARED_MEMORY(type, name) extern __shared__ type name[]

inline unsigned num_multiprocessors() {
  int device = 0, number = 0;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&number, cudaDevAttrMultiProcessorCount, device);
  return static_cast<unsigned>(number);
}

template <typename Arguments>
xla::ffi::Error launch(void (*kernel)(Arguments), dim3 grid, int threads, size_t shared_bytes, Stream stream, Arguments arguments) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error == cudaSuccess) {
    kernel<<<grid, threads, shared_bytes, stream>>>(arguments);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) return xla::ffi::Error::Success();
  return xla::ffi::Error::Internal(std::string("the kernel could not be started: ") + cudaGetErrorString(error));
}

#else

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using Stream = int;
using StreamContext = xla::ffi::DeviceOrdinal;  // Any context that a handler can take: a CPU has no streams.

namespace emulation {

// A block's threads are fibers that run in turn from one barrier to the next, which is fast
// and deterministic. A shuffle is a barrier of a warp: each warp runs from one
// __syncthreads to the next while the later ones wait, so a missing barrier shows. All
// threads must reach the same barriers and shuffles, as they do in these kernels.
struct Block {
  std::vector<ucontext_t> fibers;
  std::unique_ptr<float4[]> shared;
  std::vector<float> exchanged[2];  // By shuffles, alternating: no thread is two shuffles ahead of another.
  std::vector<int> shuffles;
  ucontext_t caller;
  unsigned current = 0;
  dim3 index;
  void (*run)(const void*) = nullptr;
  const void* closure = nullptr;
};

inline thread_local Block* block = nullptr;

constexpr unsigned kWarp = 32;

inline void barrier(unsigned first, unsigned threads) {
  const unsigned self = block->current;
  block->current = first + (self - first + 1) % threads;
  swapcontext(&block->fibers[self], &block->fibers[block->current]);
}

inline void fiber() {
  block->run(block->closure);
  const unsigned next = block->current + 1;
  block->current = next;
  setcontext(next < block->fibers.size() ? &block->fibers[next] : &block->caller);
}

inline float shuffle(float value, unsigned source) {
  const unsigned self = block->current;
  std::vector<float>& exchanged = block->exchanged[block->shuffles[self]++ % 2];
  exchanged[self] = value;
  barrier(self / kWarp * kWarp, kWarp);
  return exchanged[source];
}

}  // namespace emulation

#define threadIdx (dim3(emulation::block->current))
#define blockIdx (emulation::block->index)
#define SHARED_MEMORY(type, name) type* const name = emulation::block->shared.get()

inline void __syncthreads() { emulation::barrier(0, emulation::block->fibers.size()); }
inline float __shfl_xor_sync(unsigned, float value, int lanes) {
  return emulation::shuffle(value, emulation::block->current ^ static_cast<unsigned>(lanes));
}
inline float __shfl_sync(unsigned, float value, int lane, int width) {
  const unsigned first = emulation::block->current / static_cast<unsigned>(width) * static_cast<unsigned>(width);
  return emulation::shuffle(value, first + static_cast<unsigned>(lane));
}

inline unsigned num_multiprocessors() { return 4; }  // Few, so that small tests have more rows than that.

template <typename Arguments>
xla::ffi::Error launch(void (*kernel)(Arguments), dim3 grid, int threads, size_t shared_bytes, Stream, Arguments arguments) {
  constexpr size_t kStack = 64 * 1024;
  struct Closure {
    void (*kernel)(Arguments);
    const Arguments* arguments;
  };
  const Closure closure{kernel, &arguments};
  emulation::Block block;
  block.fibers.resize(threads);
  block.shared.reset(new float4[shared_bytes / sizeof(float4)]);
  for (std::vector<float>& exchanged : block.exchanged) exchanged.resize(threads);
  block.run = [](const void* data) {
    const Closure& closure = *static_cast<const Closure*>(data);
    closure.kernel(*closure.arguments);
  };
  block.closure = &closure;
  const std::unique_ptr<char[]> stacks(new char[threads * kStack]);
  emulation::block = &block;
  for (unsigned y = 0; y < grid.y; y++) {
    for (unsigned x = 0; x < grid.x; x++) {
      block.index = dim3(x, y);
      block.current = 0;
      block.shuffles.assign(threads, 0);
      std::memset(block.shared.get(), 0xff, shared_bytes);  // NaN, so that a read before a write shows.
      for (int thread = 0; thread < threads; thread++) {
        ucontext_t& context = block.fibers[thread];
        getcontext(&context);
        context.uc_stack.ss_sp = stacks.get() + thread * kStack;
        context.uc_stack.ss_size = kStack;
        context.uc_link = nullptr;
        makecontext(&context, emulation::fiber, 0);
      }
      swapcontext(&block.caller, &block.fibers[0]);
    }
  }
  emulation::block = nullptr;
  return xla::ffi::Error::Success();
}

#endif
