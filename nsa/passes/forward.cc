#include "nsa/passes/forward.h"

#include <algorithm>

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

  // 2. Own blocks: l tokens each -> kc [.,Hkv,Dk], vc [.,Hkv,Dv]
  const Summaries summaries = SummariesOf(context);
  NSA_RETURN_IF_ERROR(Compress(context, inputs, cmp_tokens, summaries, stream));

  // 3. Summaries of all ranks in global block order: kc [N,Hkv,Dk], vc [N,Hkv,Dv]. Beside it, for
  //    peers to read in step 6: l' tokens each -> records [Hkv, own blocks]
  NSA_RETURN_IF_ERROR(context.Fork(stream));
  NSA_RETURN_IF_ERROR(AllGatherSummaries(context, context.beside()));
  NSA_RETURN_IF_ERROR(PublishBlocks(context, slc_tokens, stream));
  NSA_RETURN_IF_ERROR(context.Join(stream));

  // 4, 5. q [T,Hq,Dk], kc, vc -> o_cmp [T,Hq,Dv], block indices [T,Hkv,n]
  {
    const StageScope scope(context.stages, "score+select", stream);
    NSA_RETURN_IF_ERROR(kernels.ScoreAndSelect(
        {.dims = dims,
         .queries = queries,
         .kc = ReadOnly(summaries.kc),
         .vc = ReadOnly(summaries.vc),
         .num_cmp_blocks = context.blocks.num_cmp_blocks,
         .num_documents = static_cast<int32_t>(context.blocks.documents.size()),
         .o_cmp = o_cmp,
         .lse_cmp = outputs.lse_cmp,
         .block_indices = block_indices,
         .scratch = context.Buffer(kScoreScratchBuffer)},
        stream));
  }

  // In pieces that the fetch budget holds the blocks of: as many kv heads as it can always hold, or
  // when it cannot be sure of one, as many queries of one as turn out to fit.
  const bool fetches = context.rank_plan.num_remote_slc_blocks > 0;
  const bool cuts_queries = context.layout.kv_heads_a_piece == 0;
  // Slots that are kept are numbered for the pieces of the backward, which are no larger.
  const int32_t heads_a_piece = context.kept_slots != nullptr
                                    ? context.layout.backward.kv_heads_a_piece
                                    : std::max(1, context.layout.kv_heads_a_piece);
  kernels::Queries piece = queries;
  piece.kv_heads = {0, heads_a_piece};
  int num_pieces = 0;
  for (int64_t begin = 0, end = num_tokens; piece.kv_heads.size() > 0; ++num_pieces) {
    // 6. Distinct remote (block, kv head) pairs of the piece -> slots
    if (fetches) {
      NSA_RETURN_IF_ERROR(context.Fork(stream));
      NSA_RETURN_IF_ERROR(FetchBlocks(context, piece, block_indices, begin,
                                      cuts_queries ? 0 : num_pieces, context.beside()));
    }

    // Beside the first fetch: tokens (t - w, t] -> o_win [T,Hq,Dv]
    if (num_pieces == 0) {
      const StageScope scope(context.stages, "window", stream);
      NSA_RETURN_IF_ERROR(kernels.AttendWindow({.dims = dims,
                                                .queries = queries,
                                                .k = win_tokens.k,
                                                .v = win_tokens.v,
                                                .o_win = o_win,
                                                .lse_win = outputs.lse_win,
                                                .sms_to_leave = fetches ? kSmsOfFetch : 0},
                                               stream));
    }
    if (fetches && cuts_queries) {
      absl::StatusOr<int64_t> fetched =
          ReadFetchCounters(context, 0, context.beside(), context.stats);
      if (!fetched.ok()) return fetched.status();
      end = *fetched;
      if (end <= begin) {
        return absl::InternalError(absl::StrCat("no query fits into the fetch budget at ", begin));
      }
    }
    if (fetches) NSA_RETURN_IF_ERROR(context.Join(stream));

    // 7, 8. n blocks a query -> o_slc, gated with o_cmp and o_win into o [T,Hq,Dv]
    {
      const StageScope scope(context.stages, "attend+gate", stream);
      NSA_RETURN_IF_ERROR(kernels.AttendSelected(
          {.dims = dims,
           .queries = piece,
           .query_begin = begin,
           .query_end = end,
           .block_indices = block_indices,
           .locations = context.Locations(),
           .num_blocks = context.blocks.num_slc_blocks,
           .own_records = context.records->data(),
           .num_own_records = context.rank_plan.num_own_slc_blocks * dims.num_kv_heads,
           .slots = context.Slots(piece.kv_heads.begin),
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

    if (end < num_tokens) {
      begin = end;
    } else {
      begin = 0;
      const int32_t next = piece.kv_heads.end;
      piece.kv_heads = {next, std::min(next + heads_a_piece, dims.num_kv_heads)};
    }
  }
  context.stats.set_query_pieces(num_pieces);
  return context.records->Release(stream);
}

}  // namespace nsa
