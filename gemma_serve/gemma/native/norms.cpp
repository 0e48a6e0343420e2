// Norms of the decoder layers, and what stands beside them: sums, rotations and rounding.
//
// Each row is computed in float32 and by itself, so that its result does not depend on how many
// others there are. `library.py` describes the arguments.

#include <cmath>

#include "numbers.h"

namespace {

template <typename T>
float norm_scale(const T* values, int64_t width, float eps) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; ++i) squares += to_float(values[i]) * to_float(values[i]);
  return 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
}

template <typename T>
void norm_row(T* output, const float* hidden, const float* weight, float eps, int64_t width) {
  const float scale = norm_scale(hidden, width, eps);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) store(output + i, hidden[i] * scale * weight[i]);
}

template <typename T>
void norm_rows(T* output, const float* hidden, const float* weight, float eps, int64_t num_rows,
               int64_t width) {
#pragma omp parallel for if (num_rows * width > kMinParallelFloats)
  for (int64_t row = 0; row < num_rows; ++row)
    norm_row(output + row * width, hidden + row * width, weight, eps, width);
}

template <typename T>
void add_norm_rows(T* output, float* hidden, const T* branch, const float* weight,
                   const float* next_weight, float eps, float next_eps, int64_t num_rows,
                   int64_t width) {
#pragma omp parallel for if (num_rows * width > kMinParallelFloats)
  for (int64_t row = 0; row < num_rows; ++row) {
    float* sums = hidden + row * width;
    const T* added = branch + row * width;
    const float scale = norm_scale(added, width, eps);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) sums[i] += to_float(added[i]) * scale * weight[i];
    if (output != nullptr) norm_row(output + row * width, sums, next_weight, next_eps, width);
  }
}

template <typename T>
void rotate_heads(T* output, const T* heads, const float* weight, const float* cos,
                  const float* signed_sin, float eps, int64_t num_tokens, int64_t token_stride,
                  int64_t num_heads, int64_t head_dim) {
  const int64_t half = head_dim / 2;
#pragma omp parallel for if (num_tokens * num_heads * head_dim > kMinParallelFloats)
  for (int64_t token = 0; token < num_tokens; ++token) {
    const float* cosines = cos + token * head_dim;
    const float* sines = signed_sin + token * head_dim;
    for (int64_t head = 0; head < num_heads; ++head) {
      const T* values = heads + token * token_stride + head * head_dim;
      const float* weights = weight + head * head_dim;
      T* rotated = output + (token * num_heads + head) * head_dim;
      const float scale = norm_scale(values, head_dim, eps);
      float normed[kMaxHeadDim];
#pragma omp simd
      for (int64_t i = 0; i < head_dim; ++i) normed[i] = to_float(values[i]) * scale * weights[i];
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        store(rotated + i, normed[i] * cosines[i] + normed[i + half] * sines[i]);
        store(rotated + i + half,
              normed[i + half] * cosines[i + half] + normed[i] * sines[i + half]);
      }
    }
  }
}

}  // namespace

extern "C" {

void norm(void* output, const float* hidden, const float* weight, float eps, int64_t num_rows,
          int64_t width, int is_bfloat16) {
  with_type(is_bfloat16, [&](auto element) {
    using T = decltype(element);
    norm_rows(static_cast<T*>(output), hidden, weight, eps, num_rows, width);
  });
}

void add_norm(void* output, float* hidden, const void* branch, const float* weight,
              const float* next_weight, float eps, float next_eps, int64_t num_rows, int64_t width,
              int is_bfloat16) {
  with_type(is_bfloat16, [&](auto element) {
    using T = decltype(element);
    add_norm_rows(static_cast<T*>(output), hidden, static_cast<const T*>(branch), weight,
                  next_weight, eps, next_eps, num_rows, width);
  });
}

void rotate(void* output, const void* heads, const float* weight, const float* cos,
            const float* signed_sin, float eps, int64_t num_tokens, int64_t token_stride,
            int64_t num_heads, int64_t head_dim, int is_bfloat16) {
  with_type(is_bfloat16, [&](auto element) {
    using T = decltype(element);
    rotate_heads(static_cast<T*>(output), static_cast<const T*>(heads), weight, cos, signed_sin,
                 eps, num_tokens, token_stride, num_heads, head_dim);
  });
}

}  // extern "C"
