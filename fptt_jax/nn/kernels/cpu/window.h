// What the windows of all cells share: sizes, the order of work, and members.
//
// Legend: S steps, B batch, D features, H hidden, G gates, R members of a population. Arrays
// are row-major float32, masks bool. Leading axes are members, each with weights of its own.
// An operand that is absent, or a result that is not wanted, has no elements; its pointer is
// null here.
//
// All cells multiply x [B, D] by w_x [D, GX H] and the output h [B, H] by w_h [H, GH H]. A
// cell's file says what it does with the sums, forward and backward.

#pragma once

#include <algorithm>
#include <new>

#include "products.h"
#include "team.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

using Array = ffi::Buffer<ffi::F32>;
using Mask = ffi::Buffer<ffi::PRED>;
using Output = ffi::Result<Array>;

// Packed weights above this size do not fit the cache of a core (L2) beside the rest.
constexpr size_t kCachedOperands = 256 * 1024;
// Rows that a weight gradient sums at once, at least. From 128 to 1792 measured within 2 %.
constexpr int kGradientRows = 256;

struct Window {
  int steps, batch;
  Units inputs, units;
  int gates;  // Of w_h.

  size_t row(int t, int row) const { return static_cast<size_t>(t) * batch + row; }
  size_t rows() const { return row(steps, 0); }
  // Rows of a step, padded to pairs.
  size_t step_rows() const { return operands(batch) * kPair; }
  // Numbers of a state whose units are padded to whole blocks.
  size_t padded_size() const { return batch * units.padded(); }
  int gradient_steps() const { return std::min(steps, divide_up(kGradientRows, batch)); }

  // Threads share rows where a core can keep all weights and there are enough rows, and units
  // otherwise: then a core reads a part of the weights, at the cost of a barrier per step.
  bool shares_units(const Team& team) const {
    if ((inputs.count + units.count) * units.packed(gates) > kCachedOperands || batch < 2 * kRows) return true;
    return kTileRows > 1 && divide_up(batch, kTileRows) < std::min(team.size(), units.blocks());
  }

  // Calls work(begin, end) for parts of the rows if threads share them, of about 12 rows or one
  // tile register. Only the last rows may fill no register, so that parts do not change results.
  template <typename Work>
  void run_rows(Team& team, const Work& work) const {
    constexpr int kTogether = std::max(kPair, kTileRows);
    const int threads = team.size(), groups = divide_up(batch, kTogether);
    const int parts = threads == 1 ? 1 : std::min(groups, threads * std::max(1, (batch / threads + 6) / 12));
    team.run(parts, [&](int part) {
      const int64_t begin = int64_t{part} * groups / parts, end = int64_t{part + 1} * groups / parts;
      work(static_cast<int>(begin * kTogether), std::min(static_cast<int>(end * kTogether), batch));
    });
  }

  // Copies a state [B, H] to one of padded units, or zeros if it is absent.
  void pad(const float* state, float* padded) const {
    for (int row = 0; row < batch; row++) {
      for (int block = 0; block < units.blocks(); block++, padded += kLanes) {
        const float* from = state + static_cast<size_t>(row) * units.count + block * kLanes;
        store(padded, state ? load(from, units.in_block(block)) : Vector{});
      }
    }
  }

  void unpad(const float* padded, float* state) const {
    for (int row = 0; row < batch; row++, state += units.count, padded += units.padded()) {
      std::memcpy(state, padded, 4 * static_cast<size_t>(units.count));
    }
  }
};

// The products of a window forward, and its output.
template <int GX, int GH>
struct Forward {
  const Window window;
  const float *w_x, *w_h, *x, *h_start;
  const bool* mask;
  float *h_end, *y;
  Operand *packed_x = nullptr, *packed_h = nullptr, *rounded_x = nullptr, *rounded_h = nullptr;

  size_t panel_x() const { return operands(window.inputs.count) * GX * kLanes; }
  size_t panel_h() const { return operands(window.units.count) * GH * kLanes; }
  size_t stride_x() const { return operands(window.inputs.count); }
  size_t stride_h() const { return kPair == 1 ? window.units.count : window.units.packed(1); }
  size_t scratch_size() const {
    const size_t packed = window.units.blocks() * (panel_x() + panel_h());
    const size_t rounded = kPair == 1 ? 0 : window.rows() * stride_x() + size_t{2} * window.batch * stride_h();
    return packed + rounded + 128;
  }

  // Calls tile(R, t, first row, block) for all tiles, each step after the one before.
  template <typename Tile>
  void run(Team& team, Scratch& scratch, const Tile& tile) {
    const int blocks = window.units.blocks();
    packed_x = scratch.next<Operand>(blocks * panel_x());
    packed_h = scratch.next<Operand>(blocks * panel_h());
    team.run(blocks, [&](int block) {
      pack_block<GX>(window.units, w_x, window.inputs.count, block, packed_x + block * panel_x());
      pack_block<GH>(window.units, w_h, window.units.count, block, packed_h + block * panel_h());
    });
    if (kPair > 1) round_operands(scratch);
    const auto step = [&](int t, int begin, int end, int block) {
      constexpr int kMost = tile_rows(std::max(GX, GH));
      for_tiles<kMost>(begin, end, [&](auto rows, int row) { tile(rows, t, row, block); });
    };
    if (window.shares_units(team)) {
      for (int t = 0; t < window.steps; t++) {
        team.run(blocks, [&](int block) { step(t, 0, window.batch, block); });
      }
    } else {
      window.run_rows(team, [&](int begin, int end) {
        for (int t = 0; t < window.steps; t++) {
          for (int block = 0; block < blocks; block++) step(t, begin, end, block);
        }
      });
    }
    const size_t size = static_cast<size_t>(window.batch) * window.units.count;
    std::memcpy(h_end, y + (window.steps - 1) * size, 4 * size);
  }

  // Rounds x and the first h. Two copies of h alternate, because a step reads all units of
  // the one before while it writes its own.
  void round_operands(Scratch& scratch) {
    rounded_x = scratch.next<Operand>(window.rows() * stride_x());
    rounded_h = scratch.next<Operand>(size_t{2} * window.batch * stride_h());
    const auto round = [](const float* from, Units units, size_t rows, Operand* to, size_t stride) {
      for (size_t row = 0; row < rows; row++, from += units.count, to += stride) {
        for (int block = 0; block < units.blocks(); block++) {
          Operand rounded[kLanes];
          store_row(rounded, load(from + block * kLanes, units.in_block(block)));
          const size_t count = operands(units.in_block(block));
          std::memcpy(to + block * kLanes / kPair, rounded, count * sizeof(Operand));
        }
      }
    };
    round(x, window.inputs, window.rows(), rounded_x, stride_x());
    round(h_start, window.units, window.batch, rounded_h, stride_h());
  }

  // Returns h before a step, in full precision.
  const float* h_before(int t, int row) const {
    return t == 0 ? h_start + static_cast<size_t>(row) * window.units.count
                  : y + window.row(t - 1, row) * window.units.count;
  }

  FPTT_INLINE Vector h_before(int t, int row, int block) const {
    return load(h_before(t, row) + block * kLanes, window.units.in_block(block));
  }

  // Adds x w_x of R rows.
  template <int R>
  FPTT_INLINE void multiply_x(Vector (&sums)[R][GX], int t, int row, int block) const {
    const Operand* const rows = kPair == 1 ? reinterpret_cast<const Operand*>(x) : rounded_x;
    multiply(
        sums, rows + window.row(t, row) * stride_x(), stride_x(), 1, stride_x(), packed_x + block * panel_x());
  }

  // Adds h w_h of R rows.
  template <int R>
  FPTT_INLINE void multiply_h(Vector (&sums)[R][GH], int t, int row, int block) const {
    const Operand* const rows = kPair == 1 ? reinterpret_cast<const Operand*>(h_before(t, row))
                                           : rounded_h + (size_t(t % 2) * window.batch + row) * stride_h();
    multiply(sums, rows, stride_h(), 1, operands(window.units.count), packed_h + block * panel_h());
  }

  // Stores h after a step.
  FPTT_INLINE void keep_h(int t, int row, int block, Vector h) const {
    store(y + window.row(t, row) * window.units.count + block * kLanes, h, window.units.in_block(block));
    if (kPair > 1) {
      Operand* const to = rounded_h + (size_t((t + 1) % 2) * window.batch + row) * stride_h();
      store_row(to + block * kLanes / kPair, first_lanes(h, window.units.in_block(block)));
    }
  }

  bool is_valid(int t, int row) const { return !mask || mask[window.row(t, row)]; }

  // Returns N vectors of a row of biases [N, H].
  template <int N>
  FPTT_INLINE void load_bias(Vector (&start)[N], const float* bias, int block) const {
    for (int gate = 0; gate < N; gate++) {
      start[gate] = load(bias + gate * window.units.count + block * kLanes, window.units.in_block(block));
    }
  }
};

// The products of a window backward, which give all gradients. With kShared the gradients
// of x w_x and of h w_h are one array.
template <int GX, int GH, bool kShared>
struct Backward {
  const Window window;
  const float *w_x, *w_h, *x;
  const bool* mask;
  const float *h_start, *y, *dy, *dh_end;
  float *dw_x, *dw_h, *dbias, *dbias_h, *dx, *dh_start;  // Biases of the sums of x w_x, and of h w_h.
  Operand *packed_x = nullptr, *packed_h = nullptr, *columns_x = nullptr, *columns_h = nullptr;
  float* dh = nullptr;
  PackedGradient<GX> dz_x{};
  PackedGradient<GH> dz_h{};

  // Pairs of rows of some steps, padded to whole tiles.
  size_t pairs(int steps) const {
    return divide_up(steps * static_cast<int>(window.step_rows()), kPair * kTilePairs) * kTilePairs;
  }
  size_t chunk_pairs() const { return pairs(window.gradient_steps()); }
  size_t chunk_rows() const { return kPair * chunk_pairs(); }
  size_t scratch_size() const {
    const Units inputs = window.inputs, units = window.units;
    const size_t transposed = units.packed(GH) * units.padded() + (dx ? units.packed(GX) * inputs.padded() : 0);
    const size_t gradients = kPair * (units.packed(GH) + (kShared ? 0 : units.packed(GX))) * chunk_rows();
    const size_t columns = (units.parts() + inputs.parts()) * kPart * chunk_pairs();
    return transposed + gradients + columns + Scratch::padded(window.padded_size()) + 256;
  }

  // Runs the cell, step by step. cell(t, row, block, dh, to_h, to_x) computes dz of a row in
  // to_h and to_x (only in to_h if they are shared) and returns the part of the gradient
  // of h before the step that passes no product.
  template <typename Cell>
  void run(Team& team, Scratch& scratch, const Cell& cell) {
    allocate(scratch);
    if (window.steps > 1 || dh_start) pack<GH>(team, w_h, window.units, packed_h);
    if (dx) pack<GX>(team, w_x, window.inputs, packed_x);
    window.pad(dh_end, dh);
    const int blocks = window.units.blocks(), panels = window.units.panels();
    for (int end = window.steps; end > 0;) {
      const int begin = std::max(0, end - window.gradient_steps());
      if (window.shares_units(team)) {
        for (int t = end - 1; t >= begin; t--) {
          team.run(blocks, [&](int block) { gates(cell, t, t - begin, 0, window.batch, block); });
          team.run(panels, [&](int panel) { state(t, t - begin, 0, window.batch, panel); });
        }
      } else {
        window.run_rows(team, [&](int first, int last) {
          for (int t = end - 1; t >= begin; t--) {
            for (int block = 0; block < blocks; block++) gates(cell, t, t - begin, first, last, block);
            for (int panel = 0; panel < panels; panel++) state(t, t - begin, first, last, panel);
          }
        });
      }
      gradients(team, begin, end);
      end = begin;
    }
    if (dh_start) window.unpad(dh, dh_start);
  }

  // Returns h before a step.
  FPTT_INLINE Vector h_before(int t, int row, int block) const {
    return t == 0 ? load_units(h_start + static_cast<size_t>(row) * window.units.count, block)
                  : h_after(t - 1, row, block);
  }

  FPTT_INLINE Vector h_after(int t, int row, int block) const {
    return load_units(y + window.row(t, row) * window.units.count, block);
  }

  FPTT_INLINE Vector load_units(const float* row, int block) const {
    return load(row + block * kLanes, window.units.in_block(block));
  }

  void allocate(Scratch& scratch) {
    const Units inputs = window.inputs, units = window.units;
    packed_h = scratch.next<Operand>(units.packed(GH) * units.padded());
    packed_x = scratch.next<Operand>(dx ? units.packed(GX) * inputs.padded() : 0);
    columns_h = scratch.next<Operand>(units.parts() * kPart * chunk_pairs());
    columns_x = scratch.next<Operand>(inputs.parts() * kPart * chunk_pairs());
    dh = scratch.next(window.padded_size());
    const size_t size_h = dz_h.size(units, chunk_rows()), size_x = dz_x.size(units, chunk_rows());
    Operand* const by_column = scratch.next<Operand>(size_h);
    dz_h = {units, chunk_rows(), kPair == 1 ? by_column : scratch.next<Operand>(size_h), by_column};
    if constexpr (kShared) {
      dz_x = dz_h;
    } else {
      Operand* const x_by_column = scratch.next<Operand>(size_x);
      dz_x = {units, chunk_rows(), kPair == 1 ? x_by_column : scratch.next<Operand>(size_x), x_by_column};
    }
  }

  template <int G>
  void pack(Team& team, const float* weights, Units columns, Operand* to) const {
    team.run(columns.panels(), [&](int panel) {
      Operand* const start = to + window.units.packed(G) * panel * kPanel * kLanes;
      pack_transposed_panel<G>(window.units, weights, columns, panel, start);
    });
  }

  // Computes dz of a block of units, and what of the gradient of h passes no product.
  template <typename Cell>
  void gates(const Cell& cell, int t, int step, int begin, int end, int block) const {
    for (int first = begin; first < end; first += kPair) {
      Vector to_h[kPair][GH] = {}, to_x[kPair][GX] = {};
      for (int i = 0; i < kPair && first + i < end; i++) {
        const int row = first + i;
        float* const dh_here = dh + row * window.units.padded() + block * kLanes;
        Vector d = load(dh_here);
        if (dy) {
          d += load(dy + window.row(t, row) * window.units.count + block * kLanes, window.units.in_block(block));
        }
        // A masked step passes the gradient on. Its dz is 0.
        const bool valid = !mask || mask[window.row(t, row)];
        store(dh_here, valid ? cell(t, row, block, d, to_h[i], to_x[i]) : d);
      }
      // Lanes beyond the units have weights of 0, which make NaN of what is infinite.
      const int there = window.units.in_block(block);
      for (int i = 0; i < kPair && there < kLanes; i++) {
        for (Vector& d : to_h[i]) d = first_lanes(d, there);
        for (Vector& d : to_x[i]) d = first_lanes(d, there);
      }
      dz_h.keep(step * window.step_rows() + first, block, to_h);
      if constexpr (!kShared) dz_x.keep(step * window.step_rows() + first, block, to_x);
    }
  }

  // Adds dz w_h^T to the gradient of h before the step.
  void state(int t, int step, int begin, int end, int panel) const {
    if (t == 0 && !dh_start) return;
    dz_h.multiply_transposed(
        step * window.step_rows(), packed_h, window.units, panel, begin, end, [&](int row, int unit, Vector sum) {
          float* const to = dh + row * window.units.padded() + unit;
          store(to, load(to) + sum);
        });
  }

  // Adds the share of the steps [begin, end) to the gradients of weights and inputs.
  void gradients(Team& team, int begin, int end) const {
    const Units inputs = window.inputs, units = window.units;
    const int parts = units.parts();
    const size_t count = pairs(end - begin);
    team.run(parts + inputs.parts(), [&](int part) {
      if (part < parts) {
        pack_columns(begin, end, part, units, columns_h, [&](int t) {
          return t == 0 ? h_start : y + window.row(t - 1, 0) * units.count;
        });
      } else {
        pack_columns(begin, end, part - parts, inputs, columns_x, [&](int t) {
          return x + window.row(t, 0) * inputs.count;
        });
      }
    });
    const size_t filled = (end - begin) * window.step_rows() / kPair;
    dz_h.clear_columns(filled, count);
    if constexpr (!kShared) dz_x.clear_columns(filled, count);
    const bool set = end == window.steps;
    team.run(units.blocks() * (parts + inputs.parts()), [&](int task) {
      const int block = task / (parts + inputs.parts()), part = task % (parts + inputs.parts());
      const int first = (part < parts ? part : part - parts) * kPart;
      if (part < parts) {
        const int last = std::min(first + kPart, units.count);
        dz_h.add_weight_gradient(columns_h + first * chunk_pairs(), count, first, last, block, set, dw_h);
      } else {
        const int last = std::min(first + kPart, inputs.count);
        dz_x.add_weight_gradient(columns_x + first * chunk_pairs(), count, first, last, block, set, dw_x);
      }
      if (part == 0) {
        dz_x.add_bias_gradient(count, block, set, dbias);
        if (dbias_h) dz_h.add_bias_gradient(count, block, set, dbias_h);
      }
    });
    if (dx) {
      window.run_rows(team, [&](int first, int last) { input_gradients(begin, end, first, last); });
    }
  }

  // Copies kPart columns of the rows that weights multiplied: whole rows would be so far
  // apart that they compete for the same lines of the cache.
  template <typename From>
  void pack_columns(int begin, int end, int part, Units units, Operand* columns, const From& from) const {
    const int first = part * kPart, last = std::min(first + kPart, units.count);
    Operand* const to = columns + first * chunk_pairs();
    const size_t count = pairs(end - begin);
    size_t pair = 0;
    for (int t = begin; t < end; t++) {
      const float* const rows = from(t);
      for (int row = 0; row < window.batch; row += kPair, pair++) {
        for (int column = first; column < last; column += kLanes) {
          Vector v[kPair] = {};
          for (int i = 0; i < kPair && row + i < window.batch; i++) {
            v[i] = load(rows + static_cast<size_t>(row + i) * units.count + column, last - column);
          }
          store_columns(to, count, pair, column - first, join(v));
        }
      }
    }
    for (; pair < count; pair++) {
      for (int column = first; column < last; column += kLanes) store_columns(to, count, pair, column - first, Operands{});
    }
  }

  void input_gradients(int begin, int end, int first, int last) const {
    const int features = window.inputs.count;
    for (int t = begin; t < end; t++) {
      for (int panel = 0; panel < window.inputs.panels(); panel++) {
        dz_x.multiply_transposed(
            (t - begin) * window.step_rows(), packed_x, window.inputs, panel, first, last,
            [&](int row, int column, Vector sum) {
              store(dx + window.row(t, row) * features + column, sum, features - column);
            });
      }
    }
  }
};

// Returns where the N factors of a row and block of units are, side by side.
template <int N, typename Float>
FPTT_INLINE Float* factors(const Window& window, Float* kept, int t, int row, int block) {
  return kept + (window.row(t, row) * window.units.blocks() + block) * N * kLanes;
}

// Fetches the lines of R rows that a tile will write, which takes as long as its products.
template <int N, int R>
FPTT_INLINE void prefetch_factors(const Window& window, float* kept, int t, int row, int block) {
  for (int r = 0; kept && r < R; r++) {
    for (int i = 0; i < N; i++) __builtin_prefetch(factors<N>(window, kept, t, row + r, block) + i * kLanes, 1);
  }
}

// Returns a block of h before a step.
FPTT_INLINE Vector h_before(const Window& window, const float* h_start, const float* y, int t, int row, int block) {
  const float* const from = t == 0 ? h_start + static_cast<size_t>(row) * window.units.count
                                   : y + window.row(t - 1, row) * window.units.count;
  return load(from + block * kLanes, window.units.in_block(block));
}

// Keeps N factors.
template <int N>
FPTT_INLINE void keep_factors(float* to, const Vector (&v)[N]) {
  for (int i = 0; i < N; i++) store(to + i * kLanes, v[i]);
}

// Returns the part of an array that belongs to a member, or null if the array is empty.
template <typename Buffer>
auto part(Buffer& array, int64_t member, int64_t members) {
  auto* const data = array.typed_data();
  const int64_t count = static_cast<int64_t>(array.element_count()) / members;
  return count == 0 ? nullptr : data + member * count;
}

// Runs work(window, team, member, members) for all members of x [R..., S, B, D].
//
// Threads share a window where there is one, and the members otherwise.
template <typename Work>
ffi::Error run_members(
    ffi::ThreadPool& pool, const Array& x, const Array& w_h, int gates, int passes, const Work& work) try {
  const auto dims = x.dimensions();
  const auto matrix = w_h.dimensions();
  const size_t rank = dims.size();
  const auto size = [&](size_t back) { return static_cast<int>(dims[rank - back]); };
  const Window window{size(3), size(2), {size(1)}, {static_cast<int>(matrix[matrix.size() - 2])}, gates};
  int members = 1;
  for (size_t i = 0; i + 3 < rank; i++) members *= static_cast<int>(dims[i]);
  const TileRegisters registers;
  const double weights = static_cast<double>(window.inputs.count + window.units.count) * window.units.count * gates;
  Team team(pool, 2.0 * passes * members * window.rows() * weights);
  if (members == 1) {
    work(window, team, 0, 1);
  } else {
    team.run(members, [&](int member) {
      Team alone;
      work(window, alone, member, members);
    });
  }
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "there is no memory for a window's packed weights.");
}

extern "C" void set_thread_limit(int threads) { thread_limit = threads; }
