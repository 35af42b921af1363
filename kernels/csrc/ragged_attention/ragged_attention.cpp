#include "ragged_attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "common/pool.h"

namespace genarm {
namespace {

constexpr int64_t kQueries = 24;  // queries of a task: many share the transposed keys, and their scores fit into L2
constexpr int64_t kPerThread = 1 << 21;  // products for one thread: 0.1 ms of work; waking a thread takes a tenth of it

int64_t products(const RaggedAttention& call) {
  int64_t entries = 0;
  for (int64_t row = 0; row < call.rows; ++row) {
    for (int64_t i = 0; i < call.block; ++i) entries += std::min(call.places.position(row, i) + 1, call.window);
  }
  return entries * call.heads * (call.width + call.value_width);
}

}  // namespace

void ragged_attention(const RaggedAttention& call, const RaggedLoops& loops, int threads) {
  if (call.heads == 0) return;
  const int64_t tokens = std::max<int64_t>(1, kQueries / (call.heads / call.kv_heads));
  const int64_t blocks = (call.block + tokens - 1) / tokens;
  std::atomic<bool> failed{false};
  const auto work = [&](int64_t task, int64_t last) {
    thread_local std::vector<float> scratch;  // kept between calls, as the system would page in a new one each time
    for (; task < last; ++task) {
      const int64_t token = task / call.kv_heads % blocks * tokens;
      const RaggedTask part{task / call.kv_heads / blocks, task % call.kv_heads, token,
                            std::min(tokens, call.block - token)};
      const size_t floats = static_cast<size_t>(loops.scratch(call, part));
      try {
        if (scratch.size() < floats) scratch.resize(floats);
      } catch (const std::bad_alloc&) {
        failed = true;  // a helper's exception would end the process
        return;
      }
      loops.attend(call, part, scratch.data());
    }
  };
  if (threads > 1) threads = static_cast<int>(std::min<int64_t>(threads, products(call) / kPerThread));
  parallel(threads, call.rows * blocks * call.kv_heads, work);
  if (failed) throw std::bad_alloc();
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
