// Attention of one task, compiled with -DISA=name and that instruction set's flags. The order of a query's arithmetic
// depends only on its own position: each score is one dot product in a fixed order, key j is always in lane j % kWidth,
// and weighted values are added one by one from the first key to the last. So a result does not depend on the queries
// that share the task.
#include <cmath>

#include "common/float_math.h"
#include "common/simd.h"
#include "ragged_attention.h"

namespace genarm {
namespace {

constexpr float kInf = INFINITY;
constexpr float kLog2e = 1.44269504088896340736f;
constexpr int kGroup = 6;                         // queries whose sums fit into the registers together
constexpr int kChains = kWidth == 16 ? 4 : 2;     // independent sums of a dot product, which hide the fma's latency
constexpr int kVectors = kWidth == 16 ? 4 : 2;    // vectors of an output row that are summed at a time
// Entries that are prefetched, because the key-value cache of a decode step is not in the processor's caches: 1024
// entries of SmolLM2-135M take 98 instead of 139 µs.
constexpr int kAhead = 32;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename T>
inline void fetch(const T* vector, int64_t width) {
  for (int64_t d = 0; d < width; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(vector + d);
}

// A task's queries, the keys that they see, and the sizes of its scratch memory.
struct Layout {
  int64_t group, queries, first, end;  // first key, rounded down to whole vectors, and last key + 1
  int64_t width, value_width, span;    // widths of keys and values, and end - first: padded to whole vectors
  int64_t floats;                      // size of the scratch memory

  Layout(const RaggedAttention& a, const RaggedTask& t) {
    group = a.heads / a.kv_heads, queries = group * t.tokens;
    first = INT64_MAX, end = 0;
    for (int64_t i = 0; i < t.tokens; ++i) {
      const int64_t position = a.places.position(t.row, t.token + i);
      end = most(end, position + 1);
      first = least(first, begin(a, position));
    }
    first = first / kWidth * kWidth;
    width = round_up(a.width, a.bfloat16 ? 2 * kWidth : kWidth);
    value_width = round_up(a.value_width, kWidth);
    span = round_up(end - first, kWidth);
    floats = width * kWidth + queries * (width + span + value_width + 1);
  }

  static int64_t begin(const RaggedAttention& a, int64_t position) {  // first key that this query sees
    return position < a.window ? 0 : position - a.window + 1;
  }
};

// Transposes kWidth keys, given by their rows, to floats [width, kWidth].
void transpose_keys(const float* const* rows, int64_t width, float* out) {
  for (int64_t d = 0; d < width; d += kWidth) {
    Words block[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      block[i] = reinterpret_cast<Words>(d + kWidth <= width ? load(rows[i] + d) : load_some(rows[i] + d, width - d));
    }
    transpose(block);
    for (int i = 0; i < kWidth; ++i) store(out + (d + i) * kWidth, reinterpret_cast<Floats>(block[i]));
  }
}

// Transposes bfloat16 keys as words of two values, which are separated at the end.
void transpose_keys(const uint16_t* const* rows, int64_t width, float* out) {
  for (int64_t d = 0; d < width; d += 2 * kWidth) {
    Words block[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      uint16_t padded[2 * kWidth] = {};
      const uint16_t* pairs = rows[i] + d;
      if (d + 2 * kWidth > width) {
        std::memcpy(padded, pairs, (width - d) * sizeof *pairs);
        pairs = padded;
      }
      block[i] = load_as<Words>(pairs);
    }
    transpose(block);
    for (int i = 0; i < kWidth; ++i) {
      store(out + (d + 2 * i) * kWidth, reinterpret_cast<Floats>(block[i] << 16));
      store(out + (d + 2 * i + 1) * kWidth, reinterpret_cast<Floats>(block[i] & 0xffff0000u));
    }
  }
}

// Writes the scores of kWidth transposed keys for N queries [N, width].
template <int N>
void dot(const float* keys, const float* queries, int64_t width, float* scores, int64_t span) {
  Floats sums[N][kChains];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) sums[i][c] = Floats{};
  }
  for (int64_t d = 0; d < width; d += kChains) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const Floats key = load(keys + (d + c) * kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) sums[i][c] = fma(key, splat(queries[i * width + d + c]), sums[i][c]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    Floats sum = sums[i][0] + sums[i][1];
    if (kChains == 4) sum += sums[i][kChains - 2] + sums[i][kChains - 1];
    store(scores + i * span, sum);
  }
}

// Turns the scores x of the keys first .. first + n - 1 into weights, and returns their sum. The largest weight is 1,
// and weights outside begin .. end - 1 are 0. The scores come multiplied by log2(e). With a softcap they come divided
// by the softcap instead.
float softmax(float* x, int64_t first, int64_t n, int64_t begin, int64_t end, float softcap) {
  float lanes[kWidth];
  for (float& lane : lanes) lane = -kInf;
  for (int64_t j = 0; j < n; j += kWidth) {
    const int low = static_cast<int>(most(begin - first - j, 0)), high = static_cast<int>(least(end - first - j, kWidth));
    if (softcap != 0.f) {
#pragma omp simd
      for (int i = 0; i < kWidth; ++i) {  // tanh
        float y = x[j + i], power = exp2_negative(-2.f * kLog2e * std::fabs(y));
        x[j + i] = std::copysign((1.f - power) / (1.f + power), y) * (softcap * kLog2e);
      }
    }
#pragma omp simd
    for (int i = 0; i < kWidth; ++i) {
      float y = (i >= low) & (i < high) ? x[j + i] : -kInf;
      lanes[i] = y > lanes[i] ? y : lanes[i];
    }
  }
  float peak = -kInf;
  for (float lane : lanes) peak = lane > peak ? lane : peak;
  for (float& lane : lanes) lane = 0.f;
  for (int64_t j = 0; j < n; j += kWidth) {
    const int low = static_cast<int>(most(begin - first - j, 0)), high = static_cast<int>(least(end - first - j, kWidth));
#pragma omp simd
    for (int i = 0; i < kWidth; ++i) {
      float power = exp2_negative(x[j + i] - peak);
      power = (i >= low) & (i < high) ? power : 0.f;
      x[j + i] = power;
      lanes[i] += power;
    }
  }
  float sum = 0.f;
  for (float lane : lanes) sum += lane;
  return sum;
}

// Adds weights [N, span] · values, over `keys` keys, to V vectors of the output. If `tail` is not 0, there is one
// vector, of which only the first `tail` elements are read.
template <int N, int V, typename T>
void add_vectors(const T* values, int64_t value_stride, int64_t keys, int64_t tail, const float* weights, int64_t span,
                 float* out, int64_t out_stride) {
  Floats sums[N][V];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[i][v] = load(out + i * out_stride + v * kWidth);
  }
  for (int64_t j = 0; j < keys; ++j, values += value_stride) {
    if (j + kAhead < keys) fetch(values + kAhead * value_stride, V * kWidth);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Floats value = V == 1 && tail ? load_some(values, tail) : load(values + v * kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) sums[i][v] = fma(value, splat(weights[i * span + j]), sums[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out + i * out_stride + v * kWidth, sums[i][v]);
  }
}

template <int N, typename T>
void add_values(const T* values, int64_t value_stride, int64_t keys, int64_t width, const float* weights, int64_t span,
                float* out, int64_t out_stride) {
  if (keys <= 0) return;
  int64_t d = 0;
  for (; d + kVectors * kWidth <= width; d += kVectors * kWidth) {
    add_vectors<N, kVectors>(values + d, value_stride, keys, 0, weights, span, out + d, out_stride);
  }
  for (; d < width; d += kWidth) {
    const int64_t tail = d + kWidth <= width ? 0 : width - d;
    add_vectors<N, 1>(values + d, value_stride, keys, tail, weights, span, out + d, out_stride);
  }
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls f(Count<n>), n in 1..kGroup.
template <int N = kGroup, typename F>
void with_count(int64_t n, F f) {
  if constexpr (N > 0) {
    if (n == N) return f(Count<N>{});
    with_count<N - 1>(n, f);
  }
}

template <typename T>
void attend(const RaggedAttention& a, const RaggedTask& t, float* scratch) {
  const Layout layout(a, t);
  const int64_t queries = layout.queries, span = layout.span, first = layout.first;
  float* keys_block = scratch;
  float* q = keys_block + layout.width * kWidth;
  float* scores = q + queries * layout.width;
  float* out = scores + queries * span;
  float* sums = out + queries * layout.value_width;
  const int64_t slot = a.places.slot(t.row);
  const auto position_of = [&](int64_t query) { return a.places.position(t.row, t.token + query % t.tokens); };
  const T* keys = static_cast<const T*>(a.keys) + slot * a.key_strides[0] + t.kv_head * a.key_strides[1];
  const T* values = static_cast<const T*>(a.values) + slot * a.value_strides[0] + t.kv_head * a.value_strides[1];
  // Query i is head i / tokens of the group, token i % tokens.
  const float scale = a.softcap != 0.f ? a.scale / a.softcap : a.scale * kLog2e;
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t head = t.kv_head * layout.group + i / t.tokens, token = t.token + i % t.tokens;
    const T* source = static_cast<const T*>(a.query) + t.row * a.query_strides[0] + head * a.query_strides[1] +
                      token * a.query_strides[2];
    for (int64_t d = 0; d < a.width; ++d) q[i * layout.width + d] = as_float32(source[d]) * scale;
    for (int64_t d = a.width; d < layout.width; ++d) q[i * layout.width + d] = 0.f;
  }

  const int64_t groups = (queries + kGroup - 1) / kGroup, per_group = (queries + groups - 1) / groups;
  for (int64_t j = first; j < layout.end; j += kWidth) {
    const T* rows[kWidth];  // beyond the last key, the last key again; `softmax` masks it
    for (int i = 0; i < kWidth; ++i) {
      rows[i] = keys + least(j + i, layout.end - 1) * a.key_strides[2];
      fetch(keys + least(j + i + kAhead, layout.end - 1) * a.key_strides[2], a.width);
    }
    transpose_keys(rows, a.width, keys_block);
    for (int64_t i = 0; i < queries; i += per_group) {
      with_count(least(per_group, queries - i), [&](auto n) {
        dot<decltype(n)::value>(keys_block, q + i * layout.width, layout.width, scores + i * span + j - first, span);
      });
    }
  }

  for (int64_t i = 0; i < queries; ++i) {
    const int64_t position = position_of(i);
    sums[i] = softmax(scores + i * span, first, span, Layout::begin(a, position), position + 1, a.softcap);
  }

  // A query's weights are only multiplied with values that it sees, because 0 · NaN is NaN. The queries of a group are
  // added together for the keys that all of them see, and one by one for the keys before and after.
  std::memset(out, 0, queries * layout.value_width * sizeof *out);
  const auto add = [&](auto n, int64_t i, int64_t begin, int64_t end) {
    add_values<decltype(n)::value>(values + begin * a.value_strides[2], a.value_strides[2], end - begin, a.value_width,
                                   scores + i * span + begin - first, span, out + i * layout.value_width,
                                   layout.value_width);
  };
  for (int64_t i = 0; i < queries; i += per_group) {
    const int64_t count = least(per_group, queries - i);
    int64_t begin = 0, end = INT64_MAX;
    for (int64_t g = i; g < i + count; ++g) {
      const int64_t position = position_of(g);
      begin = most(begin, Layout::begin(a, position)), end = least(end, position + 1);
    }
    end = most(begin, end);  // if the group shares no key, `begin` splits each query's own range
    for (int64_t g = i; g < i + count; ++g) {
      const int64_t position = position_of(g);
      add(Count<1>{}, g, Layout::begin(a, position), least(begin, position + 1));
    }
    with_count(count, [&](auto n) { add(n, i, begin, end); });
    for (int64_t g = i; g < i + count; ++g) {
      add(Count<1>{}, g, end, position_of(g) + 1);
    }
  }

  for (int64_t i = 0; i < queries; ++i) {
    const int64_t head = t.kv_head * layout.group + i / t.tokens, token = t.token + i % t.tokens;
    T* target = static_cast<T*>(a.out) + ((t.row * a.block + token) * a.heads + head) * a.value_width;
    const float share = 1.f / sums[i];
    for (int64_t d = 0; d < a.value_width; ++d) put(target + d, out[i * layout.value_width + d] * share);
  }
}

int64_t scratch(const RaggedAttention& a, const RaggedTask& t) { return Layout(a, t).floats; }

void attend_any(const RaggedAttention& a, const RaggedTask& t, float* scratch) {
  (a.bfloat16 ? attend<uint16_t> : attend<float>)(a, t, scratch);
}

#define TABLE_(isa) ragged_##isa
#define TABLE(isa) TABLE_(isa)

}  // namespace

extern const RaggedLoops TABLE(ISA) = {scratch, attend_any};

}  // namespace genarm
