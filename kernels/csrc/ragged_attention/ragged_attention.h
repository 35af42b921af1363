// ragged_attention and ragged_append on the CPU; kernels/ops/ragged_attention/reference.py is the specification.
#pragma once

#include <cstdint>

namespace genarm {

struct Places {  // of rows in the cache, and of their tokens in the rows
  const int64_t *slots, *positions;  // [N], [N, q]
  int64_t slot_stride, row_stride, token_stride;

  int64_t slot(int64_t row) const { return slots[row * slot_stride]; }
  int64_t position(int64_t row, int64_t token) const { return positions[row * row_stride + token * token_stride]; }
};

struct RaggedAttention {
  const void *query, *keys, *values;  // [N, Hq, q, D], [S, Hkv, C, D], [S, Hkv, C, Dv]; contiguous in the last
  void* out;                          // [N, q, Hq, Dv]
  int64_t query_strides[3], key_strides[3], value_strides[3];  // in elements
  int64_t rows, heads, block, width, kv_heads, value_width;
  Places places;
  int64_t window;        // entries that a query sees; INT64_MAX: all
  float scale, softcap;  // 0: no softcap
  bool bfloat16;         // else float32
};

// A row's queries of `tokens` consecutive tokens and of the heads that share a key-value head.
struct RaggedTask {
  int64_t row, kv_head, token, tokens;
};

struct RaggedLoops {
  int64_t (*scratch)(const RaggedAttention&, const RaggedTask&);  // floats that `attend` needs
  void (*attend)(const RaggedAttention&, const RaggedTask&, float* scratch);
};

extern const RaggedLoops ragged_baseline;
#ifdef GENARM_X86
extern const RaggedLoops ragged_avx2, ragged_avx512;
#endif

const RaggedLoops& ragged_loops();  // of the instruction set in use

// Throws std::bad_alloc. Slots and positions must be in range.
void ragged_attention(const RaggedAttention& call, const RaggedLoops& loops, int threads);

struct RaggedCopy {  // of [N, H, q, width] into [S, H, C, width]; both contiguous in the last, strides in bytes
  const char* source;
  char* target;
  int64_t source_strides[3], target_strides[3];
  int64_t rows, heads, block, bytes;
  Places places;
};

void ragged_copy(const RaggedCopy& call);

}  // namespace genarm
