// guided_sample on the CPU; kernels/ops/guided_sample/reference.py is the specification.
#pragma once

#include <cstdint>
#include <vector>

#include "loops.h"

namespace genarm {

enum class Dtype : int { kFloat32, kBfloat16, kFloat16 };

struct Member {  // a member's logits [rows, block, V], contiguous in V
  const void* data;
  Dtype dtype;
  int64_t row_stride, block_stride;  // strides count elements
};

template <typename T>
struct Parameter {  // one scalar for all rows if data is null
  const T* data = nullptr;
  int64_t row_stride = 0, block_stride = 0;
  T scalar = 0;

  T at(int64_t row, int64_t block) const { return data ? data[row * row_stride + block * block_stride] : scalar; }
};

struct Request {
  int64_t rows, block, vocab;   // block: positions in each row
  std::vector<Member> members;  // base, then m ARMs
  const float* weights;         // [rows, m]; the row stride may be 0
  int64_t weights_row_stride;
  const float* bias;  // [rows, V] or null
  int64_t bias_row_stride;
  Parameter<float> temperature, top_p, min_p;
  Parameter<int64_t> top_k, seeds, positions;
  int64_t top_n;  // most probable tokens that are wanted
  // Outputs [rows, block]. Pointers are null for outputs that are not wanted.
  int64_t* tokens;
  int32_t* status;
  float* logprobs;
  float* member_logprobs;  // [members, rows, block]
  int64_t* top_tokens;     // [rows, block, top_n]
  float* top_logprobs;
};

// Threads share the rows, or the tiles of a row if there are few rows. Helpers are woken only for enough work. The
// result does not depend on the number of threads. Throws std::bad_alloc.
void guided_sample(const Request& request, const TileLoops& loops, int threads);

}  // namespace genarm
