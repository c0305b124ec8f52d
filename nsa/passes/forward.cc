#include "nsa/passes/forward.h"

#include "absl/strings/str_cat.h"
#include "nsa/passes/block_fetch.h"
#include "nsa/passes/halo.h"
#include "nsa/passes/summaries.h"

namespace nsa {

// T tokens of this rank, H halo rows, N compression blocks and B select blocks of all documents.
absl::Status RunForward(PassContext& context, const ForwardInputs& inputs,
                        const ForwardOutputs& outputs, void* stream) {
  kernels::Kernels& kernels = *context.kernels;
  const kernels::AttentionDims& dims = context.dims;
  const kernels::Queries queries = QueriesOf(context, inputs);
  const int64_t num_tokens = context.rank_plan.num_tokens;

  // What the caller does not ask for still has to be somewhere: o_cmp waits in o.
  const kernels::Tensor3 o_cmp = View(outputs.o_cmp.is_set() ? outputs.o_cmp : outputs.o);
  kernels::Tensor3 o_win = View(outputs.o_win);
  if (!outputs.o_win.is_set()) {
    o_win = {.data = context.Buffer(kWindowOutputBuffer),
             .row_stride = int64_t{dims.num_q_heads} * dims.head_dim_v,
             .head_stride = dims.head_dim_v};
  }
  int32_t* block_indices = outputs.block_indices != nullptr
                               ? outputs.block_indices
                               : context.Buffer<int32_t>(kBlockIndicesBuffer);

  // 1. k, v of neighbouring tokens: [H,Hkv,D] for each distinct pair of tensors
  absl::StatusOr<std::array<BranchTokens, 3>> tokens = ExchangeHalo(context, inputs, stream);
  if (!tokens.ok()) return tokens.status();
  const auto& [cmp_tokens, slc_tokens, win_tokens] = *tokens;

  // 2. Own blocks: l tokens each -> kc [.,Hkv,Dk], vc [.,Hkv,Dv]; and, for peers to read in step 6,
  //    l' tokens each -> records [Hkv, own blocks]
  const Summaries summaries = SummariesOf(context);
  NSA_RETURN_IF_ERROR(Compress(context, inputs, cmp_tokens, summaries, stream));
  NSA_RETURN_IF_ERROR(PublishBlocks(context, slc_tokens, stream));

  // 3. Summaries of all ranks in global block order: kc [N,Hkv,Dk], vc [N,Hkv,Dv]
  NSA_RETURN_IF_ERROR(AllGatherSummaries(context, stream));

  // Beside 3 to 6: tokens (t - w, t] -> o_win [T,Hq,Dv]
  {
    const StageScope scope(context, "window");
    NSA_RETURN_IF_ERROR(kernels.AttendWindow({.dims = dims,
                                              .queries = queries,
                                              .k = win_tokens.k,
                                              .v = win_tokens.v,
                                              .o_win = o_win,
                                              .lse_win = outputs.lse_win},
                                             stream));
  }

  // 4, 5. q [T,Hq,Dk], kc, vc -> o_cmp [T,Hq,Dv], block indices [T,Hkv,n]
  {
    const StageScope scope(context, "score+select");
    NSA_RETURN_IF_ERROR(kernels.ScoreAndSelect(
        {.dims = dims,
         .queries = queries,
         .kc = ReadOnly(summaries.kc),
         .vc = ReadOnly(summaries.vc),
         .num_cmp_blocks = context.blocks.num_cmp_blocks,
         .num_documents = static_cast<int32_t>(context.blocks.documents.size()),
         .o_cmp = o_cmp,
         .lse_cmp = outputs.lse_cmp,
         .block_indices = block_indices},
        stream));
  }

  // One piece of the queries after another, as many at a time as the fetch budget holds blocks of.
  for (int64_t begin = 0, end = 0; begin < num_tokens; begin = end) {
    // 6. Distinct remote (block, kv head) pairs of the piece -> slots
    absl::StatusOr<int64_t> piece_end = FetchBlocks(context, queries, block_indices, begin, stream);
    if (!piece_end.ok()) return piece_end.status();
    end = *piece_end;
    if (end <= begin) {
      return absl::InternalError(absl::StrCat("no query fits into the fetch budget at ", begin));
    }

    // 7, 8. n blocks a query -> o_slc, gated with o_cmp and o_win into o [T,Hq,Dv]
    const StageScope scope(context, "attend+gate");
    NSA_RETURN_IF_ERROR(kernels.AttendSelected(
        {.dims = dims,
         .queries = queries,
         .query_begin = begin,
         .query_end = end,
         .block_indices = block_indices,
         .locations = context.Buffer<int32_t>(kLocationsBuffer),
         .num_blocks = context.blocks.num_slc_blocks,
         .own_records = context.records->data(),
         .num_own_records = context.rank_plan.num_own_slc_blocks * dims.num_kv_heads,
         .slots = context.Buffer(kSlotsBuffer),
         .o_slc = View(outputs.o_slc),
         .lse_slc = outputs.lse_slc,
         .gate = {.gate = inputs.gate.data,
                  .gate_dtype = inputs.gate.dtype,
                  .row_stride = inputs.gate.strides[0],
                  .head_stride = inputs.gate.strides[1],
                  .o_cmp = ReadOnly(o_cmp),
                  .o_win = ReadOnly(o_win),
                  .o = View(outputs.o)}},
        stream));
  }
  return context.records->Release(stream);
}

}  // namespace nsa
