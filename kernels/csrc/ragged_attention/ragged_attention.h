// ragged_attention and ragged_append on the CPU; kernels/ops/ragged_attention/reference.py is the specification.
#pragma once

#include <cstdint>

namespace genarm {

struct Places {  // places in the cache: the slot of each row, the position of each of its tokens
  const int64_t *slots, *positions;  // [N], [N, q]
  int64_t slot_stride, row_stride, token_stride;

  int64_t slot(int64_t row) const { return slots[row * slot_stride]; }
  int64_t position(int64_t row, int64_t token) const { return positions[row * row_stride + token * token_stride]; }
};

struct RaggedAttention {
  const void *query, *keys, *values;  // [N, Hq, q, D], [S, Hkv, C, D], [S, Hkv, C, Dv]; last dimensions contiguous
  void* out;                          // [N, q, Hq, Dv]
  int64_t query_strides[3], key_strides[3], value_strides[3];  // strides count elements
  int64_t rows, heads, block, width, kv_heads, value_width;
  Places places;
  int64_t window;        // most entries that a query sees; INT64_MAX if it sees all
  float scale, softcap;  // softcap is 0 if there is none
  bool bfloat16;         // dtype of all tensors: bfloat16, or float32 if false
};

// The unit of work: `tokens` consecutive tokens of a row, from `token` on, with all heads that share a key-value head.
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

const RaggedLoops& ragged_loops();  // the loops of the instruction set in use

// Throws std::bad_alloc. Slots and positions must be in range.
void ragged_attention(const RaggedAttention& call, const RaggedLoops& loops, int threads);

// A copy of new entries [N, H, q, width] into a cache [S, H, C, width], both contiguous in the last dimension.
struct RaggedCopy {
  const char* source;
  char* target;
  int64_t source_strides[3], target_strides[3];  // bytes
  int64_t rows, heads, block, bytes;             // bytes: size of one vector [width]
  Places places;
};

void ragged_copy(const RaggedCopy& call);

}  // namespace genarm
