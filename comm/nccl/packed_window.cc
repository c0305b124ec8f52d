#include "comm/nccl/packed_window.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <unordered_map>

#include "absl/strings/str_cat.h"
#include "comm/nccl/window_kernels.h"
#include "comm/wire.h"

namespace nsa::comm::nccl {
namespace {

// Of the records that a rank receives in one round, unless one record of each rank is more.
constexpr int64_t kRoundBytes = 64 << 20;
// Of the records that a rank asks of another in one round: the lists pass through rank 0.
constexpr int64_t kRoundRecords = 8192;

// The memories that records are copied from.
enum : int32_t { kReceived, kOwn, kNumMemories };

// What a list of the copying kernel looks like in device memory. The head is common to all lists.
struct UploadHead {
  char* bases[kNumMemories];
  int64_t num_bytes[kNumMemories];
};
constexpr int64_t kAlignment = 16;
int64_t AlignUp(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
int64_t OffsetsBytes(int64_t count) { return AlignUp(count * int64_t{sizeof(int64_t)}); }
int64_t MemoryBytes(int64_t count) { return AlignUp(count * int64_t{sizeof(int32_t)}); }

}  // namespace

absl::Status PackedWindow::DeviceBytes::Reserve(int64_t num_bytes) {
  if (num_bytes <= capacity) return absl::OkStatus();
  capacity = 0;
  data = nullptr;
  absl::StatusOr<DevicePtr<char>> memory = AllocateDevice<char>(num_bytes);
  if (!memory.ok()) return memory.status();
  data = *std::move(memory);
  capacity = num_bytes;
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Window>> PackedWindow::Create(const WindowContext* context,
                                                             int64_t id,
                                                             std::vector<int64_t> window_bytes,
                                                             DevicePtr<char> memory) {
  std::unique_ptr<PackedWindow> window(
      new PackedWindow(context, id, std::move(window_bytes), std::move(memory)));
  cudaEvent_t event = nullptr;
  NSA_COMM_CUDA_OK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  window->last_use_.reset(event);
  return window;
}

PackedWindow::~PackedWindow() {
  const ScopedDevice device(context_.device);
  if (order_.Release().ok() && context_.health->Check().ok()) {
    ReleaseInRounds(context_.stream).IgnoreError();
  }
  if (last_use_ == nullptr || context_.AwaitIdle(last_use_.get())) return;
  // Kernels may still use it all, so it is left to the end of the process.
  (void)memory_.release();
  (void)received_.data.release();
  (void)packed_.data.release();
  (void)lists_.data.release();
}

absl::Status PackedWindow::BeginWrite(void* stream) {
  if (absl::Status s = context_.health->Check(); !s.ok()) return s;
  if (absl::Status s = order_.BeginWrite(); !s.ok()) return s;
  const ScopedDevice device(context_.device);
  // No peer reads here: what the Release before has packed is what others may still be waiting for.
  return CudaStatus(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), last_use_.get(), 0),
                    "cudaStreamWaitEvent");
}

absl::Status PackedWindow::Publish(void* stream) {
  if (absl::Status s = context_.health->Check(); !s.ok()) return s;
  if (absl::Status s = order_.Publish(); !s.ok()) return s;
  const ScopedDevice device(context_.device);
  return CudaStatus(cudaEventRecord(last_use_.get(), static_cast<cudaStream_t>(stream)),
                    "cudaEventRecord");
}

absl::Status PackedWindow::Gather(const GatherList& list, int64_t record_bytes, void* dst,
                                  void* stream) {
  if (absl::Status s = context_.health->Check(); !s.ok()) return s;
  if (absl::Status s = order_.Gather(); !s.ok()) return s;
  const ScopedDevice device(context_.device);
  const auto on = static_cast<cudaStream_t>(stream);
  if (IsCapturing(on)) {
    return absl::InvalidArgumentError(
        "Gather: stream: is captured; must not be, where windows are read in packs");
  }
  const auto copy = [on](void* to, const void* from, int64_t num_bytes) -> absl::Status {
    NSA_COMM_CUDA_OK(cudaMemcpyAsync(to, from, num_bytes, cudaMemcpyDeviceToHost, on));
    return CudaStatus(cudaStreamSynchronize(on), "cudaStreamSynchronize");
  };
  absl::StatusOr<HostGatherList> read =
      ReadGatherList(list, record_bytes, dst, window_bytes_, copy);
  if (!read.ok()) {
    return absl::IsInvalidArgument(read.status()) ? read.status()
                                                  : context_.health->Break(read.status());
  }
  const int64_t count = static_cast<int64_t>(read->peers.size());
  for (int64_t begin = 0; begin < count;) {
    Wanted wanted;
    wanted.record_bytes = record_bytes;
    Records records;
    absl::StatusOr<int64_t> end = PlanRound(*read, begin, wanted, records);
    if (!end.ok()) return context_.health->Break(end.status());
    absl::StatusOr<bool> round =
        Round("Gather", false, wanted, records, static_cast<char*>(dst) + begin * record_bytes, on);
    if (!round.ok()) return context_.health->Break(round.status());
    begin = *end;
  }
  return absl::OkStatus();
}

absl::StatusOr<int64_t> PackedWindow::PlanRound(const HostGatherList& list, int64_t begin,
                                                Wanted& wanted, Records& records) {
  const int64_t record_bytes = wanted.record_bytes;
  wanted.max_records =
      std::clamp<int64_t>(kRoundBytes / context_.size / record_bytes, 1, kRoundRecords);
  wanted.offsets.resize(context_.size);
  std::vector<std::unordered_map<int64_t, int64_t>> index(context_.size);  // by offset
  int64_t i = begin;
  for (; i < static_cast<int64_t>(list.peers.size()); ++i) {
    const int32_t peer = list.peers[i];
    const int64_t offset = list.offsets[i];
    if (peer == context_.rank) {
      records.memory.push_back(kOwn);
      records.offsets.push_back(offset);
      continue;
    }
    std::vector<int64_t>& of_peer = wanted.offsets[peer];
    const auto [found, is_new] =
        index[peer].try_emplace(offset, static_cast<int64_t>(of_peer.size()));
    if (is_new) {
      if (static_cast<int64_t>(of_peer.size()) == wanted.max_records) break;
      of_peer.push_back(offset);
    }
    records.memory.push_back(kReceived);
    records.offsets.push_back((peer * wanted.max_records + found->second) * record_bytes);
  }
  absl::Status status = received_.Reserve(context_.size * wanted.max_records * record_bytes);
  if (!status.ok()) return status;
  return i;
}

absl::StatusOr<bool> PackedWindow::Round(absl::string_view call, bool released,
                                         const Wanted& wanted, const Records& records, void* dst,
                                         cudaStream_t stream) {
  WireWriter mine;
  mine.PutInt64(id_);
  mine.PutInt64(released ? 1 : 0);
  mine.PutInt64(wanted.record_bytes);
  for (const std::vector<int64_t>& of_peer : wanted.offsets) {
    mine.PutString(absl::string_view(reinterpret_cast<const char*>(of_peer.data()),
                                     of_peer.size() * sizeof(int64_t)));
  }
  absl::StatusOr<std::vector<std::string>> all = context_.host_all_gather(call, mine.bytes());
  if (!all.ok()) return all.status();

  // Lists for the copying kernel: one for what each reader wants of this rank, then `records`.
  std::vector<char> lists(sizeof(UploadHead));
  const auto add = [&lists](const Records& list) {
    const int64_t place = static_cast<int64_t>(lists.size());
    const int32_t count = static_cast<int32_t>(list.offsets.size());
    lists.resize(place + kAlignment + OffsetsBytes(count) + MemoryBytes(count));
    if (count == 0) return place;
    char* const at = lists.data() + place;
    std::memcpy(at, &count, sizeof(count));
    std::memcpy(at + kAlignment, list.offsets.data(), count * sizeof(int64_t));
    std::memcpy(at + kAlignment + OffsetsBytes(count), list.memory.data(), count * sizeof(int32_t));
    return place;
  };
  struct Pack {
    int reader;
    int64_t list;
    int64_t count;
    int64_t record_bytes;
    int64_t place;  // in packed_
  };
  std::vector<Pack> packs;
  int64_t packed_bytes = 0;
  bool all_released = true;
  for (int reader = 0; reader < context_.size; ++reader) {
    WireReader theirs((*all)[reader]);
    const int64_t id = theirs.GetInt64();
    all_released &= theirs.GetInt64() == 1;
    const int64_t record_bytes = theirs.GetInt64();
    if (!theirs.ok() || id != id_) {
      return absl::FailedPreconditionError(absl::StrCat(
          call, ": rank ", context_.rank, " is in window ", id_, ", rank ", reader, " in window ",
          id, "; every rank must make the same calls in the same order"));
    }
    std::string wants;
    for (int owner = 0; owner <= context_.rank && theirs.ok(); ++owner) wants = theirs.GetString();
    const int64_t count = static_cast<int64_t>(wants.size() / sizeof(int64_t));
    if (!theirs.ok() || count == 0) continue;  // one that releases wants nothing
    Records wanted_here;
    wanted_here.memory.assign(count, kOwn);
    wanted_here.offsets.resize(count);
    std::memcpy(wanted_here.offsets.data(), wants.data(), count * sizeof(int64_t));
    packs.push_back({reader, add(wanted_here), count, record_bytes, packed_bytes});
    packed_bytes += AlignUp(count * record_bytes);
  }
  const int64_t last_list = add(records);
  if (packs.empty() && records.offsets.empty()) return all_released;

  NSA_COMM_CUDA_OK(cudaStreamWaitEvent(stream, last_use_.get(), 0));
  for (auto [memory, num_bytes] : {std::pair(&packed_, packed_bytes),
                                   std::pair(&lists_, static_cast<int64_t>(lists.size()))}) {
    if (absl::Status s = memory->Reserve(num_bytes); !s.ok()) return s;
  }
  const UploadHead head = {{received_.data.get(), memory_.get()},
                           {received_.capacity, num_bytes()}};
  std::memcpy(lists.data(), &head, sizeof(head));
  NSA_COMM_CUDA_OK(cudaMemcpyAsync(lists_.data.get(), lists.data(), lists.size(),
                                   cudaMemcpyHostToDevice, stream));
  std::vector<SendOp> sends;
  for (const Pack& pack : packs) {
    char* const to = packed_.data.get() + pack.place;
    absl::Status status = Copy(pack.list, pack.count, pack.record_bytes, to, stream);
    if (!status.ok()) return status;
    sends.push_back({pack.reader, to, pack.count * pack.record_bytes});
  }
  std::vector<RecvOp> recvs;
  for (int owner = 0; owner < static_cast<int>(wanted.offsets.size()); ++owner) {
    const int64_t count = static_cast<int64_t>(wanted.offsets[owner].size());
    if (count == 0) continue;
    recvs.push_back({owner, received_.data.get() + owner * wanted.max_records * wanted.record_bytes,
                     count * wanted.record_bytes});
  }
  if (!sends.empty() || !recvs.empty()) {
    if (absl::Status s = context_.exchange(sends, recvs, stream); !s.ok()) return s;
  }
  if (!records.offsets.empty()) {
    absl::Status status = Copy(last_list, static_cast<int64_t>(records.offsets.size()),
                               wanted.record_bytes, dst, stream);
    if (!status.ok()) return status;
  }
  NSA_COMM_CUDA_OK(cudaEventRecord(last_use_.get(), stream));
  return all_released;
}

absl::Status PackedWindow::Copy(int64_t list_offset, int64_t count, int64_t record_bytes, void* dst,
                                cudaStream_t stream) {
  char* const head = lists_.data.get();
  char* const list = head + list_offset;
  const PeerMemory memory = {reinterpret_cast<char* const*>(head),
                             0,
                             kOwn,
                             kNumMemories,
                             context_.health->device_board(),
                             static_cast<uint64_t>(absl::ToInt64Nanoseconds(context_.timeout))};
  GatherArguments arguments = {};
  arguments.peers = reinterpret_cast<const int32_t*>(list + kAlignment + OffsetsBytes(count));
  arguments.offsets = reinterpret_cast<const int64_t*>(list + kAlignment);
  arguments.count = reinterpret_cast<const int32_t*>(list);
  arguments.max_count = count;
  arguments.record_bytes = record_bytes;
  arguments.dst = static_cast<char*>(dst);
  arguments.window_bytes = reinterpret_cast<const int64_t*>(head + offsetof(UploadHead, num_bytes));
  return CudaStatus(
      LaunchGather(memory, arguments, context_.gather_ctas, context_.gather_warps, stream),
      "Gather");
}

absl::Status PackedWindow::Release(void* stream) {
  if (absl::Status s = context_.health->Check(); !s.ok()) return s;
  if (absl::Status s = order_.Release(); !s.ok()) return s;
  const ScopedDevice device(context_.device);
  return ReleaseInRounds(static_cast<cudaStream_t>(stream));
}

absl::Status PackedWindow::ReleaseInRounds(cudaStream_t stream) {
  while (true) {
    absl::StatusOr<bool> all_released = Round("Release", true, {}, {}, nullptr, stream);
    if (!all_released.ok()) return context_.health->Break(all_released.status());
    if (*all_released) return absl::OkStatus();
  }
}

}  // namespace nsa::comm::nccl
