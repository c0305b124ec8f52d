// A fixed set of threads that share out the items of a loop.
#ifndef KERNELS_CPU_THREAD_POOL_H_
#define KERNELS_CPU_THREAD_POOL_H_

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"

namespace nsa::kernels::cpu {

class ThreadPool {
 public:
  // body(item, worker): `worker` is in [0, min(num_threads, count)), and no two calls that run at
  // the same time have the same one.
  using Body = absl::FunctionRef<void(int64_t item, int worker)>;

  // The calling thread is one of the `num_threads` >= 1. ResourceExhausted when the system has no
  // thread left.
  static absl::StatusOr<std::unique_ptr<ThreadPool>> Create(int num_threads);
  ~ThreadPool();

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Runs body for each item in [0, count) and returns when all are done. Items start in ascending
  // order, each on the next free thread. One call at a time; body must not call ParallelFor.
  void ParallelFor(int64_t count, Body body);

 private:
  struct Loop {
    Body body;
    int64_t count;
    std::atomic<int64_t> next_item{0};
  };
  struct ThreadStart {
    ThreadPool* pool;
    int worker;
  };

  explicit ThreadPool(int num_threads) : num_threads_(num_threads) {}

  static void* ThreadMain(void* start);
  static void RunItems(Loop& loop, int worker);
  void ServeLoops(int worker);

  const int num_threads_;
  std::vector<ThreadStart> starts_;
  std::vector<pthread_t> threads_;

  std::mutex mutex_;
  std::condition_variable loop_started_;
  std::condition_variable loop_left_;
  Loop* loop_ = nullptr;     // guarded by mutex_
  int64_t loop_number_ = 0;  // guarded by mutex_; counts loops, so that a thread joins each once
  int num_inside_ = 0;       // guarded by mutex_; threads of the pool that hold `loop_`
  bool stopping_ = false;    // guarded by mutex_
};

}  // namespace nsa::kernels::cpu

#endif  // KERNELS_CPU_THREAD_POOL_H_
