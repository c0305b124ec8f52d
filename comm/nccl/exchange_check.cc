#include "comm/nccl/exchange_check.h"

#include <cstdint>

#include "absl/strings/str_cat.h"
#include "comm/wire.h"

namespace nsa::comm::nccl {
namespace {

struct Plan {
  std::vector<std::vector<int64_t>> to;    // [size][messages] bytes
  std::vector<std::vector<int64_t>> from;  // [size][messages] bytes
};

void DecodeSizes(WireReader& reader, std::vector<std::vector<int64_t>>& sizes) {
  const int64_t count = reader.GetInt64();
  for (int64_t i = 0; i < count && reader.ok(); ++i) {
    const int64_t peer = reader.GetInt64();
    const int64_t num_bytes = reader.GetInt64();
    if (reader.ok() && peer >= 0 && peer < static_cast<int64_t>(sizes.size())) {
      sizes[peer].push_back(num_bytes);
    }
  }
}

Plan Decode(const std::string& encoded, size_t size) {
  Plan plan = {std::vector<std::vector<int64_t>>(size), std::vector<std::vector<int64_t>>(size)};
  WireReader reader(encoded);
  DecodeSizes(reader, plan.to);
  DecodeSizes(reader, plan.from);
  return plan;
}

}  // namespace

std::string EncodePlan(absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs) {
  WireWriter writer;
  writer.PutInt64(static_cast<int64_t>(sends.size()));
  for (const SendOp& send : sends) {
    writer.PutInt64(send.peer);
    writer.PutInt64(send.num_bytes);
  }
  writer.PutInt64(static_cast<int64_t>(recvs.size()));
  for (const RecvOp& recv : recvs) {
    writer.PutInt64(recv.peer);
    writer.PutInt64(recv.num_bytes);
  }
  return writer.bytes();
}

MatchedExchange MatchExchange(absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs,
                              int rank, absl::Span<const std::string> plans) {
  std::vector<Plan> peers;
  for (const std::string& plan : plans) peers.push_back(Decode(plan, plans.size()));
  MatchedExchange matched;

  std::vector<size_t> sent(plans.size(), 0);
  for (const SendOp& send : sends) {
    const std::vector<int64_t>& expected = peers[send.peer].from[rank];
    const size_t index = sent[send.peer]++;
    const size_t count = peers[rank].to[send.peer].size();
    if (count == expected.size() && expected[index] == send.num_bytes) {
      matched.sends.push_back(send);
    }
  }

  for (size_t peer = 0; peer < peers.size(); ++peer) {
    const size_t coming = peers[peer].to[rank].size();
    const size_t count = peers[rank].from[peer].size();
    if (count != coming && matched.mismatch.ok()) {
      matched.mismatch = absl::InvalidArgumentError(
          absl::StrCat("Exchange: rank ", peer, " sent ", coming, " messages to rank ", rank,
                       ", which receives ", count, " from it; the numbers must be equal"));
    }
  }
  std::vector<size_t> received(plans.size(), 0);
  for (const RecvOp& recv : recvs) {
    const std::vector<int64_t>& coming = peers[recv.peer].to[rank];
    const size_t index = received[recv.peer]++;
    if (peers[rank].from[recv.peer].size() != coming.size()) continue;
    if (coming[index] == recv.num_bytes) {
      matched.recvs.push_back(recv);
    } else if (matched.mismatch.ok()) {
      matched.mismatch = absl::InvalidArgumentError(absl::StrCat(
          "Exchange: rank ", recv.peer, " sent ", coming[index], " bytes as message ", index,
          " to rank ", rank, ", which receives ", recv.num_bytes, "; the sizes must be equal"));
    }
  }
  return matched;
}

}  // namespace nsa::comm::nccl
