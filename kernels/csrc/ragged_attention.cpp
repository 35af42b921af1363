#include "ragged_attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace genarm {
namespace {

constexpr int64_t kQueries = 24;  // of a task: enough to share the transposed keys, few enough to keep scores in L2

}  // namespace

void ragged_attention(const RaggedAttention& call, const RaggedLoops& loops) {
  thread_local std::vector<float> scratch;  // kept: a fresh large block would be paged in call by call
  const int64_t tokens = std::max<int64_t>(1, kQueries / (call.heads / call.kv_heads));
  for (int64_t row = 0; row < call.rows; ++row) {
    for (int64_t token = 0; token < call.block; token += tokens) {
      for (int64_t kv_head = 0; kv_head < call.kv_heads; ++kv_head) {
        const RaggedTask task{row, kv_head, token, std::min(tokens, call.block - token)};
        const size_t floats = static_cast<size_t>(loops.scratch(call, task));
        if (scratch.size() < floats) scratch.resize(floats);
        loops.attend(call, task, scratch.data());
      }
    }
  }
}

void ragged_copy(const RaggedCopy& call) {
  for (int64_t row = 0; row < call.rows; ++row) {
    for (int64_t head = 0; head < call.heads; ++head) {
      const char* source = call.source + row * call.source_strides[0] + head * call.source_strides[1];
      char* target = call.target + call.places.slot(row) * call.target_strides[0] + head * call.target_strides[1];
      for (int64_t token = 0; token < call.block; ++token) {
        std::memcpy(target + call.places.position(row, token) * call.target_strides[2],
                    source + token * call.source_strides[2], call.bytes);
      }
    }
  }
}

}  // namespace genarm
