// The influence of parameters on their own units: its advance by a window of each cell, from
// the factors that the window kept, and its credit. An advance also takes the credits, which
// it does not read: they must be computed before it overwrites the influence.

#include "own.h"
#include "window.h"

namespace {

// The derivatives of a step of the LSTM, whose factors are i, f, g, o and the new c.
struct Lstm {
  static constexpr int kGates = 4, kKept = 5;

  const Window& window;
  const float *c_start, *kept, *diagonals;

  FPTT_INLINE void operator()(
      int t, int row, int block, Within<2, 2>& transition, Within<2, kGates> (&gains)[1]) const {
    const float* const from = factors<kKept>(window, kept, t, row, block);
    const Vector i = load(from), f = load(from + kLanes), g = load(from + 2 * kLanes), o = load(from + 3 * kLanes);
    const Vector before =
        t == 0 ? load(c_start + static_cast<size_t>(row) * window.units.count + block * kLanes, window.units.in_block(block))
               : load(factors<kKept>(window, kept, t - 1, row, block) + 4 * kLanes);
    const Vector tanh_c = tanh(load(from + 4 * kLanes)), h_by_c = o * (1.0f - tanh_c * tanh_c);
    const Vector of_c[kGates] = {g * i * (1.0f - i), before * f * (1.0f - f), i * (1.0f - g * g), Vector{}};
    Vector by_h[2] = {};
    for (int gate = 0; gate < kGates; gate++) {
      gains[0][0][gate] = gate == 3 ? tanh_c * o * (1.0f - o) : h_by_c * of_c[gate];
      gains[0][1][gate] = of_c[gate];
      const Vector diagonal = load(diagonals + gate * window.units.padded() + block * kLanes);
      for (int a = 0; a < 2; a++) by_h[a] += gains[0][a][gate] * diagonal;
    }
    transition[0][0] = by_h[0];
    transition[0][1] = h_by_c * f;
    transition[1][0] = by_h[1];
    transition[1][1] = f;
  }
};

ffi::Error lstm(
    ffi::ThreadPool pool, Array, Array w_h, Array, Array x, Mask mask, Array h_start, Array c_start, Array y,
    Array kept, Array, Array, Array, Array of_w_x, Array of_w_h, Array of_bias, Output to_w_x, Output to_w_h, Output to_bias,
    float recurrence) {
  constexpr int kGates = Lstm::kGates;
  return run_members(pool, x, w_h, kGates, 2, [&](const Window& window, Team& team, int64_t m, int64_t n) {
    const Diagonals<kGates> diagonals(window.units, part(w_h, m, n), recurrence);
    OwnAdvance<2, kGates, 1, 3>{
        window, part(mask, m, n),
        {{0, window.inputs.count, part(of_w_x, m, n), part(*to_w_x, m, n), part(x, m, n), nullptr},
         {0, window.units.count, part(of_w_h, m, n), part(*to_w_h, m, n), part(y, m, n), part(h_start, m, n)},
         {0, 1, part(of_bias, m, n), part(*to_bias, m, n), nullptr, nullptr}}}
        .run(team, Lstm{window, part(c_start, m, n), part(kept, m, n), diagonals.data});
  });
}

// The derivatives of a step of the GRU, with respect to sums of x and to sums of h. The
// factors are r, z, n and the recurrent part of n.
struct Gru {
  static constexpr int kGates = 3, kKept = 4;

  const Window& window;
  const float *h_start, *y, *kept, *diagonals;

  FPTT_INLINE void operator()(
      int t, int row, int block, Within<1, 1>& transition, Within<1, kGates> (&gains)[2]) const {
    const float* const from = factors<kKept>(window, kept, t, row, block);
    const Vector r = load(from), z = load(from + kLanes), n = load(from + 2 * kLanes);
    const Vector recurrent = load(from + 3 * kLanes), before = h_before(window, h_start, y, t, row, block);
    const Vector by_n = (1.0f - z) * (1.0f - n * n);
    const Vector by_r = by_n * recurrent * r * (1.0f - r), by_z = (before - n) * z * (1.0f - z);
    const Vector of_x[kGates] = {by_r, by_z, by_n}, of_h[kGates] = {by_r, by_z, by_n * r};
    transition[0][0] = z;
    for (int gate = 0; gate < kGates; gate++) {
      gains[0][0][gate] = of_x[gate];
      gains[1][0][gate] = of_h[gate];
      transition[0][0] += of_h[gate] * load(diagonals + gate * window.units.padded() + block * kLanes);
    }
  }
};

ffi::Error gru(
    ffi::ThreadPool pool, Array, Array w_h, Array, Array, Array x, Mask mask, Array h_start, Array y, Array kept,
    Array, Array, Array, Array, Array of_w_x, Array of_w_h, Array of_bias, Array of_recurrent_bias, Output to_w_x, Output to_w_h, Output to_bias,
    Output to_recurrent_bias, float recurrence) {
  constexpr int kGates = Gru::kGates;
  return run_members(pool, x, w_h, kGates, 1, [&](const Window& window, Team& team, int64_t m, int64_t n) {
    const Diagonals<kGates> diagonals(window.units, part(w_h, m, n), recurrence);
    const float *const h = part(h_start, m, n), *const outputs = part(y, m, n);
    OwnAdvance<1, kGates, 2, 4>{
        window, part(mask, m, n),
        {{0, window.inputs.count, part(of_w_x, m, n), part(*to_w_x, m, n), part(x, m, n), nullptr},
         {1, window.units.count, part(of_w_h, m, n), part(*to_w_h, m, n), outputs, h},
         {0, 1, part(of_bias, m, n), part(*to_bias, m, n), nullptr, nullptr},
         {1, 1, part(of_recurrent_bias, m, n), part(*to_recurrent_bias, m, n), nullptr, nullptr}}}
        .run(team, Gru{window, h, outputs, part(kept, m, n), diagonals.data});
  });
}

ffi::Error elman(
    ffi::ThreadPool pool, Array, Array w_h, Array, Array x, Mask mask, Array h_start, Array y, Array,
    Array, Array, Array, Array of_w_x, Array of_w_h, Array of_bias, Output to_w_x, Output to_w_h, Output to_bias, float recurrence) {
  return run_members(pool, x, w_h, 1, 1, [&](const Window& window, Team& team, int64_t m, int64_t n) {
    const Diagonals<1> diagonals(window.units, part(w_h, m, n), recurrence);
    const float* const outputs = part(y, m, n);
    const auto derive = [&](int t, int row, int block, Within<1, 1>& transition, Within<1, 1>(&gains)[1]) {
      const Vector h = h_before(window, nullptr, outputs, t + 1, row, block);
      gains[0][0][0] = 1.0f - h * h;
      transition[0][0] = gains[0][0][0] * load(diagonals.data + block * kLanes);
    };
    OwnAdvance<1, 1, 1, 3>{
        window, part(mask, m, n),
        {{0, window.inputs.count, part(of_w_x, m, n), part(*to_w_x, m, n), part(x, m, n), nullptr},
         {0, window.units.count, part(of_w_h, m, n), part(*to_w_h, m, n), outputs, part(h_start, m, n)},
         {0, 1, part(of_bias, m, n), part(*to_bias, m, n), nullptr, nullptr}}}
        .run(team, derive);
  });
}

// Computes the credit [Q, K H] of a parameter, sum_b delta_b M_b, from delta [R..., B, A, H]
// and the influence M [R..., B, Q, A, K H].
struct Credit {
  int batch, count, arrays, gates;
  Units units;
  const float *delta, *influence;
  float* credit;

  // Some operands, whose credit stays in the cache while the rows are added.
  void run(Team& team) const {
    constexpr int kNumbers = 4096;
    const int row = gates * units.count, most = std::max(1, kNumbers / row);
    team.run(divide_up(count, most), [&](int part) {
      const int begin = part * most, end = std::min(count, begin + most);
      std::fill(credit + static_cast<size_t>(begin) * row, credit + static_cast<size_t>(end) * row, 0.0f);
      for (int b = 0; b < batch; b++) {
        for (int q = begin; q < end; q++) add(b, q);
      }
    });
  }

  FPTT_INLINE void add(int b, int q) const {
    const size_t row = static_cast<size_t>(gates) * units.count;
    const float* const of_row = delta + static_cast<size_t>(b) * arrays * units.count;
    const float* const from = influence + (static_cast<size_t>(b) * count + q) * arrays * row;
    for (int gate = 0; gate < gates; gate++) {
      for (int block = 0; block < units.blocks(); block++) {
        const int there = units.in_block(block), unit = block * kLanes;
        float* const to = credit + q * row + gate * units.count + unit;
        Vector sum = load(to, there);
        for (int a = 0; a < arrays; a++) {
          sum += load(of_row + a * units.count + unit, there) * load(from + a * row + gate * units.count + unit, there);
        }
        store(to, sum, there);
      }
    }
  }
};

ffi::Error credit(ffi::ThreadPool pool, Array delta, Array influence, Output credit) try {
  const auto dims = influence.dimensions();
  const size_t rank = dims.size();
  const auto size = [&](size_t back) { return static_cast<int>(dims[rank - back]); };
  const int hidden = static_cast<int>(delta.dimensions()[rank - 2]);
  int members = 1;
  for (size_t i = 0; i + 4 < rank; i++) members *= static_cast<int>(dims[i]);
  // A number is read from memory in the time of several products.
  Team team(pool, 8.0 * static_cast<double>(influence.element_count()));
  const auto work = [&](Team& team, int member) {
    Credit{size(4), size(3), size(2), size(1) / hidden, {hidden}, part(delta, member, members),
           part(influence, member, members), part(*credit, member, members)}
        .run(team);
  };
  if (members == 1) {
    work(team, 0);
  } else {
    team.run(members, [&](int member) {
      Team alone;
      work(alone, member);
    });
  }
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "there is no memory for threads.");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    own_lstm, lstm,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Mask>().Arg<Array>().Arg<Array>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
        .Ret<Array>().Ret<Array>().Ret<Array>()
        .Attr<float>("recurrence"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    own_gru, gru,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Mask>().Arg<Array>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
        .Arg<Array>().Arg<Array>()
        .Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>()
        .Attr<float>("recurrence"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    own_elman, elman,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Mask>().Arg<Array>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
        .Ret<Array>().Ret<Array>().Ret<Array>()
        .Attr<float>("recurrence"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    own_credit, credit, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array>().Arg<Array>().Ret<Array>());
