// Memory of engines: what their calls use one after the other, which engines may share, and what
// each keeps of its plan.
#ifndef NSA_PASSES_ENGINE_MEMORY_H_
#define NSA_PASSES_ENGINE_MEMORY_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "comm/communicator.h"
#include "kernels/kernels.h"

namespace nsa {

// What a call uses and leaves to the next.
struct CallMemory {
  std::unique_ptr<kernels::Memory> workspace;
  std::unique_ptr<comm::Window> records;         // [Hkv, own select blocks], readable by peers
  std::unique_ptr<comm::Window> slot_gradients;  // of a piece's slots; null: none needed yet

  struct Bytes {
    int64_t workspace = 0;
    int64_t records = 0;
    int64_t slot_gradients = -1;  // -1: none
  } bytes;
};

// What an engine keeps between its calls.
struct PlanMemory {
  std::unique_ptr<kernels::Memory> memory;
  int64_t num_bytes = 0;
  std::unique_ptr<kernels::Event> done;  // the last call that used it and was not captured
};

class EngineMemory {
 public:
  EngineMemory(std::shared_ptr<comm::Communicator> communicator,
               std::shared_ptr<kernels::Kernels> kernels);

  comm::Communicator* communicator() const { return communicator_.get(); }
  kernels::Kernels* kernels() const { return kernels_.get(); }
  // The same on all ranks, and of no other memory of the communicator; 0 before Reserve.
  int64_t id() const { return id_; }

  // Collective: has at least `needed` from now on, on every rank. After an error it is as before.
  absl::Status Reserve(const CallMemory::Bytes& needed);
  // As Reserve left it. Of who holds it also when it has grown since, as a captured call must.
  const std::shared_ptr<CallMemory>& call_memory() const { return call_memory_; }

  // From an engine that is gone, if one has left enough.
  absl::StatusOr<PlanMemory> TakePlanMemory(int64_t num_bytes);
  void ReturnPlanMemory(PlanMemory memory);

  // Of the engines' calls. PrepareStreams makes them, once.
  absl::Status PrepareStreams();
  std::unique_ptr<kernels::Stream> beside;
  std::unique_ptr<kernels::Event> forked, joined;
  std::unique_ptr<kernels::Event> done;      // the last call that was not captured in a graph
  std::unique_ptr<kernels::Stream> uploads;  // of plans
  const void* last_caller = nullptr;         // whose call was the last

 private:
  const std::shared_ptr<comm::Communicator> communicator_;
  const std::shared_ptr<kernels::Kernels> kernels_;
  int64_t id_ = 0;
  std::shared_ptr<CallMemory> call_memory_;
  absl::Mutex mutex_;  // engines may be let go on another thread than the one that calls
  std::vector<PlanMemory> returned_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace nsa

#endif  // NSA_PASSES_ENGINE_MEMORY_H_
