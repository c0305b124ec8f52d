#include "comm/loopback/loopback.h"

#include <cstring>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "comm/errors.h"
#include "comm/host_communicator.h"
#include "comm/loopback/group.h"

namespace nsa::comm {
namespace loopback {
namespace {

class LoopbackWindow final : public HostWindow {
 public:
  LoopbackWindow(std::shared_ptr<Group> group, int rank, const Health* health, int64_t id,
                 std::shared_ptr<PageMemory> memory)
      : HostWindow(rank, health),
        group_(std::move(group)),
        rank_(rank),
        id_(id),
        memory_(std::move(memory)),
        everyone_(group_->size()) {
    std::iota(everyone_.begin(), everyone_.end(), 0);
    group_->AddWindow(rank_, id_, memory_);
  }
  ~LoopbackWindow() override { group_->RemoveWindow(rank_, id_); }

  void* data() override { return memory_->data(); }
  int64_t num_bytes() const override { return memory_->num_bytes(); }
  void* PeerData(int rank) override { return peers_[rank]->data(); }

 private:
  std::string Export() const override { return ""; }
  absl::Status Connect(absl::Span<const std::string>) override {
    peers_ = group_->WindowMemory(id_);
    return absl::OkStatus();
  }
  absl::Status AwaitReleased(int64_t epoch) override {
    return group_->Await(rank_, id_, &WindowBoard::released, epoch, everyone_, "BeginWrite");
  }
  absl::Status AwaitPublished(absl::Span<const int> peers, int64_t epoch) override {
    return group_->Await(rank_, id_, &WindowBoard::published, epoch, peers, "Gather");
  }
  absl::Status SignalPublished(int64_t epoch) override {
    group_->Signal(rank_, id_, &WindowBoard::published, epoch);
    return absl::OkStatus();
  }
  absl::Status SignalReleased(int64_t epoch) override {
    group_->Signal(rank_, id_, &WindowBoard::released, epoch);
    return absl::OkStatus();
  }
  absl::Status Read(absl::Span<const WindowRead> reads, void* dst) override {
    for (const WindowRead& read : reads) {
      std::memcpy(static_cast<char*>(dst) + read.dst_offset,
                  peers_[read.peer]->data() + read.window_offset, read.num_bytes);
    }
    return absl::OkStatus();
  }

  const std::shared_ptr<Group> group_;
  const int rank_;
  const int64_t id_;
  const std::shared_ptr<PageMemory> memory_;
  std::vector<int> everyone_;
  // [size] held here, so that a peer may destroy its window while this rank still reads it.
  std::vector<std::shared_ptr<PageMemory>> peers_;
};

class LoopbackCommunicator final : public HostCommunicator {
 public:
  LoopbackCommunicator(std::shared_ptr<Group> group, int rank)
      : HostCommunicator(rank, group->size(), group->timeout()), group_(std::move(group)) {
    group_->Register(rank, &health());
  }
  ~LoopbackCommunicator() override { group_->Leave(rank(), health().status()); }

  void Abort(absl::string_view reason) override { group_->AbortAll(rank(), reason); }

 private:
  absl::Status Transfer(CallKind kind, absl::Span<const SendOp> sends,
                        absl::Span<const Incoming> receives) override {
    return group_->Transfer(rank(), ++calls_, kind, sends, receives);
  }
  absl::StatusOr<std::unique_ptr<HostWindow>> AllocateWindow(int64_t num_bytes) override {
    const int64_t id = ++windows_;
    absl::StatusOr<std::shared_ptr<PageMemory>> memory = PageMemory::Allocate(num_bytes);
    if (!memory.ok()) {
      group_->RemoveWindow(rank(), id);
      return memory.status();
    }
    return std::make_unique<LoopbackWindow>(group_, rank(), &health(), id, *std::move(memory));
  }

  const std::shared_ptr<Group> group_;
  int64_t calls_ = 0;
  int64_t windows_ = 0;
};

}  // namespace
}  // namespace loopback

absl::StatusOr<std::vector<std::unique_ptr<Communicator>>> LoopbackGroup::Create(
    int size, const LoopbackOptions& options) {
  if (size < 1) {
    return absl::InvalidArgumentError(absl::StrCat("size: ", size, "; must be >= 1"));
  }
  if (absl::Status s = CheckTimeout(options.timeout); !s.ok()) return s;
  auto group = std::make_shared<loopback::Group>(size, options.timeout);
  std::vector<std::unique_ptr<Communicator>> ranks;
  for (int rank = 0; rank < size; ++rank) {
    ranks.push_back(std::make_unique<loopback::LoopbackCommunicator>(group, rank));
  }
  return ranks;
}

}  // namespace nsa::comm
