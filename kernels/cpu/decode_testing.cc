#include "kernels/cpu/decode_testing.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <numeric>
#include <utility>

namespace nsa::kernels::cpu {
namespace {

using test::Bytes;

// A table of pages, with the pages.
class Table {
 public:
  Table(int64_t sequences, int64_t max_pages, int64_t page_bytes)
      : max_pages_(max_pages),
        page_bytes_(page_bytes),
        pages_(sequences * max_pages),
        entries_(sequences * max_pages, nullptr) {}

  void Add(int64_t sequence, int64_t page) {
    const int64_t i = sequence * max_pages_ + page;
    if (entries_[i] != nullptr) return;
    pages_[i] = std::make_unique<Bytes>(page_bytes_, kPoison);
    entries_[i] = pages_[i]->data();
  }
  // Frees pages [0, end) of the sequence.
  void Drop(int64_t sequence, int64_t end) {
    for (int64_t i = sequence * max_pages_; i < sequence * max_pages_ + end; ++i) {
      pages_[i].reset();
      entries_[i] = nullptr;
    }
  }
  void* const* entries() const { return entries_.data(); }
  const std::byte* page(int64_t sequence, int64_t page) const {
    return pages_[sequence * max_pages_ + page]->data();
  }

 private:
  const int64_t max_pages_, page_bytes_;
  std::vector<std::unique_ptr<Bytes>> pages_;
  std::vector<void*> entries_;
};

class Decoder {
 public:
  Decoder(const StageProblem& problem, const DecodeSchedule& schedule, Kernels& kernels)
      : problem_(problem),
        schedule_(schedule),
        kernels_(kernels),
        dims_(problem.dims),
        random_(schedule.seed),
        num_sequences_(static_cast<int64_t>(problem.documents.size())),
        max_tokens_(LongestOf(problem)),
        max_pages_(max_tokens_ / dims_.select_block_tokens + 1),
        max_summary_pages_(max_tokens_ / dims_.compress_stride_tokens / kSummaryPageBlocks + 1),
        slc_(num_sequences_, max_pages_, PageBytes()),
        win_(num_sequences_, max_pages_, PageBytes()),
        cmp_(num_sequences_, max_pages_, PageBytes()),
        summaries_(num_sequences_, max_summary_pages_, kSummaryPageBlocks * SummaryBytes()),
        lengths_(num_sequences_, 0) {
    const int64_t tokens = problem.num_tokens();
    const int64_t o_bytes = tokens * dims_.num_q_heads * dims_.head_dim_v * SizeOf(dims_.dtype);
    StageOutputs& out = run_.outputs;
    for (Bytes* o : {&out.o_cmp, &out.o_slc, &out.o_win, &out.o}) o->assign(o_bytes, kPoison);
    for (auto* lse : {&out.lse_cmp, &out.lse_slc, &out.lse_win}) {
      lse->assign(tokens * dims_.num_q_heads, kNan);
    }
    out.block_indices.assign(tokens * IndicesOfRow(), kNoIndex);
  }

  absl::StatusOr<DecodeRun> Run() {
    if (!schedule_.prefixes.empty()) {
      std::vector<DecodeRow> rows;
      for (int32_t s = 0; s < num_sequences_; ++s) AddRows(s, schedule_.prefixes[s], rows);
      const absl::Status status = Append(rows);
      if (!status.ok()) return status;
      DropPages();
    }
    for (std::vector<DecodeRow> rows = NextStep(); !rows.empty(); rows = NextStep()) {
      absl::Status status = Append(rows);
      if (status.ok()) status = Attend(rows);
      if (!status.ok()) return status;
      DropPages();
    }
    ReadSummaries();
    return std::move(run_);
  }

 private:
  static constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  static constexpr int32_t kNoIndex = -7;
  static constexpr int64_t kRowPadding = 16;

  static int64_t LongestOf(const StageProblem& problem) {
    int64_t longest = 0;
    for (const Document& document : problem.documents) {
      longest = std::max(longest, document.num_tokens);
    }
    return longest;
  }
  int64_t PageBytes() const { return dims_.num_kv_heads * kernels_.RecordBytes(dims_); }
  int64_t SummaryBytes() const {
    return dims_.num_kv_heads * (dims_.head_dim_qk + dims_.head_dim_v) * SizeOf(dims_.dtype);
  }
  int64_t IndicesOfRow() const { return int64_t{dims_.num_kv_heads} * dims_.num_selected_blocks; }
  // Compression blocks of the first `num_tokens` tokens.
  int64_t NumBlocks(int64_t num_tokens) const {
    return reference::NumCompressBlocks(problem_.config, num_tokens);
  }

  void AddRows(int32_t sequence, int64_t count, std::vector<DecodeRow>& rows) {
    for (int64_t i = 0; i < count; ++i) rows.push_back({sequence, lengths_[sequence] + i});
  }

  // Empty once all tokens are decoded.
  std::vector<DecodeRow> NextStep() {
    std::vector<int32_t> sequences(num_sequences_);
    std::iota(sequences.begin(), sequences.end(), 0);
    for (int64_t i = num_sequences_ - 1; i > 0; --i) {
      std::swap(sequences[i], sequences[random_.Int(0, i)]);
    }
    std::vector<DecodeRow> rows;
    for (int32_t s : sequences) {
      const int64_t room = std::min(problem_.documents[s].num_tokens - lengths_[s],
                                    schedule_.max_rows - static_cast<int64_t>(rows.size()));
      if (room <= 0) continue;
      AddRows(s, random_.Int(1, std::min(room, schedule_.max_new_tokens)), rows);
      if (random_.OneIn(3) && static_cast<int64_t>(rows.size()) < schedule_.max_rows) {
        rows.push_back({-1, 0});
      }
    }
    return rows;
  }

  // Rows of `dense` [tokens,row_bytes] in the order of `rows`.
  Rows Gather(const Bytes& dense, const std::vector<DecodeRow>& rows, DType dtype, int64_t heads,
              int64_t dim) const {
    Rows gathered(dtype, static_cast<int64_t>(rows.size()), heads, dim, kRowPadding);
    for (size_t i = 0; i < rows.size(); ++i) {
      if (rows[i].sequence < 0) continue;
      std::memcpy(gathered.row(i), dense.data() + TokenOf(rows[i]) * gathered.row_bytes,
                  gathered.row_bytes);
    }
    return gathered;
  }
  int64_t TokenOf(const DecodeRow& row) const {
    return problem_.documents[row.sequence].token_begin + row.position;
  }

  PageTables Tables() const {
    return {.slc = slc_.entries(),
            .win = (schedule_.shares_tables ? slc_ : win_).entries(),
            .cmp = (schedule_.shares_tables ? slc_ : cmp_).entries(),
            .summaries = summaries_.entries(),
            .max_pages = max_pages_,
            .max_summary_pages = max_summary_pages_};
  }

  absl::Status Append(const std::vector<DecodeRow>& rows) {
    for (const DecodeRow& row : rows) {
      if (row.sequence < 0) continue;
      for (Table* table : {&slc_, &win_, &cmp_}) {
        table->Add(row.sequence, row.position / dims_.select_block_tokens);
      }
      lengths_[row.sequence] = row.position + 1;
      const int64_t num_blocks = NumBlocks(row.position + 1);
      if (num_blocks > 0) summaries_.Add(row.sequence, (num_blocks - 1) / kSummaryPageBlocks);
    }
    const auto& in = problem_.encoded;
    const auto gather = [&](const Bytes& dense, int64_t dim) {
      return Gather(dense, rows, dims_.dtype, dims_.num_kv_heads, dim);
    };
    const int64_t dk = dims_.head_dim_qk, dv = dims_.head_dim_v;
    const Rows k_slc = gather(in.k_slc, dk), v_slc = gather(in.v_slc, dv);
    const Rows k_win = gather(in.k_win, dk), v_win = gather(in.v_win, dv);
    const Rows k_cmp = gather(in.k_cmp, dk), v_cmp = gather(in.v_cmp, dv);
    const bool shares = schedule_.shares_tables;
    return kernels_.AppendTokens(
        {.dims = dims_,
         .rows = rows.data(),
         .num_rows = static_cast<int64_t>(rows.size()),
         .tables = Tables(),
         .slc = {k_slc.view(), v_slc.view()},
         .win = shares ? NewTokens{} : NewTokens{k_win.view(), v_win.view()},
         .cmp = shares ? NewTokens{} : NewTokens{k_cmp.view(), v_cmp.view()},
         .compresses = true,
         .compressor = test::MakeCompressor(problem_.config.compressor),
         .weights_k = in.compress_k.view(),
         .weights_v = in.compress_v.view()},
        nullptr);
  }

  absl::Status Attend(const std::vector<DecodeRow>& rows) {
    const int64_t num_rows = static_cast<int64_t>(rows.size());
    const int64_t hq = dims_.num_q_heads, dv = dims_.head_dim_v;
    const DType gate_dtype = problem_.options.gate_dtype;
    const Rows q = Gather(problem_.encoded.q, rows, dims_.dtype, hq, dims_.head_dim_qk);
    const Rows gate = Gather(problem_.encoded.gate, rows, gate_dtype, hq, 3);
    Rows o_cmp(dims_.dtype, num_rows, hq, dv, kRowPadding);
    Rows o_slc = o_cmp, o_win = o_cmp, o = o_cmp;
    std::vector<float> lse_cmp(num_rows * hq, kNan), lse_slc = lse_cmp, lse_win = lse_cmp;
    std::vector<int32_t> indices(num_rows * IndicesOfRow(), kNoIndex);
    const bool looks = schedule_.looks_at_branches;
    const auto branch = [&](Rows& rows) { return looks ? rows.mutable_view() : Tensor3{}; };
    const auto lse_of = [&](std::vector<float>& lse) { return looks ? lse.data() : nullptr; };
    const int64_t scratch_bytes = kernels_.DecodeScratchBytes(dims_, {num_rows, max_tokens_});
    const auto scratch = kernels_.Allocate(scratch_bytes);
    if (!scratch.ok()) return scratch.status();
    std::memset((*scratch)->data(), static_cast<int>(kPoison), scratch_bytes);

    absl::Status status = kernels_.DecodeSelect({.dims = dims_,
                                                 .rows = rows.data(),
                                                 .num_rows = num_rows,
                                                 .max_tokens = max_tokens_,
                                                 .tables = Tables(),
                                                 .q = q.view(),
                                                 .block_indices = indices.data(),
                                                 .o_cmp = branch(o_cmp),
                                                 .lse_cmp = lse_of(lse_cmp),
                                                 .scratch = (*scratch)->data()},
                                                nullptr);
    if (!status.ok()) return status;
    status = kernels_.DecodeAttend({.dims = dims_,
                                    .rows = rows.data(),
                                    .num_rows = num_rows,
                                    .max_tokens = max_tokens_,
                                    .tables = Tables(),
                                    .q = q.view(),
                                    .block_indices = indices.data(),
                                    .gate = gate.bytes.data(),
                                    .gate_dtype = gate_dtype,
                                    .gate_row_stride = gate.row_stride,
                                    .gate_head_stride = gate.head_stride,
                                    .o = o.mutable_view(),
                                    .o_slc = branch(o_slc),
                                    .o_win = branch(o_win),
                                    .lse_slc = lse_of(lse_slc),
                                    .lse_win = lse_of(lse_win),
                                    .scratch = (*scratch)->data()},
                                   nullptr);
    if (!status.ok()) return status;

    StageOutputs& out = run_.outputs;
    for (int64_t i = 0; i < num_rows; ++i) {
      if (rows[i].sequence < 0) {
        if (!IsUntouched(i, {&o_cmp, &o_slc, &o_win, &o}, {&lse_cmp, &lse_slc, &lse_win},
                         indices)) {
          return absl::InternalError("a row without a token was written to");
        }
        continue;
      }
      const int64_t token = TokenOf(rows[i]);
      run_.tokens.push_back(token);
      const auto store = [&](Rows& from, Bytes& to) {
        std::memcpy(to.data() + token * from.row_bytes, from.row(i), from.row_bytes);
      };
      store(o, out.o);
      std::copy_n(indices.begin() + i * IndicesOfRow(), IndicesOfRow(),
                  out.block_indices.begin() + token * IndicesOfRow());
      store(o_cmp, out.o_cmp);
      store(o_slc, out.o_slc);
      store(o_win, out.o_win);
      const std::pair<std::vector<float>*, std::vector<float>*> lses[] = {
          {&lse_cmp, &out.lse_cmp}, {&lse_slc, &out.lse_slc}, {&lse_win, &out.lse_win}};
      for (const auto& [from, to] : lses) {
        std::copy_n(from->begin() + i * hq, hq, to->begin() + token * hq);
      }
    }
    return absl::OkStatus();
  }

  bool IsUntouched(int64_t row, std::initializer_list<Rows*> outputs,
                   std::initializer_list<const std::vector<float>*> lses,
                   const std::vector<int32_t>& indices) const {
    for (Rows* rows : outputs) {
      if (std::count(rows->row(row), rows->row(row) + rows->row_bytes, kPoison) !=
          rows->row_bytes) {
        return false;
      }
    }
    for (const std::vector<float>* lse : lses) {
      const auto begin = lse->begin() + row * dims_.num_q_heads;
      if (std::count_if(begin, begin + dims_.num_q_heads, [](float x) { return std::isnan(x); }) !=
          dims_.num_q_heads) {
        return false;
      }
    }
    const auto begin = indices.begin() + row * IndicesOfRow();
    return std::count(begin, begin + IndicesOfRow(), kNoIndex) == IndicesOfRow();
  }

  // What no later token's window and no later block needs.
  void DropPages() {
    for (int64_t s = 0; s < num_sequences_; ++s) {
      const int64_t window_begin = std::max<int64_t>(0, lengths_[s] - dims_.window_tokens + 1);
      win_.Drop(s, window_begin / dims_.select_block_tokens);
      const int64_t next_block_begin = NumBlocks(lengths_[s]) * dims_.compress_stride_tokens;
      cmp_.Drop(s, std::min(next_block_begin, lengths_[s]) / dims_.select_block_tokens);
    }
  }

  void ReadSummaries() {
    StageOutputs& out = run_.outputs;
    const int64_t kc_bytes = dims_.num_kv_heads * dims_.head_dim_qk * SizeOf(dims_.dtype);
    for (int64_t s = 0; s < num_sequences_; ++s) {
      for (int64_t block = 0; block < NumBlocks(lengths_[s]); ++block) {
        const std::byte* const row = summaries_.page(s, block / kSummaryPageBlocks) +
                                     block % kSummaryPageBlocks * SummaryBytes();
        out.kc.insert(out.kc.end(), row, row + kc_bytes);
        out.vc.insert(out.vc.end(), row + kc_bytes, row + SummaryBytes());
      }
    }
  }

  const StageProblem& problem_;
  const DecodeSchedule& schedule_;
  Kernels& kernels_;
  const AttentionDims& dims_;
  test::Random random_;
  const int64_t num_sequences_, max_tokens_, max_pages_, max_summary_pages_;
  Table slc_, win_, cmp_, summaries_;
  std::vector<int64_t> lengths_;  // of the sequences
  DecodeRun run_;
};

}  // namespace

absl::StatusOr<DecodeRun> RunDecode(const StageProblem& problem, const DecodeSchedule& schedule,
                                    Kernels& kernels) {
  return Decoder(problem, schedule, kernels).Run();
}

}  // namespace nsa::kernels::cpu
