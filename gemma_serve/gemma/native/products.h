// How weights lie that are multiplied here, and what becomes of the sums.
//
// Few rows of activations are multiplied as fast as memory gives the weights, which therefore lie
// in the order in which they are read. A *tile* is 16 rows of 64 bytes: 32 inputs of 16 outputs, of
// two inputs each after the other in a row, as the instructions want them. Two tiles stand side by
// side in a *block* of 32 outputs, and all tiles of a block one after another.

#pragma once

#include "numbers.h"

#ifdef __AVX512BF16__

#include <immintrin.h>
#include <omp.h>

namespace {

constexpr int kTile = 16;          // rows of a tile; outputs of one
constexpr int kDepth = 32;         // inputs of a tile
constexpr int kBlock = 2 * kTile;  // outputs that are computed together
constexpr int kTileNumbers = kTile * kDepth;
constexpr int kShares = 8;  // of the outputs, for each thread: one that is interrupted takes fewer

// Ask for the two tiles that lie so far ahead: in one go and in order, as memory likes it.
template <_mm_hint kCache = _MM_HINT_T0>
inline void prefetch(const BFloat16* weights, int64_t num_bytes_ahead) {
  const char* place = reinterpret_cast<const char*>(weights) + num_bytes_ahead;
  for (int line = 0; line < 2 * kTile; ++line) _mm_prefetch(place + line * 64, kCache);
}

// What comes out of a block of sums: all of them,
struct Plain {
  static constexpr int kOutputs = kBlock;

  static void store_row(BFloat16* output, const float* sums) {
    for (int i = 0; i < kBlock; i += kLanes) {
      const auto rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(sums + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(output + i), rounded);
    }
  }
};

// or gelu(gate) * up of 16 gates and the 16 factors beside them (the tanh form of GELU).
struct Gated {
  static constexpr int kOutputs = kTile;

  static void store_row(BFloat16* output, const float* sums) {
#pragma omp simd
    for (int i = 0; i < kTile; ++i) {
      const float gate = sums[i];
      const float twice = 1.5957691216f * (gate + 0.044715f * gate * gate * gate);
      const float power = exp_of(std::min(-twice, 40.0f));
      store(output + i, gate / (1.0f + power) * sums[i + kTile]);
    }
  }
};

// Of the blocks, for one thread at a time.
inline int64_t share_of(int64_t num_blocks) {
  return std::max<int64_t>(1, num_blocks / (kShares * omp_get_max_threads()));
}

}  // namespace

#endif  // __AVX512BF16__
