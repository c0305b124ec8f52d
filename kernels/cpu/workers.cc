#include "kernels/cpu/workers.h"

#include <algorithm>
#include <utility>

#include "absl/memory/memory.h"
#include "kernels/cpu/memory.h"

namespace nsa::kernels::cpu {

absl::StatusOr<std::unique_ptr<Workers>> Workers::Create(int num_threads) {
  auto pool = ThreadPool::Create(num_threads);
  if (!pool.ok()) return pool.status();
  return absl::WrapUnique(new Workers(*std::move(pool)));
}

absl::Status Workers::Run(int64_t count, int64_t scratch_bytes,
                          absl::FunctionRef<void(int64_t item, char* scratch)> body) {
  std::lock_guard<std::mutex> lock(mutex_);
  // Threads write to scratch all the time: not to the same page.
  constexpr int64_t kPageBytes = 4096;
  const int64_t stride = (scratch_bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
  const int64_t threads_used = std::min<int64_t>(num_threads(), count);
  if (stride * threads_used > scratch_capacity_) {
    scratch_.reset();
    scratch_capacity_ = 0;
    auto memory = AllocateMemory(stride * threads_used);
    if (!memory.ok()) return memory.status();
    scratch_ = *std::move(memory);
    scratch_capacity_ = stride * threads_used;
  }
  char* const scratch = scratch_ == nullptr ? nullptr : static_cast<char*>(scratch_->data());
  pool_->ParallelFor(count,
                     [&](int64_t item, int worker) { body(item, scratch + worker * stride); });
  return absl::OkStatus();
}

}  // namespace nsa::kernels::cpu
