// All steps of a GRU's window in one kernel, forward and backward; see window.h.
// Gates are in the order r, z, n.

#include "window.h"

namespace {

// How many of a thread's 3H/4 weights are in registers: all, unless two rows per block
// leave too few of the 128 registers.
template <int H, int kRows>
constexpr int kHeld = H < 128 || kRows == 1 ? 3 * H / 4 : 84;

struct Forward {
  Shape shape;
  const float *drive, *w_h, *recurrent_bias, *h_0;
  const bool* mask;
  float *y, *h_end;
  float *to_r, *to_z, *to_n, *to_recurrent_n, *z;  // Factors: see _forward in cells/gru.py.

  template <int H, int kRows>
  ffi::Error start(dim3 grid, Stream stream) const;
};

struct Backward {
  Shape shape;
  const float* factors[4];  // Of dh for r, z, the recurrent part of n, and n.
  const float *z, *dy;
  const bool* mask;
  const float *dh_end, *w_h;
  float *inputs, *recurrent, *dh_0;  // dz of w_x and dz of w_h: see _backward in cells/gru.py.

  template <int H, int kRows>
  ffi::Error start(dim3 grid, Stream stream) const;
};

template <int H, int kRows>
using ForwardOf = ForwardProduct<H, 3, kRows, kHeld<H, kRows>>;
template <int H, int kRows>
using BackwardOf = BackwardProduct<H, 3, kRows, kHeld<H, kRows>>;

// Each of a unit's four threads computes all gates of a row. One gate per thread would
// need fewer tanh, but more shuffles in sequence.
template <int H, int kRows>
__global__ void __launch_bounds__(4 * H) forward_window(const Forward window) {
  SHARED_MEMORY(float4, shared);
  const Rows rows(window.shape, kRows);
  ForwardOf<H, kRows> product(window.w_h + size_t{rows.member} * H * 3 * H, shared);
  const int part = product.part, unit = product.unit, row = product.row, num_steps = window.shape.num_steps;
  const bool there = rows.has(row), writes = there && part < kRows;

  const size_t state_at = rows.of_state(row) * H + unit;
  float h = read(window.h_0, state_at, there);
  product.hand_on(0, h);

  float bias[3], next_drive[3];
#pragma unroll
  for (int gate = 0; gate < 3; gate++) bias[gate] = window.recurrent_bias[(rows.member * 3 + gate) * H + unit];
  bool next_real;
  const auto fetch = [&](int step) {
    const bool wanted = step < num_steps && there;
    const size_t step_row = rows.of_step(step, row);
#pragma unroll
    for (int gate = 0; gate < 3; gate++) next_drive[gate] = read(window.drive, (step_row * 3 + gate) * H + unit, wanted);
    next_real = wanted && window.mask[step_row];
  };
  fetch(0);
  __syncthreads();

  for (int step = 0; step < num_steps; step++) {
    float drive[3];
    const bool real = next_real;
#pragma unroll
    for (int gate = 0; gate < 3; gate++) drive[gate] = next_drive[gate];
    fetch(step + 1);

    float sum[3][kRows] = {}, recurrent[3];
    product.sum_up(step, sum);
#pragma unroll
    for (int gate = 0; gate < 3; gate++) recurrent[gate] = add_up(add_row(sum[gate], row, 1), 2) + bias[gate];

    // From here on as _forward in cells/gru.py: weights and drive are halved for r and z,
    // since σ(x) = (1 + tanh(x/2))/2.
    const float r = 0.5f * tanhf(drive[0] + recurrent[0]) + 0.5f, z = 0.5f * tanhf(drive[1] + recurrent[1]) + 0.5f;
    const float n = tanhf(drive[2] + r * recurrent[2]), to_n = (1 - z) * (1 - n * n);
    const size_t at = rows.of_step(step, row) * H + unit;
    if (writes) {
      window.to_r[at] = to_n * recurrent[2] * r * (1 - r);
      window.to_z[at] = (h - n) * z * (1 - z);
      window.to_n[at] = to_n;
      window.to_recurrent_n[at] = to_n * r;
      window.z[at] = z;
    }
    if (real) h = n + z * (h - n);
    if (writes) window.y[at] = h;
    product.hand_on(step + 1, h);
    __syncthreads();
  }

  if (writes) window.h_end[state_at] = h;
}

// A unit and row have four numbers dz, the third for the recurrent part of n. Each of
// kTwins threads handles kRows of them.
template <int H, int kRows>
__global__ void __launch_bounds__(4 * H) backward_window(const Backward window) {
  SHARED_MEMORY(float4, shared);
  const Rows rows(window.shape, kRows);
  BackwardOf<H, kRows> product(window.w_h + size_t{rows.member} * H * 3 * H, shared);
  constexpr int kTwins = product.kTwins;
  const int unit = product.unit, row = product.row, twin = product.twin, num_steps = window.shape.num_steps;
  const bool there = rows.has(row);

  const size_t state_at = rows.of_state(row) * H + unit;
  float dh = read(window.dh_end, state_at, there);

  const float* factors[kRows];
#pragma unroll
  for (int own = 0; own < kRows; own++) {
    factors[own] = window.factors[own];
#pragma unroll
    for (int other = 1; other < kTwins; other++) factors[own] = twin == other ? window.factors[other * kRows + own] : factors[own];
  }
  float next_factors[kRows], next_z, next_dy;
  bool next_real;
  const auto fetch = [&](int step) {
    const bool wanted = step >= 0 && there;
    const size_t step_row = rows.of_step(step, row), at = step_row * H + unit;
#pragma unroll
    for (int own = 0; own < kRows; own++) next_factors[own] = read(factors[own], at, wanted);
    next_z = read(window.z, at, wanted);
    next_dy = read(window.dy, at, wanted);
    next_real = wanted && window.mask[step_row];
  };
  fetch(num_steps - 1);

  for (int step = num_steps - 1; step >= 0; step--) {
    const bool real = next_real;
    dh += next_dy;
#pragma unroll
    for (int own = 0; own < kRows; own++) {
      const float dz = real ? dh * next_factors[own] : 0.0f;
      const int number = twin * kRows + own;
      const size_t first = rows.of_step(step, row) * 3 * H + unit;
      if (number < 3) {
        product.hand_on(step, number, dz);
        if (there) window.recurrent[first + number * H] = dz;
      }
      if (there && number != 2) window.inputs[first + (number < 2 ? number : 2) * H] = dz;
    }
    if (real) dh *= next_z;
    fetch(step - 1);
    __syncthreads();
    dh += product.sum_up(step);  // A sum of zeros at a masked step.
  }

  if (there && twin == 0) window.dh_0[state_at] = dh;
}

template <int H, int kRows>
ffi::Error Forward::start(dim3 grid, Stream stream) const {
  return launch<Forward>(forward_window<H, kRows>, grid, 4 * H, sizeof(float4) * ForwardOf<H, kRows>::kShared, stream, *this);
}

template <int H, int kRows>
ffi::Error Backward::start(dim3 grid, Stream stream) const {
  return launch<Backward>(backward_window<H, kRows>, grid, 4 * H, sizeof(float4) * BackwardOf<H, kRows>::kShared, stream, *this);
}

ffi::Error forward(Stream stream, Array drive, Array w_h, Array recurrent_bias, Array h_0, Mask mask, Output y, Output h_end,
                   Output to_r, Output to_z, Output to_n, Output to_recurrent_n, Output z) {
  const Forward window{
      {},
      drive.typed_data(),
      w_h.typed_data(),
      recurrent_bias.typed_data(),
      h_0.typed_data(),
      mask.typed_data(),
      y->typed_data(),
      h_end->typed_data(),
      to_r->typed_data(),
      to_z->typed_data(),
      to_n->typed_data(),
      to_recurrent_n->typed_data(),
      z->typed_data(),
  };
  return run(window, y->dimensions(), stream);
}

ffi::Error backward(Stream stream, Array to_r, Array to_z, Array to_n, Array to_recurrent_n, Array z, Array dy, Array dh_end,
                    Array w_h, Mask mask, Output inputs, Output recurrent, Output dh_0) {
  const Backward window{
      {},
      {to_r.typed_data(), to_z.typed_data(), to_recurrent_n.typed_data(), to_n.typed_data()},
      z.typed_data(),
      dy.typed_data(),
      mask.typed_data(),
      dh_end.typed_data(),
      w_h.typed_data(),
      inputs->typed_data(),
      recurrent->typed_data(),
      dh_0->typed_data(),
  };
  return run(window, dy.dimensions(), stream);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(gru_forward, forward,
                              ffi::Ffi::Bind()
                                  .Ctx<StreamContext>()
                                  .Arg<Array>()  // drive [..., S, B, 3H]
                                  .Arg<Array>()  // w_h [..., H, 3H]
                                  .Arg<Array>()  // recurrent_bias [..., 3H]
                                  .Arg<Array>()  // h_0 [..., B, H]
                                  .Arg<Mask>()  // [..., S, B]
                                  .Ret<Array>()  // y [..., S, B, H]
                                  .Ret<Array>()  // h_end [..., B, H]
                                  .Ret<Array>()  // factors [..., S, B, H]
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(gru_backward, backward,
                              ffi::Ffi::Bind()
                                  .Ctx<StreamContext>()
                                  .Arg<Array>()  // factors [..., S, B, H]
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()  // dy [..., S, B, H]
                                  .Arg<Array>()  // dh_end [..., B, H]
                                  .Arg<Array>()  // w_h [..., H, 3H]
                                  .Arg<Mask>()  // [..., S, B]
                                  .Ret<Array>()  // dz of the inputs' product [..., S, B, 3H]
                                  .Ret<Array>()  // dz of the recurrent product
                                  .Ret<Array>(),  // dh_0 [..., B, H]
                              {ffi::Traits::kCmdBufferCompatible});
