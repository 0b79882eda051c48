// A window of the GRU on a CPU, forward and backward with all gradients.
//
// Kept for the backward pass are r, z, n and the recurrent part of n, four numbers per unit,
// and the outputs.

#include "window.h"

namespace {

constexpr int kGates = 3;
constexpr int kKept = 4;  // r, z, n, recurrent part of n.

struct GruForward {
  Forward<kGates, kGates> products;
  const float *bias, *recurrent_bias;
  float* kept;

  void run(Team& team) {
    Scratch scratch(products.scratch_size());
    products.run(team, scratch, [&](auto rows, int t, int row, int block) {
      tile<decltype(rows)::value>(t, row, block);
    });
  }

  template <int R>
  FPTT_INLINE void tile(int t, int row, int block) const {
    const Window& window = products.window;
    Vector start_x[kGates], start_h[kGates], sums_x[R][kGates], sums_h[R][kGates];
    products.load_bias(start_x, bias, block);
    products.load_bias(start_h, recurrent_bias, block);
    for (int r = 0; r < R; r++) {
      for (int gate = 0; gate < kGates; gate++) sums_x[r][gate] = start_x[gate];
    }
    prefetch_factors<kKept, R>(window, kept, t, row, block);
    products.multiply_x(sums_x, t, row, block);
    // The gates r and z are of one sum; the candidate needs its recurrent part alone.
    for (int r = 0; r < R; r++) {
      sums_h[r][0] = sums_x[r][0] + start_h[0];
      sums_h[r][1] = sums_x[r][1] + start_h[1];
      sums_h[r][2] = start_h[2];
    }
    products.multiply_h(sums_h, t, row, block);
    for (int i = 0; i < R; i++) {
      const Vector before = products.h_before(t, row + i, block), recurrent = sums_h[i][2];
      const Vector r = sigmoid(sums_h[i][0]), z = sigmoid(sums_h[i][1]), n = tanh(sums_x[i][2] + r * recurrent);
      const bool valid = products.is_valid(t, row + i);
      products.keep_h(t, row + i, block, valid ? n + z * (before - n) : before);
      if (kept) keep_factors<kKept>(factors<kKept>(window, kept, t, row + i, block), {r, z, n, recurrent});
    }
  }
};

struct GruBackward {
  Backward<kGates, kGates, false> products;
  const float* kept;

  void run(Team& team) {
    Scratch scratch(products.scratch_size());
    products.run(team, scratch, [&](int t, int row, int block, Vector dh, Vector* to_h, Vector* to_x) {
      return step(t, row, block, dh, to_h, to_x);
    });
  }

  FPTT_INLINE Vector step(int t, int row, int block, Vector dh, Vector* to_h, Vector* to_x) const {
    const float* const from = factors<kKept>(products.window, kept, t, row, block);
    const Vector r = load(from), z = load(from + kLanes), n = load(from + 2 * kLanes);
    const Vector recurrent = load(from + 3 * kLanes);
    const Vector dn = dh * (1.0f - z) * (1.0f - n * n);
    to_x[0] = to_h[0] = dn * recurrent * r * (1.0f - r);
    to_x[1] = to_h[1] = dh * (products.h_before(t, row, block) - n) * z * (1.0f - z);
    to_x[2] = dn;
    to_h[2] = dn * r;
    return dh * z;
  }
};

ffi::Error forward(
    ffi::ThreadPool pool, Array w_x, Array w_h, Array bias, Array recurrent_bias, Array x, Mask mask, Array h_start,
    Output h_end, Output y, Output kept) {
  return run_members(pool, x, w_h, kGates, 1, [&](const Window& window, Team& team, int64_t m, int64_t n) {
    GruForward{
        {window, part(w_x, m, n), part(w_h, m, n), part(x, m, n), part(h_start, m, n), part(mask, m, n),
         part(*h_end, m, n), part(*y, m, n)},
        part(bias, m, n), part(recurrent_bias, m, n), part(*kept, m, n)}
        .run(team);
  });
}

ffi::Error backward(
    ffi::ThreadPool pool, Array w_x, Array w_h, Array, Array, Array x, Mask mask, Array h_start, Array y, Array kept,
    Array dy, Array dh_end, Output dw_x, Output dw_h, Output dbias, Output drecurrent_bias, Output dx,
    Output dh_start) {
  return run_members(pool, x, w_h, kGates, 2, [&](const Window& window, Team& team, int64_t m, int64_t n) {
    GruBackward{
        {window, part(w_x, m, n), part(w_h, m, n), part(x, m, n), part(mask, m, n), part(h_start, m, n),
         part(y, m, n), part(dy, m, n), part(dh_end, m, n), part(*dw_x, m, n), part(*dw_h, m, n),
         part(*dbias, m, n), part(*drecurrent_bias, m, n), part(*dx, m, n), part(*dh_start, m, n)},
        part(kept, m, n)}
        .run(team);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    gru_forward, forward,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Mask>().Arg<Array>()
        .Ret<Array>().Ret<Array>().Ret<Array>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    gru_backward, backward,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Mask>().Arg<Array>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
        .Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>());
