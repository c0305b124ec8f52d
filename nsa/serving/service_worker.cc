#include "nsa/serving/service_worker.h"

#include <algorithm>
#include <limits>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"

namespace nsa::serving {
namespace {

// How long a rank that has nothing to do lets the others wait, where ranks go round together.
constexpr absl::Duration kIdleRound = absl::Milliseconds(1);
constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

// Upper bounds of the buckets of step_seconds.
constexpr double kStepSeconds[] = {10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3,
                                   10e-3, 25e-3, 50e-3, 100e-3, 250e-3, 500e-3, 1,    2.5,    5};

// What ranks tell each other at the begin of a round, as bits of a character.
constexpr int kStops = 1;
constexpr int kHasCollective = 2;
constexpr int kHasBatch = 4;

}  // namespace

ServiceWorker::ServiceWorker(std::unique_ptr<KvCache> cache,
                             std::shared_ptr<comm::Communicator> communicator,
                             std::shared_ptr<kernels::Kernels> kernels,
                             std::unique_ptr<StepBuffers> buffers,
                             std::unique_ptr<kernels::Stream> stream, RequestQueue* queue)
    : cache_(std::move(cache)),
      communicator_(std::move(communicator)),
      kernels_(std::move(kernels)),
      buffers_(std::move(buffers)),
      stream_(std::move(stream)),
      queue_(queue),
      in_step_with_ranks_(!cache_->is_reachable()),
      max_batch_(kNoLimit) {
  for (double bound : kStepSeconds) stats_.mutable_step_seconds()->add_bounds(bound);
  for (size_t i = 0; i <= std::size(kStepSeconds); ++i) {
    stats_.mutable_step_seconds()->add_counts(0);
  }
  RecordCache();
}

void ServiceWorker::Run() {
  for (;;) {
    const Round round = queue_->Take(max_batch_);
    for (const RequestPtr& request : round.functions) RunFunction(*request);
    const Plan plan = Agree(round);
    if (plan.stops) break;
    const bool runs_collective = plan.collective && queue_->TakeCollective(*round.collective);
    if (runs_collective) RunFunction(*round.collective);
    if (plan.absent >= 0) WaitForOthers(round, plan);
    if (plan.step) Step(round.batch);
    if (round.is_idle() && !runs_collective && !plan.step) {
      queue_->WaitForArrival(round.arrivals,
                             in_step_with_ranks_ ? kIdleRound : absl::InfiniteDuration());
    }
  }
  queue_->SetStopped();
}

ServiceWorker::Plan ServiceWorker::Agree(const Round& round) {
  Plan plan = {round.stops, round.collective != nullptr, !round.batch.empty()};
  if (!in_step_with_ranks_) return plan;
  const char mine =
      static_cast<char>((plan.stops ? kStops : 0) | (plan.collective ? kHasCollective : 0) |
                        (plan.step ? kHasBatch : 0));
  auto all = communicator_->HostAllGather(absl::string_view(&mine, 1));
  if (!all.ok()) {
    in_step_with_ranks_ = false;  // the cache's Check knows what is lost; the rest goes on
    return plan;
  }
  for (size_t rank = 0; rank < all->size(); ++rank) {
    const char theirs = (*all)[rank][0];
    plan.stops &= (theirs & kStops) != 0;
    plan.collective &= (theirs & kHasCollective) != 0;
    plan.step |= (theirs & kHasBatch) != 0;
    if (round.collective != nullptr && !plan.collective && plan.absent < 0) {
      plan.absent = static_cast<int>(rank);
    }
  }
  return plan;
}

void ServiceWorker::WaitForOthers(const Round& round, const Plan& plan) {
  const absl::Time now = absl::Now();
  if (waits_in_ != round.collective->id) waits_since_ = now;
  waits_in_ = round.collective->id;
  if (now - waits_since_ < communicator_->timeout()) return;
  if (!queue_->TakeCollective(*round.collective)) return;
  queue_->Finish(*round.collective,
                 absl::DeadlineExceededError(absl::StrCat(
                     "RunCollective: rank ", communicator_->rank(), " waited ",
                     absl::FormatDuration(communicator_->timeout()), " for rank ", plan.absent)));
}

void ServiceWorker::RunFunction(Request& request) {
  absl::Status status = request.function(*cache_);
  status.Update(kernels_->Synchronize(/*stream=*/nullptr));
  RecordCache();
  queue_->Finish(request, status);
}

void ServiceWorker::Step(const std::vector<RequestPtr>& batch) {
  const absl::Time begin = absl::Now();
  const absl::Status status = PlanAndRun(batch);
  if (batch.empty()) return;
  if (!status.ok()) return SortOut(batch, status);
  int64_t num_rows = 0;
  for (const RequestPtr& request : batch) num_rows += NumTokens(request->decode);
  RecordStep(absl::ToDoubleSeconds(absl::Now() - begin), num_rows);
  RecordCache();
  max_batch_ = kNoLimit;
  for (const RequestPtr& request : batch) queue_->Finish(*request, status);
}

absl::Status ServiceWorker::PlanAndRun(const std::vector<RequestPtr>& batch) {
  std::vector<StepSequence> steps;
  std::vector<const DecodeRequest*> requests;
  for (const RequestPtr& request : batch) {
    steps.push_back({request->sequence, static_cast<int32_t>(NumTokens(request->decode))});
    requests.push_back(&request->decode);
  }
  absl::Status status = cache_->PlanStep(steps, stream_->get());
  if (!status.ok()) {
    // Other ranks may need this one in their step.
    if (in_step_with_ranks_) {
      cache_->PlanStep({}, stream_->get()).IgnoreError();
      buffers_->RunStep({}, *cache_, stream_->get()).IgnoreError();
    }
    return status;
  }
  status = buffers_->RunStep(requests, *cache_, stream_->get());
  if (status.ok()) return status;
  for (const StepSequence& step : steps) {
    const auto num_tokens = cache_->NumTokens(step.sequence);
    if (!num_tokens.ok()) continue;
    status.Update(cache_->Truncate(step.sequence, *num_tokens - step.num_new));
  }
  return status;
}

void ServiceWorker::SortOut(const std::vector<RequestPtr>& batch, const absl::Status& error) {
  RecordCache();
  std::vector<RequestPtr> rest;
  for (const RequestPtr& request : batch) {
    const absl::Status own =
        cache_->Check({request->sequence, static_cast<int32_t>(NumTokens(request->decode))});
    if (own.ok()) {
      rest.push_back(request);
    } else {
      queue_->Finish(*request, own);
    }
  }
  if (rest.size() == batch.size()) {
    // Each could go alone, so together they ask too much; or the step itself does not work.
    if (batch.size() == 1) return queue_->Finish(*batch[0], error);
    max_batch_ = static_cast<int64_t>(batch.size() / 2);
  }
  queue_->Return(rest);
}

void ServiceWorker::RecordStep(double seconds, int64_t num_rows) {
  absl::MutexLock lock(&mu_);
  stats_.set_steps(stats_.steps() + 1);
  stats_.set_step_rows(stats_.step_rows() + num_rows);
  Histogram& histogram = *stats_.mutable_step_seconds();
  const auto bucket = std::lower_bound(std::begin(kStepSeconds), std::end(kStepSeconds), seconds);
  const int index = static_cast<int>(bucket - std::begin(kStepSeconds));
  histogram.set_counts(index, histogram.counts(index) + 1);
  histogram.set_sum(histogram.sum() + seconds);
}

void ServiceWorker::RecordCache() {
  const KvCacheStats cache = cache_->Stats();
  absl::MutexLock lock(&mu_);
  stats_.set_sequences(cache.sequences);
  stats_.set_pages(cache.pages);
  stats_.set_pages_used(cache.pages_used);
  stats_.mutable_pages_used_of_rank()->Assign(cache.pages_used_of_rank.begin(),
                                              cache.pages_used_of_rank.end());
  stats_.set_summary_pages(cache.summary_pages);
  stats_.set_summary_pages_used(cache.summary_pages_used);
  stats_.set_tokens_appended(cache.tokens_appended);
  stats_.set_bytes_fetched(cache.bytes_fetched);
}

void ServiceWorker::FillStats(ServiceStats& stats) {
  absl::MutexLock lock(&mu_);
  stats = stats_;
}

}  // namespace nsa::serving
