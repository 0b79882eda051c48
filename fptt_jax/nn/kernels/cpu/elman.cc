// A window of the Elman network on a CPU, forward and backward with all gradients.
//
// The outputs are all that the backward pass needs: tanh' = 1 - h^2.

#include "window.h"

namespace {

struct ElmanForward {
  Forward<1, 1> products;
  const float* bias;

  void run(Team& team) {
    Scratch scratch(products.scratch_size());
    products.run(team, scratch, [&](auto rows, int t, int row, int block) {
      tile<decltype(rows)::value>(t, row, block);
    });
  }

  template <int R>
  FPTT_INLINE void tile(int t, int row, int block) const {
    Vector start[1], sums[R][1];
    products.load_bias(start, bias, block);
    for (int r = 0; r < R; r++) sums[r][0] = start[0];
    products.multiply_x(sums, t, row, block);
    products.multiply_h(sums, t, row, block);
    for (int r = 0; r < R; r++) {
      const bool valid = products.is_valid(t, row + r);
      products.keep_h(t, row + r, block, valid ? tanh(sums[r][0]) : products.h_before(t, row + r, block));
    }
  }
};

struct ElmanBackward {
  Backward<1, 1, true> products;

  void run(Team& team) {
    Scratch scratch(products.scratch_size());
    products.run(team, scratch, [&](int t, int row, int block, Vector dh, Vector* to, Vector*) {
      const Vector h = products.h_after(t, row, block);
      to[0] = dh * (1.0f - h * h);
      return Vector{};
    });
  }
};

ffi::Error forward(
    ffi::ThreadPool pool, Array w_x, Array w_h, Array bias, Array x, Mask mask, Array h_start, Output h_end, Output y,
    Output) {
  return run_members(pool, x, w_h, 1, 1, [&](const Window& window, Team& team, int64_t m, int64_t n) {
    ElmanForward{
        {window, part(w_x, m, n), part(w_h, m, n), part(x, m, n), part(h_start, m, n), part(mask, m, n),
         part(*h_end, m, n), part(*y, m, n)},
        part(bias, m, n)}
        .run(team);
  });
}

ffi::Error backward(
    ffi::ThreadPool pool, Array w_x, Array w_h, Array, Array x, Mask mask, Array h_start, Array y, Array, Array dy,
    Array dh_end, Output dw_x, Output dw_h, Output dbias, Output dx, Output dh_start) {
  return run_members(pool, x, w_h, 1, 2, [&](const Window& window, Team& team, int64_t m, int64_t n) {
    ElmanBackward{
        {window, part(w_x, m, n), part(w_h, m, n), part(x, m, n), part(mask, m, n), part(h_start, m, n),
         part(y, m, n), part(dy, m, n), part(dh_end, m, n), part(*dw_x, m, n), part(*dw_h, m, n),
         part(*dbias, m, n), nullptr, part(*dx, m, n), part(*dh_start, m, n)}}
        .run(team);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    elman_forward, forward,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Mask>().Arg<Array>()
        .Ret<Array>().Ret<Array>().Ret<Array>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    elman_backward, backward,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Mask>().Arg<Array>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
        .Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>());
