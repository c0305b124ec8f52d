// Decoding for many callers: one rank's front of a KV cache (nsa/serving/kv_cache.h).
//
//   auto service = nsa::Service::Create(options, communicator, kernels);
//   auto client = (*service)->Connect();                 // one or more for each caller
//   auto opened = (*client)->Control(open, deadline);    // sequences: open, fork, truncate, close
//   auto id = (*client)->Submit({.sequence = opened->sequence(), .inputs = ..., .o = ...});
//   auto result = (*client)->Next(deadline);             // results, as they come
//
// One thread of the service owns the cache. Each of its rounds does what the queue holds: control
// requests one by one, then one step of the cache for what is ready to be decoded, at most one
// request of each sequence. Requests of one sequence are done in the order of their submission, by
// whatever clients; a request that fails changes nothing, and no other request is harmed.
//
// Where the cache is not reachable in place (KvCache::is_reachable) the ranks' services go round
// together, and each rank's service goes on until all are shut down.
//
// Errors, of calls and of results:
//   InvalidArgument    names the field, the value and the rule
//   NotFound           there is no such sequence on this rank
//   ResourceExhausted  the queue, the client's unread results, or the cache's sequences and pages:
//                      which limit, and its value
//   DeadlineExceeded   the request's deadline passed before it began
//   Cancelled          the request was cancelled, or its client or the service went away
//   Unavailable        the service drains or is shut down, or a rank was lost that the sequence has
//                      pages on
#ifndef NSA_SERVICE_H_
#define NSA_SERVICE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "comm/communicator.h"
#include "kernels/kernels.h"
#include "nsa/service.pb.h"
#include "nsa/serving/kv_cache.h"
#include "nsa/tensor.h"

namespace nsa {

struct ServiceOptions {
  // A step has at most cache.max_step_rows new tokens; of a sequence at most 64, which
  // cache.max_rollback_tokens must allow to take back.
  serving::KvCacheOptions cache;
  DType gate_dtype = DType::kF32;  // of all gates: f32 or cache.dtype
  int32_t max_queued = 1024;       // requests of all clients that have not begun
  // Requests of one client that are in the queue, in work, or done and not read.
  int32_t max_unread = 256;
};

// New tokens of a sequence, and where their output goes. Without q, gate and o they are appended
// only. Tensors lie in memory of the service's kernels, every row dense and at a multiple of 16
// bytes; what is read is complete, and all stay as they are until the result is there or the client
// is destroyed.
struct DecodeRequest {
  serving::SequenceId sequence = 0;
  serving::StepInputs inputs = {};  // [T,...], T from 1 to 64, or any number when appended only
  Tensor o = {};                    // [T,Hq,Dv] cache.dtype
  absl::Time deadline = absl::InfiniteFuture();
};

using RequestId = int64_t;

// OK: the tokens are in the sequence and o is written.
struct Result {
  RequestId id;
  absl::Status status;
};

struct ClientOptions {
  // Sequences that the client has opened or forked outlive it. They are any client's to use, as
  // others are, by their number.
  bool keeps_sequences = false;
};

// Any threads may call. Destruction cancels what the client has in the queue, waits for what is in
// work and closes the client's sequences.
class Client {
 public:
  virtual ~Client() = default;

  // Waits until the request is done, or its deadline passes before it began.
  virtual absl::StatusOr<ControlResponse> Control(const ControlRequest& request,
                                                  absl::Time deadline) = 0;
  // Never waits. Each request that is accepted has exactly one result.
  virtual absl::StatusOr<RequestId> Submit(const DecodeRequest& request) = 0;
  // Whether the request was still in the queue: its result is Cancelled then. Else it takes its
  // course.
  virtual bool Cancel(RequestId id) = 0;
  // The next result of this client, in the order in which requests end. DeadlineExceeded when none
  // comes in time; Unavailable when the service is shut down and none is left.
  virtual absl::StatusOr<Result> Next(absl::Time deadline) = 0;
  // Runs `function` on the service's thread, where alone the communicator may be used: for a
  // sharded forward and the KvCache::AppendForward behind it. What it enqueues on other streams
  // than the default one it waits for. Every rank calls this, in the same order; returns when
  // `function` has, for which the other ranks must have come too, within the communicator's
  // timeout. No queue is too full for it.
  virtual absl::Status RunCollective(
      const std::function<absl::Status(serving::KvCache&)>& function) = 0;
};

// Any threads may call.
class Service {
 public:
  // Collective, as KvCache::Create, whose errors it has.
  static absl::StatusOr<std::unique_ptr<Service>> Create(
      const ServiceOptions& options, std::shared_ptr<comm::Communicator> communicator,
      std::shared_ptr<kernels::Kernels> kernels);
  // With a cache that was made with options.cache.
  static absl::StatusOr<std::unique_ptr<Service>> Create(
      const ServiceOptions& options, std::unique_ptr<serving::KvCache> cache,
      std::shared_ptr<comm::Communicator> communicator, std::shared_ptr<kernels::Kernels> kernels);
  // Shuts down, waiting for at most the communicator's timeout. Clients may live on. The pages of
  // other ranks' sequences go along: ranks that share some end together, as behind a Barrier in
  // RunCollective, which waits no longer than the communicator's timeout.
  virtual ~Service() = default;

  virtual absl::StatusOr<std::unique_ptr<Client>> Connect(const ClientOptions& options = {}) = 0;

  // From now on no requests nor clients are accepted; returns when the queue is empty, or
  // DeadlineExceeded with how many requests are left.
  virtual absl::Status Drain(absl::Time deadline) = 0;
  // Cancels what is in the queue and returns when what is in work is done; where ranks go round
  // together, when all are shut down. Past the deadline it aborts the communicator, so that no
  // wait for a peer goes on, and returns DeadlineExceeded.
  virtual absl::Status Shutdown(absl::Time deadline) = 0;

  virtual ServiceHealth Health() = 0;
  virtual ServiceStats Stats() = 0;
  // The same in Prometheus' text format 0.0.4.
  virtual std::string MetricsText() = 0;
};

}  // namespace nsa

#endif  // NSA_SERVICE_H_
