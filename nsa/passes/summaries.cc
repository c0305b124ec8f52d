#include "nsa/passes/summaries.h"

#include <algorithm>
#include <vector>

namespace nsa {
namespace {

kernels::CompressorWeights WeightsOf(const CompressorParams& params) {
  kernels::CompressorWeights weights;
  // The one tensor that is set tells H' and the dtype; see ParamsChecker.
  for (const ConstTensor* tensor : {&params.weight, &params.w, &params.w1}) {
    if (!tensor->is_set()) continue;
    weights.dtype = tensor->dtype;
    weights.num_heads = static_cast<int32_t>(tensor->shape[0]);
  }
  if (params.w1.is_set()) weights.hidden_width = static_cast<int32_t>(params.w1.shape[1]);
  weights.weight = params.weight.data;
  weights.pe = params.pe.data;
  weights.w = params.w.data;
  weights.w1 = params.w1.data;
  weights.b1 = params.b1.data;
  weights.w2 = params.w2.data;
  weights.b2 = params.b2.data;
  return weights;
}

}  // namespace

Summaries SummariesOf(const PassContext& context) {
  const kernels::AttentionDims& dims = context.dims;
  const int64_t row_stride = SummaryRowBytes(dims) / SizeOf(dims.dtype);
  const int64_t kc_bytes = int64_t{dims.num_kv_heads} * dims.head_dim_qk * SizeOf(dims.dtype);
  return {.kc = {.data = context.Buffer(kSummariesBuffer),
                 .row_stride = row_stride,
                 .head_stride = dims.head_dim_qk},
          .vc = {.data = context.Buffer(kSummariesBuffer, kc_bytes),
                 .row_stride = row_stride,
                 .head_stride = dims.head_dim_v}};
}

std::vector<comm::GatherRun> SummaryRuns(const NsaConfig& config,
                                         const kernels::AttentionDims& dims, const ShardPlan& plan,
                                         const BlockMap& blocks) {
  const int64_t row_bytes = SummaryRowBytes(dims);
  std::vector<comm::GatherRun> runs;
  for (int rank = 0; rank < plan.num_ranks(); ++rank) {
    for (const kernels::BlockRun& run : OwnCompressionRuns(config, plan, blocks, rank)) {
      const int64_t row = blocks.documents[run.document].cmp_block_begin + run.first_block;
      runs.push_back(
          {.rank = rank, .offset_bytes = row * row_bytes, .num_bytes = run.num_blocks * row_bytes});
    }
  }
  std::sort(runs.begin(), runs.end(), [](const comm::GatherRun& a, const comm::GatherRun& b) {
    return a.offset_bytes < b.offset_bytes;
  });
  return runs;
}

absl::Status Compress(PassContext& context, const ForwardInputs& inputs, const BranchTokens& tokens,
                      const Summaries& summaries, void* stream) {
  const StageScope scope(context.stages, "compress", stream);
  kernels::CompressParams params = {
      .dims = context.dims,
      .head_dim = context.dims.head_dim_qk,
      .compressor = context.options.config.compressor,
      .weights = WeightsOf(inputs.compress_k),
      .tokens = tokens.k,
      .documents = context.Documents(),
      .runs = context.Table<kernels::BlockRun>(context.tables.cmp_runs),
      .num_runs = static_cast<int32_t>(context.rank_plan.cmp_runs.size()),
      .summaries = summaries.kc};
  NSA_RETURN_IF_ERROR(context.kernels->Compress(params, stream));
  params.head_dim = context.dims.head_dim_v;
  params.weights = WeightsOf(inputs.compress_v);
  params.tokens = tokens.v;
  params.summaries = summaries.vc;
  return context.kernels->Compress(params, stream);
}

absl::Status AllGatherSummaries(PassContext& context, void* stream) {
  const StageScope scope(context.stages, "all-gather", stream, StageScope::kBeside);
  const int64_t row_bytes = SummaryRowBytes(context.dims);
  const int64_t others = context.communicator->size() - 1;
  int64_t own_bytes = 0;
  for (const comm::GatherRun& run : context.summary_runs) {
    if (run.rank == context.rank_plan.rank) own_bytes += run.num_bytes;
  }
  context.stats.set_summary_bytes_sent(own_bytes * others);
  context.stats.set_summary_bytes_received(context.blocks.num_cmp_blocks * row_bytes - own_bytes);
  return context.communicator->AllGather(context.Buffer(kSummariesBuffer), context.summary_runs,
                                         stream);
}

}  // namespace nsa
