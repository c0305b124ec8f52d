#include "kernels/cpu/thread_pool.h"

#include <cstring>

#include "absl/memory/memory.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace nsa::kernels::cpu {

absl::StatusOr<std::unique_ptr<ThreadPool>> ThreadPool::Create(int num_threads) {
  auto pool = absl::WrapUnique(new ThreadPool(num_threads));
  // Threads keep pointers into starts_, so it must not move.
  pool->starts_.reserve(num_threads);
  for (int worker = 1; worker < num_threads; ++worker) {
    pool->starts_.push_back(ThreadStart{pool.get(), worker});
    pthread_t thread;
    const int error = pthread_create(&thread, nullptr, &ThreadMain, &pool->starts_.back());
    if (error != 0) {
      return absl::ResourceExhaustedError(absl::StrCat("num_threads = ", num_threads,
                                                       ": the system gave only ", worker, " (",
                                                       std::strerror(error), ")"));
    }
    pool->threads_.push_back(thread);
  }
  return pool;
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  loop_started_.notify_all();
  for (pthread_t thread : threads_) pthread_join(thread, nullptr);
}

void ThreadPool::ParallelFor(int64_t count, Body body) {
  Loop loop{body, count};
  if (count <= 1 || threads_.empty()) return RunItems(loop, 0);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    loop_ = &loop;
    ++loop_number_;
  }
  loop_started_.notify_all();
  RunItems(loop, 0);
  // A thread that has not woken yet finds no loop; those inside still hold items.
  std::unique_lock<std::mutex> lock(mutex_);
  loop_ = nullptr;
  loop_left_.wait(lock, [this] { return num_inside_ == 0; });
}

void ThreadPool::RunItems(Loop& loop, int worker) {
  for (int64_t item;
       (item = loop.next_item.fetch_add(1, std::memory_order_relaxed)) < loop.count;) {
    loop.body(item, worker);
  }
}

void* ThreadPool::ThreadMain(void* start) {
  const ThreadStart* const thread_start = static_cast<ThreadStart*>(start);
  thread_start->pool->ServeLoops(thread_start->worker);
  return nullptr;
}

void ThreadPool::ServeLoops(int worker) {
  int64_t last_loop = 0;
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    loop_started_.wait(lock, [&] {
      return stopping_ || (loop_ != nullptr && loop_number_ != last_loop && worker < loop_->count);
    });
    if (stopping_) return;
    last_loop = loop_number_;
    Loop* const loop = loop_;
    ++num_inside_;
    lock.unlock();
    RunItems(*loop, worker);
    lock.lock();
    if (--num_inside_ == 0) loop_left_.notify_one();
  }
}

}  // namespace nsa::kernels::cpu
