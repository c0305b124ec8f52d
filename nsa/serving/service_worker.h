// The thread that owns a service's cache: takes what the queue holds and does it, round by round.
#ifndef NSA_SERVING_SERVICE_WORKER_H_
#define NSA_SERVING_SERVICE_WORKER_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "comm/communicator.h"
#include "kernels/kernels.h"
#include "nsa/service.h"
#include "nsa/serving/kv_cache.h"
#include "nsa/serving/request_queue.h"
#include "nsa/serving/step_buffers.h"

namespace nsa::serving {

class ServiceWorker {
 public:
  ServiceWorker(std::unique_ptr<KvCache> cache, std::shared_ptr<comm::Communicator> communicator,
                std::shared_ptr<kernels::Kernels> kernels, std::unique_ptr<StepBuffers> buffers,
                std::unique_ptr<kernels::Stream> stream, RequestQueue* queue);

  // Returns when the queue has been stopped, with all its requests ended, and, where ranks go
  // round together, those of all ranks.
  void Run();

  // Thread-safe. The cache's and the steps' part.
  void FillStats(ServiceStats& stats);

 private:
  // What this rank, or some or all ranks together, do in a round.
  struct Plan {
    bool stops;       // all
    bool collective;  // all
    bool step;        // some
    int absent = -1;  // from a collective of this rank
  };
  Plan Agree(const Round& round);
  // Ends a collective that others have not come to for the communicator's timeout.
  void WaitForOthers(const Round& round, const Plan& plan);
  void RunFunction(Request& request);
  void Step(const std::vector<RequestPtr>& batch);
  absl::Status PlanAndRun(const std::vector<RequestPtr>& batch);
  // Gives each request of a step that failed its own error, or back to the queue.
  void SortOut(const std::vector<RequestPtr>& batch, const absl::Status& error);
  // Before callers learn of what was done.
  void RecordStep(double seconds, int64_t num_rows);
  void RecordCache();

  const std::unique_ptr<KvCache> cache_;
  const std::shared_ptr<comm::Communicator> communicator_;
  const std::shared_ptr<kernels::Kernels> kernels_;
  const std::unique_ptr<StepBuffers> buffers_;
  const std::unique_ptr<kernels::Stream> stream_;
  RequestQueue* const queue_;
  // Whether ranks go round together, which ends when one is lost.
  bool in_step_with_ranks_;
  // Since when this rank waits for others to come to a collective, and to which.
  absl::Time waits_since_;
  RequestId waits_in_ = 0;
  int64_t
      max_batch_;  // sequences; fewer after a step that failed and no one knows whose fault it is

  absl::Mutex mu_;
  ServiceStats stats_ ABSL_GUARDED_BY(mu_);
};

}  // namespace nsa::serving

#endif  // NSA_SERVING_SERVICE_WORKER_H_
