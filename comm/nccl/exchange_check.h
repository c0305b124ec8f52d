// Comparing what ranks send in an Exchange with what their peers expect, for NcclOptions'
// check_exchange.
#ifndef COMM_NCCL_EXCHANGE_CHECK_H_
#define COMM_NCCL_EXCHANGE_CHECK_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "comm/communicator.h"

namespace nsa::comm::nccl {

// The sizes of one rank's part of an Exchange, for the others.
std::string EncodePlan(absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs);

struct MatchedExchange {
  // Those whose other end has the same size.
  std::vector<SendOp> sends;
  std::vector<RecvOp> recvs;
  // OK, or InvalidArgument about the first receive of this rank that does not match.
  absl::Status mismatch;
};

// `plans` holds every rank's EncodePlan.
MatchedExchange MatchExchange(absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs,
                              int rank, absl::Span<const std::string> plans);

}  // namespace nsa::comm::nccl

#endif  // COMM_NCCL_EXCHANGE_CHECK_H_
