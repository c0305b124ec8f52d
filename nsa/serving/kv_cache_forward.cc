// A sharded forward's tokens become a sequence: blocks stay with the ranks that own them, in pages
// of the sequence's home there; summaries and the last tokens go to the home.
#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "nsa/passes/agreement.h"
#include "nsa/passes/inputs.h"
#include "nsa/passes/summaries.h"
#include "nsa/serving/kv_cache_impl.h"

namespace nsa::serving {
namespace {

// Where a page lies, as the home tells the others.
struct Place {
  int64_t rank;
  int64_t offset;  // in the rank's window
};

}  // namespace

struct KvCacheImpl::ForwardPart {
  int home;
  SequenceId sequence;
  Engine& engine;
  const ForwardInputs& inputs;
  int32_t document_index;
  void* stream;

  int64_t num_blocks = 0;  // the first ones, which stay with their owners

  const kernels::Document& document() const { return engine.block_map().documents[document_index]; }
  int32_t owner(int64_t block) const {
    return engine.block_map().slc_owner[document().slc_block_begin + block];
  }
};

absl::Status KvCacheImpl::CheckForwardPart(const ForwardPart& part) const {
  const ShardPlan& plan = part.engine.shard_plan();
  if (part.home < 0 || part.home >= communicator_->size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("home = ", part.home, ": must lie in [0, ", communicator_->size(), ")"));
  }
  if (plan.num_ranks() != communicator_->size()) {
    return absl::InvalidArgumentError(absl::StrCat("engine: its plan has ", plan.num_ranks(),
                                                   " ranks, must have the communicator's ",
                                                   communicator_->size()));
  }
  const auto num_documents = static_cast<int32_t>(part.engine.block_map().documents.size());
  if (part.document_index < 0 || part.document_index >= num_documents) {
    return absl::InvalidArgumentError(
        absl::StrCat("document = ", part.document_index, ": must lie in [0, ", num_documents, ")"));
  }
  const kernels::Document& document = part.document();
  if (document.num_cmp_blocks != NumCompressionBlocks(options_.config, document.num_tokens) ||
      document.num_slc_blocks != NumSelectBlocks(options_.config, document.num_tokens)) {
    return absl::InvalidArgumentError(
        absl::StrCat("engine: its config must be the cache's, but document ", part.document_index,
                     " of ", document.num_tokens, " tokens has ", document.num_cmp_blocks,
                     " compression and ", document.num_slc_blocks, " select blocks there"));
  }
  if (!part.engine.LastBlocks().is_there) {
    return absl::FailedPreconditionError(
        "engine: its memory must hold its last forward still, and none of another engine's");
  }
  const int64_t num_tokens = plan.TokensOfRank(rank());
  if (num_tokens == 0) return absl::OkStatus();
  NSA_RETURN_IF_ERROR(
      CheckKeysAndValues(engine_options_, num_tokens, kernels_->RowAlignment(), part.inputs));
  const bool shares = BranchesOf(part.inputs)[0].branches == (kCmpBit | kSlcBit | kWinBit);
  if (options_.shares_kv && !shares) {
    return absl::InvalidArgumentError(
        "inputs: the branches must be given the same k and v, as shares_kv says");
  }
  return absl::OkStatus();
}

absl::Status KvCacheImpl::TakeForwardPages(const ForwardPart& part,
                                           std::vector<PageChange>* changes) {
  std::vector<int32_t> owners;
  for (int64_t block = 0; block < part.num_blocks; ++block) owners.push_back(part.owner(block));
  auto taken = table_->ExtendOnRanks(part.sequence, part.document().num_tokens, owners);
  if (!taken.ok()) return taken.status();
  *changes = *std::move(taken);
  // Others are about to write where earlier work of this home may still read.
  return kernels_->Synchronize(part.stream);
}

// Collective: where the pages of the blocks that this rank owns lie for it, in ascending order.
absl::StatusOr<std::vector<char*>> KvCacheImpl::ShareForwardPages(const ForwardPart& part) {
  std::string message;
  if (part.home == rank()) {
    const std::vector<PageId>& pages = (*table_->Find(part.sequence))->lists[0];
    for (int64_t block = 0; block < part.num_blocks; ++block) {
      const Place place = {table_->pages().RankOf(pages[block]), OffsetOf(pages[block])};
      message.append(reinterpret_cast<const char*>(&place), sizeof(place));
    }
  }
  const auto all = communicator_->HostAllGather(message);
  if (!all.ok()) return all.status();
  const std::string& places = (*all)[part.home];
  if (places.size() != part.num_blocks * sizeof(Place)) {
    return absl::InternalError(absl::StrCat("rank ", part.home, " sent ", places.size(),
                                            " bytes of places for ", part.num_blocks, " blocks"));
  }
  std::vector<char*> mine;
  for (int64_t block = 0; block < part.num_blocks; ++block) {
    if (part.owner(block) != rank()) continue;
    Place place;
    std::memcpy(&place, places.data() + block * sizeof(Place), sizeof(place));
    mine.push_back(bases_[place.rank] + place.offset);
  }
  return mine;
}

absl::Status KvCacheImpl::CopyNow(const std::vector<const void*>& src,
                                  const std::vector<void*>& dst, int64_t num_bytes, void* stream) {
  const auto memory =
      kernels_->Allocate(static_cast<int64_t>(std::max<size_t>(src.size(), 1) * 2 * sizeof(void*)));
  if (!memory.ok()) return memory.status();
  NSA_RETURN_IF_ERROR(CopyPieces(src, dst, num_bytes, (*memory)->data(), stream));
  return kernels_->Synchronize(stream);
}

absl::Status KvCacheImpl::CopyForwardBlocks(const ForwardPart& part,
                                            absl::Span<char* const> pages) {
  const BlockMap& blocks = part.engine.block_map();
  const auto* const records = static_cast<const char*>(part.engine.LastBlocks().records);
  const int64_t num_own = blocks.slc_blocks_of_rank[rank()];
  std::vector<const void*> src;
  std::vector<void*> dst;
  size_t next = 0;
  for (int64_t block = 0; block < part.num_blocks; ++block) {
    if (part.owner(block) != rank()) continue;
    const int64_t ordinal = blocks.slc_ordinal[part.document().slc_block_begin + block];
    for (int64_t head = 0; head < dims_.num_kv_heads; ++head) {
      src.push_back(records + (head * num_own + ordinal) * record_bytes_);
      dst.push_back(pages[next] + head * record_bytes_);
    }
    ++next;
  }
  return CopyNow(src, dst, record_bytes_, part.stream);
}

absl::Status KvCacheImpl::CopyForwardSummaries(const ForwardPart& part) {
  const auto* const rows = static_cast<const char*>(part.engine.LastBlocks().summaries) +
                           part.document().cmp_block_begin * summary_row_bytes_;
  const std::vector<PageId>& pages = (*table_->Find(part.sequence))->lists.back();
  std::vector<const void*> src;
  std::vector<void*> dst;
  for (int64_t i = 0; i < part.document().num_cmp_blocks; ++i) {
    src.push_back(rows + i * summary_row_bytes_);
    dst.push_back(AddressOf(table_->num_lists(), pages[i / kernels::kSummaryPageBlocks]) +
                  i % kernels::kSummaryPageBlocks * summary_row_bytes_);
  }
  return CopyNow(src, dst, summary_row_bytes_, part.stream);
}

struct KvCacheImpl::ForwardTail {
  // A run of it on one rank.
  struct Run {
    int32_t rank;
    int64_t tail_row, num_tokens;
  };

  int64_t first = 0;                   // token of the document
  int64_t first_slc = 0;               // that no block that stays holds
  int64_t first_kept = 0;              // that the lists from 1 on keep
  int64_t num_rows = 0;                // from `first` on
  std::vector<Run> runs;               // in order
  std::vector<kernels::Segment> mine;  // rows of the caller's tensors
  int64_t num_mine = 0;                // rows of `mine`
  int64_t stride_bytes = 0;  // of a tensor in `memory`: rows to send, then, at home, the tail's
  std::unique_ptr<kernels::Memory> memory;  // of each tensor, then `mine`
};

// Takes its memory; needs no other rank.
absl::StatusOr<KvCacheImpl::ForwardTail> KvCacheImpl::PrepareForwardTail(
    const ForwardPart& part) const {
  const ShardPlan& plan = part.engine.shard_plan();
  const kernels::Document& document = part.document();
  ForwardTail tail;
  tail.first_slc = part.num_blocks * dims_.select_block_tokens;
  tail.first_kept =
      table_->num_lists() > 1 ? table_->FirstKeptToken(document.num_tokens) : tail.first_slc;
  tail.first = std::min(tail.first_slc, tail.first_kept);
  tail.num_rows = document.num_tokens - tail.first;
  const int64_t begin = document.token_begin + tail.first, end = begin + tail.num_rows;
  for (const Chunk& chunk : plan.chunks()) {
    const int64_t from = std::max(chunk.begin, begin), to = std::min(chunk.end(), end);
    if (from >= to) continue;
    tail.runs.push_back({chunk.rank, from - begin, to - from});
    if (chunk.rank != rank()) continue;
    tail.mine.push_back({.row = plan.Locate(from).local,
                         .num_tokens = to - from,
                         .position = 0,
                         .document = 0,
                         .is_halo = 0});
    tail.num_mine += to - from;
  }
  tail.stride_bytes = (tail.num_mine + tail.num_rows) * int64_t{dims_.num_kv_heads} *
                      std::max(dims_.head_dim_qk, dims_.head_dim_v) * SizeOf(dims_.dtype);
  absl::StatusOr<std::unique_ptr<kernels::Memory>> memory =
      kernels_->Allocate(static_cast<int64_t>(TailTensors(part.inputs).size()) * tail.stride_bytes +
                         static_cast<int64_t>((tail.mine.size() + 1) * sizeof(tail.mine[0])));
  if (!memory.ok()) return memory.status();
  tail.memory = *std::move(memory);
  return tail;
}

std::vector<const ConstTensor*> KvCacheImpl::TailTensors(const ForwardInputs& inputs) const {
  if (options_.shares_kv) return {&inputs.k_slc, &inputs.v_slc};
  return {&inputs.k_slc, &inputs.v_slc, &inputs.k_win, &inputs.v_win, &inputs.k_cmp, &inputs.v_cmp};
}

// Collective: the tail goes from its owners to the home, which writes it into its pages.
absl::Status KvCacheImpl::AppendForwardTail(const ForwardPart& part, const ForwardTail& tail) {
  const std::vector<const ConstTensor*> tensors = TailTensors(part.inputs);
  const bool is_home = part.home == rank();
  const int64_t esize = SizeOf(dims_.dtype);
  const auto row_elements = [&](size_t tensor) {
    return int64_t{dims_.num_kv_heads} * (tensor % 2 == 0 ? dims_.head_dim_qk : dims_.head_dim_v);
  };
  char* const base = static_cast<char*>(tail.memory->data());
  auto* const segments = reinterpret_cast<kernels::Segment*>(
      base + static_cast<int64_t>(tensors.size()) * tail.stride_bytes);
  NSA_RETURN_IF_ERROR(kernels_->CopyFromHost(
      segments, tail.mine.data(), static_cast<int64_t>(tail.mine.size() * sizeof(tail.mine[0])),
      part.stream));

  std::vector<comm::SendOp> sends;
  std::vector<comm::RecvOp> recvs;
  std::array<char*, 6> tails = {};
  for (size_t i = 0; i < tensors.size(); ++i) {
    char* next = base + i * tail.stride_bytes;
    tails[i] = next + tail.num_mine * row_elements(i) * esize;
    if (tail.num_mine > 0) {
      NSA_RETURN_IF_ERROR(
          kernels_->CopyRows({.dtype = dims_.dtype,
                              .num_heads = dims_.num_kv_heads,
                              .head_dim = i % 2 == 0 ? dims_.head_dim_qk : dims_.head_dim_v,
                              .src = View(*tensors[i]),
                              .segments = segments,
                              .num_segments = static_cast<int32_t>(tail.mine.size()),
                              .dst = next},
                             part.stream));
    }
    for (const ForwardTail::Run& run : tail.runs) {
      const int64_t num_bytes = run.num_tokens * row_elements(i) * esize;
      if (run.rank == rank()) {
        sends.push_back({part.home, next, num_bytes});
        next += num_bytes;
      }
      if (is_home) {
        recvs.push_back({run.rank, tails[i] + run.tail_row * row_elements(i) * esize, num_bytes});
      }
    }
  }
  NSA_RETURN_IF_ERROR(communicator_->Exchange(sends, recvs, part.stream));
  if (!is_home) return kernels_->Synchronize(part.stream);

  const int32_t slot = (*table_->Find(part.sequence))->slot;
  const int64_t num_tokens = part.document().num_tokens;
  const auto rows_from = [&](size_t tensor, int64_t row) -> kernels::ConstTensor3 {
    return {tails[tensor] + row * row_elements(tensor) * esize, row_elements(tensor),
            tensor % 2 == 0 ? dims_.head_dim_qk : dims_.head_dim_v};
  };
  const auto append = [&](int64_t from, bool to_slc) -> absl::Status {
    for (int64_t at = from; at < num_tokens; at += kMaxExtendTokens) {
      const int64_t count = std::min(kMaxExtendTokens, num_tokens - at);
      std::vector<kernels::DecodeRow> rows;
      for (int64_t i = 0; i < count; ++i) rows.push_back({slot, at + i});
      NSA_RETURN_IF_ERROR(UploadRows(rows, part.stream));
      kernels::AppendTokensParams params = AppendParams(count);
      params.compresses = false;
      const auto tokens = [&](size_t k) -> kernels::NewTokens {
        return {rows_from(k, at - tail.first), rows_from(k + 1, at - tail.first)};
      };
      if (to_slc) {
        params.slc = tokens(0);
      } else {
        params.win = tokens(options_.shares_kv ? 0 : 2);
        params.cmp = tokens(options_.shares_kv ? 0 : 4);
      }
      NSA_RETURN_IF_ERROR(kernels_->AppendTokens(params, part.stream));
    }
    return absl::OkStatus();
  };
  NSA_RETURN_IF_ERROR(append(tail.first_slc, /*to_slc=*/true));
  if (table_->num_lists() > 1) NSA_RETURN_IF_ERROR(append(tail.first_kept, /*to_slc=*/false));
  return kernels_->Synchronize(part.stream);
}

absl::Status KvCacheImpl::AppendForward(int home, SequenceId sequence, Engine& engine,
                                        const ForwardInputs& inputs, int32_t document,
                                        void* stream) {
  LookForLostRanks();
  ForwardPart part = {home, sequence, engine, inputs, document, stream};
  absl::Status status = CheckForwardPart(part);
  // What fails on this rank alone fails before the agreement, for which the others wait.
  if (status.ok()) status = engine.WaitForLastCall(stream);
  if (status.ok()) status = kernels_->WaitFor(*done_, stream);
  const bool is_in_order = status.ok();
  std::vector<PageChange> changes;
  bool has_pages = false;
  if (status.ok()) {
    // What may be written to again has to be at home, if only a home's pages can be.
    const int64_t num_tokens = part.document().num_tokens;
    const int64_t stays = is_reachable_
                              ? num_tokens
                              : std::max<int64_t>(num_tokens - options_.max_rollback_tokens, 0);
    part.num_blocks = stays / dims_.select_block_tokens;
    if (home == rank()) {
      status = TakeForwardPages(part, &changes);
      has_pages = status.ok();
    }
  }
  const auto run = [&]() -> absl::Status {
    NSA_RETURN_IF_ERROR(
        Agree(*communicator_, status,
              {{"home", absl::StrCat(home)}, {"document", absl::StrCat(document)}}));
    const auto pages = ShareForwardPages(part);
    if (!pages.ok()) return pages.status();
    if (!is_reachable_) NSA_RETURN_IF_ERROR(window_->BeginWrite(stream));
    absl::Status copied = CopyForwardBlocks(part, *pages);
    if (copied.ok() && home == rank()) copied = Apply(changes, stream);
    if (copied.ok() && home == rank()) copied = CopyForwardSummaries(part);
    if (!is_reachable_) {
      NSA_RETURN_IF_ERROR(window_->Publish(stream));
      NSA_RETURN_IF_ERROR(window_->Release(stream));
    }
    const absl::StatusOr<ForwardTail> tail = PrepareForwardTail(part);
    // Also: nothing of it is read before everyone has written.
    NSA_RETURN_IF_ERROR(Agree(*communicator_, copied.ok() ? tail.status() : copied, {}));
    return AbortOnError(*communicator_, AppendForwardTail(part, *tail));
  };
  status = run();
  if (is_in_order) status.Update(kernels_->Record(*done_, stream));
  if (!status.ok() && has_pages) table_->Truncate(sequence, 0).IgnoreError();
  if (status.ok() && home == rank()) stats_.tokens_appended += part.document().num_tokens;
  return status;
}

}  // namespace nsa::serving
