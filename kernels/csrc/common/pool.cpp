#include "common/pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#ifdef __unix__
#include <unistd.h>
#endif

namespace genarm {
namespace {

constexpr int kPartsPerThread = 4;  // parts of the work for each thread, so that a late helper still finds a part
// Times that the caller looks for the end of the work before it sleeps. A helper's last part takes microseconds, and
// waking up takes longer.
constexpr int kSpins = 2000;

using Work = std::function<void(int64_t, int64_t)>;

class Pool {
 public:
  void run(int threads, int64_t n, const Work& work) {
    const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return work(0, n);  // the helpers work for another thread's call
    const int64_t part = std::max<int64_t>(1, n / (threads * kPartsPerThread));
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (helpers_ < threads - 1 && start()) ++helpers_;
      work_ = &work, n_ = n, part_ = part, next_ = 0, wanted_ = std::min(threads - 1, helpers_);
    }
    wake_.notify_all();
    take(work, n, part);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      wanted_ = 0;
    }
    for (int spin = 0; spin < kSpins && busy_.load(std::memory_order_acquire) > 0; ++spin) pause();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  static void pause() {
#ifdef GENARM_X86
    __builtin_ia32_pause();
#endif
  }

  bool start() {
    try {
      std::thread([this] { help(); }).detach();
      return true;
    } catch (const std::system_error&) {
      return false;  // the system gives no more threads
    }
  }

  void take(const Work& work, int64_t n, int64_t part) {
    for (int64_t first; (first = next_.fetch_add(part)) < n;) work(first, std::min(first + part, n));
  }

  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      --wanted_, ++busy_;
      const Work& work = *work_;
      const int64_t n = n_, part = part_;
      lock.unlock();
      take(work, n, part);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  const Work* work_ = nullptr;
  int64_t n_ = 0, part_ = 1;
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0};
  int wanted_ = 0, helpers_ = 0;
};

struct Owned {
  int64_t process;
  Pool pool;
};

int64_t process() {
#ifdef __unix__
  return getpid();
#else
  return 0;
#endif
}

// The pool is never destroyed, because helpers sleep in it. A forked child has no helpers, so it gets a new pool.
Pool& pool() {
  static std::atomic<Owned*> current{nullptr};
  Owned* owned = current.load();
  if (!owned || owned->process != process()) {
    auto fresh = std::make_unique<Owned>();
    fresh->process = process();
    if (current.compare_exchange_strong(owned, fresh.get())) owned = fresh.release();
  }
  return owned->pool;
}

}  // namespace

void parallel(int threads, int64_t n, const Work& work) {
  if (threads <= 1 || n <= 1) return work(0, n);
  pool().run(threads, n, work);
}

}  // namespace genarm
