#include "nsa/passes/engine_memory.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "nsa/passes/agreement.h"
#include "nsa/passes/context.h"

namespace nsa {
namespace {

bool Fits(const CallMemory::Bytes& needed, const CallMemory* has) {
  return has != nullptr && needed.workspace <= has->bytes.workspace &&
         needed.records <= has->bytes.records && needed.slot_gradients <= has->bytes.slot_gradients;
}

// With room for plans that need a little more, as the documents of the next batch may.
int64_t Grown(int64_t needed, int64_t has) {
  return needed <= has ? has : (needed + needed / 8) / 256 * 256 + 256;
}

}  // namespace

EngineMemory::EngineMemory(std::shared_ptr<comm::Communicator> communicator,
                           std::shared_ptr<kernels::Kernels> kernels)
    : communicator_(std::move(communicator)), kernels_(std::move(kernels)) {}

absl::Status EngineMemory::Reserve(const CallMemory::Bytes& needed) {
  static std::atomic<int64_t> num_memories = 0;
  const bool fits = Fits(needed, call_memory_.get());
  const absl::StatusOr<std::vector<std::string>> all = communicator_->HostAllGather(
      absl::StrCat(fits ? "fits" : "grow", ",", id_ == 0 ? ++num_memories : id_));
  if (!all.ok()) return all.status();
  const std::vector<std::string> first = absl::StrSplit(all->front(), ',');
  if (first.size() != 2 || !absl::SimpleAtoi(first[1], &id_)) {
    return absl::InternalError("unreadable: " + all->front());
  }
  if (std::none_of(all->begin(), all->end(),
                   [](absl::string_view rank) { return absl::StartsWith(rank, "grow"); })) {
    return absl::OkStatus();
  }

  auto made = std::make_shared<CallMemory>();
  made->bytes = needed;
  if (call_memory_ != nullptr) {
    const CallMemory::Bytes& has = call_memory_->bytes;
    made->bytes = {.workspace = Grown(needed.workspace, has.workspace),
                   .records = Grown(needed.records, has.records),
                   .slot_gradients = Grown(needed.slot_gradients, has.slot_gradients)};
  }
  absl::StatusOr<std::unique_ptr<kernels::Memory>> workspace =
      kernels_->Allocate(made->bytes.workspace);
  NSA_RETURN_IF_ERROR(Agree(*communicator_, workspace.status(), {}));
  made->workspace = *std::move(workspace);
  for (auto [window, num_bytes] : {std::pair(&made->records, made->bytes.records),
                                   std::pair(&made->slot_gradients, made->bytes.slot_gradients)}) {
    if (num_bytes < 0) continue;
    absl::StatusOr<std::unique_ptr<comm::Window>> created = communicator_->CreateWindow(num_bytes);
    if (!created.ok()) return created.status();
    *window = *std::move(created);
  }
  call_memory_ = std::move(made);
  last_caller = nullptr;
  return absl::OkStatus();
}

absl::StatusOr<PlanMemory> EngineMemory::TakePlanMemory(int64_t num_bytes) {
  {
    absl::MutexLock lock(&mutex_);
    for (PlanMemory& memory : returned_) {
      if (memory.num_bytes < num_bytes) continue;
      std::swap(memory, returned_.back());
      PlanMemory taken = std::move(returned_.back());
      returned_.pop_back();
      return taken;
    }
    returned_.clear();
  }
  PlanMemory made;
  made.num_bytes = Grown(num_bytes, 0);
  absl::StatusOr<std::unique_ptr<kernels::Memory>> memory = kernels_->Allocate(made.num_bytes);
  if (!memory.ok()) return memory.status();
  made.memory = *std::move(memory);
  absl::StatusOr<std::unique_ptr<kernels::Event>> done =
      kernels_->CreateEvent(kernels::EventUse::kOrder);
  if (!done.ok()) return done.status();
  made.done = *std::move(done);
  return made;
}

void EngineMemory::ReturnPlanMemory(PlanMemory memory) {
  absl::MutexLock lock(&mutex_);
  returned_.push_back(std::move(memory));
}

absl::Status EngineMemory::PrepareStreams() {
  if (done != nullptr) return absl::OkStatus();
  for (std::unique_ptr<kernels::Stream>* stream : {&beside, &uploads}) {
    absl::StatusOr<std::unique_ptr<kernels::Stream>> made = kernels_->CreateStream();
    if (!made.ok()) return made.status();
    *stream = *std::move(made);
  }
  for (std::unique_ptr<kernels::Event>* event : {&forked, &joined, &done}) {
    absl::StatusOr<std::unique_ptr<kernels::Event>> made =
        kernels_->CreateEvent(kernels::EventUse::kOrder);
    if (!made.ok()) return made.status();
    *event = *std::move(made);
  }
  return absl::OkStatus();
}

}  // namespace nsa
