#include "comm/ucx/window_board.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "comm/host_memory.h"

namespace nsa::comm::ucx {
namespace {

constexpr int64_t kAlignment = 256;
constexpr int64_t kAllEpochs = std::numeric_limits<int64_t>::max();

}  // namespace

absl::StatusOr<std::unique_ptr<MappedMemory>> MappedMemory::Allocate(ucp_context_h context,
                                                                     int64_t num_bytes) {
  if (num_bytes > std::numeric_limits<int64_t>::max() - kAlignment) {
    return OutOfMemory(num_bytes, "out of range");
  }
  // UCP finds out how much shared memory there is by writing to all of it: ask first.
  if (absl::Status s = CheckMemoryFor(num_bytes); !s.ok()) return s;
  ucp_mem_map_params_t params = {};
  params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH |
                      UCP_MEM_MAP_PARAM_FIELD_FLAGS;
  params.length = num_bytes + kAlignment;
  params.flags = UCP_MEM_MAP_ALLOCATE;
  ucp_mem_h handle = nullptr;
  if (ucs_status_t s = ucp_mem_map(context, &params, &handle); s != UCS_OK) {
    return OutOfMemory(num_bytes, absl::StrCat("ucp_mem_map: ", ucs_status_string(s)));
  }
  std::unique_ptr<MappedMemory> memory(new MappedMemory(context, handle));
  ucp_mem_attr_t attributes = {};
  attributes.field_mask = UCP_MEM_ATTR_FIELD_ADDRESS;
  if (ucs_status_t s = ucp_mem_query(handle, &attributes); s != UCS_OK) {
    return UcsError("ucp_mem_query", s);
  }
  const auto address = reinterpret_cast<uintptr_t>(attributes.address);
  memory->data_ = reinterpret_cast<char*>((address + kAlignment - 1) / kAlignment * kAlignment);
  memory->num_bytes_ = num_bytes;
  std::memset(memory->data_, 0, num_bytes);
  return memory;
}

absl::StatusOr<std::unique_ptr<MappedMemory>> MappedMemory::AllocateCuda(ucp_context_h context,
                                                                         int64_t num_bytes,
                                                                         DeviceMemory& device) {
  const int64_t length = std::max<int64_t>(num_bytes, 1);
  absl::StatusOr<DeviceMemory::Block> block = device.Allocate(length);
  if (!block.ok()) return block.status();
  ucp_mem_map_params_t params = {};
  params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH |
                      UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
  params.address = block->get();
  params.length = length;
  params.memory_type = UCS_MEMORY_TYPE_CUDA;
  ucp_mem_h handle = nullptr;
  if (ucs_status_t s = ucp_mem_map(context, &params, &handle); s != UCS_OK) {
    return UcsError("ucp_mem_map", s);
  }
  std::unique_ptr<MappedMemory> memory(new MappedMemory(context, handle));
  memory->block_ = *std::move(block);
  memory->data_ = memory->block_.get();
  memory->num_bytes_ = num_bytes;
  return memory;
}

MappedMemory::~MappedMemory() { ucp_mem_unmap(context_, handle_); }

int64_t WindowBoard::Add() {
  const int64_t window = ++num_windows_;
  counters_[window] = {std::vector<int64_t>(size_, 0), std::vector<int64_t>(size_, 0)};
  return window;
}

void WindowBoard::Tell(MessageType type, int64_t window, int64_t epoch) {
  for (int step = 1; step < size_; ++step) {
    const int peer = (rank_ + step) % size_;
    if (!worker_.has_left(peer)) worker_.Post(peer, {type, rank_, window, epoch});
  }
  worker_.Kick();
}

void WindowBoard::Publish(int64_t window, int64_t epoch) {
  counters_.at(window).published[rank_] = epoch;
  Tell(MessageType::kPublished, window, epoch);
}

void WindowBoard::Release(int64_t window, int64_t epoch) {
  counters_.at(window).released[rank_] = epoch;
  Tell(MessageType::kReleased, window, epoch);
}

void WindowBoard::Retire(int64_t window, int64_t published_epoch,
                         std::unique_ptr<MappedMemory> memory, bool tell) {
  counters_.at(window).released[rank_] = kAllEpochs;
  if (tell) Tell(MessageType::kReleased, window, kAllEpochs);
  retired_.push_back({window, published_epoch, std::move(memory)});
  look_at_retired_ = true;
  AfterProgress();
}

void WindowBoard::OnMessage(const WireHeader& header) {
  const auto found = counters_.find(header.memory);
  if (found == counters_.end()) return;  // destroyed here, and nobody reads it any more
  if (header.type == MessageType::kPublished) {
    found->second.published[header.sender] = header.epoch;
  } else {
    found->second.released[header.sender] = header.epoch;
    look_at_retired_ = true;
  }
}

void WindowBoard::OnLeft(int rank) {
  for (auto& [window, counters] : counters_) counters.released[rank] = kAllEpochs;
  look_at_retired_ = true;
}

bool WindowBoard::MayBeRead(const Retired& retired) const {
  const std::vector<int64_t>& released = counters_.at(retired.window).released;
  return std::any_of(released.begin(), released.end(),
                     [&](int64_t epoch) { return epoch < retired.published_epoch; });
}

void WindowBoard::AfterProgress() {
  if (!std::exchange(look_at_retired_, false)) return;
  const auto end = std::partition(retired_.begin(), retired_.end(),
                                  [this](const Retired& retired) { return MayBeRead(retired); });
  for (auto it = end; it != retired_.end(); ++it) {
    counters_.erase(it->window);
    reads_.RemoveWindow(it->window);
  }
  retired_.erase(end, retired_.end());
}

}  // namespace nsa::comm::ucx
