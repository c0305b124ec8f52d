#include "tools/nsa_run/gather_rows.h"

#include <algorithm>
#include <memory>
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

absl::Status GatherRows(const RankContext& context, const ShardPlan& plan, const void* rows,
                        int64_t row_bytes, const RowSink& sink) {
  const int rank = context.communicator->rank();
  const int64_t max_rows = std::clamp<int64_t>(kBatchBytes / row_bytes, 1, plan.num_tokens());
  const int64_t max_bytes = rank == 0 ? max_rows * row_bytes : 0;
  absl::StatusOr<std::unique_ptr<kernels::Memory>> received = context.kernels->Allocate(max_bytes);
  if (!received.ok()) return received.status();
  std::byte* const batch = static_cast<std::byte*>((*received)->data());
  const std::byte* const own = static_cast<const std::byte*>(rows);
  std::vector<std::byte> host_batch(max_bytes);
  for (const std::vector<Piece>& pieces : MakeBatches(plan, max_rows)) {
    std::vector<comm::SendOp> sends;
    std::vector<comm::RecvOp> receives;
    int64_t batch_bytes = 0;
    for (const Piece& piece : pieces) {
      const int64_t num_bytes = piece.num_rows * row_bytes;
      if (piece.rank == rank) sends.push_back({0, own + piece.local * row_bytes, num_bytes});
      if (rank == 0) receives.push_back({piece.rank, batch + batch_bytes, num_bytes});
      batch_bytes += num_bytes;
    }
    absl::Status status = context.communicator->Exchange(sends, receives, /*stream=*/nullptr);
    if (!status.ok()) return status;
    if (rank == 0) {
      status =
          context.kernels->CopyToHost(host_batch.data(), batch, batch_bytes, /*stream=*/nullptr);
      if (!status.ok()) return status;
    }
    status = context.Wait();
    if (!status.ok()) return status;
    if (rank != 0) continue;
    status = sink(absl::MakeConstSpan(host_batch).subspan(0, batch_bytes));
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace nsa::tools
