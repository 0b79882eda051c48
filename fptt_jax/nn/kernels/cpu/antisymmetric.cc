// A window of the gated AntisymmetricRNN on a CPU, forward and backward with all gradients.
//
// One recurrent sum serves the tanh and its gate. Kept for the backward pass are both, two
// numbers per unit, and the outputs. w_h is the transpose of A.

#include "window.h"

namespace {

constexpr int kGates = 2;  // Of w_x: tanh, gate.
constexpr int kKept = 2;

struct AntisymmetricForward {
  Forward<kGates, 1> products;
  const float* bias;
  float* kept;
  float epsilon;

  void run(Team& team) {
    Scratch scratch(products.scratch_size());
    products.run(team, scratch, [&](auto rows, int t, int row, int block) {
      tile<decltype(rows)::value>(t, row, block);
    });
  }

  template <int R>
  FPTT_INLINE void tile(int t, int row, int block) const {
    Vector start[kGates], sums_x[R][kGates], sums_h[R][1] = {};
    products.load_bias(start, bias, block);
    for (int r = 0; r < R; r++) {
      for (int gate = 0; gate < kGates; gate++) sums_x[r][gate] = start[gate];
    }
    products.multiply_x(sums_x, t, row, block);
    products.multiply_h(sums_h, t, row, block);
    for (int r = 0; r < R; r++) {
      const Vector before = products.h_before(t, row + r, block);
      const Vector value = tanh(sums_x[r][0] + sums_h[r][0]), gate = sigmoid(sums_x[r][1] + sums_h[r][0]);
      const bool valid = products.is_valid(t, row + r);
      products.keep_h(t, row + r, block, valid ? before + epsilon * gate * value : before);
      if (kept) keep_factors<kKept>(factors<kKept>(products.window, kept, t, row + r, block), {value, gate});
    }
  }
};

struct AntisymmetricBackward {
  Backward<kGates, 1, false> products;
  const float* kept;
  float epsilon;

  void run(Team& team) {
    Scratch scratch(products.scratch_size());
    products.run(team, scratch, [&](int t, int row, int block, Vector dh, Vector* to_h, Vector* to_x) {
      const float* const from = factors<kKept>(products.window, kept, t, row, block);
      const Vector value = load(from), gate = load(from + kLanes), scaled = epsilon * gate * dh;
      to_x[0] = scaled * (1.0f - value * value);
      to_x[1] = scaled * value * (1.0f - gate);
      to_h[0] = to_x[0] + to_x[1];
      return dh;
    });
  }
};

ffi::Error forward(
    ffi::ThreadPool pool, Array w_x, Array w_h, Array bias, Array x, Mask mask, Array h_start, Output h_end, Output y,
    Output kept, float epsilon) {
  return run_members(pool, x, w_h, 1, 1, [&](const Window& window, Team& team, int64_t m, int64_t n) {
    AntisymmetricForward{
        {window, part(w_x, m, n), part(w_h, m, n), part(x, m, n), part(h_start, m, n), part(mask, m, n),
         part(*h_end, m, n), part(*y, m, n)},
        part(bias, m, n), part(*kept, m, n), epsilon}
        .run(team);
  });
}

ffi::Error backward(
    ffi::ThreadPool pool, Array w_x, Array w_h, Array, Array x, Mask mask, Array h_start, Array y, Array kept,
    Array dy, Array dh_end, Output dw_x, Output dw_h, Output dbias, Output dx, Output dh_start, float epsilon) {
  return run_members(pool, x, w_h, 1, 2, [&](const Window& window, Team& team, int64_t m, int64_t n) {
    AntisymmetricBackward{
        {window, part(w_x, m, n), part(w_h, m, n), part(x, m, n), part(mask, m, n), part(h_start, m, n),
         part(y, m, n), part(dy, m, n), part(dh_end, m, n), part(*dw_x, m, n), part(*dw_h, m, n),
         part(*dbias, m, n), nullptr, part(*dx, m, n), part(*dh_start, m, n)},
        part(kept, m, n), epsilon}
        .run(team);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    antisymmetric_forward, forward,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Mask>().Arg<Array>()
        .Ret<Array>().Ret<Array>().Ret<Array>()
        .Attr<float>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    antisymmetric_backward, backward,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Mask>().Arg<Array>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
        .Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>()
        .Attr<float>("epsilon"));
