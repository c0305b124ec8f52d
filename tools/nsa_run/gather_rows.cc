#include "tools/nsa_run/gather_rows.h"

#include <algorithm>
#include <vector>

namespace nsa::tools {
namespace {

// What rank 0 receives at a time.
constexpr int64_t kBatchBytes = int64_t{32} << 20;

// Consecutive tokens of one rank.
struct Piece {
  int32_t rank;
  int64_t local;  // first row at its rank
  int64_t num_rows;
};

// The sequence in batches of at most `max_rows` rows, the same on all ranks.
std::vector<std::vector<Piece>> MakeBatches(const ShardPlan& plan, int64_t max_rows) {
  std::vector<std::vector<Piece>> batches;
  std::vector<int64_t> next_local(plan.num_ranks());
  int64_t room = 0;
  for (const Chunk& chunk : plan.chunks()) {
    for (int64_t left = chunk.num_tokens; left > 0;) {
      if (room == 0) {
        batches.emplace_back();
        room = max_rows;
      }
      const int64_t num_rows = std::min(left, room);
      batches.back().push_back({chunk.rank, next_local[chunk.rank], num_rows});
      next_local[chunk.rank] += num_rows;
      left -= num_rows;
      room -= num_rows;
    }
  }
  return batches;
}

}  // namespace

absl::Status GatherRows(const ShardPlan& plan, comm::Communicator& communicator,
                        kernels::Kernels& kernels, const void* rows, int64_t row_bytes,
                        const RowSink& sink) {
  const int rank = communicator.rank();
  const int64_t max_rows = std::clamp<int64_t>(kBatchBytes / row_bytes, 1, plan.num_tokens());
  std::vector<std::byte> own(max_rows * row_bytes);                    // rows to send
  std::vector<std::byte> batch(rank == 0 ? max_rows * row_bytes : 0);  // rows received
  for (const std::vector<Piece>& pieces : MakeBatches(plan, max_rows)) {
    std::vector<comm::SendOp> sends;
    std::vector<comm::RecvOp> receives;
    int64_t own_bytes = 0;
    int64_t batch_bytes = 0;
    for (const Piece& piece : pieces) {
      const int64_t num_bytes = piece.num_rows * row_bytes;
      if (piece.rank == rank) {
        const std::byte* from = static_cast<const std::byte*>(rows) + piece.local * row_bytes;
        std::byte* staged = own.data() + own_bytes;
        absl::Status status = kernels.CopyToHost(staged, from, num_bytes, /*stream=*/nullptr);
        if (!status.ok()) return status;
        sends.push_back({.peer = 0, .data = staged, .num_bytes = num_bytes});
        own_bytes += num_bytes;
      }
      if (rank == 0) {
        receives.push_back(
            {.peer = piece.rank, .data = batch.data() + batch_bytes, .num_bytes = num_bytes});
        batch_bytes += num_bytes;
      }
    }
    absl::Status status = kernels.Synchronize(/*stream=*/nullptr);
    if (!status.ok()) return status;
    status = communicator.Exchange(sends, receives, /*stream=*/nullptr);
    if (!status.ok()) return status;
    if (rank != 0) continue;
    status = sink(absl::MakeConstSpan(batch).subspan(0, batch_bytes));
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace nsa::tools
