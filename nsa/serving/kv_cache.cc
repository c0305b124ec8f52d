#include "nsa/serving/kv_cache.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <string>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "nsa/passes/agreement.h"
#include "nsa/passes/inputs.h"
#include "nsa/passes/summaries.h"
#include "nsa/serving/kv_cache_impl.h"

namespace nsa::serving {
namespace {

// Rows whose selected pages are fetched at a time, where they are not read in place.
constexpr int64_t kFetchRows = 4;

// Rows [begin, ...) of a tensor.
kernels::ConstTensor3 RowsFrom(const ConstTensor& tensor, int64_t begin) {
  return {static_cast<const char*>(tensor.data) + begin * tensor.strides[0] * SizeOf(tensor.dtype),
          tensor.strides[0], tensor.strides[1]};
}
kernels::Tensor3 RowsFrom(const Tensor& tensor, int64_t begin) {
  return {static_cast<char*>(tensor.data) + begin * tensor.strides[0] * SizeOf(tensor.dtype),
          tensor.strides[0], tensor.strides[1]};
}

kernels::NewTokens TokensFrom(const ConstTensor& k, const ConstTensor& v, int64_t begin) {
  return {RowsFrom(k, begin), RowsFrom(v, begin)};
}

// First page of home `home` among `num_pages` of a rank.
int64_t ShareBegin(const std::vector<double>& shares, int home, int64_t num_pages) {
  const double total = std::accumulate(shares.begin(), shares.end(), 0.0);
  const double before = std::accumulate(shares.begin(), shares.begin() + home, 0.0);
  return std::min(num_pages, static_cast<int64_t>(std::floor(num_pages * (before / total))));
}

absl::Status CheckOptions(const KvCacheOptions& options, int num_ranks,
                          const kernels::Kernels& kernels) {
  NSA_RETURN_IF_ERROR(Validate(options.config));
  // Far beyond any host, and such that no product of them overflows.
  const struct {
    const char* name;
    int64_t value, low, high;
  } limits[] = {{"num_pages", options.num_pages, 0, int64_t{1} << 30},
                {"max_sequences", options.max_sequences, 1, int64_t{1} << 20},
                {"max_tokens", options.max_tokens, 1, int64_t{1} << 32},
                {"summary_tokens", options.summary_tokens, 0, int64_t{1} << 36},
                {"max_step_rows", options.max_step_rows, 1, int64_t{1} << 20},
                {"max_rollback_tokens", options.max_rollback_tokens, 0, int64_t{1} << 32}};
  for (const auto& [name, value, low, high] : limits) {
    if (value >= low && value <= high) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(name, " = ", value, ": must lie in [", low, ", ", high, "]"));
  }
  const std::vector<double>& shares = options.home_shares;
  const bool all_valid = std::all_of(shares.begin(), shares.end(),
                                     [](double x) { return std::isfinite(x) && x >= 0.0; });
  const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
  if (!shares.empty() && (static_cast<int>(shares.size()) != num_ranks || !all_valid ||
                          !(sum > 0.0) || !std::isfinite(sum))) {
    return absl::InvalidArgumentError(absl::StrCat("home_shares = {", absl::StrJoin(shares, ", "),
                                                   "}: must be ", num_ranks,
                                                   " numbers, none negative, not all zero, of a "
                                                   "finite sum"));
  }
  const kernels::AttentionDims dims = MakeDims(options.config, options.dtype);
  NSA_RETURN_IF_ERROR(kernels.Supports(dims));
  EngineOptions engine;
  engine.config = options.config;
  engine.dtype = options.dtype;
  ForwardInputs inputs;
  inputs.SetSharedKv(ConstTensor(nullptr, options.dtype, {0, dims.num_kv_heads, dims.head_dim_qk}),
                     ConstTensor(nullptr, options.dtype, {0, dims.num_kv_heads, dims.head_dim_v}));
  inputs.compress_k = options.compress_k;
  inputs.compress_v = options.compress_v;
  return CheckKeysAndValues(engine, 0, kernels.RowAlignment(), inputs);
}

// The new tokens of a step that was planned and has failed.
void TakeBack(KvCache& cache, absl::Span<const StepSequence> batch) {
  for (const StepSequence& step : batch) {
    const absl::StatusOr<int64_t> num_tokens = cache.NumTokens(step.sequence);
    if (num_tokens.ok()) cache.Truncate(step.sequence, *num_tokens - step.num_new).IgnoreError();
  }
}

}  // namespace

absl::Status KvCacheImpl::Prepare() {
  const int num_ranks = communicator_->size();
  const absl::Status valid = CheckOptions(options_, num_ranks, *kernels_);
  FieldList fields = Fields(options_.config);
  fields.emplace_back("dtype", NameOf(options_.dtype));
  fields.emplace_back("shares_kv", options_.shares_kv ? "true" : "false");
  fields.emplace_back("home_shares", absl::StrJoin(options_.home_shares, ", "));
  fields.emplace_back("max_rollback_tokens", absl::StrCat(options_.max_rollback_tokens));
  NSA_RETURN_IF_ERROR(Agree(*communicator_, valid, fields));
  dims_ = MakeDims(options_.config, options_.dtype);
  record_bytes_ = kernels_->RecordBytes(dims_);
  page_bytes_ = record_bytes_ * dims_.num_kv_heads;
  summary_row_bytes_ =
      int64_t{dims_.num_kv_heads} * (dims_.head_dim_qk + dims_.head_dim_v) * SizeOf(dims_.dtype);
  max_pages_ = CeilDiv(options_.max_tokens, dims_.select_block_tokens);
  max_summary_pages_ =
      std::max<int64_t>(1, CeilDiv(NumCompressionBlocks(options_.config, options_.max_tokens),
                                   kernels::kSummaryPageBlocks));

  const auto gather = [&](int64_t mine) -> absl::StatusOr<std::vector<int64_t>> {
    const auto all = communicator_->HostAllGather(absl::StrCat(mine));
    if (!all.ok()) return all.status();
    std::vector<int64_t> values(all->size());
    for (size_t i = 0; i < all->size(); ++i) {
      if (!absl::SimpleAtoi((*all)[i], &values[i])) return absl::InternalError((*all)[i]);
    }
    return values;
  };
  const auto pages_of_rank = gather(options_.num_pages);
  if (!pages_of_rank.ok()) return pages_of_rank.status();
  auto window = communicator_->CreateWindow(options_.num_pages * page_bytes_);
  if (!window.ok()) return window.status();
  window_ = *std::move(window);
  for (int peer = 0; peer < num_ranks; ++peer) {
    bases_.push_back(static_cast<char*>(window_->PeerData(peer)));
  }
  const bool reaches_all =
      std::all_of(bases_.begin(), bases_.end(), [](char* base) { return base != nullptr; });
  const auto reach = gather(reaches_all ? 1 : 0);
  if (!reach.ok()) return reach.status();
  is_reachable_ = std::count(reach->begin(), reach->end(), 1) == num_ranks;
  if (!is_reachable_) {
    bases_.assign(num_ranks, nullptr);
    bases_[rank()] = static_cast<char*>(window_->data());
  }

  SequenceTableOptions table = {
      .config = options_.config,
      .home = rank(),
      .pages_of_rank = {},
      .max_sequences = options_.max_sequences,
      .max_tokens = options_.max_tokens,
      .num_lists = !options_.shares_kv ? 3
                   : is_reachable_     ? 1
                                       : 2,
      .only_at_home = !is_reachable_,
      .max_rollback_tokens = options_.max_rollback_tokens,
  };
  int64_t num_pages = 0;
  for (int64_t of_rank : *pages_of_rank) {
    share_begin_.push_back(ShareBegin(options_.home_shares, rank(), of_rank));
    table.pages_of_rank.push_back(ShareBegin(options_.home_shares, rank() + 1, of_rank) -
                                  share_begin_.back());
    num_pages += table.pages_of_rank.back();
  }
  const int64_t summary_tokens =
      options_.summary_tokens > 0 ? options_.summary_tokens : num_pages * dims_.select_block_tokens;
  // The last page of each sequence may be filled in part.
  table.num_summary_pages =
      CeilDiv(summary_tokens / dims_.compress_stride_tokens, kernels::kSummaryPageBlocks) +
      options_.max_sequences;
  table_ = std::make_unique<SequenceTable>(table);

  const int64_t rows = std::max<int64_t>(options_.max_step_rows, kMaxExtendTokens);
  const int64_t picks = int64_t{dims_.num_kv_heads} * dims_.num_selected_blocks;
  const int64_t fetched_records = is_reachable_ ? 0 : kFetchRows * picks * dims_.num_kv_heads;
  const std::pair<std::unique_ptr<kernels::Memory>*, int64_t> memory[] = {
      {&summaries_, table.num_summary_pages * kernels::kSummaryPageBlocks * summary_row_bytes_},
      {&tables_, (table.num_lists * max_pages_ + max_summary_pages_) * options_.max_sequences *
                     int64_t{sizeof(void*)}},
      {&rows_, rows * int64_t{sizeof(kernels::DecodeRow)}},
      // Of a step: each sequence's last page of each list, and of summaries.
      {&copies_, 2 * (table.num_lists + 1) * options_.max_step_rows * int64_t{sizeof(void*)}},
      {&indices_, options_.max_step_rows * picks * int64_t{sizeof(int32_t)}},
      {&scratch_, kernels_->DecodeScratchBytes(dims_, {.num_rows = options_.max_step_rows,
                                                       .max_tokens = options_.max_tokens})},
      {&slots_, fetched_records * record_bytes_},
      {&fetch_list_, 16 + fetched_records * int64_t{sizeof(int64_t) + sizeof(int32_t)}},
  };
  absl::Status status;
  for (const auto& [to, num_bytes] : memory) {
    auto allocated = kernels_->Allocate(std::max<int64_t>(num_bytes, 1));
    status.Update(allocated.status());
    if (allocated.ok()) *to = *std::move(allocated);
  }
  // No step is planned yet.
  const std::vector<kernels::DecodeRow> no_rows(options_.max_step_rows, {-1, 0});
  if (status.ok()) status.Update(UploadRows(no_rows, /*stream=*/nullptr));
  auto done = kernels_->CreateEvent(kernels::EventUse::kOrder);
  status.Update(done.status());
  if (done.ok()) {
    done_ = *std::move(done);
    status.Update(kernels_->Record(*done_, nullptr));
  }
  return Agree(*communicator_, status, {});
}

ForwardInputs KvCacheImpl::InputsOf(const KvTokens& kv) const {
  ForwardInputs inputs;
  inputs.SetSharedKv(kv.k_slc, kv.v_slc);
  if (!options_.shares_kv) {
    inputs.k_cmp = kv.k_cmp;
    inputs.v_cmp = kv.v_cmp;
    inputs.k_win = kv.k_win;
    inputs.v_win = kv.v_win;
  }
  inputs.compress_k = options_.compress_k;
  inputs.compress_v = options_.compress_v;
  return inputs;
}

absl::Status KvCacheImpl::CopyPieces(const std::vector<const void*>& src,
                                     const std::vector<void*>& dst, int64_t num_bytes, void* memory,
                                     void* stream) {
  if (src.empty()) return absl::OkStatus();
  const int64_t count = static_cast<int64_t>(src.size());
  const int64_t list_bytes = count * int64_t{sizeof(void*)};
  auto* const sources = static_cast<const void**>(memory);
  auto* const destinations = static_cast<void**>(memory) + count;
  NSA_RETURN_IF_ERROR(kernels_->CopyFromHost(sources, src.data(), list_bytes, stream));
  NSA_RETURN_IF_ERROR(kernels_->CopyFromHost(destinations, dst.data(), list_bytes, stream));
  return kernels_->CopyPieces(
      {.src = sources, .dst = destinations, .count = count, .num_bytes = num_bytes}, stream);
}

absl::Status KvCacheImpl::Apply(absl::Span<const PageChange> changes, void* stream) {
  // Runs of neighbours of one table.
  for (size_t begin = 0, end = 0; begin < changes.size(); begin = end) {
    const PageChange& first = changes[begin];
    std::vector<void*> addresses;
    for (; end < changes.size() && changes[end].list == first.list &&
           changes[end].slot == first.slot &&
           changes[end].index == first.index + static_cast<int64_t>(end - begin);
         ++end) {
      addresses.push_back(AddressOf(first.list, changes[end].after));
    }
    NSA_RETURN_IF_ERROR(
        kernels_->CopyFromHost(TableRow(first.list, first.slot) + first.index, addresses.data(),
                               static_cast<int64_t>(addresses.size() * sizeof(void*)), stream));
  }
  // Pages first, then summary pages, whose list is the last.
  for (bool of_summaries : {false, true}) {
    std::vector<const void*> src;
    std::vector<void*> dst;
    for (const PageChange& change : changes) {
      if (change.before == kNoPage || (change.list == table_->num_lists()) != of_summaries)
        continue;
      src.push_back(AddressOf(change.list, change.before));
      dst.push_back(AddressOf(change.list, change.after));
    }
    void** const memory =
        static_cast<void**>(copies_->data()) +
        (of_summaries ? 2 * table_->num_lists() * int64_t{options_.max_step_rows} : 0);
    const int64_t num_bytes =
        of_summaries ? kernels::kSummaryPageBlocks * summary_row_bytes_ : page_bytes_;
    NSA_RETURN_IF_ERROR(CopyPieces(src, dst, num_bytes, memory, stream));
  }
  return absl::OkStatus();
}

absl::Status KvCacheImpl::UploadRows(absl::Span<const kernels::DecodeRow> rows, void* stream) {
  return kernels_->CopyFromHost(rows_->data(), rows.data(),
                                static_cast<int64_t>(rows.size() * sizeof(kernels::DecodeRow)),
                                stream);
}

kernels::AppendTokensParams KvCacheImpl::AppendParams(int64_t num_rows) const {
  return {.dims = dims_,
          .rows = static_cast<const kernels::DecodeRow*>(rows_->data()),
          .num_rows = num_rows,
          .tables = Tables(),
          .slc = {},
          .win = {},
          .cmp = {},
          .compresses = true,
          .compressor = options_.config.compressor,
          .weights_k = WeightsOf(options_.compress_k),
          .weights_v = WeightsOf(options_.compress_v)};
}

absl::Status KvCacheImpl::AppendRows(int64_t num_rows, int64_t begin, const ForwardInputs& inputs,
                                     void* stream) {
  kernels::AppendTokensParams params = AppendParams(num_rows);
  params.slc = TokensFrom(inputs.k_slc, inputs.v_slc, begin);
  params.win = TokensFrom(inputs.k_win, inputs.v_win, begin);
  params.cmp = TokensFrom(inputs.k_cmp, inputs.v_cmp, begin);
  return kernels_->AppendTokens(params, stream);
}

absl::Status KvCacheImpl::Append(SequenceId sequence, const KvTokens& tokens, void* stream) {
  LookForLostRanks();
  const ForwardInputs inputs = InputsOf(tokens);
  const int64_t num_tokens = inputs.k_slc.shape.empty() ? 0 : inputs.k_slc.shape[0];
  NSA_RETURN_IF_ERROR(
      CheckKeysAndValues(engine_options_, num_tokens, kernels_->RowAlignment(), inputs));
  NSA_RETURN_IF_ERROR(table_->Check(sequence, num_tokens));
  const int64_t num_before = (*table_->Find(sequence))->num_tokens;
  const absl::Status status = RunInOrder(stream, [&]() -> absl::Status {
    for (int64_t begin = 0; begin < num_tokens; begin += kMaxExtendTokens) {
      const auto num_rows = static_cast<int32_t>(std::min(kMaxExtendTokens, num_tokens - begin));
      const SequenceTable::Sequence* const found = *table_->Find(sequence);
      std::vector<kernels::DecodeRow> rows;
      for (int32_t i = 0; i < num_rows; ++i) rows.push_back({found->slot, found->num_tokens + i});
      const StepSequence step = {sequence, num_rows};
      const auto changes = table_->Extend({&step, 1});
      if (!changes.ok()) return changes.status();
      NSA_RETURN_IF_ERROR(Apply(*changes, stream));
      NSA_RETURN_IF_ERROR(UploadRows(rows, stream));
      NSA_RETURN_IF_ERROR(AppendRows(num_rows, begin, inputs, stream));
    }
    stats_.tokens_appended += num_tokens;
    return absl::OkStatus();
  });
  if (!status.ok()) table_->Truncate(sequence, num_before).IgnoreError();
  return status;
}

absl::StatusOr<SequenceId> KvCacheImpl::Fork(SequenceId sequence) {
  LookForLostRanks();
  std::vector<PageChange> changes;
  const absl::StatusOr<SequenceId> forked = table_->Fork(sequence, &changes);
  if (!forked.ok()) return forked.status();
  const absl::Status status = RunInOrder(nullptr, [&] { return Apply(changes, nullptr); });
  if (status.ok()) return *forked;
  table_->Close(*forked).IgnoreError();
  return status;
}

absl::Status KvCacheImpl::CheckTensors(int64_t num_rows, const StepInputs& inputs,
                                       const StepOutputs& outputs) const {
  if (num_rows < 0 || num_rows > options_.max_step_rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("rows of the step = ", num_rows,
                     ": must be at most max_step_rows = ", options_.max_step_rows));
  }
  if (num_rows == 0) return absl::OkStatus();
  ForwardInputs forward = InputsOf(inputs.kv);
  forward.q = inputs.q;
  forward.gate = inputs.gate;
  ForwardOutputs o;
  o.o = outputs.o;
  return CheckForward(engine_options_, num_rows, kernels_->RowAlignment(), forward, o);
}

absl::Status KvCacheImpl::PlanStep(absl::Span<const StepSequence> batch, void* stream) {
  LookForLostRanks();
  std::vector<PlanRow> plan;
  int64_t num_rows = 0;
  for (const StepSequence& step : batch) {
    NSA_RETURN_IF_ERROR(CheckNumNew(step));
    const absl::StatusOr<const SequenceTable::Sequence*> found = table_->Find(step.sequence);
    if (!found.ok()) return found.status();
    num_rows += step.num_new;
    for (int32_t i = 0; i < step.num_new; ++i) {
      plan.push_back({step.sequence, {(*found)->slot, (*found)->num_tokens + i}});
    }
  }
  if (num_rows > options_.max_step_rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("rows of the step = ", num_rows,
                     ": must be at most max_step_rows = ", options_.max_step_rows));
  }
  const auto changes = table_->Extend(batch);
  if (!changes.ok()) return changes.status();
  plan_ = std::move(plan);
  std::vector<kernels::DecodeRow> rows;
  for (const PlanRow& row : plan_) rows.push_back(row.row);
  rows.resize(options_.max_step_rows, {.sequence = -1, .position = 0});
  const absl::Status status = RunInOrder(stream, [&]() -> absl::Status {
    NSA_RETURN_IF_ERROR(Apply(*changes, stream));
    return UploadRows(rows, stream);
  });
  if (!status.ok()) {
    TakeBack(*this, batch);
    return status;
  }
  ++stats_.steps;
  stats_.tokens_appended += num_rows;
  return absl::OkStatus();
}

kernels::DecodeSelectParams KvCacheImpl::SelectParams(int64_t begin, int64_t num_rows,
                                                      const StepInputs& inputs,
                                                      int32_t* indices) const {
  const int64_t picks = int64_t{dims_.num_kv_heads} * dims_.num_selected_blocks;
  return {.dims = dims_,
          .rows = static_cast<const kernels::DecodeRow*>(rows_->data()) + begin,
          .num_rows = num_rows,
          .max_tokens = options_.max_tokens,
          .tables = Tables(),
          .q = RowsFrom(inputs.q, begin),
          .block_indices = indices + begin * picks,
          .o_cmp = {},
          .lse_cmp = nullptr,
          .scratch = scratch_->data()};
}

kernels::DecodeAttendParams KvCacheImpl::AttendParams(int64_t begin, int64_t num_rows,
                                                      const StepInputs& inputs,
                                                      const StepOutputs& outputs,
                                                      const int32_t* indices) const {
  const int64_t picks = int64_t{dims_.num_kv_heads} * dims_.num_selected_blocks;
  const kernels::ConstTensor3 gate = RowsFrom(inputs.gate, begin);
  return {.dims = dims_,
          .rows = static_cast<const kernels::DecodeRow*>(rows_->data()) + begin,
          .num_rows = num_rows,
          .max_tokens = options_.max_tokens,
          .tables = Tables(),
          .q = RowsFrom(inputs.q, begin),
          .block_indices = indices + begin * picks,
          .gate = gate.data,
          .gate_dtype = inputs.gate.dtype,
          .gate_row_stride = gate.row_stride,
          .gate_head_stride = gate.head_stride,
          .o = RowsFrom(outputs.o, begin),
          .o_slc = {},
          .o_win = {},
          .lse_slc = nullptr,
          .lse_win = nullptr,
          .scratch = scratch_->data()};
}

absl::Status KvCacheImpl::RunStep(int64_t num_rows, const StepInputs& inputs,
                                  const StepOutputs& outputs, void* stream) {
  absl::Status valid = CheckTensors(num_rows, inputs, outputs);
  if (valid.ok() && num_rows < static_cast<int64_t>(plan_.size())) {
    valid = absl::InvalidArgumentError(absl::StrCat(
        "num_rows = ", num_rows, ": must be at least the ", plan_.size(), " of the plan"));
  }
  if (is_reachable_) {
    NSA_RETURN_IF_ERROR(valid);
    if (num_rows == 0) return absl::OkStatus();
    return RunInOrder(stream, [&] { return RunStepInPlace(num_rows, inputs, outputs, stream); });
  }
  // The others take this rank to be in the step.
  if (!valid.ok()) plan_.clear();
  const absl::Status ran = AbortOnError(
      *communicator_, RunInOrder(stream, [&] { return RunStepFetching(inputs, outputs, stream); }));
  return valid.ok() ? ran : valid;
}

absl::Status KvCacheImpl::RunStepInPlace(int64_t num_rows, const StepInputs& inputs,
                                         const StepOutputs& outputs, void* stream) {
  NSA_RETURN_IF_ERROR(AppendRows(num_rows, 0, InputsOf(inputs.kv), stream));
  int32_t* const indices = IndicesOf(outputs);
  NSA_RETURN_IF_ERROR(kernels_->DecodeSelect(SelectParams(0, num_rows, inputs, indices), stream));
  return kernels_->DecodeAttend(AttendParams(0, num_rows, inputs, outputs, indices), stream);
}

absl::Status KvCacheImpl::RunStepFetching(const StepInputs& inputs, const StepOutputs& outputs,
                                          void* stream) {
  // Without the others a rank goes on with what lies at home.
  const bool together = communicator_->HealthCheck().ok();
  if (together) NSA_RETURN_IF_ERROR(window_->BeginWrite(stream));
  const auto num_rows = static_cast<int64_t>(plan_.size());
  if (num_rows > 0) {
    NSA_RETURN_IF_ERROR(AppendRows(num_rows, 0, InputsOf(inputs.kv), stream));
  }
  if (together) NSA_RETURN_IF_ERROR(window_->Publish(stream));
  int32_t* const indices = IndicesOf(outputs);
  for (int64_t begin = 0; begin < num_rows; begin += kFetchRows) {
    const int64_t count = std::min(kFetchRows, num_rows - begin);
    NSA_RETURN_IF_ERROR(
        kernels_->DecodeSelect(SelectParams(begin, count, inputs, indices), stream));
    NSA_RETURN_IF_ERROR(FetchPages(begin, begin + count, indices, stream));
    NSA_RETURN_IF_ERROR(
        kernels_->DecodeAttend(AttendParams(begin, count, inputs, outputs, indices), stream));
  }
  return together ? window_->Release(stream) : absl::OkStatus();
}

absl::Status KvCacheImpl::FetchPages(int64_t begin, int64_t end, const int32_t* block_indices,
                                     void* stream) {
  const int64_t hkv = dims_.num_kv_heads, n = dims_.num_selected_blocks;
  std::vector<int32_t> indices((end - begin) * hkv * n);
  NSA_RETURN_IF_ERROR(kernels_->CopyToHost(indices.data(), block_indices + begin * hkv * n,
                                           static_cast<int64_t>(indices.size() * sizeof(int32_t)),
                                           stream));
  NSA_RETURN_IF_ERROR(kernels_->Synchronize(stream));
  // Slot of each page, and which of its kv heads are selected.
  struct Slot {
    int64_t place;
    std::vector<bool> heads;
  };
  std::map<PageId, Slot> slots;
  for (int64_t row = begin; row < end; ++row) {
    const auto found = table_->Find(plan_[row].sequence);
    if (!found.ok()) return found.status();
    const std::vector<PageId>& pages = (*found)->lists[0];
    for (int64_t i = 0; i < hkv * n; ++i) {
      const int32_t block = indices[(row - begin) * hkv * n + i];
      if (block < 0 || table_->pages().RankOf(pages[block]) == rank()) continue;
      Slot& slot = slots
                       .try_emplace(pages[block], Slot{static_cast<int64_t>(slots.size()),
                                                       std::vector<bool>(hkv)})
                       .first->second;
      slot.heads[i / n] = true;
      void* const address = static_cast<char*>(slots_->data()) + slot.place * page_bytes_;
      NSA_RETURN_IF_ERROR(kernels_->CopyFromHost(TableRow(0, (*found)->slot) + block, &address,
                                                 sizeof(address), stream));
    }
  }
  if (slots.empty()) return absl::OkStatus();
  const auto count = static_cast<int32_t>(slots.size() * hkv);
  std::vector<int32_t> peers(count);
  std::vector<int64_t> offsets(count);
  for (const auto& [page, slot] : slots) {
    for (int64_t head = 0; head < hkv; ++head) {
      // What nobody selects is read from this rank's own memory, if there is any.
      const bool is_idle = !slot.heads[head] && window_->num_bytes() >= record_bytes_;
      const int64_t place = slot.place * hkv + head;
      peers[place] = is_idle ? rank() : table_->pages().RankOf(page);
      offsets[place] = is_idle ? 0 : OffsetOf(page) + head * record_bytes_;
      if (!is_idle) stats_.bytes_fetched += record_bytes_;
    }
  }
  char* const list = static_cast<char*>(fetch_list_->data());
  const int64_t offsets_bytes = count * int64_t{sizeof(int64_t)};
  const int64_t peers_bytes = count * int64_t{sizeof(int32_t)};
  NSA_RETURN_IF_ERROR(kernels_->CopyFromHost(list, &count, sizeof(count), stream));
  NSA_RETURN_IF_ERROR(kernels_->CopyFromHost(list + 16, offsets.data(), offsets_bytes, stream));
  NSA_RETURN_IF_ERROR(
      kernels_->CopyFromHost(list + 16 + offsets_bytes, peers.data(), peers_bytes, stream));
  return window_->Gather({.peers = reinterpret_cast<const int32_t*>(list + 16 + offsets_bytes),
                          .offsets = reinterpret_cast<const int64_t*>(list + 16),
                          .count = reinterpret_cast<const int32_t*>(list),
                          .max_count = count},
                         record_bytes_, slots_->data(), stream);
}

KvCacheStats KvCacheImpl::Stats() const {
  KvCacheStats stats = stats_;
  const PagePool& pages = table_->pages();
  stats.sequences = table_->num_sequences();
  stats.pages = pages.num_pages();
  for (int r = 0; r < pages.num_ranks(); ++r) {
    stats.pages_used_of_rank.push_back(pages.num_used(r));
    stats.pages_used += pages.num_used(r);
  }
  stats.summary_pages = table_->summary_pages().num_pages();
  stats.summary_pages_used = table_->summary_pages().num_used(0);
  return stats;
}

absl::StatusOr<std::unique_ptr<KvCache>> KvCache::Create(
    const KvCacheOptions& options, std::shared_ptr<comm::Communicator> communicator,
    std::shared_ptr<kernels::Kernels> kernels) {
  auto cache = std::make_unique<KvCacheImpl>(options, std::move(communicator), std::move(kernels));
  NSA_RETURN_IF_ERROR(cache->Prepare());
  return cache;
}

absl::Status KvCache::Step(absl::Span<const StepSequence> batch, const StepInputs& inputs,
                           const StepOutputs& outputs, void* stream) {
  int64_t num_rows = 0;
  for (const StepSequence& step : batch) num_rows += step.num_new;
  absl::Status status = CheckTensors(num_rows, inputs, outputs);
  if (status.ok()) status = PlanStep(batch, stream);
  if (status.ok()) {
    status = RunStep(num_rows, inputs, outputs, stream);
    if (!status.ok()) TakeBack(*this, batch);
    return status;
  }
  // Where a step is collective, the others take this rank to be in it.
  if (!is_reachable()) {
    status.Update(PlanStep({}, stream));
    status.Update(RunStep(0, inputs, outputs, stream));
  }
  return status;
}

}  // namespace nsa::serving
