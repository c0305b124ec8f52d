// The rows of requests, brought together for a step of the cache and taken apart behind it.
#ifndef NSA_SERVING_STEP_BUFFERS_H_
#define NSA_SERVING_STEP_BUFFERS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/kernels.h"
#include "nsa/service.h"
#include "nsa/serving/kv_cache.h"

namespace nsa::serving {

// InvalidArgument naming field, value and rule, or OK. Whether there is such a sequence is not
// looked at.
absl::Status CheckDecodeRequest(const ServiceOptions& options, const DecodeRequest& request);

// Tokens that a request may decode.
int64_t MaxNewTokens(const ServiceOptions& options);

// Whether it is to be appended without attending.
bool AppendsOnly(const DecodeRequest& request);

// T. Of a request that has not been checked, 0 when k_slc is not set.
int64_t NumTokens(const DecodeRequest& request);

class StepBuffers {
 public:
  // InvalidArgument when a row of gates is no multiple of 16 bytes.
  static absl::StatusOr<std::unique_ptr<StepBuffers>> Create(
      const ServiceOptions& options, std::shared_ptr<kernels::Kernels> kernels);

  // KvCache::RunStep for the step that was planned, whose rows are those of the requests, which
  // have been checked, one request behind the other. Has finished when it returns.
  absl::Status RunStep(absl::Span<const DecodeRequest* const> requests, KvCache& cache,
                       void* stream);

 private:
  StepBuffers(const ServiceOptions& options, std::shared_ptr<kernels::Kernels> kernels)
      : options_(options), kernels_(std::move(kernels)) {}
  absl::Status Allocate();
  absl::Status Copy(size_t lane, int64_t num_rows, bool to_caller, void* stream);

  const ServiceOptions options_;
  const std::shared_ptr<kernels::Kernels> kernels_;
  std::unique_ptr<kernels::Memory> memory_;
  // Lanes are the tensors of the inputs and then o.
  StepInputs inputs_;  // [max_step_rows,...] or as many rows as the step has
  Tensor o_;
  std::vector<int64_t> row_bytes_;  // [lanes] multiples of 16
  void** own_rows_;                 // [lanes,max_step_rows] addresses, in memory of the kernels
  void** caller_rows_;              // [lanes,rows of a step]
};

}  // namespace nsa::serving

#endif  // NSA_SERVING_STEP_BUFFERS_H_
