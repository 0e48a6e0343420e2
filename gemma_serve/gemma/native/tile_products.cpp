// Products with bfloat16 weights by AMX, a CPU's matrix unit, whose registers are tiles.
// `library.py` describes the arguments.

#include "products.h"

#ifdef __AMX_BF16__

#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int kPrefetchBytes = 2048;  // how far ahead of 16 rows' use weights are asked for

using Sums = float[kBlock][kBlock];

// As `ldtilecfg` reads it.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // Tiles 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights.
  explicit TileShapes(int num_rows) {
    const int first = std::min(num_rows, kTile), second = num_rows - first;
    const int rows_of[8] = {first, first, second, second, first, second, kTile, kTile};
    for (int tile = 0; tile < 8; ++tile) {
      rows[tile] = static_cast<uint8_t>(rows_of[tile]);
      row_bytes[tile] = rows_of[tile] ? 64 : 0;
    }
  }
};

// Up to 32 rows with one block of weights, which is in memory still, or in a cache.
template <bool kHasSecondRows, bool kInMemory>
void multiply(Sums sums, const BFloat16* activations, int64_t num_inputs,
              const BFloat16* weights) {
  const int64_t stride = num_inputs * sizeof(BFloat16);
  const BFloat16* second_rows = activations + kTile * num_inputs;
  _tile_zero(0);
  _tile_zero(1);
  if (kHasSecondRows) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t input = 0; input < num_inputs; input += kDepth) {
    if (kInMemory) prefetch(weights, kPrefetchBytes << kHasSecondRows);
    _tile_loadd(4, activations + input, stride);
    _tile_loadd(6, weights, 64);
    _tile_loadd(7, weights + kTileNumbers, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (kHasSecondRows) {
      _tile_loadd(5, second_rows + input, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    weights += 2 * kTileNumbers;
  }
  _tile_stored(0, &sums[0][0], sizeof sums[0]);
  _tile_stored(1, &sums[0][kTile], sizeof sums[0]);
  if (kHasSecondRows) {
    _tile_stored(2, &sums[kTile][0], sizeof sums[0]);
    _tile_stored(3, &sums[kTile][kTile], sizeof sums[0]);
  }
}

template <typename Outputs>
void multiply_all(BFloat16* output, const BFloat16* activations, const BFloat16* weights,
                  int64_t num_rows, int64_t num_inputs, int64_t num_blocks) {
  const int64_t num_outputs = num_blocks * Outputs::kOutputs;
  const TileShapes whole(kBlock), last(static_cast<int>((num_rows - 1) % kBlock + 1));
  const int64_t share = share_of(num_blocks);
#pragma omp parallel
  {
    const TileShapes* shapes = num_rows >= kBlock ? &whole : &last;
    _tile_loadconfig(shapes);
#pragma omp for schedule(dynamic, share)
    for (int64_t block = 0; block < num_blocks; ++block) {
      const BFloat16* of_block = weights + block * kBlock * num_inputs;
      for (int64_t row = 0; row < num_rows; row += kBlock) {
        const int rows = static_cast<int>(std::min<int64_t>(kBlock, num_rows - row));
        const TileShapes* needed = rows == kBlock ? &whole : &last;
        if (needed != shapes) _tile_loadconfig(shapes = needed);
        alignas(64) Sums sums;
        auto* multiply_rows = rows > kTile ? row == 0 ? multiply<true, true> : multiply<true, false>
                              : row == 0 ? multiply<false, true> : multiply<false, false>;
        multiply_rows(sums, activations + row * num_inputs, num_inputs, of_block);
        for (int i = 0; i < rows; ++i)
          Outputs::store_row(output + (row + i) * num_outputs + block * Outputs::kOutputs,
                             sums[i]);
      }
    }
    _tile_release();
  }
}

}  // namespace

#endif  // __AMX_BF16__

extern "C" {

// Whether this machine has the unit and lets us use it: its registers are large, and Linux saves
// them for those who ask (Documentation/arch/x86/xstate.rst).
int has_tiles() {
#ifdef __AMX_BF16__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return 0;
#endif
}

void multiply_tiles([[maybe_unused]] void* output, [[maybe_unused]] const void* activations,
                    [[maybe_unused]] const void* weights, [[maybe_unused]] int64_t num_rows,
                    [[maybe_unused]] int64_t num_inputs, [[maybe_unused]] int64_t num_blocks,
                    [[maybe_unused]] int is_gated) {
#ifdef __AMX_BF16__
  auto* multiply = is_gated ? multiply_all<Gated> : multiply_all<Plain>;
  multiply(static_cast<BFloat16*>(output), static_cast<const BFloat16*>(activations),
           static_cast<const BFloat16*>(weights), num_rows, num_inputs, num_blocks);
#endif
}

}  // extern "C"
