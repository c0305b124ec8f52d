#include "nsa/service.h"

#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "nsa/passes/agreement.h"
#include "nsa/serving/metrics.h"
#include "nsa/serving/request_queue.h"
#include "nsa/serving/service_worker.h"
#include "nsa/serving/step_buffers.h"

namespace nsa {
namespace {

using serving::KvCache;
using serving::Request;
using serving::SequenceId;

absl::Status CheckOptions(const ServiceOptions& options) {
  if (options.gate_dtype != DType::kF32 && options.gate_dtype != options.cache.dtype) {
    return absl::InvalidArgumentError(absl::StrCat("gate_dtype = ", NameOf(options.gate_dtype),
                                                   ": must be f32 or ",
                                                   NameOf(options.cache.dtype)));
  }
  if (options.cache.max_rollback_tokens < serving::MaxNewTokens(options)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "max_rollback_tokens = ", options.cache.max_rollback_tokens, ": must be at least ",
        serving::MaxNewTokens(options), ", the new tokens of a step that fails and is taken back"));
  }
  for (const auto& [name, value] :
       {std::pair("max_queued", options.max_queued), std::pair("max_unread", options.max_unread)}) {
    if (value < 1) {
      return absl::InvalidArgumentError(absl::StrCat(name, " = ", value, ": must be at least 1"));
    }
  }
  return absl::OkStatus();
}

// The sequence that a request names; InvalidArgument when it asks for nothing.
absl::StatusOr<SequenceId> SequenceOf(const ControlRequest& request) {
  switch (request.operation_case()) {
    case ControlRequest::kOpen:
      return serving::kNoSequence;
    case ControlRequest::kFork:
      return request.fork().sequence();
    case ControlRequest::kTruncate:
      return request.truncate().sequence();
    case ControlRequest::kClose:
      return request.close().sequence();
    case ControlRequest::kDescribe:
      return request.describe().sequence();
    case ControlRequest::OPERATION_NOT_SET:
      break;
  }
  return absl::InvalidArgumentError("operation: must be set");
}

// What is shared by the service and its clients, of which any may be the last.
struct Core {
  explicit Core(const ServiceOptions& options)
      : options(options),
        queue(options.max_queued, options.max_unread, options.cache.max_step_rows) {}

  const ServiceOptions options;
  serving::RequestQueue queue;
};

class ClientImpl : public Client {
 public:
  ClientImpl(std::shared_ptr<Core> core, std::shared_ptr<serving::ClientState> state)
      : core_(std::move(core)), state_(std::move(state)) {}
  ~ClientImpl() override { core_->queue.Disconnect(state_); }

  absl::StatusOr<ControlResponse> Control(const ControlRequest& request,
                                          absl::Time deadline) override {
    const absl::StatusOr<SequenceId> sequence = SequenceOf(request);
    if (!sequence.ok()) return core_->queue.Refuse(sequence.status());
    ControlResponse response;
    Request work = {.kind = Request::Kind::kFunction, .sequence = *sequence, .deadline = deadline};
    work.function = [&](KvCache& cache) { return Do(request, cache, response); };
    if (absl::Status status = core_->queue.Run(state_, std::move(work)); !status.ok()) {
      return status;
    }
    return response;
  }

  absl::StatusOr<RequestId> Submit(const DecodeRequest& request) override {
    if (absl::Status status = serving::CheckDecodeRequest(core_->options, request); !status.ok()) {
      return core_->queue.Refuse(std::move(status));
    }
    Request work = {.sequence = request.sequence, .deadline = request.deadline, .decode = request};
    if (serving::AppendsOnly(request)) {
      work.kind = Request::Kind::kFunction;
      work.function = [sequence = request.sequence, kv = request.inputs.kv](KvCache& cache) {
        return cache.Append(sequence, kv);
      };
    }
    return core_->queue.Submit(state_, std::move(work));
  }

  bool Cancel(RequestId id) override { return core_->queue.Cancel(state_, id); }
  absl::StatusOr<Result> Next(absl::Time deadline) override {
    return core_->queue.Next(state_, deadline);
  }

  absl::Status RunCollective(const std::function<absl::Status(KvCache&)>& function) override {
    Request work = {.kind = Request::Kind::kCollective};
    work.function = function;
    return core_->queue.Run(state_, std::move(work));
  }

 private:
  // On the worker's thread.
  absl::Status Do(const ControlRequest& request, KvCache& cache, ControlResponse& response) {
    absl::StatusOr<SequenceId> sequence = SequenceOf(request);
    absl::Status status;
    if (request.has_open()) {
      sequence = cache.Open();
    } else if (request.has_fork()) {
      sequence = cache.Fork(*sequence);
    } else if (request.has_truncate()) {
      status = cache.Truncate(*sequence, request.truncate().num_tokens());
    } else if (request.has_close()) {
      status = cache.Close(*sequence);
    }
    status.Update(sequence.status());
    if (!status.ok()) return status;
    if (request.has_open() || request.has_fork()) core_->queue.SetOwner(*sequence, state_);
    response.set_sequence(*sequence);
    if (request.has_close()) {
      core_->queue.ForgetOwner(*sequence);
      return status;
    }
    const absl::StatusOr<int64_t> num_tokens = cache.NumTokens(*sequence);
    if (num_tokens.ok()) response.set_num_tokens(*num_tokens);
    return num_tokens.status();
  }

  const std::shared_ptr<Core> core_;
  const std::shared_ptr<serving::ClientState> state_;
};

class ServiceImpl : public Service {
 public:
  ServiceImpl(std::shared_ptr<Core> core, std::shared_ptr<comm::Communicator> communicator,
              std::unique_ptr<serving::ServiceWorker> worker)
      : core_(std::move(core)),
        communicator_(std::move(communicator)),
        worker_(std::move(worker)),
        thread_([this] { worker_->Run(); }) {}
  ~ServiceImpl() override {
    Shutdown(absl::Now() + communicator_->timeout()).IgnoreError();
    thread_.join();
  }

  absl::StatusOr<std::unique_ptr<Client>> Connect(const ClientOptions& options) override {
    auto state = core_->queue.Connect(options);
    if (!state.ok()) return state.status();
    return std::make_unique<ClientImpl>(core_, *std::move(state));
  }

  absl::Status Drain(absl::Time deadline) override { return core_->queue.Drain(deadline); }

  absl::Status Shutdown(absl::Time deadline) override {
    core_->queue.Stop();
    if (core_->queue.AwaitStopped(deadline)) return absl::OkStatus();
    communicator_->Abort("its service was shut down");
    core_->queue.AwaitStopped(absl::InfiniteFuture());
    return absl::DeadlineExceededError(
        "shutting down waited for what was in work or for other ranks' services");
  }

  ServiceHealth Health() override {
    using State = serving::RequestQueue::State;
    ServiceHealth health;
    const State state = core_->queue.state();
    const absl::Status broken = communicator_->HealthCheck();
    for (int rank : communicator_->LostRanks()) health.add_lost_ranks(rank);
    if (!broken.ok() || health.lost_ranks_size() > 0) {
      health.set_state(ServiceHealth::DEGRADED);
      health.set_reason(broken.ToString());
    }
    if (state == State::kDraining) health.set_state(ServiceHealth::DRAINING);
    if (state >= State::kStopping) health.set_state(ServiceHealth::STOPPED);
    return health;
  }

  ServiceStats Stats() override {
    ServiceStats stats;
    worker_->FillStats(stats);
    core_->queue.FillStats(stats);
    *stats.mutable_health() = Health();
    return stats;
  }

  std::string MetricsText() override { return serving::FormatMetrics(Stats()); }

 private:
  const std::shared_ptr<Core> core_;
  const std::shared_ptr<comm::Communicator> communicator_;
  const std::unique_ptr<serving::ServiceWorker> worker_;
  std::thread thread_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Service>> Service::Create(
    const ServiceOptions& options, std::shared_ptr<comm::Communicator> communicator,
    std::shared_ptr<kernels::Kernels> kernels) {
  auto cache = KvCache::Create(options.cache, communicator, kernels);
  if (!cache.ok()) return cache.status();
  return Create(options, *std::move(cache), std::move(communicator), std::move(kernels));
}

absl::StatusOr<std::unique_ptr<Service>> Service::Create(
    const ServiceOptions& options, std::unique_ptr<KvCache> cache,
    std::shared_ptr<comm::Communicator> communicator, std::shared_ptr<kernels::Kernels> kernels) {
  absl::Status mine = CheckOptions(options);
  std::unique_ptr<serving::StepBuffers> buffers;
  std::unique_ptr<kernels::Stream> stream;
  if (mine.ok()) {
    auto made = serving::StepBuffers::Create(options, kernels);
    mine = made.status();
    if (made.ok()) buffers = *std::move(made);
  }
  if (mine.ok()) {
    auto made = kernels->CreateStream();
    mine = made.status();
    if (made.ok()) stream = *std::move(made);
  }
  if (absl::Status agreed = Agree(*communicator, mine, {}); !agreed.ok()) return agreed;
  auto core = std::make_shared<Core>(options);
  auto worker = std::make_unique<serving::ServiceWorker>(
      std::move(cache), communicator, kernels, std::move(buffers), std::move(stream), &core->queue);
  return std::make_unique<ServiceImpl>(std::move(core), std::move(communicator), std::move(worker));
}

}  // namespace nsa
