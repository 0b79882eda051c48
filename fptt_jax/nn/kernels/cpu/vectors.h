// Vectors of float32 in the vector extensions of GCC and Clang, and functions of them.
//
// The width follows the instruction set that the compiler targets. A load or store of a
// part of a vector serves the last units of a layer whose size the width does not divide.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FPTT_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRows = 6;  // Rows of a tile of 4 vectors: 6 x 4 sums, 4 weights and 1 operand fit 32 registers.
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kRows = 3;  // 3 x 4 sums leave 4 of 16 registers.
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kRows = 6;
#else
constexpr int kLanes = 4;
constexpr int kRows = 2;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedVector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

FPTT_INLINE Vector load(const float* from) { return *reinterpret_cast<const UnalignedVector*>(from); }

FPTT_INLINE void store(float* to, Vector v) { *reinterpret_cast<UnalignedVector*>(to) = v; }

// Loads the first `count` numbers, and 0 in place of the others.
FPTT_INLINE Vector load(const float* from, int count) {
  if (count >= kLanes) return load(from);
  Vector v{};
  std::memcpy(&v, from, 4 * static_cast<size_t>(count));
  return v;
}

// Stores the first `count` numbers.
FPTT_INLINE void store(float* to, Vector v, int count) {
  if (count >= kLanes) return store(to, v);
  std::memcpy(to, &v, 4 * static_cast<size_t>(count));
}

// Returns the first `count` numbers, and 0 in place of the others.
FPTT_INLINE Vector first_lanes(Vector v, int count) {
  if (count >= kLanes) return v;
  Vector first{};
  std::memcpy(&first, &v, 4 * static_cast<size_t>(count));
  return first;
}

// Limits the absolute value. NaN stays, so that the caller finds it in the results.
FPTT_INLINE Vector clamp(Vector v, float limit) {
  const Vector high = limit - Vector{}, low = -high;
  v = v > high ? high : v;
  return v < low ? low : v;
}

// 2^v = scale (1 + rest), with the rest in full relative accuracy near v = 0.
struct Power {
  Vector scale, rest;
};

// Computes 2^v for |v| <= 126. The polynomial's error is 1.3e-8, below that of rounding.
FPTT_INLINE Power exp2(Vector v) {
  // Adding 1.5 * 2^23 rounds to a whole number, which is then in the lowest bits.
  constexpr float kShift = 12582912.0f;
  const Vector shifted = v + kShift;
  const Vector r = v - (shifted - kShift);
  Vector p = 0.00015453163f * r + 0.0013390863f;
  p = p * r + 0.009618083f;
  p = p * r + 0.05550357f;
  p = p * r + 0.24022651f;
  p = p * r + 0.69314718f;
  const Integers bits = (reinterpret_cast<Integers>(shifted) << 23) + (127 << 23);
  return {reinterpret_cast<Vector>(bits), p * r};
}

constexpr float kLog2e = 1.44269504f;

FPTT_INLINE Vector sigmoid(Vector v) {
  const Power e = exp2(clamp(-kLog2e * v, 126.0f));
  return 1.0f / (1.0f + e.scale + e.scale * e.rest);
}

FPTT_INLINE Vector tanh(Vector v) {
  const Power e = exp2(clamp(2.0f * kLog2e * v, 60.0f));
  const Vector m = e.scale * e.rest + (e.scale - 1.0f);  // exp(2v) - 1
  return m / (m + 2.0f);
}

// What products multiply: float32 or, with FPTT_BFLOAT16, pairs of bfloat16 that share 32
// bits. A pair holds neighbors along the axis that a product sums over, so an array of
// operands is shorter along that axis by the factor kPair. Sums are float32.
#ifdef FPTT_BFLOAT16

constexpr int kPair = 2;
typedef uint32_t Operand;
typedef Integers Operands;

FPTT_INLINE void add_product(Vector& sum, Operand a, Operands w) {
  const __m512i pair = _mm512_set1_epi32(static_cast<int>(a));
  sum = reinterpret_cast<Vector>(_mm512_dpbf16_ps(
      reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(pair), reinterpret_cast<__m512bh>(w)));
}

// Rounds neighbors along the axis of a sum, one in each vector.
FPTT_INLINE Operands join(const Vector (&v)[kPair]) {
  const auto round = [](Vector v) {
    return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v))));
  };
  return reinterpret_cast<Operands>(round(v[0]) | _mm512_slli_epi32(round(v[1]), 16));
}

// Rounds and stores kLanes numbers that are neighbors along the axis of a sum.
FPTT_INLINE void store_row(Operand* to, Vector v) {
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v))));
}

FPTT_INLINE Operands load_operands(const Operand* from) {
  Operands v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

FPTT_INLINE void store_operands(Operand* to, Operands v) { std::memcpy(to, &v, sizeof(v)); }

#else

constexpr int kPair = 1;
typedef float Operand;
typedef Vector Operands;

// Adds a product with one rounding where the processor can. GCC splits `sum += a * w` in some
// tiles, since it expects that to be faster on AMD processors. A result would then depend on
// its tile, and so on how threads share the rows.
FPTT_INLINE void add_product(Vector& sum, Operand a, Operands w) {
#if defined(__AVX512F__)
  sum = _mm512_fmadd_ps(_mm512_set1_ps(a), w, sum);
#elif defined(__FMA__)
  sum = _mm256_fmadd_ps(_mm256_set1_ps(a), w, sum);
#elif defined(__aarch64__)
  sum = vfmaq_n_f32(sum, w, a);
#else
  sum += a * w;
#endif
}

FPTT_INLINE Operands join(const Vector (&v)[kPair]) { return v[0]; }
FPTT_INLINE void store_row(Operand* to, Vector v) { store(to, v); }
FPTT_INLINE Operands load_operands(const Operand* from) { return load(from); }
FPTT_INLINE void store_operands(Operand* to, Operands v) { store(to, v); }

#endif

// Returns how many operands hold `count` numbers.
inline size_t operands(size_t count) { return (count + kPair - 1) / kPair; }
