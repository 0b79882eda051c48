// All steps of an LSTM's window in one kernel, forward and backward; see window.h.
// Gates are in the order i, f, g, o.

#include "window.h"

namespace {

constexpr int kNumFactors = 6;  // In the order of _forward in cells/lstm.py.

// How many of a thread's H weights are in registers: as many as fit into 128 registers,
// the most that each of 512 threads can have.
template <int H, int kRows>
constexpr int kHeldForward = H < 128 ? H : kRows == 1 ? 96 : 76;
template <int H, int kRows>
constexpr int kHeldBackward = H < 128 ? H : kRows == 1 ? 80 : 68;

struct Forward {
  Shape shape;
  const float *drive, *w_h, *h_0, *c_0;
  const bool* mask;
  float *y, *h_end, *c_end;
  float* factors[kNumFactors];

  template <int H, int kRows>
  ffi::Error start(dim3 grid, Stream stream) const;
};

struct Backward {
  Shape shape;
  const float* factors[kNumFactors];
  const float* dy;
  const bool* mask;
  const float *dh_end, *dc_end, *w_h;
  float *dz, *dh_0, *dc_0;

  template <int H, int kRows>
  ffi::Error start(dim3 grid, Stream stream) const;
};

template <int H, int kRows>
using ForwardOf = ForwardProduct<H, 4, kRows, kHeldForward<H, kRows>>;
template <int H, int kRows>
using BackwardOf = BackwardProduct<H, 4, kRows, kHeldBackward<H, kRows>>;

// Each of a unit's four threads computes one gate.
template <int H, int kRows>
__global__ void __launch_bounds__(4 * H) forward_window(const Forward window) {
  SHARED_MEMORY(float4, shared);
  const Rows rows(window.shape, kRows);
  ForwardOf<H, kRows> product(window.w_h + size_t{rows.member} * H * 4 * H, shared);
  const int part = product.part, unit = product.unit, row = product.row, num_steps = window.shape.num_steps;
  const bool there = rows.has(row), writes = there && part < kRows;

  const size_t state_at = rows.of_state(row) * H + unit;
  float h = read(window.h_0, state_at, there), c = read(window.c_0, state_at, there);
  product.hand_on(0, h);

  float next_drive[kRows];
  bool next_real;
  const auto fetch = [&](int step) {
    const bool wanted = step < num_steps;
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      next_drive[r] = read(window.drive, rows.of_step(step, r) * 4 * H + part * H + unit, wanted && rows.has(r));
    }
    next_real = wanted && there && window.mask[rows.of_step(step, row)];
  };
  fetch(0);
  __syncthreads();

  for (int step = 0; step < num_steps; step++) {
    float drive[kRows];
    const bool real = next_real;
#pragma unroll
    for (int r = 0; r < kRows; r++) drive[r] = next_drive[r];
    fetch(step + 1);

    float sum[4][kRows] = {};
    product.sum_up(step, sum);
    float activated[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) {  // Keep two gates, then one; hand over the others.
      const float even_gate = add_one_of(sum[0][r], sum[2][r], part & 2, 2);
      const float odd_gate = add_one_of(sum[1][r], sum[3][r], part & 2, 2);
      activated[r] = tanhf(drive[r] + add_one_of(even_gate, odd_gate, part & 1, 1));
    }
    float gates[4];
#pragma unroll
    for (int gate = 0; gate < 4; gate++) {
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const float value = __shfl_sync(0xffffffffu, activated[r], gate, 4);
        if (r == row) gates[gate] = value;
      }
    }

    // From here on as _forward in cells/lstm.py: weights and drive are halved for i, f and
    // o, since σ(z) = (1 + tanh(z/2))/2.
    const float i = 0.5f * gates[0] + 0.5f, f = 0.5f * gates[1] + 0.5f, g = gates[2], o = 0.5f * gates[3] + 0.5f;
    const float new_c = f * c + i * g, t = tanhf(new_c);
    if (writes) {
      const size_t at = rows.of_step(step, row) * H + unit;
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
    product.hand_on(step + 1, h);
    __syncthreads();
  }

  if (writes) {
    window.h_end[state_at] = h;
    window.c_end[state_at] = c;
  }
}

// A unit and row have four gates' dz. Each of kTwins threads writes kRows of them.
template <int H, int kRows>
__global__ void __launch_bounds__(4 * H) backward_window(const Backward window) {
  SHARED_MEMORY(float4, shared);
  const Rows rows(window.shape, kRows);
  BackwardOf<H, kRows> product(window.w_h + size_t{rows.member} * H * 4 * H, shared);
  constexpr int kTwins = product.kTwins;
  const int unit = product.unit, row = product.row, twin = product.twin, num_steps = window.shape.num_steps;
  const bool there = rows.has(row);

  const size_t state_at = rows.of_state(row) * H + unit;
  float dh = read(window.dh_end, state_at, there), dc = read(window.dc_end, state_at, there);

  float next_factors[kNumFactors], next_dy;
  bool next_real;
  const auto fetch = [&](int step) {
    const bool wanted = step >= 0 && there;
    const size_t at = rows.of_step(step, row) * H + unit;
#pragma unroll
    for (int number = 0; number < kNumFactors; number++) next_factors[number] = read(window.factors[number], at, wanted);
    next_dy = read(window.dy, at, wanted);
    next_real = wanted && window.mask[rows.of_step(step, row)];
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

#pragma unroll
    for (int g = 0; g < kRows; g++) {
      float own = dz[g];
#pragma unroll
      for (int other = 1; other < kTwins; other++) own = twin == other ? dz[other * kRows + g] : own;
      const int gate = twin * kRows + g;
      product.hand_on(step, gate, own);
      if (there) window.dz[(rows.of_step(step, row) * 4 + gate) * H + unit] = own;
    }
    fetch(step - 1);
    __syncthreads();
    const float before = product.sum_up(step);
    if (real) dh = before;
  }

  if (there && twin == 0) {
    window.dh_0[state_at] = dh;
    window.dc_0[state_at] = dc;
  }
}

template <int H, int kRows>
ffi::Error Forward::start(dim3 grid, Stream stream) const {
  return launch<Forward>(forward_window<H, kRows>, grid, 4 * H, sizeof(float4) * ForwardOf<H, kRows>::kShared, stream, *this);
}

template <int H, int kRows>
ffi::Error Backward::start(dim3 grid, Stream stream) const {
  return launch<Backward>(backward_window<H, kRows>, grid, 4 * H, sizeof(float4) * BackwardOf<H, kRows>::kShared, stream, *this);
}

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
