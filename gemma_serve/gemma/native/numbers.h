// Numbers as the kernels load, compute and store them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
constexpr int kMaxHeadDim = 512;
constexpr int64_t kMinParallelFloats = 1 << 15;  // below it, waking a thread costs more

struct BFloat16 {
  uint16_t bits;
};

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  const uint32_t word = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

inline void store(float* place, float value) { *place = value; }

// To the nearest, of two as near the even one; what is not a number stays so.
inline void store(BFloat16* place, float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  const uint32_t rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16;
  place->bits = static_cast<uint16_t>(value != value ? 0x7FC0 : rounded);
}

inline Floats load(const float* place) {
  Floats values;
  std::memcpy(&values, place, sizeof values);
  return values;
}

inline Floats load(const BFloat16* place) {
  Halves halves;
  std::memcpy(&halves, place, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Floats values;
  std::memcpy(&values, &words, sizeof values);
  return values;
}

inline float total(Floats values) {
  typedef float Half __attribute__((vector_size(kLanes / 2 * sizeof(float))));
  typedef float Four __attribute__((vector_size(4 * sizeof(float))));
  Half halves[2];
  std::memcpy(halves, &values, sizeof halves);
  halves[0] += halves[1];
  Four fours[kLanes / 8];
  std::memcpy(fours, halves, sizeof fours);
  Four sums = fours[0];
  if (kLanes == 16) sums += fours[kLanes / 8 - 1];
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// e to the power of x < 88, to a few units of float32's last place (Cephes' expf).
inline float exp_of(float x) {
  x = std::max(x, -80.0f);  // less would soon be denormal, which takes a hundred times as long
  const float rounding = 12582912.0f;  // 1.5 * 2**23: what is added to it loses its fraction
  const float power = (x * 1.44269504f + rounding) - rounding;
  const float rest = x - power * 0.693359375f + power * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  const int32_t exponent = (static_cast<int32_t>(power) + 127) << 23;
  float scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return sum * scale;
}

// Calls `compute` with a value of the type of activations.
template <typename Compute>
void with_type(int is_bfloat16, Compute compute) {
  if (is_bfloat16)
    compute(BFloat16{});
  else
    compute(float{});
}

}  // namespace
