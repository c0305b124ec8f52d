// A communicator whose windows no one loads in place, as between hosts.
#ifndef TESTS_SERVING_UNREACHABLE_H_
#define TESTS_SERVING_UNREACHABLE_H_

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "comm/communicator.h"

namespace nsa::test {

class UnreachableCommunicator final : public comm::Communicator {
 public:
  explicit UnreachableCommunicator(std::shared_ptr<comm::Communicator> inner)
      : inner_(std::move(inner)) {}

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  absl::Duration timeout() const override { return inner_->timeout(); }
  absl::Status AllGather(void* buffer, absl::Span<const comm::GatherRun> runs,
                         void* stream) override {
    return inner_->AllGather(buffer, runs, stream);
  }
  absl::Status Exchange(absl::Span<const comm::SendOp> sends, absl::Span<const comm::RecvOp> recvs,
                        void* stream) override {
    return inner_->Exchange(sends, recvs, stream);
  }
  absl::StatusOr<std::unique_ptr<comm::Window>> CreateWindow(int64_t num_bytes) override {
    auto window = inner_->CreateWindow(num_bytes);
    if (!window.ok()) return window.status();
    return std::make_unique<UnreachableWindow>(rank(), *std::move(window));
  }
  absl::StatusOr<std::vector<std::string>> HostAllGather(absl::string_view mine) override {
    return inner_->HostAllGather(mine);
  }
  absl::Status Barrier() override { return inner_->Barrier(); }
  absl::Status HealthCheck() override { return inner_->HealthCheck(); }
  std::vector<int> LostRanks() override { return inner_->LostRanks(); }
  void Abort(absl::string_view reason) override { inner_->Abort(reason); }

 private:
  class UnreachableWindow final : public comm::Window {
   public:
    UnreachableWindow(int rank, std::unique_ptr<comm::Window> inner)
        : rank_(rank), inner_(std::move(inner)) {}
    void* data() override { return inner_->data(); }
    int64_t num_bytes() const override { return inner_->num_bytes(); }
    void* PeerData(int rank) override { return rank == rank_ ? data() : nullptr; }
    absl::Status BeginWrite(void* stream) override { return inner_->BeginWrite(stream); }
    absl::Status Publish(void* stream) override { return inner_->Publish(stream); }
    absl::Status Gather(const comm::GatherList& list, int64_t record_bytes, void* dst,
                        void* stream) override {
      return inner_->Gather(list, record_bytes, dst, stream);
    }
    absl::Status Release(void* stream) override { return inner_->Release(stream); }

   private:
    const int rank_;
    const std::unique_ptr<comm::Window> inner_;
  };

  const std::shared_ptr<comm::Communicator> inner_;
};

}  // namespace nsa::test

#endif  // TESTS_SERVING_UNREACHABLE_H_
