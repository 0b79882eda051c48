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
constexpr int kWidth = kGates * kLanes;
constexpr int kPart = 8 * kRows;  // Units whose weights' gradients are one task.

struct Forward {
  const Window window;
  const float *w_x, *w_h, *bias, *h_start, *c_start, *x;
  const bool* mask;
  float *h_end, *c_end, *y, *kept;
  float *packed = nullptr, *c = nullptr;

  size_t panel_size() const { return static_cast<size_t>(window.layer.features + window.layer.hidden) * kWidth; }

  void run(Team& team) {
    const Layer& layer = window.layer;
    const size_t packed_size = Scratch::padded(panel_size() * layer.blocks());
    Scratch scratch(packed_size + window.padded_size());
    packed = scratch.next(packed_size);
    c = scratch.next(window.padded_size());
    team.run(layer.blocks(), [&](int block) {
      float* const panel = packed + block * panel_size();
      pack_block(layer, w_x, layer.features, block, panel);
      pack_block(layer, w_h, layer.hidden, block, panel + layer.features * kWidth);
    });
    window.pad(c_start, c);
    window.run_forward(team, [&](int t, int begin, int end, int block) {
      for_tiles(begin, end, [&](auto rows, int row) { step<decltype(rows)::value>(t, row, block); });
    });
    std::memcpy(h_end, y + (window.steps - 1) * window.step_size(), 4 * window.step_size());
    window.unpad(c, c_end);
  }

  // Fetches the lines that the tile will write, which is as long as its products take.
  template <int R>
  FPTT_INLINE void prefetch_kept(size_t first, int block) const {
    for (int r = 0; r < R; r++) {
      const float* const to = kept + ((first + r) * window.layer.blocks() + block) * kKept * kLanes;
      for (int i = 0; i < kKept; i++) __builtin_prefetch(to + i * kLanes, 1);
    }
  }

  template <int R>
  FPTT_INLINE void step(int t, int row, int block) const {
    const Layer& layer = window.layer;
    const size_t hidden = layer.hidden, features = layer.features;
    const size_t first = static_cast<size_t>(t) * window.batch + row;  // Among the rows of all steps.
    const int units = layer.units(block);
    const float* const h = (t == 0 ? h_start + row * hidden : y + (first - window.batch) * hidden);
    Vector sums[R][kGates];
    for (int gate = 0; gate < kGates; gate++) {
      const Vector start = load(bias + gate * hidden + block * kLanes, units);
      for (int r = 0; r < R; r++) sums[r][gate] = start;
    }
    const float* const panel = packed + block * panel_size();
    if (kept) prefetch_kept<R>(first, block);
    multiply(sums, x + first * features, features, 1, features, panel);
    multiply(sums, h, hidden, 1, hidden, panel + features * kWidth);
    for (int r = 0; r < R; r++) {
      float* const c_here = c + (row + r) * window.padded_units() + block * kLanes;
      Vector i = sigmoid(sums[r][0]), f = sigmoid(sums[r][1]), g = tanh(sums[r][2]), o = sigmoid(sums[r][3]);
      Vector new_c = f * load(c_here) + i * g;
      Vector new_h = o * tanh(new_c);
      if (mask && !mask[first + r]) {
        new_c = load(c_here);
        new_h = load(h + r * hidden + block * kLanes, units);
      }
      store(c_here, new_c);
      store(y + (first + r) * hidden + block * kLanes, new_h, units);
      if (!kept) continue;
      float* const to = kept + ((first + r) * layer.blocks() + block) * kKept * kLanes;
      store(to, i);
      store(to + kLanes, f);
      store(to + 2 * kLanes, g);
      store(to + 3 * kLanes, o);
      store(to + 4 * kLanes, new_c);
    }
  }
};

struct Backward {
  const Window window;
  const float *w_x, *w_h, *x;
  const bool* mask;
  const float *h_start, *c_start, *y, *kept, *dh_end, *dc_end, *dy;
  float *dw_x, *dw_h, *dbias, *dx, *dh_start, *dc_start;
  float *packed_x = nullptr, *packed_h = nullptr, *dz = nullptr, *dh = nullptr, *dc = nullptr, *before = nullptr;

  // Rows of dz that are kept, those of a chunk of steps.
  size_t chunk_rows() const { return static_cast<size_t>(window.gradient_steps()) * window.batch; }
  bool is_valid(size_t row) const { return !mask || mask[row]; }

  void run(Team& team) {
    const Layer& layer = window.layer;
    const size_t state_size = Scratch::padded(window.padded_size());
    const size_t size_h = layer.transpose_size(layer.hidden);
    const size_t size_x = dx ? layer.transpose_size(layer.features) : 0;
    const size_t dz_size = chunk_rows() * layer.width();
    const size_t before_size = chunk_rows() * num_parts() * kPart;
    Scratch scratch(size_h + size_x + dz_size + 2 * state_size + before_size);
    packed_h = scratch.next(size_h);
    packed_x = scratch.next(size_x);
    dz = scratch.next(dz_size);
    dh = scratch.next(state_size);
    dc = scratch.next(state_size);
    before = scratch.next(before_size);
    pack(team, w_h, layer.hidden, packed_h);
    if (dx) pack(team, w_x, layer.features, packed_x);
    window.pad(dh_end, dh);
    window.pad(dc_end, dc);
    window.run_backward(
        team, [&](int t, int chunk, int begin, int end, int block) { gates(t, chunk, begin, end, block); },
        [&](int t, int chunk, int begin, int end, int panel) { state(t, chunk, begin, end, panel); },
        [&](int begin, int end) { gradients(team, begin, end); });
    if (dh_start) window.unpad(dh, dh_start);
    if (dc_start) window.unpad(dc, dc_start);
  }

  void pack(Team& team, const float* weights, int columns, float* to) const {
    const Layer& layer = window.layer;
    team.run(Layer::panels(columns), [&](int panel) {
      pack_transposed_panel(layer, weights, columns, panel, to + layer.width() * panel * kPanel * kLanes);
    });
  }

  // Returns a row of dz within its block.
  float* dz_row(size_t row_in_chunk, int block) const { return dz + (block * chunk_rows() + row_in_chunk) * kWidth; }

  void gates(int t, int chunk, int begin, int end, int block) const {
    const Layer& layer = window.layer;
    const int units = layer.units(block);
    const size_t kept_row = static_cast<size_t>(layer.blocks()) * kKept * kLanes;
    for (int row = begin; row < end; row++) {
      const size_t here = static_cast<size_t>(t) * window.batch + row;
      float* const to = dz_row((t - chunk) * static_cast<size_t>(window.batch) + row, block);
      float* const dh_here = dh + row * window.padded_units() + block * kLanes;
      float* const dc_here = dc + row * window.padded_units() + block * kLanes;
      Vector d_h = load(dh_here);
      if (dy) d_h += load(dy + here * layer.hidden + block * kLanes, units);
      if (!is_valid(here)) {
        // A masked step passes the state's gradient on.
        store(dh_here, d_h);
        for (int gate = 0; gate < kGates; gate++) store(to + gate * kLanes, Vector{});
        continue;
      }
      const float* const from = kept + here * kept_row + block * kKept * kLanes;
      const Vector i = load(from), f = load(from + kLanes), g = load(from + 2 * kLanes), o = load(from + 3 * kLanes);
      const Vector before = t == 0 ? load(c_start + row * static_cast<size_t>(layer.hidden) + block * kLanes, units)
                                   : load(from - window.batch * kept_row + 4 * kLanes);
      const Vector tanh_c = tanh(load(from + 4 * kLanes));
      const Vector d_c = load(dc_here) + d_h * o * (1.0f - tanh_c * tanh_c);
      store(to, d_c * g * i * (1.0f - i));
      store(to + kLanes, d_c * before * f * (1.0f - f));
      store(to + 2 * kLanes, d_c * i * (1.0f - g * g));
      store(to + 3 * kLanes, d_h * tanh_c * o * (1.0f - o));
      store(dc_here, d_c * f);
    }
  }

  void state(int t, int chunk, int begin, int end, int panel) const {
    if (t == 0 && !dh_start) return;
    const size_t step = static_cast<size_t>(t) * window.batch;
    const float* const rows = dz_row((t - chunk) * static_cast<size_t>(window.batch), 0);
    transposed_product(
        window.layer, rows, chunk_rows(), packed_h, window.layer.hidden, panel, begin, end,
        [&](int row, int unit, Vector sum) {
          if (is_valid(step + row)) store(dh + row * window.padded_units() + unit, sum);
        });
  }

  // Adds the share of the steps [begin, end) to the gradients of weights and inputs.
  void gradients(Team& team, int begin, int end) const {
    const Layer& layer = window.layer;
    const int parts = num_parts();
    team.run(parts, [&](int part) { pack_outputs(begin, end, part); });
    team.run(layer.blocks() * parts, [&](int task) {
      const int block = task / parts, first = task % parts * kPart;
      recurrent_gradient(begin, end, block, first);
      if (first == 0) input_gradients(begin, end, block);
    });
    if (dx) {
      window.run_rows(team, [&](int first, int last) { inputs(begin, end, first, last); });
    }
  }

  int num_parts() const { return (window.layer.hidden + kPart - 1) / kPart; }

  // Copies kPart units of h before each step: rows of a whole layer would be so far apart
  // that they compete for the same lines of the cache.
  void pack_outputs(int begin, int end, int part) const {
    const size_t hidden = window.layer.hidden, first = part * kPart;
    const size_t units = std::min<size_t>(kPart, hidden - first);
    float* to = before + chunk_rows() * first;
    for (int t = begin; t < end; t++) {
      const float* const from = t == 0 ? h_start : y + (t - 1) * window.step_size();
      for (int row = 0; row < window.batch; row++, to += kPart) {
        std::memcpy(to, from + row * hidden + first, 4 * units);
      }
    }
  }

  void recurrent_gradient(int begin, int end, int block, int first) const {
    const size_t rows = static_cast<size_t>(end - begin) * window.batch;
    const float* const from = before + chunk_rows() * first;
    add_weight_gradient<kGates>(
        window.layer, first, std::min(first + kPart, window.layer.hidden), block, end == window.steps, dw_h,
        [&](auto& sums, int unit) { multiply(sums, from + unit - first, 1, kPart, rows, dz_row(0, block)); });
  }

  void input_gradients(int begin, int end, int block) const {
    const size_t features = window.layer.features, rows = static_cast<size_t>(end - begin) * window.batch;
    const float* const from = x + static_cast<size_t>(begin) * window.batch * features;
    const bool first = end == window.steps;
    add_weight_gradient<kGates>(
        window.layer, 0, static_cast<int>(features), block, first, dw_x,
        [&](auto& sums, int feature) { multiply(sums, from + feature, 1, features, rows, dz_row(0, block)); });
    constexpr float kOne = 1.0f;
    add_weight_gradient<kGates>(window.layer, 0, 1, block, first, dbias, [&](auto& sums, int) {
      multiply(sums, &kOne, 0, 0, rows, dz_row(0, block));
    });
  }

  void inputs(int begin, int end, int first, int last) const {
    const int features = window.layer.features;
    for (int t = begin; t < end; t++) {
      const float* const rows = dz_row(static_cast<size_t>(t - begin) * window.batch, 0);
      for (int panel = 0; panel < Layer::panels(features); panel++) {
        transposed_product(
            window.layer, rows, chunk_rows(), packed_x, features, panel, first, last,
            [&](int row, int column, Vector sum) {
              float* const to = dx + (static_cast<size_t>(t) * window.batch + row) * features + column;
              store(to, sum, features - column);
            });
      }
    }
  }
};

ffi::Error forward(
    ffi::ThreadPool pool, Array w_x, Array w_h, Array bias, Array x, Mask mask, Array h_start, Array c_start,
    Output h_end, Output c_end, Output y, Output kept) {
  return run_members(pool, x, w_h, kGates, 1, [&](const Window& window, Team& team, int64_t m, int64_t n) {
    Forward{window, part(w_x, m, n), part(w_h, m, n), part(bias, m, n), part(h_start, m, n), part(c_start, m, n),
            part(x, m, n), part(mask, m, n), part(*h_end, m, n), part(*c_end, m, n), part(*y, m, n),
            part(*kept, m, n)}
        .run(team);
  });
}

ffi::Error backward(
    ffi::ThreadPool pool, Array w_x, Array w_h, Array, Array x, Mask mask, Array h_start, Array c_start, Array y,
    Array kept, Array dy, Array dh_end, Array dc_end, Output dw_x, Output dw_h, Output dbias, Output dx,
    Output dh_start, Output dc_start) {
  return run_members(pool, x, w_h, kGates, 2, [&](const Window& window, Team& team, int64_t m, int64_t n) {
    Backward{window, part(w_x, m, n), part(w_h, m, n), part(x, m, n), part(mask, m, n), part(h_start, m, n),
             part(c_start, m, n), part(y, m, n), part(kept, m, n), part(dh_end, m, n), part(dc_end, m, n),
             part(dy, m, n), part(*dw_x, m, n), part(*dw_h, m, n), part(*dbias, m, n), part(*dx, m, n),
             part(*dh_start, m, n), part(*dc_start, m, n)}
        .run(team);
  });
}

}  // namespace

extern "C" void set_thread_limit(int threads) { thread_limit = threads; }

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
