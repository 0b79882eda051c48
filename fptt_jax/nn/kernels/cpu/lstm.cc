// A window of the LSTM on a CPU, forward and backward with all gradients.
//
// Forward, a tile of rows by the 4 gates of a block of units stays in registers from the
// products to the new state. Kept for the backward pass are i, f, g, o and the new c, five
// numbers per unit, and the outputs. Backward, dz is written once, in the order in which
// all three products read it.

#include "window.h"

namespace {

constexpr int kGates = 4;
constexpr int kKept = 5;  // i, f, g, o, c of a block of units, side by side.

struct LstmForward {
  Forward<kGates, kGates> products;
  const float *bias, *c_start;
  float *c_end, *kept;
  float* c = nullptr;

  void run(Team& team) {
    const Window& window = products.window;
    Scratch scratch(products.scratch_size() + window.padded_size());
    c = scratch.next(window.padded_size());
    window.pad(c_start, c);
    products.run(team, scratch, [&](auto rows, int t, int row, int block) {
      tile<decltype(rows)::value>(t, row, block);
    });
    window.unpad(c, c_end);
  }

  template <int R>
  FPTT_INLINE void tile(int t, int row, int block) const {
    const Window& window = products.window;
    Vector start[kGates], sums[R][kGates];
    products.load_bias(start, bias, block);
    for (int r = 0; r < R; r++) {
      for (int gate = 0; gate < kGates; gate++) sums[r][gate] = start[gate];
    }
    prefetch_factors<kKept, R>(window, kept, t, row, block);
    products.multiply_x(sums, t, row, block);
    products.multiply_h(sums, t, row, block);
    for (int r = 0; r < R; r++) {
      float* const c_here = c + (row + r) * window.units.padded() + block * kLanes;
      const Vector i = sigmoid(sums[r][0]), f = sigmoid(sums[r][1]), g = tanh(sums[r][2]), o = sigmoid(sums[r][3]);
      Vector new_c = f * load(c_here) + i * g;
      Vector h = o * tanh(new_c);
      if (!products.is_valid(t, row + r)) {
        new_c = load(c_here);
        h = products.h_before(t, row + r, block);
      }
      store(c_here, new_c);
      products.keep_h(t, row + r, block, h);
      if (kept) keep_factors<kKept>(factors<kKept>(window, kept, t, row + r, block), {i, f, g, o, new_c});
    }
  }
};

struct LstmBackward {
  Backward<kGates, kGates, true> products;
  const float *c_start, *kept, *dc_end;
  float* dc_start;

  void run(Team& team) {
    const Window& window = products.window;
    Scratch scratch(products.scratch_size() + window.padded_size());
    float* const dc = scratch.next(window.padded_size());
    window.pad(dc_end, dc);
    products.run(team, scratch, [&](int t, int row, int block, Vector dh, Vector* to, Vector*) {
      return step(dc, t, row, block, dh, to);
    });
    if (dc_start) window.unpad(dc, dc_start);
  }

  FPTT_INLINE Vector step(float* dc, int t, int row, int block, Vector dh, Vector* to) const {
    const Window& window = products.window;
    const float* const from = factors<kKept>(window, kept, t, row, block);
    const Vector i = load(from), f = load(from + kLanes), g = load(from + 2 * kLanes), o = load(from + 3 * kLanes);
    const Vector before =
        t == 0 ? load(c_start + static_cast<size_t>(row) * window.units.count + block * kLanes, window.units.in_block(block))
               : load(factors<kKept>(window, kept, t - 1, row, block) + 4 * kLanes);
    const Vector tanh_c = tanh(load(from + 4 * kLanes));
    float* const dc_here = dc + row * window.units.padded() + block * kLanes;
    const Vector d = load(dc_here) + dh * o * (1.0f - tanh_c * tanh_c);
    to[0] = d * g * i * (1.0f - i);
    to[1] = d * before * f * (1.0f - f);
    to[2] = d * i * (1.0f - g * g);
    to[3] = dh * tanh_c * o * (1.0f - o);
    store(dc_here, d * f);
    return Vector{};
  }
};

ffi::Error forward(
    ffi::ThreadPool pool, Array w_x, Array w_h, Array bias, Array x, Mask mask, Array h_start, Array c_start,
    Output h_end, Output c_end, Output y, Output kept) {
  return run_members(pool, x, w_h, kGates, 1, [&](const Window& window, Team& team, int64_t m, int64_t n) {
    LstmForward{
        {window, part(w_x, m, n), part(w_h, m, n), part(x, m, n), part(h_start, m, n), part(mask, m, n),
         part(*h_end, m, n), part(*y, m, n)},
        part(bias, m, n), part(c_start, m, n), part(*c_end, m, n), part(*kept, m, n)}
        .run(team);
  });
}

ffi::Error backward(
    ffi::ThreadPool pool, Array w_x, Array w_h, Array, Array x, Mask mask, Array h_start, Array c_start, Array y,
    Array kept, Array dy, Array dh_end, Array dc_end, Output dw_x, Output dw_h, Output dbias, Output dx,
    Output dh_start, Output dc_start) {
  return run_members(pool, x, w_h, kGates, 2, [&](const Window& window, Team& team, int64_t m, int64_t n) {
    LstmBackward{
        {window, part(w_x, m, n), part(w_h, m, n), part(x, m, n), part(mask, m, n), part(h_start, m, n),
         part(y, m, n), part(dy, m, n), part(dh_end, m, n), part(*dw_x, m, n), part(*dw_h, m, n),
         part(*dbias, m, n), nullptr, part(*dx, m, n), part(*dh_start, m, n)},
        part(c_start, m, n), part(kept, m, n), part(dc_end, m, n), part(*dc_start, m, n)}
        .run(team);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    lstm_forward, forward,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Mask>().Arg<Array>().Arg<Array>()
        .Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    lstm_backward, backward,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Mask>().Arg<Array>().Arg<Array>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
        .Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>());
