#include "nsa/passes/backward.h"

#include <algorithm>

#include "nsa/passes/block_fetch.h"
#include "nsa/passes/halo.h"
#include "nsa/passes/inputs.h"
#include "nsa/passes/summaries.h"

namespace nsa {
namespace {

// src [rows,heads,head_dim] f32, dense, to the caller's heads from first_head on, if wanted.
absl::Status Store(PassContext& context, const float* src, int32_t num_heads, int32_t head_dim,
                   const Tensor& wanted, int32_t first_head, bool adds, void* stream) {
  if (!wanted.is_set()) return absl::OkStatus();
  kernels::Tensor3 dst = View(wanted);
  dst.data = static_cast<char*>(dst.data) + first_head * dst.head_stride * SizeOf(wanted.dtype);
  return context.kernels->StoreGradient({.src = src,
                                         .num_rows = context.rank_plan.num_tokens,
                                         .num_heads = num_heads,
                                         .head_dim = head_dim,
                                         .dst = dst,
                                         .dst_dtype = wanted.dtype,
                                         .adds = adds},
                                        stream);
}

}  // namespace

// T tokens of this rank, H halo rows, N compression blocks; h kv heads of a piece.
absl::Status RunBackward(PassContext& context, const ForwardInputs& inputs, const ConstTensor& d_o,
                         const SavedForwardImpl& saved, const Gradients& gradients, void* stream) {
  kernels::Kernels& kernels = *context.kernels;
  const kernels::AttentionDims& dims = context.dims;
  const kernels::Queries queries = QueriesOf(context, inputs);
  const int64_t num_tokens = context.rank_plan.num_tokens;
  const int64_t rows = num_tokens * dims.num_q_heads;
  const int32_t* const block_indices = saved.block_indices();
  auto* const dq = context.Buffer<float>(kQueryGradientsBuffer);
  auto* const gates = context.Buffer<float>(kGatesBuffer);
  float* const deltas = gates + 3 * rows;
  enum Branch { kCmp, kSlc, kWin };
  const auto outputs_of = [&](Branch branch) {
    return kernels::OutputGradients{.d_o = View(d_o),
                                    .lse = saved.lse(branch),
                                    .gate = gates + branch * rows,
                                    .delta = deltas + branch * rows};
  };

  // 1 to 3, 6. As in the forward: halo, summaries unless they were kept, records
  absl::StatusOr<std::array<BranchTokens, 3>> tokens = ExchangeHalo(context, inputs, stream);
  if (!tokens.ok()) return tokens.status();
  const auto& [cmp_tokens, slc_tokens, win_tokens] = *tokens;
  const Summaries summaries = SummariesOf(context);
  const bool recomputes_summaries = saved.summaries() == nullptr;
  if (recomputes_summaries) {
    NSA_RETURN_IF_ERROR(Compress(context, inputs, cmp_tokens, summaries, stream));
  }
  NSA_RETURN_IF_ERROR(context.Fork(stream));
  if (recomputes_summaries) {
    NSA_RETURN_IF_ERROR(AllGatherSummaries(context, context.beside()));
  }
  NSA_RETURN_IF_ERROR(PublishBlocks(context, slc_tokens, stream));

  // 8'. dO, o_cmp, o_slc, o_win [T,Hq,Dv] -> dgate [T,Hq,3], deltas [3,T,Hq]
  {
    const StageScope scope(context.stages, "gate backward", stream);
    NSA_RETURN_IF_ERROR(kernels.GateBackward({.dims = dims,
                                              .num_tokens = num_tokens,
                                              .gate = inputs.gate.data,
                                              .gate_dtype = inputs.gate.dtype,
                                              .row_stride = inputs.gate.strides[0],
                                              .head_stride = inputs.gate.strides[1],
                                              .d_o = View(d_o),
                                              .o_cmp = saved.branch_output(kCmp),
                                              .o_slc = saved.branch_output(kSlc),
                                              .o_win = saved.branch_output(kWin),
                                              .d_gate = dq,
                                              .gates = gates,
                                              .deltas = deltas},
                                             stream));
    NSA_RETURN_IF_ERROR(
        Store(context, dq, dims.num_q_heads, 3, gradients.dgate, 0, gradients.accumulate, stream));
  }
  NSA_RETURN_IF_ERROR(context.Join(stream));

  const std::array<BranchInputs, 3> branches = BranchesOf(inputs);
  const bool fetches = context.rank_plan.num_remote_slc_blocks > 0 && context.kept_slots == nullptr;
  const bool returns = context.slot_gradients != nullptr;
  const int32_t heads_a_piece = context.layout.backward.kv_heads_a_piece;
  int num_pieces = 0;
  for (int32_t head = 0; head < dims.num_kv_heads; head += heads_a_piece, ++num_pieces) {
    kernels::Queries piece = queries;
    piece.kv_heads = {head, std::min(head + heads_a_piece, dims.num_kv_heads)};
    // 6. Distinct remote (block, kv head) pairs of the piece -> slots. An epoch of its own: no
    // other collective may come between a Gather and its Release where windows are read in packs.
    NSA_RETURN_IF_ERROR(context.Fork(stream));
    if (num_pieces > 0) NSA_RETURN_IF_ERROR(PublishAgain(context, context.beside()));
    if (fetches) {
      NSA_RETURN_IF_ERROR(
          FetchBlocks(context, piece, block_indices, 0, num_pieces, context.beside()));
    }
    NSA_RETURN_IF_ERROR(context.records->Release(context.beside()));
    if (returns) {
      NSA_RETURN_IF_ERROR(AllGatherLocations(context, piece.kv_heads, context.beside()));
    }

    // 7'. Beside the fetch, the window: dq [T,G*h,Dk], dk, dv of the piece's heads of [T+H,Hkv,D]
    {
      const StageScope scope(context.stages, "window backward", stream);
      BranchGradients window = BranchGradientsOf(context, branches[kWin].branches);
      window.dk.adds = window.dv.adds = false;
      NSA_RETURN_IF_ERROR(
          kernels.AttendWindowBackward({.dims = dims,
                                        .queries = piece,
                                        .k = win_tokens.k,
                                        .v = win_tokens.v,
                                        .outputs = outputs_of(kWin),
                                        .queries_gradients = {.dq = dq, .adds = false},
                                        .dk = window.dk,
                                        .dv = window.dv,
                                        .sms_to_leave = fetches || returns ? kSmsOfFetch : 0,
                                        .scratch = context.Buffer(kBackwardScratchBuffer)},
                                       stream));
    }
    // Also with the return of the piece before.
    NSA_RETURN_IF_ERROR(context.Join(stream));

    // 7'. The selected blocks: dq, gradients of own records and of slots
    {
      const StageScope scope(context.stages, "selected backward", stream);
      if (returns) NSA_RETURN_IF_ERROR(context.slot_gradients->BeginWrite(stream));
      NSA_RETURN_IF_ERROR(kernels.AttendSelectedBackward(
          {.dims = dims,
           .queries = piece,
           .query_begin = 0,
           .query_end = num_tokens,
           .block_indices = block_indices,
           .locations = context.Locations(),
           .num_blocks = context.blocks.num_slc_blocks,
           .num_documents = static_cast<int32_t>(context.blocks.documents.size()),
           .own_records = context.records->data(),
           .num_own_records = context.rank_plan.num_own_slc_blocks * dims.num_kv_heads,
           .slots = context.Slots(head),
           .outputs = outputs_of(kSlc),
           .queries_gradients = {.dq = dq, .adds = true},
           .own_gradients = context.Buffer<float>(kRecordGradientsBuffer),
           .adds_to_own = false,
           .slot_gradients =
               returns ? static_cast<float*>(context.slot_gradients->data()) : nullptr,
           .scratch = context.Buffer(kBackwardScratchBuffer)},
          stream));
    }

    // 6'. Gradients of slots to the blocks' owners. Published before the next stage fills the
    // device: a peer that waited for it would do so on multiprocessors that its own stage lacks.
    if (returns) {
      NSA_RETURN_IF_ERROR(context.slot_gradients->Publish(stream));
      NSA_RETURN_IF_ERROR(context.Fork(stream));
      NSA_RETURN_IF_ERROR(
          ReturnSlotGradients(context, piece.kv_heads, num_pieces, context.beside()));
    }

    // 4'. Beside it: dq, and d_summaries [N,Hkv*(Dk+Dv)] of this rank's queries
    {
      const StageScope scope(context.stages, "compressed backward", stream);
      NSA_RETURN_IF_ERROR(kernels.AttendSummariesBackward(
          {.dims = dims,
           .queries = piece,
           .kc = ReadOnly(summaries.kc),
           .vc = ReadOnly(summaries.vc),
           .num_cmp_blocks = context.blocks.num_cmp_blocks,
           .num_documents = static_cast<int32_t>(context.blocks.documents.size()),
           .outputs = outputs_of(kCmp),
           .queries_gradients = {.dq = dq, .adds = true},
           .d_summaries = context.Buffer<float>(kSummaryGradientsBuffer),
           .scratch = context.Buffer(kBackwardScratchBuffer)},
          stream));
    }
    const int32_t group = dims.group_size();
    NSA_RETURN_IF_ERROR(Store(context, dq, piece.kv_heads.size() * group, dims.head_dim_qk,
                              gradients.dq, piece.kv_heads.begin * group, gradients.accumulate,
                              stream));
  }
  if (returns) NSA_RETURN_IF_ERROR(context.Join(stream));
  context.stats.set_query_pieces(num_pieces);

  // 3'. d_summaries of all ranks' queries -> those of own blocks
  NSA_RETURN_IF_ERROR(ReduceSummaryGradients(context, stream));

  // 2', 1'. Each set of branches that share k and v: the window's gradients are in place, so its
  // set comes first.
  const Tensor* const dk[] = {&gradients.dk_cmp, &gradients.dk_slc, &gradients.dk_win};
  const Tensor* const dv[] = {&gradients.dv_cmp, &gradients.dv_slc, &gradients.dv_win};
  int sets_done = 0;
  for (Branch branch : {kWin, kSlc, kCmp}) {
    const int set = branches[branch].branches;
    if (sets_done & set) {
      // A rank without tokens need not know which branches share: all make the same calls.
      NSA_RETURN_IF_ERROR(context.communicator->Exchange({}, {}, stream));
      continue;
    }
    sets_done |= set;
    if (branch != kWin) NSA_RETURN_IF_ERROR(ZeroBranchGradients(context, set, stream));
    const BranchGradients sum = BranchGradientsOf(context, set);
    if (set & kSlcBit) {
      const StageScope scope(context.stages, "unpack", stream);
      NSA_RETURN_IF_ERROR(kernels.UnpackGradients(
          {.dims = dims,
           .record_gradients = context.Buffer<float>(kRecordGradientsBuffer),
           .segments = slc_tokens.k.segments,
           .num_segments = slc_tokens.k.num_segments,
           .documents = context.Documents(),
           .runs = context.Table<kernels::BlockRun>(context.tables.slc_runs),
           .num_runs = static_cast<int32_t>(context.rank_plan.slc_runs.size()),
           .num_blocks = context.rank_plan.num_own_slc_blocks,
           .dk = sum.dk,
           .dv = sum.dv},
          stream));
    }
    if (set & kCmpBit) {
      NSA_RETURN_IF_ERROR(CompressBackward(context, inputs, cmp_tokens, sum, gradients, stream));
    }
    const StageScope scope(context.stages, "halo backward", stream);
    NSA_RETURN_IF_ERROR(ReturnHaloGradients(context, set, stream));
    NSA_RETURN_IF_ERROR(Store(context, sum.dk.own, dims.num_kv_heads, dims.head_dim_qk, *dk[branch],
                              0, gradients.accumulate, stream));
    NSA_RETURN_IF_ERROR(Store(context, sum.dv.own, dims.num_kv_heads, dims.head_dim_v, *dv[branch],
                              0, gradients.accumulate, stream));
  }
  return StoreCompressorGradients(context, inputs, gradients, stream);
}

}  // namespace nsa
