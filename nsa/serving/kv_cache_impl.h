// The cache behind the interface: memory, tables and steps. Which pages there are is the
// SequenceTable's; what follows from a change of it for the kernels is here.
#ifndef NSA_SERVING_KV_CACHE_IMPL_H_
#define NSA_SERVING_KV_CACHE_IMPL_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "comm/communicator.h"
#include "kernels/kernels.h"
#include "nsa/passes/context.h"
#include "nsa/serving/kv_cache.h"
#include "nsa/serving/sequence_table.h"

namespace nsa::serving {

constexpr int32_t kMaxNewTokens = 64;  // of a sequence in a step

class KvCacheImpl final : public KvCache {
 public:
  KvCacheImpl(const KvCacheOptions& options, std::shared_ptr<comm::Communicator> communicator,
              std::shared_ptr<kernels::Kernels> kernels)
      : options_(options), communicator_(std::move(communicator)), kernels_(std::move(kernels)) {
    if (options_.home_shares.empty()) options_.home_shares.assign(communicator_->size(), 1.0);
    engine_options_.config = options_.config;
    engine_options_.dtype = options_.dtype;
  }

  // Collective.
  absl::Status Prepare();

  bool is_reachable() const override { return is_reachable_; }

  absl::StatusOr<SequenceId> Open() override {
    LookForLostRanks();
    return table_->Open();
  }
  absl::StatusOr<int64_t> NumTokens(SequenceId sequence) const override {
    const auto found = table_->Find(sequence);
    if (!found.ok()) return found.status();
    return (*found)->num_tokens;
  }
  absl::Status Append(SequenceId sequence, const KvTokens& tokens, void* stream) override;
  absl::Status AppendForward(int home, SequenceId sequence, Engine& engine,
                             const ForwardInputs& inputs, int32_t document, void* stream) override;
  absl::Status Truncate(SequenceId sequence, int64_t num_tokens) override {
    return table_->Truncate(sequence, num_tokens);
  }
  absl::StatusOr<SequenceId> Fork(SequenceId sequence) override;
  absl::Status Close(SequenceId sequence) override { return table_->Close(sequence); }

  absl::Status PlanStep(absl::Span<const StepSequence> batch, void* stream) override;
  absl::Status RunStep(int64_t num_rows, const StepInputs& inputs, const StepOutputs& outputs,
                       void* stream) override;
  absl::Status CheckTensors(int64_t num_rows, const StepInputs& inputs,
                            const StepOutputs& outputs) const override;
  absl::Status Check(const StepSequence& step) const override {
    NSA_RETURN_IF_ERROR(CheckNumNew(step));
    return table_->Check(step.sequence, step.num_new);
  }
  KvCacheStats Stats() const override;

 private:
  int rank() const { return communicator_->rank(); }

  // Calls of whatever streams share the memory. A graph's owner keeps it in order with other calls.
  template <typename Run>
  absl::Status RunInOrder(void* stream, Run run) {
    const absl::StatusOr<bool> capturing = kernels_->IsCapturing(stream);
    if (!capturing.ok()) return capturing.status();
    if (*capturing) return run();
    NSA_RETURN_IF_ERROR(kernels_->WaitFor(*done_, stream));
    absl::Status status = run();
    status.Update(kernels_->Record(*done_, stream));
    return status;
  }

  absl::Status CheckNumNew(const StepSequence& step) const {
    if (step.num_new >= 1 && step.num_new <= kMaxNewTokens) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("num_new = ", step.num_new, " of sequence ",
                                                   step.sequence, ": must lie in [1, ",
                                                   kMaxNewTokens, "]"));
  }

  void LookForLostRanks() {
    for (int lost : communicator_->LostRanks()) table_->Lose(lost);
  }

  // What CheckForward is shown.
  ForwardInputs InputsOf(const KvTokens& kv) const;

  // Lists of pages by branch.
  int win_list() const { return table_->num_lists() == 1 ? 0 : 1; }
  int cmp_list() const { return table_->num_lists() - 1; }

  // Of a page of this home, wherever it lies; null where this rank cannot load it.
  char* AddressOf(int list, PageId page) const {
    if (list == table_->num_lists()) {
      return static_cast<char*>(summaries_->data()) +
             int64_t{page} * kernels::kSummaryPageBlocks * summary_row_bytes_;
    }
    const int owner = table_->pages().RankOf(page);
    if (bases_[owner] == nullptr) return nullptr;
    return bases_[owner] + OffsetOf(page);
  }
  // In its rank's window.
  int64_t OffsetOf(PageId page) const {
    const int owner = table_->pages().RankOf(page);
    return (share_begin_[owner] + table_->pages().IndexOf(page)) * page_bytes_;
  }

  void** TableRow(int list, int32_t slot) const {
    const bool is_summaries = list == table_->num_lists();
    void** const table =
        static_cast<void**>(tables_->data()) + list * int64_t{options_.max_sequences} * max_pages_;
    return table + slot * (is_summaries ? max_summary_pages_ : max_pages_);
  }
  kernels::PageTables Tables() const {
    return {.slc = TableRow(0, 0),
            .win = TableRow(win_list(), 0),
            .cmp = TableRow(cmp_list(), 0),
            .summaries = TableRow(table_->num_lists(), 0),
            .max_pages = max_pages_,
            .max_summary_pages = max_summary_pages_};
  }

  // Tells the kernels of `changes`, and copies what they say.
  absl::Status Apply(absl::Span<const PageChange> changes, void* stream);
  absl::Status CopyPieces(const std::vector<const void*>& src, const std::vector<void*>& dst,
                          int64_t num_bytes, void* memory, void* stream);
  absl::Status UploadRows(absl::Span<const kernels::DecodeRow> rows, void* stream);
  kernels::AppendTokensParams AppendParams(int64_t num_rows) const;
  // Of the tokens [begin, begin + num_rows) of `inputs`, whose rows were uploaded.
  absl::Status AppendRows(int64_t num_rows, int64_t begin, const ForwardInputs& inputs,
                          void* stream);

  absl::Status RunStepInPlace(int64_t num_rows, const StepInputs& inputs,
                              const StepOutputs& outputs, void* stream);
  absl::Status RunStepFetching(const StepInputs& inputs, const StepOutputs& outputs, void* stream);
  // Of plan_rows_ [begin, end), whose block indices are known.
  absl::Status FetchPages(int64_t begin, int64_t end, const int32_t* block_indices, void* stream);
  kernels::DecodeSelectParams SelectParams(int64_t begin, int64_t num_rows,
                                           const StepInputs& inputs, int32_t* indices) const;
  kernels::DecodeAttendParams AttendParams(int64_t begin, int64_t num_rows,
                                           const StepInputs& inputs, const StepOutputs& outputs,
                                           const int32_t* indices) const;
  int32_t* IndicesOf(const StepOutputs& outputs) const {
    return outputs.block_indices != nullptr ? outputs.block_indices
                                            : static_cast<int32_t*>(indices_->data());
  }

  // AppendForward, of what its arguments say (kv_cache_forward.cc).
  struct ForwardPart;
  absl::Status CheckForwardPart(const ForwardPart& part) const;
  absl::Status TakeForwardPages(const ForwardPart& part, std::vector<PageChange>* changes);
  absl::StatusOr<std::vector<char*>> ShareForwardPages(const ForwardPart& part);
  absl::Status CopyForwardBlocks(const ForwardPart& part, absl::Span<char* const> pages);
  absl::Status CopyForwardSummaries(const ForwardPart& part);
  struct ForwardTail;  // the tokens that the blocks that stay do not hold, or the lists keep
  std::vector<const ConstTensor*> TailTensors(const ForwardInputs& inputs) const;
  absl::StatusOr<ForwardTail> PrepareForwardTail(const ForwardPart& part) const;
  absl::Status AppendForwardTail(const ForwardPart& part, const ForwardTail& tail);
  absl::Status CopyNow(const std::vector<const void*>& src, const std::vector<void*>& dst,
                       int64_t num_bytes, void* stream);

  KvCacheOptions options_;
  EngineOptions engine_options_;
  const std::shared_ptr<comm::Communicator> communicator_;
  const std::shared_ptr<kernels::Kernels> kernels_;
  kernels::AttentionDims dims_;
  int64_t record_bytes_ = 0, page_bytes_ = 0, summary_row_bytes_ = 0;
  int64_t max_pages_ = 0, max_summary_pages_ = 0;  // of a sequence

  std::unique_ptr<comm::Window> window_;  // this rank's pages, of all homes
  std::vector<char*> bases_;              // [P] where this rank reaches them; null where it cannot
  bool is_reachable_ = false;
  std::vector<int64_t> share_begin_;  // [P] first page of this home
  std::unique_ptr<SequenceTable> table_;

  std::unique_ptr<kernels::Memory> summaries_;  // this home's summary pages
  std::unique_ptr<kernels::Memory> tables_;   // [lists,max_sequences,max_pages], then of summaries
  std::unique_ptr<kernels::Memory> rows_;     // DecodeRow
  std::unique_ptr<kernels::Memory> copies_;   // sources and destinations of CopyPieces
  std::unique_ptr<kernels::Memory> indices_;  // [max_step_rows,Hkv,n]
  std::unique_ptr<kernels::Memory> scratch_;
  std::unique_ptr<kernels::Memory> slots_;  // pages that a piece of a step fetches
  std::unique_ptr<kernels::Memory> fetch_list_;
  std::unique_ptr<kernels::Event> done_;

  struct PlanRow {
    SequenceId sequence;
    kernels::DecodeRow row;
  };
  std::vector<PlanRow> plan_;  // of the last PlanStep
  KvCacheStats stats_;
};

}  // namespace nsa::serving

#endif  // NSA_SERVING_KV_CACHE_IMPL_H_
