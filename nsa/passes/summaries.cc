#include "nsa/passes/summaries.h"

#include <algorithm>
#include <array>
#include <vector>

namespace nsa {

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

namespace {

// A learned tensor's gradient: where it is computed, and where the caller wants it.
struct WeightGradient {
  float* kernels::CompressorWeightGradients::*field;
  int64_t count;
  float* computed;
  const Tensor* wanted;
};

int64_t NumElements(const ConstTensor& tensor) {
  int64_t count = 1;
  for (int64_t size : tensor.shape) count *= size;
  return count;
}

// Those of the tensors that are set, one after another from `numbers` on.
std::vector<WeightGradient> WeightGradientsOf(const PassContext& context,
                                              const CompressorParams& params,
                                              const CompressorGradients& wanted, float* numbers) {
  std::vector<WeightGradient> gradients;
  if (context.options.config.compressor == Compressor::kMean) return gradients;
  using Fields = kernels::CompressorWeightGradients;
  const auto add = [&](const ConstTensor& weight, float* Fields::*field, const Tensor& to) {
    if (!weight.is_set()) return;
    const int64_t count = NumElements(weight);
    gradients.push_back({field, count, numbers, &to});
    numbers += (count + kWeightsAlignment - 1) / kWeightsAlignment * kWeightsAlignment;
  };
  add(params.weight, &Fields::weight, wanted.weight);
  add(params.pe, &Fields::pe, wanted.pe);
  add(params.w, &Fields::w, wanted.w);
  add(params.w1, &Fields::w1, wanted.w1);
  add(params.b1, &Fields::b1, wanted.b1);
  add(params.w2, &Fields::w2, wanted.w2);
  add(params.b2, &Fields::b2, wanted.b2);
  return gradients;
}

// Of the compressors of k and of v.
std::array<std::vector<WeightGradient>, 2> WeightGradientsOf(const PassContext& context,
                                                             const ForwardInputs& inputs,
                                                             const Gradients& gradients) {
  auto* const numbers = context.Buffer<float>(kWeightGradientsBuffer);
  return {WeightGradientsOf(context, inputs.compress_k, gradients.dcompress_k, numbers),
          WeightGradientsOf(context, inputs.compress_v, gradients.dcompress_v,
                            numbers + context.layout.backward.num_weights)};
}

// src as rows of one head and dimension, as long as an int32 can say.
absl::Status StoreNumbers(PassContext& context, const float* src, int64_t count, float* dst,
                          bool adds, void* stream) {
  constexpr int64_t kMostAtATime = 1 << 30;
  for (int64_t begin = 0; begin < count; begin += kMostAtATime) {
    const int64_t size = std::min(count - begin, kMostAtATime);
    NSA_RETURN_IF_ERROR(context.kernels->StoreGradient(
        {.src = src + begin,
         .num_rows = 1,
         .num_heads = 1,
         .head_dim = static_cast<int32_t>(size),
         .dst = {.data = dst + begin, .row_stride = size, .head_stride = 0},
         .dst_dtype = DType::kF32,
         .adds = adds},
        stream));
  }
  return absl::OkStatus();
}

// Adds up `numbers` [count] of all ranks, in the order of ranks, so that all get the same bits.
absl::Status SumOverRanks(PassContext& context, float* numbers, int64_t count, void* stream) {
  const int num_ranks = context.plan.num_ranks();
  auto* const gathered = context.Buffer<float>(
      kWeightGradientsBuffer, 2 * context.layout.backward.num_weights * int64_t{sizeof(float)});
  for (int64_t begin = 0; begin < count; begin += kWeightsAtATime) {
    const int64_t size = std::min(count - begin, kWeightsAtATime);
    std::vector<comm::GatherRun> runs;
    for (int rank = 0; rank < num_ranks; ++rank) {
      runs.push_back({.rank = rank,
                      .offset_bytes = rank * size * int64_t{sizeof(float)},
                      .num_bytes = size * int64_t{sizeof(float)}});
    }
    NSA_RETURN_IF_ERROR(StoreNumbers(context, numbers + begin, size,
                                     gathered + context.rank_plan.rank * size, /*adds=*/false,
                                     stream));
    NSA_RETURN_IF_ERROR(context.communicator->AllGather(gathered, runs, stream));
    for (int rank = 0; rank < num_ranks; ++rank) {
      NSA_RETURN_IF_ERROR(StoreNumbers(context, gathered + rank * size, size, numbers + begin,
                                       /*adds=*/rank > 0, stream));
    }
  }
  return absl::OkStatus();
}

}  // namespace

Summaries SummariesOf(const PassContext& context) {
  const kernels::AttentionDims& dims = context.dims;
  const int64_t row_stride = SummaryRowBytes(dims) / SizeOf(dims.dtype);
  const int64_t kc_bytes = int64_t{dims.num_kv_heads} * dims.head_dim_qk * SizeOf(dims.dtype);
  return {
      .kc = {.data = context.summaries, .row_stride = row_stride, .head_stride = dims.head_dim_qk},
      .vc = {.data = context.summaries + kc_bytes,
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
  return context.communicator->AllGather(context.summaries, context.summary_runs, stream);
}

absl::Status ReduceSummaryGradients(PassContext& context, void* stream) {
  const StageScope scope(context.stages, "reduce summaries", stream);
  const kernels::AttentionDims& dims = context.dims;
  const int64_t row_elements = int64_t{dims.num_kv_heads} * (dims.head_dim_qk + dims.head_dim_v);
  const int64_t row_bytes = row_elements * int64_t{sizeof(float)};
  auto* const gradients = context.Buffer<float>(kSummaryGradientsBuffer);
  const int64_t own_rows = NumBlocks(context.rank_plan.cmp_runs);
  float* const received = gradients + context.blocks.num_cmp_blocks * row_elements;

  // Rows of the ranks, in the order of the runs that each rank provides.
  std::vector<comm::SendOp> sends;
  std::vector<comm::RecvOp> recvs;
  int64_t sent = 0;
  std::vector<int64_t> row_of(context.plan.num_ranks(), 0);
  const auto place = [&](int peer) { return peer - (peer > context.rank_plan.rank ? 1 : 0); };
  for (const comm::GatherRun& run : context.summary_runs) {
    const int64_t row = run.offset_bytes / SummaryRowBytes(dims);
    const int64_t rows = run.num_bytes / SummaryRowBytes(dims);
    if (run.rank != context.rank_plan.rank) {
      sends.push_back({run.rank, gradients + row * row_elements, rows * row_bytes});
      sent += rows * row_bytes;
      continue;
    }
    for (int peer = 0; peer < context.plan.num_ranks(); ++peer) {
      if (peer == context.rank_plan.rank) continue;
      recvs.push_back({peer, received + (place(peer) * own_rows + row_of[peer]) * row_elements,
                       rows * row_bytes});
      row_of[peer] += rows;
    }
  }
  NSA_RETURN_IF_ERROR(context.communicator->Exchange(sends, recvs, stream));
  const int64_t others = context.plan.num_ranks() - 1;
  context.stats.set_gradient_bytes_sent(context.stats.gradient_bytes_sent() + sent);
  context.stats.set_gradient_bytes_received(context.stats.gradient_bytes_received() +
                                            others * own_rows * row_bytes);
  for (int64_t i = 0; i < others; ++i) {
    NSA_RETURN_IF_ERROR(context.kernels->AddRows(
        {.dst = gradients,
         .src = received + i * own_rows * row_elements,
         .segments = context.Table<kernels::Segment>(context.tables.summary_segments),
         .num_segments = static_cast<int32_t>(context.rank_plan.cmp_runs.size()),
         .row_elements = row_elements},
        stream));
  }
  return absl::OkStatus();
}

absl::Status CompressBackward(PassContext& context, const ForwardInputs& inputs,
                              const BranchTokens& tokens, const BranchGradients& token_gradients,
                              const Gradients& gradients, void* stream) {
  const StageScope scope(context.stages, "compress backward", stream);
  const kernels::AttentionDims& dims = context.dims;
  const auto* const d_summaries = context.Buffer<float>(kSummaryGradientsBuffer);
  const auto weights = WeightGradientsOf(context, inputs, gradients);
  kernels::CompressBackwardParams params = {
      .dims = dims,
      .head_dim = dims.head_dim_qk,
      .compressor = context.options.config.compressor,
      .weights = WeightsOf(inputs.compress_k),
      .tokens = tokens.k,
      .documents = context.Documents(),
      .runs = context.Table<kernels::BlockRun>(context.tables.cmp_runs),
      .num_runs = static_cast<int32_t>(context.rank_plan.cmp_runs.size()),
      .num_blocks = NumBlocks(context.rank_plan.cmp_runs),
      .d_summaries = d_summaries,
      .d_summaries_stride = int64_t{dims.num_kv_heads} * (dims.head_dim_qk + dims.head_dim_v),
      .d_tokens = token_gradients.dk,
      .d_weights = {},
      .scratch = context.Buffer(kBackwardScratchBuffer)};
  for (const WeightGradient& weight : weights[0]) params.d_weights.*weight.field = weight.computed;
  NSA_RETURN_IF_ERROR(context.kernels->CompressBackward(params, stream));
  params.head_dim = dims.head_dim_v;
  params.weights = WeightsOf(inputs.compress_v);
  params.tokens = tokens.v;
  params.d_summaries = d_summaries + int64_t{dims.num_kv_heads} * dims.head_dim_qk;
  params.d_tokens = token_gradients.dv;
  params.d_weights = {};
  for (const WeightGradient& weight : weights[1]) params.d_weights.*weight.field = weight.computed;
  return context.kernels->CompressBackward(params, stream);
}

absl::Status StoreCompressorGradients(PassContext& context, const ForwardInputs& inputs,
                                      const Gradients& gradients, void* stream) {
  for (const auto& of_compressor : WeightGradientsOf(context, inputs, gradients)) {
    for (const WeightGradient& weight : of_compressor) {
      if (gradients.sum_over_ranks && context.plan.num_ranks() > 1) {
        NSA_RETURN_IF_ERROR(SumOverRanks(context, weight.computed, weight.count, stream));
      }
      if (!weight.wanted->is_set()) continue;
      NSA_RETURN_IF_ERROR(StoreNumbers(context, weight.computed, weight.count,
                                       static_cast<float*>(weight.wanted->data),
                                       gradients.accumulate, stream));
    }
  }
  return absl::OkStatus();
}

}  // namespace nsa
