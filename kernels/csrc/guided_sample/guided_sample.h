// guided_sample on the CPU; kernels/ops/guided_sample/reference.py is the specification.
#pragma once

#include <cstdint>
#include <vector>

#include "loops.h"

namespace genarm {

enum class Dtype : int { kFloat32, kBfloat16, kFloat16 };

struct Member {  // logits [rows, block, V], contiguous in V
  const void* data;
  Dtype dtype;
  int64_t row_stride, block_stride;  // in elements
};

template <typename T>
struct Parameter {  // a scalar where data is null
  const T* data = nullptr;
  int64_t row_stride = 0, block_stride = 0;
  T scalar = 0;

  T at(int64_t row, int64_t block) const { return data ? data[row * row_stride + block * block_stride] : scalar; }
};

struct Request {
  int64_t rows, block, vocab;
  std::vector<Member> members;  // base, then ARMs
  const float* weights;         // [rows, m] with row_stride, which may be 0
  int64_t weights_row_stride;
  const float* bias;  // [rows, V] or null
  int64_t bias_row_stride;
  Parameter<float> temperature, top_p, min_p;
  Parameter<int64_t> top_k, seeds, positions;
  int64_t top_n;
  // outputs over [rows, block]; null where not wanted
  int64_t* tokens;
  int32_t* status;
  float* logprobs;
  float* member_logprobs;  // [members, rows, block]
  int64_t* top_tokens;     // [rows, block, top_n]
  float* top_logprobs;
};

// Threads share the rows, or the tiles of a row where rows are few, if the work pays for waking them. The result does
// not depend on their number. Throws std::bad_alloc.
void guided_sample(const Request& request, const TileLoops& loops, int threads);

}  // namespace genarm
