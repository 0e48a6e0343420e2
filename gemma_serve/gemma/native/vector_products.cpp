// Products with bfloat16 weights by AVX-512's instruction for them, on CPUs without AMX.
// `library.py` describes the arguments.

#include "products.h"

#ifdef __AVX512BF16__

#include <utility>
#include <vector>

namespace {

constexpr int kPrefetchBytes = 8192;  // how far ahead of their use weights are asked for
constexpr int kMaxRows = 8;  // of a group: 16 sums, so that no addition waits for another

using Sums = float[kMaxRows][kBlock];

// Pairs of inputs of some rows: all rows' first pair, then all rows' second one.
struct Rows {
  const uint32_t* pairs;
  int first, number;
};

// The rows in groups of about the same size, and their pairs in `packed`.
std::vector<Rows> in_groups(const BFloat16* activations, int64_t num_rows, int64_t num_inputs,
                            std::vector<uint32_t>& packed) {
  const int64_t num_groups = (num_rows + kMaxRows - 1) / kMaxRows, num_pairs = num_inputs / 2;
  packed.resize(num_rows * num_pairs);
  std::vector<Rows> groups(num_groups);
#pragma omp parallel for if (num_rows * num_inputs >= kMinParallelFloats)
  for (int64_t group = 0; group < num_groups; ++group) {
    const int64_t first = group * num_rows / num_groups;
    const int64_t number = (group + 1) * num_rows / num_groups - first;
    uint32_t* pairs = packed.data() + first * num_pairs;
    for (int64_t row = 0; row < number; ++row) {
      const BFloat16* inputs = activations + (first + row) * num_inputs;
      for (int64_t pair = 0; pair < num_pairs; ++pair)
        std::memcpy(&pairs[pair * number + row], inputs + 2 * pair, sizeof(uint32_t));
    }
    groups[group] = {pairs, static_cast<int>(first), static_cast<int>(number)};
  }
  return groups;
}

// Which weights to ask for on the way: those that come next, the same of the next block, or none.
enum class Ahead { kNear, kNextBlock, kNone };

// `kRows` rows with one block of weights.
template <int kRows, Ahead kAhead>
void multiply(Sums sums, const uint32_t* pairs, int64_t num_inputs, const BFloat16* weights) {
  __m512 low[kRows], high[kRows];
  for (int row = 0; row < kRows; ++row) low[row] = high[row] = _mm512_setzero_ps();
  for (int64_t input = 0; input < num_inputs; input += kDepth) {
    if (kAhead == Ahead::kNear) prefetch(weights, kPrefetchBytes);
    if (kAhead == Ahead::kNextBlock)
      prefetch<_MM_HINT_T1>(weights, kBlock * num_inputs * sizeof(BFloat16));
    for (int pair = 0; pair < kDepth / 2; ++pair) {
      const auto left = (__m512bh)_mm512_loadu_si512(weights + pair * kDepth);
      const auto right = (__m512bh)_mm512_loadu_si512(weights + kTileNumbers + pair * kDepth);
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const auto inputs = (__m512bh)_mm512_set1_epi32(static_cast<int>(pairs[row]));
        low[row] = _mm512_dpbf16_ps(low[row], left, inputs);
        high[row] = _mm512_dpbf16_ps(high[row], right, inputs);
      }
      pairs += kRows;
    }
    weights += 2 * kTileNumbers;
  }
  for (int row = 0; row < kRows; ++row) {
    _mm512_storeu_ps(&sums[row][0], low[row]);
    _mm512_storeu_ps(&sums[row][kTile], high[row]);
  }
}

using Multiply = void (*)(Sums, const uint32_t*, int64_t, const BFloat16*);

template <Ahead kAhead, size_t... kRows>
Multiply multiply_of(int num_rows, std::index_sequence<kRows...>) {
  constexpr Multiply kAll[] = {multiply<kRows + 1, kAhead>...};
  return kAll[num_rows - 1];
}

template <typename Outputs>
void multiply_all(BFloat16* output, const BFloat16* activations, const BFloat16* weights,
                  int64_t num_rows, int64_t num_inputs, int64_t num_blocks) {
  const int64_t num_outputs = num_blocks * Outputs::kOutputs, share = share_of(num_blocks);
  thread_local std::vector<uint32_t> packed;
  const std::vector<Rows> groups = in_groups(activations, num_rows, num_inputs, packed);
  constexpr auto kNumbers = std::make_index_sequence<kMaxRows>();
#pragma omp parallel for schedule(dynamic, share)
  for (int64_t block = 0; block < num_blocks; ++block) {
    const BFloat16* of_block = weights + block * kBlock * num_inputs;
    for (size_t group = 0; group < groups.size(); ++group) {
      // The first rows read the weights; while the second ones compute, the next block is read.
      const Rows& rows = groups[group];
      const Multiply multiply_rows =
          group == 0   ? multiply_of<Ahead::kNear>(rows.number, kNumbers)
          : group == 1 ? multiply_of<Ahead::kNextBlock>(rows.number, kNumbers)
                       : multiply_of<Ahead::kNone>(rows.number, kNumbers);
      alignas(64) Sums sums;
      multiply_rows(sums, rows.pairs, num_inputs, of_block);
      for (int i = 0; i < rows.number; ++i)
        Outputs::store_row(
            output + (rows.first + i) * num_outputs + block * Outputs::kOutputs, sums[i]);
    }
  }
}

}  // namespace

#endif  // __AVX512BF16__

extern "C" {

int has_bfloat16_vectors() {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}

void multiply_by_vectors([[maybe_unused]] void* output, [[maybe_unused]] const void* activations,
                         [[maybe_unused]] const void* weights, [[maybe_unused]] int64_t num_rows,
                         [[maybe_unused]] int64_t num_inputs, [[maybe_unused]] int64_t num_blocks,
                         [[maybe_unused]] int is_gated) {
#ifdef __AVX512BF16__
  auto* multiply = is_gated ? multiply_all<Gated> : multiply_all<Plain>;
  multiply(static_cast<BFloat16*>(output), static_cast<const BFloat16*>(activations),
           static_cast<const BFloat16*>(weights), num_rows, num_inputs, num_blocks);
#endif
}

}  // extern "C"
