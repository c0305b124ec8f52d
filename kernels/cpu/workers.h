// Threads and their scratch memory: what every stage runs on.
#ifndef KERNELS_CPU_WORKERS_H_
#define KERNELS_CPU_WORKERS_H_

#include <cstdint>
#include <memory>
#include <mutex>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/kernels.h"

namespace nsa::kernels::cpu {

// Cuts one piece of memory into arrays. The layout of a stage's scratch is a struct whose
// constructor takes its arrays from a Carver: with no memory it counts the bytes, with memory it
// sets the pointers.
class Carver {
 public:
  explicit Carver(char* memory) : memory_(memory) {}

  // `count` values, aligned to a cache line.
  template <class T>
  T* Take(int64_t count) {
    const int64_t begin = num_bytes_;
    num_bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + begin);
  }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  char* const memory_;
  int64_t num_bytes_ = 0;
};

class Workers {
 public:
  // num_threads >= 1.
  static absl::StatusOr<std::unique_ptr<Workers>> Create(int num_threads);

  int num_threads() const { return pool_->num_threads(); }

  // Runs body(item, scratch) for each item in [0, count), several at a time, each with
  // `scratch_bytes` of its own whose content is undefined. Items start in ascending order. Scratch
  // is kept for the next call. Calls from several threads run one after another.
  absl::Status Run(int64_t count, int64_t scratch_bytes,
                   absl::FunctionRef<void(int64_t item, char* scratch)> body);

 private:
  explicit Workers(std::unique_ptr<ThreadPool> pool) : pool_(std::move(pool)) {}

  const std::unique_ptr<ThreadPool> pool_;
  std::mutex mutex_;
  std::unique_ptr<Memory> scratch_;  // guarded by mutex_
  int64_t scratch_capacity_ = 0;     // guarded by mutex_; bytes of all threads
};

}  // namespace nsa::kernels::cpu

#endif  // KERNELS_CPU_WORKERS_H_
