#include "tests/testing/sharded.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "comm/loopback/loopback.h"
#include "kernels/cpu/cpu_kernels.h"
#include "nsa/plan/workspace.h"
#include "tests/testing/compare.h"
#include "tests/testing/local_tensor.h"

namespace nsa::test {
namespace {

constexpr const char* kFieldNames[] = {"o",       "o_cmp",   "o_slc",   "o_win",
                                       "lse_cmp", "lse_slc", "lse_win", "block_indices"};

// A tensor that is to be in the kernels' memory: where it lies in the problem, and where its view
// belongs. Empty ones are left out.
struct InputField {
  const Bytes* bytes;
  DType dtype;
  Dims shape;  // of this rank
  ConstTensor* view;
};

std::vector<InputField> ActivationFields(const Problem& problem, int64_t tokens,
                                         ForwardInputs* inputs) {
  const EncodedInputs& in = problem.inputs;
  const DType dtype = problem.input_options.dtype;
  const int64_t hq = problem.config.num_q_heads, hkv = problem.config.num_kv_heads;
  const int64_t dk = problem.config.head_dim_qk, dv = problem.config.head_dim_v;
  return {{&in.q, dtype, {tokens, hq, dk}, &inputs->q},
          {&in.k_cmp, dtype, {tokens, hkv, dk}, &inputs->k_cmp},
          {&in.v_cmp, dtype, {tokens, hkv, dv}, &inputs->v_cmp},
          {&in.k_slc, dtype, {tokens, hkv, dk}, &inputs->k_slc},
          {&in.v_slc, dtype, {tokens, hkv, dv}, &inputs->v_slc},
          {&in.k_win, dtype, {tokens, hkv, dk}, &inputs->k_win},
          {&in.v_win, dtype, {tokens, hkv, dv}, &inputs->v_win},
          {&in.gate, problem.input_options.gate_dtype, {tokens, hq, 3}, &inputs->gate}};
}

std::vector<InputField> ParameterFields(const Problem& problem, ForwardInputs* inputs) {
  std::vector<InputField> fields;
  const auto add = [&](const EncodedParameters& encoded, int64_t dim, CompressorParams* params) {
    const int64_t h = encoded.num_heads, f = encoded.hidden_width;
    const int64_t l = problem.config.compress_block_tokens;
    const InputField all[] = {{&encoded.weight, encoded.dtype, {h, l}, &params->weight},
                              {&encoded.pe, encoded.dtype, {h, l, dim}, &params->pe},
                              {&encoded.w, encoded.dtype, {h, dim, l * dim}, &params->w},
                              {&encoded.w1, encoded.dtype, {h, f, l * dim}, &params->w1},
                              {&encoded.b1, encoded.dtype, {h, f}, &params->b1},
                              {&encoded.w2, encoded.dtype, {h, dim, f}, &params->w2},
                              {&encoded.b2, encoded.dtype, {h, dim}, &params->b2}};
    for (const InputField& field : all) {
      if (!field.bytes->empty()) fields.push_back(field);
    }
  };
  add(problem.inputs.compress_k, problem.config.head_dim_qk, &inputs->compress_k);
  add(problem.inputs.compress_v, problem.config.head_dim_v, &inputs->compress_v);
  return fields;
}

}  // namespace

NsaConfig MakeNsaConfig(const reference::ReferenceConfig& config) {
  NsaConfig result = {
      .num_q_heads = static_cast<int32_t>(config.num_q_heads),
      .num_kv_heads = static_cast<int32_t>(config.num_kv_heads),
      .head_dim_qk = static_cast<int32_t>(config.head_dim_qk),
      .head_dim_v = static_cast<int32_t>(config.head_dim_v),
      .compress_block_tokens = static_cast<int32_t>(config.compress_block_tokens),
      .compress_stride_tokens = static_cast<int32_t>(config.compress_stride_tokens),
      .select_block_tokens = static_cast<int32_t>(config.select_block_tokens),
      .num_selected_blocks = static_cast<int32_t>(config.num_selected_blocks),
      .num_initial_blocks = static_cast<int32_t>(config.num_initial_blocks),
      .num_local_blocks = static_cast<int32_t>(config.num_local_blocks),
      .window_tokens = static_cast<int32_t>(config.window_tokens),
      .softmax_scale = std::nullopt,
      .compressor = MakeCompressor(config.compressor),
  };
  if (config.softmax_scale) result.softmax_scale = static_cast<float>(*config.softmax_scale);
  return result;
}

Problem MakeProblem(const reference::ReferenceConfig& config,
                    const std::vector<int64_t>& cu_seqlens, const InputOptions& options,
                    const reference::ReferenceInputs& inputs) {
  return {.config = MakeNsaConfig(config),
          .input_options = options,
          .cu_seqlens = cu_seqlens,
          .inputs = Encode(inputs, options)};
}

Problem RandomProblem(const reference::ReferenceConfig& config,
                      const std::vector<int64_t>& cu_seqlens, const InputOptions& options,
                      uint64_t seed) {
  Random random(seed);
  return MakeProblem(config, cu_seqlens, options,
                     RandomInputs(config, cu_seqlens, options, &random));
}

ShardPlan RandomPlan(const std::vector<int64_t>& cu_seqlens, Random* random) {
  const int64_t num_tokens = cu_seqlens.back();
  const int num_ranks = static_cast<int>(random->Int(1, 6));
  switch (random->Int(0, 3)) {
    case 0:
      return *ShardPlan::Parse("contiguous", num_tokens, num_ranks, cu_seqlens);
    case 1:
      return *ShardPlan::Parse("zigzag", num_tokens, num_ranks, cu_seqlens);
    case 2:
      return *ShardPlan::Parse("zigzag-per-document", num_tokens, num_ranks, cu_seqlens);
    default:
      break;
  }
  std::vector<Chunk> chunks;
  const int64_t longest = random->Pick<int64_t>({7, 100, 1000});
  for (int64_t begin = 0; begin < num_tokens;) {
    const int64_t length = std::min(num_tokens - begin, random->Int(0, longest));
    chunks.push_back({static_cast<int32_t>(random->Int(0, num_ranks - 1)), begin, length});
    begin += length;
  }
  return *ShardPlan::Create(num_tokens, num_ranks, chunks, cu_seqlens);
}

GlobalOutputs::GlobalOutputs(const Problem& problem)
    : num_tokens_(problem.num_tokens()), dtype_(problem.input_options.dtype) {
  const int64_t hq = problem.config.num_q_heads;
  const int64_t o_bytes = hq * problem.config.head_dim_v * SizeOf(dtype_);
  const int64_t lse_bytes = hq * int64_t{sizeof(float)};
  for (Field field : {kO, kOCmp, kOSlc, kOWin}) row_bytes_[field] = o_bytes;
  for (Field field : {kLseCmp, kLseSlc, kLseWin}) row_bytes_[field] = lse_bytes;
  row_bytes_[kBlockIndices] = int64_t{problem.config.num_kv_heads} *
                              problem.config.num_selected_blocks * int64_t{sizeof(int32_t)};
  for (int field = 0; field < kNumFields; ++field) {
    offset_[field] = num_bytes_;
    num_bytes_ += AlignUp(row_bytes_[field] * num_tokens_);
  }
  memory_ = static_cast<std::byte*>(
      mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  Poison();
}

GlobalOutputs::~GlobalOutputs() { munmap(memory_, num_bytes_); }

void GlobalOutputs::Poison() { std::memset(memory_, 0xff, num_bytes_); }

std::vector<double> GlobalOutputs::Values(Field field) const {
  const DType dtype = field <= kOWin ? dtype_ : DType::kF32;
  return Decode(dtype, data(field), num_tokens_ * row_bytes_[field] / SizeOf(dtype));
}

std::vector<int32_t> GlobalOutputs::block_indices() const {
  const auto* first = reinterpret_cast<const int32_t*>(data(kBlockIndices));
  return {first, first + num_tokens_ * row_bytes_[kBlockIndices] / int64_t{sizeof(int32_t)}};
}

::testing::AssertionResult SameOutputs(const Problem& problem, const GlobalOutputs& expected,
                                       const GlobalOutputs& actual) {
  const int64_t tokens = problem.num_tokens();
  for (int i = 0; i < GlobalOutputs::kNumFields; ++i) {
    const auto field = static_cast<GlobalOutputs::Field>(i);
    const bool indices = field == GlobalOutputs::kBlockIndices;
    const DType dtype = field <= GlobalOutputs::kOWin ? problem.input_options.dtype : DType::kF32;
    ::testing::AssertionResult same =
        indices
            ? SameIndices(kFieldNames[i],
                          {tokens, problem.config.num_kv_heads, problem.config.num_selected_blocks},
                          expected.block_indices(), actual.block_indices())
            : SameBits(kFieldNames[i], dtype,
                       {tokens, problem.config.num_q_heads,
                        expected.row_bytes(field) / SizeOf(dtype) / problem.config.num_q_heads},
                       expected.data(field), actual.data(field));
    if (!same) return same;
  }
  return ::testing::AssertionSuccess();
}

RankForward::RankForward(const ShardPlan& plan, int rank, std::shared_ptr<kernels::Kernels> kernels)
    : rows_(plan.TokensOfRank(rank)), kernels_(std::move(kernels)) {
  for (size_t row = 0; row < rows_.size(); ++row) rows_[row] = plan.GlobalToken(rank, row);
}

RankForward::~RankForward() = default;

absl::StatusOr<std::unique_ptr<RankForward>> RankForward::Create(
    const Problem& problem, const ShardPlan& plan, const RunOptions& options,
    std::shared_ptr<comm::Communicator> communicator, std::shared_ptr<kernels::Kernels> kernels) {
  std::unique_ptr<RankForward> forward(new RankForward(plan, communicator->rank(), kernels));
  absl::StatusOr<std::unique_ptr<Engine>> engine = Engine::Create(
      {.config = problem.config,
       .dtype = problem.input_options.dtype,
       .fetch_budget_bytes = options.fetch_budget_bytes,
       .has_backward = options.has_backward,
       .max_hidden_width = options.has_backward ? problem.input_options.hidden_width : 0,
       .on_stage = options.on_stage},
      plan, std::move(communicator), std::move(kernels), options.memory_of);
  if (!engine.ok()) return engine.status();
  forward->engine_ = *std::move(engine);
  absl::Status status = forward->Allocate(problem, options);
  if (status.ok()) status = forward->Load(problem);
  if (!status.ok()) return status;
  return forward;
}

absl::Status RankForward::Allocate(const Problem& problem, const RunOptions& options) {
  const NsaConfig& config = problem.config;
  const DType dtype = problem.input_options.dtype;
  const auto tokens = static_cast<int64_t>(rows_.size());
  const int64_t hq = config.num_q_heads, hkv = config.num_kv_heads, dv = config.head_dim_v;
  const auto add = [&](std::vector<LocalTensor>* list, DType type, const Dims& shape, bool padded,
                       auto* view) -> absl::Status {
    absl::StatusOr<LocalTensor> tensor =
        LocalTensor::Create(*kernels_, type, shape, padded ? options.row_padding : 0,
                            padded ? options.head_padding : 0);
    if (!tensor.ok()) return tensor.status();
    *view = tensor->view();
    list->push_back(*std::move(tensor));
    return absl::OkStatus();
  };
  for (const InputField& f : ActivationFields(problem, tokens, &inputs_)) {
    absl::Status status = add(&activations_, f.dtype, f.shape, true, f.view);
    if (!status.ok()) return status;
  }
  for (const InputField& f : ParameterFields(problem, &inputs_)) {
    absl::Status status = add(&parameters_, f.dtype, f.shape, false, f.view);
    if (!status.ok()) return status;
  }
  if (options.share_kv) inputs_.SetSharedKv(inputs_.k_cmp, inputs_.v_cmp);
  // In the order of GlobalOutputs::Field.
  Tensor lse[3], indices;
  for (Tensor* view : {&outputs_.o, &outputs_.o_cmp, &outputs_.o_slc, &outputs_.o_win}) {
    absl::Status status = add(&results_, dtype, {tokens, hq, dv}, true, view);
    if (!status.ok()) return status;
  }
  for (Tensor& view : lse) {
    absl::Status status = add(&results_, DType::kF32, {tokens, hq}, false, &view);
    if (!status.ok()) return status;
  }
  absl::Status status =  // 4 bytes each
      add(&results_, DType::kF32, {tokens, hkv, config.num_selected_blocks}, false, &indices);
  if (!status.ok()) return status;
  if (options.only_o) {
    outputs_.o_cmp = outputs_.o_slc = outputs_.o_win = Tensor();
  } else {
    outputs_.lse_cmp = static_cast<float*>(lse[0].data);
    outputs_.lse_slc = static_cast<float*>(lse[1].data);
    outputs_.lse_win = static_cast<float*>(lse[2].data);
    outputs_.block_indices = static_cast<int32_t*>(indices.data);
  }
  return absl::OkStatus();
}

absl::Status RankForward::Load(const Problem& problem) {
  ForwardInputs unused;
  const auto activations = ActivationFields(problem, static_cast<int64_t>(rows_.size()), &unused);
  for (size_t i = 0; i < activations.size(); ++i) {
    absl::Status status = activations_[i].Load(*kernels_, activations[i].bytes->data(), rows_);
    if (!status.ok()) return status;
  }
  const auto parameters = ParameterFields(problem, &unused);
  for (size_t i = 0; i < parameters.size(); ++i) {
    std::vector<int64_t> all_rows(parameters[i].shape[0]);
    std::iota(all_rows.begin(), all_rows.end(), int64_t{0});
    absl::Status status = parameters_[i].Load(*kernels_, parameters[i].bytes->data(), all_rows);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status RankForward::Poison() {
  for (LocalTensor& tensor : results_) {
    if (absl::Status status = tensor.Poison(*kernels_); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status RankForward::Run(void* stream) { return engine_->Forward(inputs_, outputs_, stream); }

absl::Status RankForward::CopyTo(GlobalOutputs* outputs) {
  for (int field = 0; field < GlobalOutputs::kNumFields; ++field) {
    absl::Status status = results_[field].Store(
        *kernels_, outputs->data(static_cast<GlobalOutputs::Field>(field)), rows_);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status RunRank(const Problem& problem, const ShardPlan& plan, const RunOptions& options,
                     std::shared_ptr<comm::Communicator> communicator,
                     std::shared_ptr<kernels::Kernels> kernels, GlobalOutputs* outputs,
                     ForwardStats* stats) {
  auto forward = RankForward::Create(problem, plan, options, std::move(communicator), kernels);
  if (!forward.ok()) return forward.status();
  for (int i = 0; i < options.num_forwards; ++i) {
    absl::Status status = (*forward)->Poison();
    if (status.ok()) status = (*forward)->Run();
    if (!status.ok()) return status;
  }
  if (absl::Status s = kernels->Synchronize(nullptr); !s.ok()) return s;
  absl::StatusOr<ForwardStats> gathered = (*forward)->engine().GatherStats();
  if (!gathered.ok()) return gathered.status();
  if (stats != nullptr) *stats = *gathered;
  return (*forward)->CopyTo(outputs);
}

absl::Status OnLoopbackRanks(
    int num_ranks,
    const std::function<absl::Status(std::shared_ptr<comm::Communicator>,
                                     std::shared_ptr<kernels::Kernels>)>& run,
    const MakeKernels& make_kernels) {
  auto group = comm::LoopbackGroup::Create(num_ranks);
  if (!group.ok()) return group.status();
  std::vector<absl::Status> statuses(num_ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      auto kernels =
          make_kernels ? make_kernels() : kernels::CpuKernels::Create({.num_threads = 1});
      statuses[rank] =
          kernels.ok() ? run(std::move((*group)[rank]), *std::move(kernels)) : kernels.status();
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int rank = 0; rank < num_ranks; ++rank) {
    if (!statuses[rank].ok()) {
      return absl::Status(statuses[rank].code(),
                          absl::StrCat("on rank ", rank, ": ", statuses[rank].message()));
    }
  }
  return absl::OkStatus();
}

absl::Status RunLoopback(const Problem& problem, const ShardPlan& plan, const RunOptions& options,
                         GlobalOutputs* outputs, ForwardStats* stats,
                         const MakeKernels& make_kernels) {
  return OnLoopbackRanks(
      plan.num_ranks(),
      [&](std::shared_ptr<comm::Communicator> communicator,
          std::shared_ptr<kernels::Kernels> kernels) {
        const bool is_first = communicator->rank() == 0;
        return RunRank(problem, plan, options, std::move(communicator), std::move(kernels), outputs,
                       is_first ? stats : nullptr);
      },
      make_kernels);
}

}  // namespace nsa::test
