// What the windows of all cells share: sizes, the order of work, and members.
//
// Legend: S steps, B batch, D features, H hidden, G gates, R members of a population. Arrays
// are row-major float32, masks bool. Leading axes are members, each with weights of its own.
// An operand that is absent, or a result that is not wanted, has no elements; its pointer is
// null here.

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
constexpr size_t kCachedFloats = 256 * 1024;
// Rows that a weight gradient sums at once, at least. From 128 to 1792 measured within 2 %.
constexpr int kGradientRows = 256;

struct Window {
  int steps, batch;
  Layer layer;

  size_t rows() const { return static_cast<size_t>(steps) * batch; }
  // Numbers of one step of y.
  size_t step_size() const { return static_cast<size_t>(batch) * layer.hidden; }
  // Numbers of a state whose units are padded to whole blocks.
  size_t padded_size() const { return static_cast<size_t>(batch) * padded_units(); }
  size_t padded_units() const { return static_cast<size_t>(layer.blocks()) * kLanes; }
  int gradient_steps() const { return std::min(steps, (kGradientRows + batch - 1) / batch); }

  // Threads share rows where a core can keep all weights, and units otherwise: then a core
  // reads a part of the weights, at the cost of a barrier per step.
  bool shares_units() const {
    return (layer.features + layer.hidden) * layer.width() > kCachedFloats || batch < 2 * kRows;
  }

  // Calls work(begin, end) for parts of the rows, about 12 each if threads share them.
  template <typename Work>
  void run_rows(Team& team, const Work& work) const {
    const int threads = team.size();
    const int parts = threads == 1 ? 1 : std::min(batch, threads * std::max(1, (batch / threads + 6) / 12));
    team.run(parts, [&](int part) {
      work(static_cast<int>(int64_t{part} * batch / parts), static_cast<int>(int64_t{part + 1} * batch / parts));
    });
  }

  // Calls step(t, begin row, end row, block) in an order in which each step follows the one
  // before.
  template <typename Step>
  void run_forward(Team& team, const Step& step) const {
    if (shares_units()) {
      for (int t = 0; t < steps; t++) {
        team.run(layer.blocks(), [&](int block) { step(t, 0, batch, block); });
      }
      return;
    }
    run_rows(team, [&](int begin, int end) {
      for (int t = 0; t < steps; t++) {
        for (int block = 0; block < layer.blocks(); block++) step(t, begin, end, block);
      }
    });
  }

  // Runs backward. For each step, gates(t, first step of the chunk, rows, block) for all
  // blocks, then state(t, first step of the chunk, rows, panel) for all panels. After each
  // chunk of steps, weights(first step, end step).
  template <typename Gates, typename State, typename Weights>
  void run_backward(Team& team, const Gates& gates, const State& state, const Weights& weights) const {
    for (int end = steps; end > 0;) {
      const int begin = std::max(0, end - gradient_steps());
      if (shares_units()) {
        for (int t = end - 1; t >= begin; t--) {
          team.run(layer.blocks(), [&](int block) { gates(t, begin, 0, batch, block); });
          team.run(layer.panels(), [&](int panel) { state(t, begin, 0, batch, panel); });
        }
      } else {
        run_rows(team, [&](int first, int last) {
          for (int t = end - 1; t >= begin; t--) {
            for (int block = 0; block < layer.blocks(); block++) gates(t, begin, first, last, block);
            for (int panel = 0; panel < layer.panels(); panel++) state(t, begin, first, last, panel);
          }
        });
      }
      weights(begin, end);
      end = begin;
    }
  }

  // Copies a state [B, H] to one of padded units, or zeros if it is absent.
  void pad(const float* state, float* padded) const {
    for (int row = 0; row < batch; row++) {
      for (int block = 0; block < layer.blocks(); block++, padded += kLanes) {
        const float* from = state + static_cast<size_t>(row) * layer.hidden + block * kLanes;
        store(padded, state ? load(from, layer.units(block)) : Vector{});
      }
    }
  }

  void unpad(const float* padded, float* state) const {
    for (int row = 0; row < batch; row++, state += layer.hidden, padded += padded_units()) {
      std::memcpy(state, padded, 4 * static_cast<size_t>(layer.hidden));
    }
  }
};

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
  const Window window{size(3), size(2), {size(1), static_cast<int>(matrix[matrix.size() - 2]), gates}};
  int members = 1;
  for (size_t i = 0; i + 3 < rank; i++) members *= static_cast<int>(dims[i]);
  const Layer& layer = window.layer;
  const double flops = 2.0 * window.rows() * (layer.features + layer.hidden) * layer.hidden * gates;
  Team team(pool, passes * members * flops);
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
