// Threads that outlive a call: starting one takes longer than most of the work here.
#pragma once

#include <cstdint>
#include <functional>

namespace genarm {

// work(first, last) over parts of 0 .. n - 1, on the calling thread and on threads - 1 others. A helper that is not on
// a core yet is not waited for: the caller takes all parts that nobody has begun. `work` must not throw.
void parallel(int threads, int64_t n, const std::function<void(int64_t, int64_t)>& work);

}  // namespace genarm
