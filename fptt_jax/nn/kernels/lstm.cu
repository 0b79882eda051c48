// A window of an LSTM in one kernel, forward and backward.
//
// Legend: S steps, B batch, H hidden, R members of a population; gates in the order i, f, g, o. All arrays are row-major float32,
// the mask bool.
//
// A block of 4H threads owns kRows rows of the batch of one member, 1 or 2, for the whole window, so blocks need not wait for each
// other. One row is the least work a step, and taken as long as every block can have a multiprocessor for itself; two make more of
// each weight that is read. (Reasoned, not measured.)
//
// The recurrent weights stay on the chip, each thread its H of them: what its registers do not hold is in shared memory, laid out
// such that a warp's threads read one after the other. Threads that share a sum are neighbours in a warp and add up by shuffles.
// What is handed to the next step goes through one of two buffers in shared memory in turn, so one barrier a step is enough: a
// thread that writes to a buffer has passed a barrier since the last step that read it. What the next step needs from memory is
// fetched before this step's sums.

#include <cstdint>
#include <string>

#include "platform.h"

namespace ffi = xla::ffi;

namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kNumFactors = 6;  // In the order i, f, g, o, c, step before: see _lstm_forward.

// Of each thread's H weights those in registers: what 128 registers a thread, the most there are for 512 threads, leave room for.
template <int H, int kRows>
constexpr int kHeldForward = H < 128 ? H : kRows == 1 ? 96 : 80;
template <int H, int kRows>
constexpr int kHeldBackward = H < 128 ? H : kRows == 1 ? 80 : 64;

struct Shape {
  int num_steps, batch;
};

struct Forward {
  Shape shape;
  const float *drive, *w_h, *h_0, *c_0;
  const bool* mask;
  float *y, *h_end, *c_end;
  float* factors[kNumFactors];
};

struct Backward {
  Shape shape;
  const float* factors[kNumFactors];
  const float* dy;
  const bool* mask;
  const float *dh_end, *dc_end, *w_h;
  float *dz, *dh_0, *dc_0;
};

__device__ __forceinline__ float read(const float* array, size_t index, bool there) { return there ? array[index] : 0.0f; }

__device__ __forceinline__ void add_product(float4& sum, float factor, const float4& w) {
  sum.x += factor * w.x;
  sum.y += factor * w.y;
  sum.z += factor * w.z;
  sum.w += factor * w.w;
}

__device__ __forceinline__ float dot(const float4& a, const float4& b, float sum) {
  sum += a.x * b.x;
  sum += a.y * b.y;
  sum += a.z * b.z;
  return sum + a.w * b.w;
}

// Four threads a unit: each sums a quarter of h w_h for all four gates, float4 (i, f, g, o), then has one of the gates. Then each
// row is finished by 4 / kRows of them, of which one writes.
template <int H, int kRows>
__global__ void __launch_bounds__(4 * H) forward_window(const Forward window) {
  constexpr int kThreads = 4 * H, kChunks = H / 16, kHeldChunks = kHeldForward<H, kRows> / 16;
  SHARED_MEMORY(float4, shared);
  float4* const stored = shared;  // [kChunks - kHeldChunks, 4, kThreads]
  float4* const hidden = stored + (kChunks - kHeldChunks) * 4 * kThreads;  // [2, kRows, H / 4]
  const int thread = threadIdx.x, part = thread % 4, unit = thread / 4, row = part % kRows;
  const int num_steps = window.shape.num_steps, batch = window.shape.batch, first = blockIdx.x * kRows;
  const size_t member = blockIdx.y, step_rows = batch;
  const bool there = first + row < batch, writes = there && part < kRows;

  float4 held[kHeldChunks][4];
  const float* w_h = window.w_h + member * H * 4 * H + unit;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; chunk++) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float* w = w_h + (16 * chunk + 4 * part + k) * 4 * H;
      const float4 gates = make_float4(w[0], w[H], w[2 * H], w[3 * H]);
      if (chunk < kHeldChunks) {
        held[chunk < kHeldChunks ? chunk : 0][k] = gates;
      } else {
        stored[((chunk - kHeldChunks) * 4 + k) * kThreads + thread] = gates;
      }
    }
  }

  const size_t first_row = member * num_steps * step_rows + first;  // Of [R, S, B].
  const size_t state_at = (member * step_rows + first + row) * H + unit;
  float h = read(window.h_0, state_at, there), c = read(window.c_0, state_at, there);
  if (part < kRows) reinterpret_cast<float*>(hidden)[row * H + unit] = h;

  float next_drive[kRows];
  bool next_real = there && window.mask[first_row + row];
#pragma unroll
  for (int r = 0; r < kRows; r++) next_drive[r] = read(window.drive, (first_row + r) * 4 * H + part * H + unit, first + r < batch);
  __syncthreads();

  for (int step = 0; step < num_steps; step++) {
    const size_t step_row = first_row + step * step_rows;
    float drive[kRows];
    const bool real = next_real, more = step + 1 < num_steps;
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      drive[r] = next_drive[r];
      next_drive[r] = read(window.drive, (step_row + step_rows + r) * 4 * H + part * H + unit, more && first + r < batch);
    }
    next_real = more && there && window.mask[step_row + step_rows + row];

    float4 sum[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) sum[r] = make_float4(0, 0, 0, 0);
    const float4* now = hidden + (step % 2) * kRows * H / 4 + part;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk++) {
      float4 before[kRows];
#pragma unroll
      for (int r = 0; r < kRows; r++) before[r] = now[r * H / 4 + 4 * chunk];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const float4 w = chunk < kHeldChunks ? held[chunk < kHeldChunks ? chunk : 0][k]
                                             : stored[((chunk - kHeldChunks) * 4 + k) * kThreads + thread];
#pragma unroll
        for (int r = 0; r < kRows; r++) {
          add_product(sum[r], k == 0 ? before[r].x : k == 1 ? before[r].y : k == 2 ? before[r].z : before[r].w, w);
        }
      }
    }

    float activated[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) {  // Two gates, then one, are kept, the others handed over.
      const bool second = part & 2, odd = part & 1;
      const float even_gate = (second ? sum[r].z : sum[r].x) + __shfl_xor_sync(kAll, second ? sum[r].x : sum[r].z, 2);
      const float odd_gate = (second ? sum[r].w : sum[r].y) + __shfl_xor_sync(kAll, second ? sum[r].y : sum[r].w, 2);
      const float recurrent = (odd ? odd_gate : even_gate) + __shfl_xor_sync(kAll, odd ? even_gate : odd_gate, 1);
      activated[r] = tanhf(drive[r] + recurrent);
    }
    float gates[4];
#pragma unroll
    for (int gate = 0; gate < 4; gate++) {
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const float value = __shfl_sync(kAll, activated[r], gate, 4);
        if (r == row) gates[gate] = value;
      }
    }

    // From here as _lstm_forward, whose weights and drive these are: halved where σ(z) = (1 + tanh(z/2))/2.
    const float i = 0.5f * gates[0] + 0.5f, f = 0.5f * gates[1] + 0.5f, g = gates[2], o = 0.5f * gates[3] + 0.5f;
    const float new_c = f * c + i * g, t = tanhf(new_c);
    if (writes) {
      const size_t at = (step_row + row) * H + unit;
      window.factors[0][at] = 0.25f * (1 - gates[0] * gates[0]) * g;
      window.factors[1][at] = 0.25f * (1 - gates[1] * gates[1]) * c;
      window.factors[2][at] = (1 - g * g) * i;
      window.factors[3][at] = 0.25f * (1 - gates[3] * gates[3]) * t;
      window.factors[4][at] = o * (1 - t * t);
      window.factors[5][at] = f;
      window.y[at] = real ? o * t : h;
    }
    if (real) {
      h = o * t;
      c = new_c;
    }
    if (part < kRows) reinterpret_cast<float*>(hidden)[(((step + 1) % 2) * kRows + row) * H + unit] = h;
    __syncthreads();
  }

  if (writes) {
    window.h_end[state_at] = h;
    window.c_end[state_at] = c;
  }
}

// Eight threads a pair of units: each sums an eighth of dz w_hᵀ for both units and all rows. Then kTwins of them have the sum of
// one unit and row and go on with it, and each hands on kRows of its four gates' dz.
template <int H, int kRows>
__global__ void __launch_bounds__(4 * H) backward_window(const Backward window) {
  constexpr int kThreads = 4 * H, kChunks = H / 8, kHeldChunks = kHeldBackward<H, kRows> / 8;
  constexpr int kTwins = 4 / kRows;
  SHARED_MEMORY(float4, shared);
  float4* const stored = shared;  // [kChunks - kHeldChunks, 2, kThreads]
  float4* const handed = stored + (kChunks - kHeldChunks) * 2 * kThreads;  // [2, kRows, H]
  const int thread = threadIdx.x, part = thread % 8, pair = 2 * (thread / 8);
  const int unit = pair + part / 4, row = part / kTwins % kRows, twin = part % kTwins;
  const int num_steps = window.shape.num_steps, batch = window.shape.batch, first = blockIdx.x * kRows;
  const size_t member = blockIdx.y, step_rows = batch;
  const bool there = first + row < batch;

  float4 held[kHeldChunks][2];
  const float4* w_h = reinterpret_cast<const float4*>(window.w_h + (member * H + pair) * 4 * H) + part;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; chunk++) {
#pragma unroll
    for (int u = 0; u < 2; u++) {
      const float4 w = w_h[u * H + 8 * chunk];
      if (chunk < kHeldChunks) {
        held[chunk < kHeldChunks ? chunk : 0][u] = w;
      } else {
        stored[((chunk - kHeldChunks) * 2 + u) * kThreads + thread] = w;
      }
    }
  }

  const size_t first_row = member * num_steps * step_rows + first + row;  // Of [R, S, B].
  const size_t state_at = (member * step_rows + first + row) * H + unit;
  float dh = read(window.dh_end, state_at, there), dc = read(window.dc_end, state_at, there);

  float next_factors[kNumFactors], next_dy;
  bool next_real;
  const auto fetch = [&](int step) {
    const bool wanted = step >= 0 && there;
    const size_t at = (first_row + step * step_rows) * H + unit;
#pragma unroll
    for (int number = 0; number < kNumFactors; number++) next_factors[number] = read(window.factors[number], at, wanted);
    next_dy = read(window.dy, at, wanted);
    next_real = wanted && window.mask[first_row + step * step_rows];
  };
  fetch(num_steps - 1);

  for (int step = num_steps - 1; step >= 0; step--) {
    const bool real = next_real;
    dh += next_dy;
    const float dc_inside = dc + dh * next_factors[4];
    float dz[4];
#pragma unroll
    for (int gate = 0; gate < 4; gate++) dz[gate] = real ? (gate < 3 ? dc_inside : dh) * next_factors[gate] : 0.0f;
    if (real) dc = dc_inside * next_factors[5];

    float4* const now = handed + (step % 2) * kRows * H;
#pragma unroll
    for (int g = 0; g < kRows; g++) {
      float own = dz[g];
#pragma unroll
      for (int other = 1; other < kTwins; other++) own = twin == other ? dz[other * kRows + g] : own;
      const int at = (twin * kRows + g) * H + unit;
      reinterpret_cast<float*>(now)[row * 4 * H + at] = own;
      if (there) window.dz[(first_row + step * step_rows) * 4 * H + at] = own;
    }
    __syncthreads();
    fetch(step - 1);

    float sum[2][kRows] = {};
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk++) {
      float4 part_dz[kRows];
#pragma unroll
      for (int r = 0; r < kRows; r++) part_dz[r] = now[r * H + 8 * chunk + part];
#pragma unroll
      for (int u = 0; u < 2; u++) {
        const float4 w = chunk < kHeldChunks ? held[chunk < kHeldChunks ? chunk : 0][u]
                                             : stored[((chunk - kHeldChunks) * 2 + u) * kThreads + thread];
#pragma unroll
        for (int r = 0; r < kRows; r++) sum[u][r] = dot(part_dz[r], w, sum[u][r]);
      }
    }

    float of_unit[kRows], before;
#pragma unroll
    for (int r = 0; r < kRows; r++) {  // One unit, then one row if there are two, is kept, the other handed over.
      const bool second = part & 4;
      of_unit[r] = (second ? sum[1][r] : sum[0][r]) + __shfl_xor_sync(kAll, second ? sum[0][r] : sum[1][r], 4);
    }
    if constexpr (kRows == 2) {
      before = (row ? of_unit[1] : of_unit[0]) + __shfl_xor_sync(kAll, row ? of_unit[0] : of_unit[1], 2);
    } else {
      before = of_unit[0] + __shfl_xor_sync(kAll, of_unit[0], 2);
    }
    before += __shfl_xor_sync(kAll, before, 1);
    if (real) dh = before;
  }

  if (there && twin == 0) {
    window.dh_0[state_at] = dh;
    window.dc_0[state_at] = dc;
  }
}

template <int H, int kRows>
ffi::Error run(const Forward& window, dim3 grid, Stream stream) {
  constexpr size_t kShared = sizeof(float) * ((H - kHeldForward<H, kRows>) * 4 * H + 2 * kRows * H);
  return launch<Forward>(forward_window<H, kRows>, grid, 4 * H, kShared, stream, window);
}

template <int H, int kRows>
ffi::Error run(const Backward& window, dim3 grid, Stream stream) {
  constexpr size_t kShared = sizeof(float) * ((H - kHeldBackward<H, kRows>) * 4 * H + 2 * kRows * 4 * H);
  return launch<Backward>(backward_window<H, kRows>, grid, 4 * H, kShared, stream, window);
}

template <int H, typename Window>
ffi::Error run_of_size(const Window& window, unsigned members, Stream stream) {
  const unsigned batch = window.shape.batch;
  if (size_t{members} * batch <= num_multiprocessors()) return run<H, 1>(window, dim3(batch, members), stream);
  return run<H, 2>(window, dim3((batch + 1) / 2, members), stream);
}

// A window of steps [..., S, B, H] in which all leading axes are members.
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

using Array = ffi::Buffer<ffi::F32>;
using Mask = ffi::Buffer<ffi::PRED>;
using Output = ffi::Result<Array>;

ffi::Error forward(Stream stream, Array drive, Array w_h, Array h_0, Array c_0, Mask mask, Output y, Output h_end, Output c_end,
                   Output to_i, Output to_f, Output to_g, Output to_o, Output to_c, Output f) {
  const Forward window{
      {},
      drive.typed_data(),
      w_h.typed_data(),
      h_0.typed_data(),
      c_0.typed_data(),
      mask.typed_data(),
      y->typed_data(),
      h_end->typed_data(),
      c_end->typed_data(),
      {to_i->typed_data(), to_f->typed_data(), to_g->typed_data(), to_o->typed_data(), to_c->typed_data(), f->typed_data()},
  };
  return run(window, y->dimensions(), stream);
}

ffi::Error backward(Stream stream, Array to_i, Array to_f, Array to_g, Array to_o, Array to_c, Array f, Array dy,
                    Array dh_end, Array dc_end, Array w_h, Mask mask, Output dz, Output dh_0, Output dc_0) {
  const Backward window{
      {},
      {to_i.typed_data(), to_f.typed_data(), to_g.typed_data(), to_o.typed_data(), to_c.typed_data(), f.typed_data()},
      dy.typed_data(),
      mask.typed_data(),
      dh_end.typed_data(),
      dc_end.typed_data(),
      w_h.typed_data(),
      dz->typed_data(),
      dh_0->typed_data(),
      dc_0->typed_data(),
  };
  return run(window, dy.dimensions(), stream);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(lstm_forward, forward,
                              ffi::Ffi::Bind()
                                  .Ctx<StreamContext>()
                                  .Arg<Array>()  // drive [..., S, B, 4H]
                                  .Arg<Array>()  // w_h [..., H, 4H]
                                  .Arg<Array>()  // h_0 [..., B, H]
                                  .Arg<Array>()  // c_0
                                  .Arg<Mask>()  // [..., S, B]
                                  .Ret<Array>()  // y [..., S, B, H]
                                  .Ret<Array>()  // h_end [..., B, H]
                                  .Ret<Array>()  // c_end
                                  .Ret<Array>()  // factors [..., S, B, H]
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(lstm_backward, backward,
                              ffi::Ffi::Bind()
                                  .Ctx<StreamContext>()
                                  .Arg<Array>()  // factors [..., S, B, H]
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()  // dy [..., S, B, H]
                                  .Arg<Array>()  // dh_end [..., B, H]
                                  .Arg<Array>()  // dc_end
                                  .Arg<Array>()  // w_h [..., H, 4H]
                                  .Arg<Mask>()  // [..., S, B]
                                  .Ret<Array>()  // dz [..., S, B, 4H]
                                  .Ret<Array>()  // dh_0 [..., B, H]
                                  .Ret<Array>(),  // dc_0
                              {ffi::Traits::kCmdBufferCompatible});
