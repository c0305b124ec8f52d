#include "comm/ucx/remote_reads.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace nsa::comm::ucx {
namespace {

// Of one request: enough to hide the way there and back, little enough to share a link.
constexpr int64_t kPieceBytes = 256 << 10;

}  // namespace

void RemoteReads::AddWindow(int64_t window, const char* data, int64_t num_bytes) {
  exposed_[window] = {data, num_bytes};
}

int64_t RemoteReads::Offer(int peer, const void* data, int64_t num_bytes) {
  const int64_t offer = -++num_offers_;
  exposed_[offer] = {static_cast<const char*>(data), num_bytes, peer, num_bytes};
  worker_.BeginUnfinished(peer);
  return offer;
}

void RemoteReads::Read(int peer, int64_t memory, int64_t offset, int64_t num_bytes, void* dst,
                       std::function<void()> done) {
  const int64_t job = ++num_jobs_;
  jobs_[job] = {peer, num_bytes, std::move(done)};
  worker_.BeginUnfinished(peer);
  for (int64_t begin = 0; begin < num_bytes; begin += kPieceBytes) {
    const int64_t size = std::min(kPieceBytes, num_bytes - begin);
    waiting_.push_back({job, memory, offset + begin, size, static_cast<char*>(dst) + begin, size});
  }
  StartPieces();
}

void RemoteReads::StartPieces() {
  while (!waiting_.empty() && static_cast<int>(requested_.size()) < max_requests_) {
    const int64_t request = ++num_requests_;
    const Piece& piece = requested_[request] = waiting_.front();
    waiting_.pop_front();
    WireHeader header = {MessageType::kReadRequest, rank_, piece.memory};
    header.request = request;
    header.offset = piece.offset;
    header.num_bytes = piece.num_bytes;
    worker_.Post(jobs_.at(piece.job).peer, header);
  }
}

void RemoteReads::Refuse(int peer, int64_t offer) {
  worker_.Post(peer, {MessageType::kRefusal, rank_, offer});
}

void RemoteReads::OnMessage(const WireHeader& header, const void* data, size_t num_bytes) {
  if (header.type == MessageType::kReadChunk) {
    TakeChunk(header, data, num_bytes);
  } else {
    to_serve_.push_back(header);
  }
}

void RemoteReads::TakeChunk(const WireHeader& header, const void* data, size_t num_bytes) {
  const auto found = requested_.find(header.request);
  if (found == requested_.end()) return;  // abandoned
  Piece& piece = found->second;
  const int64_t size = static_cast<int64_t>(num_bytes);
  if (header.offset < 0 || size > piece.num_bytes - header.offset) return;
  std::memcpy(piece.dst + header.offset, data, num_bytes);
  piece.left_bytes -= size;
  if (piece.left_bytes > 0) return;
  const auto job = jobs_.find(piece.job);
  job->second.left_bytes -= piece.num_bytes;
  requested_.erase(found);
  if (job->second.left_bytes > 0) return;
  worker_.EndUnfinished(job->second.peer);
  const std::function<void()> done = std::move(job->second.done);
  jobs_.erase(job);
  if (done) done();
}

void RemoteReads::AfterProgress() {
  for (const WireHeader& request : std::exchange(to_serve_, {})) Serve(request);
  StartPieces();
}

void RemoteReads::Serve(const WireHeader& request) {
  const auto found = exposed_.find(request.memory);
  if (found == exposed_.end()) return;  // abandoned
  Exposed& exposed = found->second;
  if (request.memory < 0 && exposed.peer != request.sender) return;
  if (request.type == MessageType::kRefusal) {
    OnChunkSent(request.memory, exposed.unread_bytes);
    return;
  }
  if (request.offset < 0 || request.num_bytes < 0 ||
      request.num_bytes > exposed.num_bytes - request.offset) {
    return;
  }
  const char* const data = exposed.data + request.offset;
  for (int64_t begin = 0; begin < request.num_bytes; begin += kSegmentBytes) {
    WireHeader header = {MessageType::kReadChunk, rank_, request.memory};
    header.request = request.request;
    header.offset = begin;
    worker_.SendChunk(request.sender, header, data + begin,
                      std::min(kSegmentBytes, request.num_bytes - begin));
  }
}

void RemoteReads::OnChunkSent(int64_t memory, int64_t num_bytes) {
  const auto found = exposed_.find(memory);
  if (memory > 0 || found == exposed_.end()) return;
  found->second.unread_bytes -= num_bytes;
  if (found->second.unread_bytes > 0) return;
  worker_.EndUnfinished(found->second.peer);
  exposed_.erase(found);
}

void RemoteReads::Abandon() {
  exposed_.erase(exposed_.begin(), exposed_.lower_bound(0));
  jobs_.clear();
  waiting_.clear();
  requested_.clear();
}

}  // namespace nsa::comm::ucx
