// What a step would take if remote data were there already: a communicator that can leave out the
// moving of data.
#ifndef BENCHMARKS_IN_PLACE_COMMUNICATOR_H_
#define BENCHMARKS_IN_PLACE_COMMUNICATOR_H_

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "comm/communicator.h"

namespace nsa::benchmarks {

// Passes every call on. While data is in place, AllGather, Exchange and what windows do return OK
// and do nothing: buffers keep what the last call before brought. Control data still travels
// (HostAllGather, Barrier). Ranks switch when all
// have ended an epoch of each window and none has begun the next.
class InPlaceCommunicator final : public comm::Communicator {
 public:
  explicit InPlaceCommunicator(std::shared_ptr<comm::Communicator> to) : to_(std::move(to)) {}

  void set_data_in_place(bool in_place) { in_place_ = in_place; }

  int rank() const override { return to_->rank(); }
  int size() const override { return to_->size(); }
  absl::Duration timeout() const override { return to_->timeout(); }
  absl::Status AllGather(void* buffer, absl::Span<const comm::GatherRun> runs,
                         void* stream) override {
    return in_place_ ? absl::OkStatus() : to_->AllGather(buffer, runs, stream);
  }
  absl::Status Exchange(absl::Span<const comm::SendOp> sends, absl::Span<const comm::RecvOp> recvs,
                        void* stream) override {
    return in_place_ ? absl::OkStatus() : to_->Exchange(sends, recvs, stream);
  }
  absl::StatusOr<std::unique_ptr<comm::Window>> CreateWindow(int64_t num_bytes) override {
    auto window = to_->CreateWindow(num_bytes);
    if (!window.ok()) return window.status();
    return std::make_unique<InPlaceWindow>(*std::move(window), &in_place_);
  }
  absl::StatusOr<std::vector<std::string>> HostAllGather(absl::string_view mine) override {
    return to_->HostAllGather(mine);
  }
  absl::Status Barrier() override { return to_->Barrier(); }
  absl::Status HealthCheck() override { return to_->HealthCheck(); }
  std::vector<int> LostRanks() override { return to_->LostRanks(); }
  void Abort(absl::string_view reason) override { to_->Abort(reason); }

 private:
  class InPlaceWindow final : public comm::Window {
   public:
    InPlaceWindow(std::unique_ptr<comm::Window> to, const bool* in_place)
        : to_(std::move(to)), in_place_(*in_place) {}

    void* data() override { return to_->data(); }
    int64_t num_bytes() const override { return to_->num_bytes(); }
    void* PeerData(int rank) override { return to_->PeerData(rank); }
    absl::Status BeginWrite(void* stream) override {
      return in_place_ ? absl::OkStatus() : to_->BeginWrite(stream);
    }
    absl::Status Publish(void* stream) override {
      return in_place_ ? absl::OkStatus() : to_->Publish(stream);
    }
    absl::Status Gather(const comm::GatherList& list, int64_t record_bytes, void* dst,
                        void* stream) override {
      return in_place_ ? absl::OkStatus() : to_->Gather(list, record_bytes, dst, stream);
    }
    absl::Status Release(void* stream) override {
      return in_place_ ? absl::OkStatus() : to_->Release(stream);
    }

   private:
    const std::unique_ptr<comm::Window> to_;
    const bool& in_place_;  // of the communicator, which outlives its windows
  };

  const std::shared_ptr<comm::Communicator> to_;
  bool in_place_ = false;
};

}  // namespace nsa::benchmarks

#endif  // BENCHMARKS_IN_PLACE_COMMUNICATOR_H_
