// The influence of the parameters of each unit on that unit's own state, over a window.
//
// Legend as in window.h, with A arrays of state and K sums of a unit, such as its gates. A
// matrix that multiplies Q operands has the influence [B, Q, A, K H], a bias [B, A, K H].
//
// From step to step, a unit's arrays depend on its arrays before by a transition, an A x A
// matrix, and on its sums by gains, an A x K matrix. Let after_t be the product of the
// transitions of the steps after t, and through_t = after_t gains_t. The influence M becomes
// carried M + sum_t operand_t through_t, where `carried` is the product of all transitions.
// For each row of the batch that is a matrix product over the steps, whose sums start from
// carried M, so that the influence passes through memory once.

#pragma once

#include "window.h"

#ifdef FPTT_TILES
#error "The influence has no products by tile registers."
#endif

// Numbers of through_t that a thread keeps at once, 256 KiB. Longer windows are cut.
constexpr int kThroughSize = 64 * 1024;

// A x K derivatives within the units of a block.
template <int A, int K>
using Within = Vector[A][K];

// A parameter and its influence, read from `before` and written to `after`, which may be the
// same. Without an influence, `after` is null.
struct OwnParameter {
  int sums;            // The number of the sums that it acts on.
  int count;           // Q, or 1 for a bias.
  const float *before;
  float *after;
  const float *steps;  // Operands [S, B, Q], or null for a bias.
  const float *start;  // If given, [B, Q] of the first step; `steps` are of the step before.
};

// Advances the influence of N parameters, which act on P kinds of K sums, by a window.
template <int A, int K, int P, int N>
struct OwnAdvance {
  static constexpr int kColumns = A * K;
  static constexpr int kTile = std::max(1, std::min(kRows, 4 * kRows / kColumns));

  const Window window;
  const bool* mask;
  const OwnParameter parameters[N];

  // Calls derive(t, row, block, transition, gains of each kind of sums) for valid steps.
  template <typename Derive>
  void run(Team& team, const Derive& derive) const {
    // Few rows are cut into parts of their units.
    const int blocks = window.units.blocks();
    const int parts = window.batch >= 4 * team.size() ? 1 : std::min(blocks, team.size());
    team.run(window.batch * parts, [&](int task) {
      const int part = task % parts;
      Part{*this, task / parts, part * blocks / parts, (part + 1) * blocks / parts}.run(derive);
    });
  }

  // Blocks [first, last) of the units of a row.
  struct Part {
    const OwnAdvance& own;
    const int row, first, last;
    int most = 0;  // Steps that are taken at once.
    float *through = nullptr, *carried = nullptr, *operands = nullptr;

    // Each begins with the block: through [P, step, A, K, lane] and carried [A, A, lane].
    float* through_of(int block, int p) const {
      return through + static_cast<size_t>((block - first) * P + p) * most * kColumns * kLanes;
    }
    float* carried_of(int block) const { return carried + (block - first) * A * A * kLanes; }

    template <typename Derive>
    void run(const Derive& derive) {
      const int numbers = (last - first) * P * kColumns * kLanes;
      // Of all blocks, so that the order of the sums does not depend on the number of parts.
      const int of_row = own.window.units.blocks() * P * kColumns * kLanes;
      most = std::min(own.window.steps, std::max(8, kThroughSize / of_row));
      int width = 1;
      for (const OwnParameter& parameter : own.parameters) width = std::max(width, parameter.count);
      const size_t carried_size = (last - first) * A * A * kLanes;
      Scratch scratch(static_cast<size_t>(most) * (numbers + width) + carried_size + 48);
      through = scratch.next(static_cast<size_t>(most) * numbers);
      carried = scratch.next(carried_size);
      operands = scratch.next(static_cast<size_t>(most) * width);
      for (int begin = 0; begin < own.window.steps; begin += most) {
        const int end = std::min(own.window.steps, begin + most);
        for (int block = first; block < last; block++) multiply_back(derive, begin, end, block);
        for (const OwnParameter& parameter : own.parameters) advance(parameter, begin, end);
      }
    }

    // Multiplies the derivatives of the steps [begin, end) from the last to the first.
    template <typename Derive>
    void multiply_back(const Derive& derive, int begin, int end, int block) const {
      Within<A, A> after{};
      for (int a = 0; a < A; a++) after[a][a] += 1.0f;
      for (int t = end - 1; t >= begin; t--) {
        Within<A, A> transition, product{};
        Within<A, K> gains[P], sums[P]{};
        if (!own.mask || own.mask[own.window.row(t, row)]) {
          derive(t, row, block, transition, gains);
          for (int a = 0; a < A; a++) {
            for (int b = 0; b < A; b++) {
              for (int c = 0; c < A; c++) product[a][c] += after[a][b] * transition[b][c];
              for (int p = 0; p < P; p++) {
                for (int k = 0; k < K; k++) sums[p][a][k] += after[a][b] * gains[p][b][k];
              }
            }
          }
          std::memcpy(after, product, sizeof(after));
        }
        for (int p = 0; p < P; p++) {
          std::memcpy(through_of(block, p) + (t - begin) * kColumns * kLanes, sums[p], sizeof(sums[p]));
        }
      }
      std::memcpy(carried_of(block), after, sizeof(after));
    }

    // Computes carried M + sum_t operand_t through_t over the steps [begin, end).
    void advance(const OwnParameter& parameter, int begin, int end) const {
      if (!parameter.after) return;
      copy_operands(parameter, begin, end);
      const int count = parameter.count;
      const Units units = own.window.units;
      const size_t stride = static_cast<size_t>(kColumns) * units.count;
      float* const after = parameter.after + row * (count * stride);
      // What the first steps of a long window wrote, the next ones read.
      const float* const before = begin == 0 ? parameter.before + row * (count * stride) : after;
      for_tiles<kTile>(0, count, [&](auto size, int index) {
        for (int block = first; block < last; block++) {
          const size_t place = index * stride + block * kLanes;
          advance_tile<decltype(size)::value>(
              before + place, after + place, block, operands + index, count, end - begin,
              through_of(block, parameter.sums));
        }
      });
    }

    void copy_operands(const OwnParameter& parameter, int begin, int end) const {
      if (!parameter.steps) {
        std::fill(operands, operands + (end - begin), 1.0f);
        return;
      }
      const size_t count = parameter.count;
      for (int t = begin; t < end; t++) {
        const float* from = parameter.steps + own.window.row(t, row) * count;
        if (parameter.start) {
          from = t == 0 ? parameter.start + row * count : parameter.steps + own.window.row(t - 1, row) * count;
        }
        std::memcpy(operands + (t - begin) * count, from, 4 * count);
      }
    }

    template <int R>
    FPTT_INLINE void advance_tile(
        const float* before, float* after, int block, const float* operand, int count, int steps,
        const float* panel) const {
      const Units units = own.window.units;
      const int there = units.in_block(block);
      Vector sums[R][kColumns] = {};
      const auto place = [&](int r, int a, int k) {
        return (static_cast<size_t>(r) * kColumns + a * K + k) * units.count;
      };
      for (int r = 0; r < R; r++) {
        for (int b = 0; b < A; b++) {
          for (int k = 0; k < K; k++) {
            const Vector old = load(before + place(r, b, k), there);
            for (int a = 0; a < A; a++) sums[r][a * K + k] += load(carried_of(block) + (a * A + b) * kLanes) * old;
          }
        }
      }
      multiply(sums, operand, 1, count, steps, panel);
      for (int r = 0; r < R; r++) {
        for (int a = 0; a < A; a++) {
          for (int k = 0; k < K; k++) store(after + place(r, a, k), sums[r][a * K + k], there);
        }
      }
    }
  };
};

// The diagonals [K, padded H] of a recurrent matrix [H, K, H], times a factor.
template <int K>
struct Diagonals {
  Scratch scratch;
  float* data;

  Diagonals(Units units, const float* w_h, float factor)
      : scratch(K * units.padded()), data(scratch.next(K * units.padded())) {
    for (int gate = 0; gate < K; gate++) {
      float* const to = data + gate * units.padded();
      std::fill(to, to + units.padded(), 0.0f);
      for (int unit = 0; unit < units.count; unit++) {
        to[unit] = factor * w_h[(static_cast<size_t>(unit) * K + gate) * units.count + unit];
      }
    }
  }
};
