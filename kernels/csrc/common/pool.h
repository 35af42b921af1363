// Threads that stay alive between calls: starting one takes longer than most of the work here.
#pragma once

#include <cstdint>
#include <functional>

namespace genarm {

// Calls work(first, last) for parts of 0 .. n - 1, on the calling thread and on up to threads - 1 helpers. The caller
// does not wait for a helper that is not running yet: it takes all parts that nobody has begun. `work` must not throw.
void parallel(int threads, int64_t n, const std::function<void(int64_t, int64_t)>& work);

}  // namespace genarm
