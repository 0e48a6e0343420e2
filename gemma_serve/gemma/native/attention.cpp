// Attention of single tokens over the paged cache, and the writing of keys and values.
//
// Keys are read where they lie; torch's attention wants them copied together first. Everything is
// computed in float32. A history is cut into parts at the same positions whoever else is in the
// step, so that a token's result does not depend on its neighbours. `library.py` describes the
// arguments.

#include <vector>

#include "numbers.h"

namespace {

#ifdef __AVX512F__
constexpr int kKeysAtOnce = 4;  // the sums of so many keys and four heads fit the registers
#else
constexpr int kKeysAtOnce = 2;
#endif
constexpr int kKeysAhead = 8;   // how many before their use keys are asked for
constexpr int kPartKeys = 256;  // keys of one task

// Where the keys and values of a group of layers lie, and what the step's tokens see of them.
struct Pages {
  const int32_t* table;  // [num_seats, table_width]: the blocks of each sequence
  int64_t table_width;
  int64_t block_size;
  const int64_t* positions;  // [num_tokens]
  const int64_t* key_ends;   // [num_tokens]
  const int64_t* seats;      // [num_tokens]
  int64_t window;            // 0: none

  int64_t slot(int64_t token, int64_t position) const {
    const int32_t block = table[seats[token] * table_width + position / block_size];
    return block * block_size + position % block_size;
  }
};

template <typename T, typename Stored>
void write_tokens(const Pages& pages, Stored* key_plane, Stored* value_plane, const T* keys,
                  const T* values, int64_t num_tokens, int64_t key_stride, int64_t value_stride,
                  int64_t width) {
  for (int64_t token = 0; token < num_tokens; ++token) {
    const int64_t place = pages.slot(token, pages.positions[token]) * width;
    const T* key = keys + token * key_stride;
    const T* value = values + token * value_stride;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      store(key_plane + place + i, to_float(key[i]));
      store(value_plane + place + i, to_float(value[i]));
    }
  }
}

struct Heads {
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  float scale;

  int64_t group_size() const { return num_heads / num_kv_heads; }
  int64_t width() const { return num_kv_heads * head_dim; }
};

// Keys of one token that one thread looks at, for the query heads of one KV head.
struct Task {
  int64_t token;
  int64_t kv_head;
  int64_t first_key;
  int64_t key_end;
  int64_t index;  // among those of its token and KV head
};

// What a part says of each head: the weighted values, the largest score, the sum of weights.
struct Part {
  float* values;
  float* maximum;
  float* sum;
};

template <int kHeads, int kVectors, typename Stored>
void weigh_values(float* output, int64_t head_dim, const Stored* values, const int64_t* offsets,
                  const float (*weights)[kPartKeys], int num_keys) {
  for (int64_t dim = 0; dim < head_dim; dim += kVectors * kLanes) {
    Floats sums[kHeads][kVectors] = {};
    for (int key = 0; key < num_keys; ++key) {
      const Stored* place = values + offsets[key] + dim;
      for (int vector = 0; vector < kVectors; ++vector) {
        const Floats value = load(place + vector * kLanes);
        for (int head = 0; head < kHeads; ++head)
          sums[head][vector] += value * weights[head][key];
      }
    }
    for (int head = 0; head < kHeads; ++head)
      std::memcpy(output + head * head_dim + dim, sums[head], sizeof sums[head]);
  }
}

template <int kHeads, typename T, typename Stored>
void attend_heads(const Part& part, const T* query, const Stored* keys, const Stored* values,
                  const int64_t* offsets, int num_keys, int64_t head_dim, float scale) {
  float queries[kHeads][kMaxHeadDim];
  for (int head = 0; head < kHeads; ++head)
    for (int64_t dim = 0; dim < head_dim; ++dim)
      queries[head][dim] = to_float(query[head * head_dim + dim]) * scale;

  float scores[kHeads][kPartKeys];
  for (int first = 0; first < num_keys; first += kKeysAtOnce) {
    Floats sums[kKeysAtOnce][kHeads] = {};
    for (int64_t dim = 0; dim < head_dim; dim += kLanes) {
      Floats of_heads[kHeads];
      for (int head = 0; head < kHeads; ++head) of_heads[head] = load(queries[head] + dim);
      for (int key = 0; key < kKeysAtOnce; ++key) {
        const Floats of_key = load(keys + offsets[first + key] + dim);
        __builtin_prefetch(keys + offsets[first + key + kKeysAhead] + dim);
        __builtin_prefetch(values + offsets[first + key] + dim);
        for (int head = 0; head < kHeads; ++head) sums[key][head] += of_key * of_heads[head];
      }
    }
    for (int key = 0; key < kKeysAtOnce; ++key)
      for (int head = 0; head < kHeads; ++head) scores[head][first + key] = total(sums[key][head]);
  }

  for (int head = 0; head < kHeads; ++head) {
    float maximum = scores[head][0];
    for (int key = 1; key < num_keys; ++key) maximum = std::max(maximum, scores[head][key]);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int key = 0; key < num_keys; ++key) {
      scores[head][key] = exp_of(scores[head][key] - maximum);
      sum += scores[head][key];
    }
    part.maximum[head] = maximum;
    part.sum[head] = sum;
  }

  if (head_dim % (4 * kLanes) == 0)
    weigh_values<kHeads, 4>(part.values, head_dim, values, offsets, scores, num_keys);
  else
    weigh_values<kHeads, 1>(part.values, head_dim, values, offsets, scores, num_keys);
}

template <typename T, typename Stored>
void attend_part(const Pages& pages, const Heads& heads, const Task& task, Part part,
                 const T* query, const Stored* key_plane, const Stored* value_plane) {
  constexpr int kSpare = kKeysAtOnce + kKeysAhead;
  int64_t offsets[kPartKeys + kSpare];  // the last over and over, to fill up a round
  const int num_keys = static_cast<int>(task.key_end - task.first_key);
  for (int key = 0; key < num_keys;) {
    const int64_t position = task.first_key + key;
    int64_t offset = pages.slot(task.token, position) * heads.width() +
                     task.kv_head * heads.head_dim;
    const int64_t left_in_block = pages.block_size - position % pages.block_size;
    for (int64_t left = std::min(left_in_block, task.key_end - position); left > 0; --left) {
      offsets[key++] = offset;
      offset += heads.width();
    }
  }
  std::fill_n(offsets + num_keys, kSpare, offsets[num_keys - 1]);

  const int64_t head_dim = heads.head_dim;
  for (int64_t head = 0; head < heads.group_size();) {
    const int64_t left = heads.group_size() - head;
    int done = 1;
    if (left >= 4) {
      attend_heads<4>(part, query, key_plane, value_plane, offsets, num_keys, head_dim,
                      heads.scale);
      done = 4;
    } else if (left >= 2) {
      attend_heads<2>(part, query, key_plane, value_plane, offsets, num_keys, head_dim,
                      heads.scale);
      done = 2;
    } else {
      attend_heads<1>(part, query, key_plane, value_plane, offsets, num_keys, head_dim,
                      heads.scale);
    }
    head += done;
    query += done * head_dim;
    part.values += done * head_dim;
    part.maximum += done;
    part.sum += done;
  }
}

std::vector<Task> tasks_of(const Pages& pages, const Heads& heads, const int64_t* rows,
                           int64_t num_rows) {
  std::vector<Task> tasks;
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t token = rows[i];
    const int64_t end = pages.key_ends[token];
    const int64_t first =
        pages.window ? std::max<int64_t>(0, pages.positions[token] - pages.window + 1) : 0;
    // Cut at the same positions whatever the others do.
    const int64_t first_part = first / kPartKeys, last_part = (end - 1) / kPartKeys;
    for (int64_t kv_head = 0; kv_head < heads.num_kv_heads; ++kv_head)
      for (int64_t part = first_part; part <= last_part; ++part)
        tasks.push_back({token, kv_head, std::max(first, part * kPartKeys),
                         std::min(end, (part + 1) * kPartKeys), part - first_part});
  }
  return tasks;
}

// The parts of one token and KV head, which stand one after another, weighed against each other.
template <typename T>
void join_parts(T* output, const Heads& heads, const std::vector<Part>& parts, size_t first,
                size_t end) {
  for (int64_t head = 0; head < heads.group_size(); ++head) {
    float maximum = parts[first].maximum[head];
    for (size_t part = first + 1; part < end; ++part)
      maximum = std::max(maximum, parts[part].maximum[head]);
    float sums[kMaxHeadDim] = {};
    float sum = 0;
    for (size_t part = first; part < end; ++part) {
      const float weight = exp_of(parts[part].maximum[head] - maximum);
      const float* values = parts[part].values + head * heads.head_dim;
      sum += parts[part].sum[head] * weight;
#pragma omp simd
      for (int64_t dim = 0; dim < heads.head_dim; ++dim) sums[dim] += values[dim] * weight;
    }
#pragma omp simd
    for (int64_t dim = 0; dim < heads.head_dim; ++dim)
      store(output + head * heads.head_dim + dim, sums[dim] / sum);
  }
}

template <typename T, typename Stored>
void attend_tokens(const Pages& pages, const Heads& heads, T* output, const T* query,
                   const Stored* key_plane, const Stored* value_plane, const int64_t* rows,
                   int64_t num_rows, int64_t query_stride) {
  const std::vector<Task> tasks = tasks_of(pages, heads, rows, num_rows);
  const int64_t group_size = heads.group_size();
  const size_t part_floats = group_size * (heads.head_dim + 2);
  std::vector<float> memory(tasks.size() * part_floats);
  std::vector<Part> parts(tasks.size());
  int64_t num_keys = 0;
  for (size_t i = 0; i < tasks.size(); ++i) {
    float* values = memory.data() + i * part_floats;
    float* maxima = values + group_size * heads.head_dim;
    parts[i] = {values, maxima, maxima + group_size};
    num_keys += tasks[i].key_end - tasks[i].first_key;
  }
  const auto place = [&](const Task& task, int64_t stride) {
    return task.token * stride + task.kv_head * group_size * heads.head_dim;
  };
  const bool is_shared =
      tasks.size() > 1 && num_keys * group_size * heads.head_dim > kMinParallelFloats;
#pragma omp parallel if (is_shared)
  {
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); ++i)
      attend_part(pages, heads, tasks[i], parts[i], query + place(tasks[i], query_stride),
                  key_plane, value_plane);
#pragma omp for
    for (size_t i = 0; i < tasks.size(); ++i) {
      if (tasks[i].index > 0) continue;
      size_t end = i + 1;
      while (end < tasks.size() && tasks[end].index > 0) ++end;
      join_parts(output + place(tasks[i], heads.num_heads * heads.head_dim), heads, parts, i, end);
    }
  }
}

// Calls `compute` with a value of the type of activations and one of that which the cache stores.
template <typename Compute>
void with_types(int is_bfloat16, int stores_bfloat16, Compute compute) {
  if (is_bfloat16)
    compute(BFloat16{}, BFloat16{});
  else if (stores_bfloat16)
    compute(float{}, BFloat16{});
  else
    compute(float{}, float{});
}

}  // namespace

extern "C" {

void write_kv(const Pages* pages, void* key_plane, void* value_plane, const void* keys,
           const void* values, int64_t num_tokens, int64_t key_stride, int64_t value_stride,
           int64_t width, int is_bfloat16, int stores_bfloat16) {
  with_types(is_bfloat16, stores_bfloat16, [&](auto element, auto stored) {
    using T = decltype(element);
    using Stored = decltype(stored);
    write_tokens(*pages, static_cast<Stored*>(key_plane), static_cast<Stored*>(value_plane),
                 static_cast<const T*>(keys), static_cast<const T*>(values), num_tokens,
                 key_stride, value_stride, width);
  });
}

void attend(const Pages* pages, void* output, const void* query, const void* key_plane,
            const void* value_plane, const int64_t* rows, int64_t num_rows, int64_t query_stride,
            int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, float scale,
            int is_bfloat16, int stores_bfloat16) {
  const Heads heads{num_heads, num_kv_heads, head_dim, scale};
  with_types(is_bfloat16, stores_bfloat16, [&](auto element, auto stored) {
    using T = decltype(element);
    using Stored = decltype(stored);
    attend_tokens(*pages, heads, static_cast<T*>(output), static_cast<const T*>(query),
                  static_cast<const Stored*>(key_plane), static_cast<const Stored*>(value_plane),
                  rows, num_rows, query_stride);
  });
}

}  // extern "C"
