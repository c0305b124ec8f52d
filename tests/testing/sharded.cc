#include "tests/testing/sharded.h"

#include <sys/mman.h>

#include <cstring>
#include <thread>

#include "absl/strings/str_cat.h"
#include "comm/loopback/loopback.h"
#include "kernels/cpu/cpu_kernels.h"
#include "nsa/engine.h"
#include "nsa/plan/workspace.h"
#include "tests/testing/compare.h"

namespace nsa::test {
namespace {

constexpr const char* kFieldNames[] = {"o",       "o_cmp",   "o_slc",   "o_win",
                                       "lse_cmp", "lse_slc", "lse_win", "block_indices"};

// A tensor of this rank in the kernels' memory, rows `row_padding` elements further apart than
// dense.
class LocalTensor {
 public:
  static absl::StatusOr<LocalTensor> Create(kernels::Kernels& kernels, DType dtype, Dims shape,
                                            int64_t row_padding) {
    LocalTensor tensor;
    tensor.tensor_ = Tensor(nullptr, dtype, std::move(shape));
    tensor.tensor_.strides[0] += row_padding;
    tensor.row_bytes_ = (tensor.tensor_.strides[0] - row_padding) * SizeOf(dtype);
    absl::StatusOr<std::unique_ptr<kernels::Memory>> memory =
        kernels.Allocate(std::max<int64_t>(1, tensor.tensor_.shape[0] * tensor.stride_bytes()));
    if (!memory.ok()) return memory.status();
    tensor.memory_ = *std::move(memory);
    tensor.tensor_.data = tensor.memory_->data();
    return tensor;
  }

  const Tensor& view() const { return tensor_; }

  absl::Status CopyRowIn(kernels::Kernels& kernels, int64_t row, const std::byte* src) {
    return kernels.CopyFromHost(At(row), src, row_bytes_, nullptr);
  }
  absl::Status CopyRowOut(kernels::Kernels& kernels, int64_t row, std::byte* dst) {
    return kernels.CopyToHost(dst, At(row), row_bytes_, nullptr);
  }
  int64_t row_bytes() const { return row_bytes_; }
  // NaN everywhere, in the padding too.
  absl::Status Poison(kernels::Kernels& kernels) {
    const std::vector<char> poison(tensor_.shape[0] * stride_bytes(), '\xff');
    return kernels.CopyFromHost(tensor_.data, poison.data(), static_cast<int64_t>(poison.size()),
                                nullptr);
  }

 private:
  int64_t stride_bytes() const { return tensor_.strides[0] * SizeOf(tensor_.dtype); }
  char* At(int64_t row) { return static_cast<char*>(tensor_.data) + row * stride_bytes(); }

  Tensor tensor_;
  int64_t row_bytes_ = 0;
  std::unique_ptr<kernels::Memory> memory_;
};

// Compressor parameters in the kernels' memory.
class LocalParams {
 public:
  absl::Status Load(kernels::Kernels& kernels, const NsaConfig& config,
                    const EncodedParameters& encoded, int64_t head_dim) {
    const int64_t h = encoded.num_heads;
    const int64_t l = config.compress_block_tokens;
    const int64_t f = encoded.hidden_width;
    const std::tuple<const Bytes*, ConstTensor*, Dims> all[] = {
        {&encoded.weight, &params_.weight, {h, l}},
        {&encoded.pe, &params_.pe, {h, l, head_dim}},
        {&encoded.w, &params_.w, {h, head_dim, l * head_dim}},
        {&encoded.w1, &params_.w1, {h, f, l * head_dim}},
        {&encoded.b1, &params_.b1, {h, f}},
        {&encoded.w2, &params_.w2, {h, head_dim, f}},
        {&encoded.b2, &params_.b2, {h, head_dim}}};
    for (const auto& [bytes, tensor, shape] : all) {
      if (bytes->empty()) continue;
      absl::StatusOr<std::unique_ptr<kernels::Memory>> memory =
          kernels.Allocate(static_cast<int64_t>(bytes->size()));
      if (!memory.ok()) return memory.status();
      memory_.push_back(*std::move(memory));
      absl::Status status = kernels.CopyFromHost(memory_.back()->data(), bytes->data(),
                                                 static_cast<int64_t>(bytes->size()), nullptr);
      if (!status.ok()) return status;
      *tensor = ConstTensor(memory_.back()->data(), encoded.dtype, shape);
    }
    return absl::OkStatus();
  }
  const CompressorParams& view() const { return params_; }

 private:
  CompressorParams params_;
  std::vector<std::unique_ptr<kernels::Memory>> memory_;
};

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

absl::Status RunRank(const Problem& problem, const ShardPlan& plan, const RunOptions& options,
                     std::shared_ptr<comm::Communicator> communicator,
                     std::shared_ptr<kernels::Kernels> kernels, GlobalOutputs* outputs,
                     ForwardStats* stats) {
  const int rank = communicator->rank();
  const int64_t tokens = plan.TokensOfRank(rank);
  const NsaConfig& config = problem.config;
  const DType dtype = problem.input_options.dtype;
  const int64_t hq = config.num_q_heads, hkv = config.num_kv_heads;
  const int64_t dk = config.head_dim_qk, dv = config.head_dim_v;

  absl::StatusOr<std::unique_ptr<Engine>> engine =
      Engine::Create({.config = config,
                      .dtype = dtype,
                      .fetch_budget_bytes = options.fetch_budget_bytes,
                      .on_stage = options.on_stage},
                     plan, communicator, kernels);
  if (!engine.ok()) return engine.status();

  std::vector<LocalTensor> local;
  local.reserve(16);
  auto load = [&](const Bytes& global, DType type, Dims shape, ConstTensor* view) -> absl::Status {
    absl::StatusOr<LocalTensor> tensor =
        LocalTensor::Create(*kernels, type, std::move(shape), options.row_padding);
    if (!tensor.ok()) return tensor.status();
    if (absl::Status status = tensor->Poison(*kernels); !status.ok()) return status;
    for (int64_t row = 0; row < tokens; ++row) {
      absl::Status status = tensor->CopyRowIn(
          *kernels, row, global.data() + plan.GlobalToken(rank, row) * tensor->row_bytes());
      if (!status.ok()) return status;
    }
    *view = tensor->view();
    local.push_back(*std::move(tensor));
    return absl::OkStatus();
  };
  ForwardInputs inputs;
  const EncodedInputs& in = problem.inputs;
  const std::tuple<const Bytes*, DType, Dims, ConstTensor*> loads[] = {
      {&in.q, dtype, {tokens, hq, dk}, &inputs.q},
      {&in.k_cmp, dtype, {tokens, hkv, dk}, &inputs.k_cmp},
      {&in.v_cmp, dtype, {tokens, hkv, dv}, &inputs.v_cmp},
      {&in.k_slc, dtype, {tokens, hkv, dk}, &inputs.k_slc},
      {&in.v_slc, dtype, {tokens, hkv, dv}, &inputs.v_slc},
      {&in.k_win, dtype, {tokens, hkv, dk}, &inputs.k_win},
      {&in.v_win, dtype, {tokens, hkv, dv}, &inputs.v_win},
      {&in.gate, problem.input_options.gate_dtype, {tokens, hq, 3}, &inputs.gate}};
  for (const auto& [bytes, type, shape, view] : loads) {
    if (absl::Status status = load(*bytes, type, shape, view); !status.ok()) return status;
  }
  if (options.share_kv) inputs.SetSharedKv(inputs.k_cmp, inputs.v_cmp);
  LocalParams compress_k, compress_v;
  if (absl::Status s = compress_k.Load(*kernels, config, in.compress_k, dk); !s.ok()) return s;
  if (absl::Status s = compress_v.Load(*kernels, config, in.compress_v, dv); !s.ok()) return s;
  inputs.compress_k = compress_k.view();
  inputs.compress_v = compress_v.view();

  std::vector<LocalTensor> results;
  ForwardOutputs out;
  for (Tensor* view : {&out.o, &out.o_cmp, &out.o_slc, &out.o_win}) {
    absl::StatusOr<LocalTensor> tensor =
        LocalTensor::Create(*kernels, dtype, {tokens, hq, dv}, options.row_padding);
    if (!tensor.ok()) return tensor.status();
    *view = tensor->view();
    results.push_back(*std::move(tensor));
  }
  for (float** lse : {&out.lse_cmp, &out.lse_slc, &out.lse_win}) {
    absl::StatusOr<LocalTensor> tensor =
        LocalTensor::Create(*kernels, DType::kF32, {tokens, hq}, 0);
    if (!tensor.ok()) return tensor.status();
    *lse = static_cast<float*>(tensor->view().data);
    results.push_back(*std::move(tensor));
  }
  absl::StatusOr<LocalTensor> indices = LocalTensor::Create(
      *kernels, DType::kF32, {tokens, hkv, config.num_selected_blocks}, 0);  // 4 bytes each
  if (!indices.ok()) return indices.status();
  out.block_indices = static_cast<int32_t*>(indices->view().data);
  results.push_back(*std::move(indices));

  for (int i = 0; i < options.num_forwards; ++i) {
    for (LocalTensor& tensor : results) {
      if (absl::Status status = tensor.Poison(*kernels); !status.ok()) return status;
    }
    if (absl::Status s = (*engine)->Forward(inputs, out); !s.ok()) return s;
  }
  if (absl::Status s = kernels->Synchronize(nullptr); !s.ok()) return s;
  absl::StatusOr<ForwardStats> gathered = (*engine)->GatherStats();
  if (!gathered.ok()) return gathered.status();
  if (stats != nullptr) *stats = *gathered;
  for (int field = 0; field < GlobalOutputs::kNumFields; ++field) {
    const auto f = static_cast<GlobalOutputs::Field>(field);
    for (int64_t row = 0; row < tokens; ++row) {
      absl::Status status = results[field].CopyRowOut(
          *kernels, row, outputs->data(f) + plan.GlobalToken(rank, row) * outputs->row_bytes(f));
      if (!status.ok()) return status;
    }
  }
  return kernels->Synchronize(nullptr);
}

absl::Status RunLoopback(const Problem& problem, const ShardPlan& plan, const RunOptions& options,
                         GlobalOutputs* outputs, ForwardStats* stats) {
  auto group = comm::LoopbackGroup::Create(plan.num_ranks());
  if (!group.ok()) return group.status();
  std::vector<absl::Status> statuses(plan.num_ranks());
  std::vector<std::thread> threads;
  for (int rank = 0; rank < plan.num_ranks(); ++rank) {
    threads.emplace_back([&, rank] {
      auto kernels = kernels::CpuKernels::Create({.num_threads = 1});
      statuses[rank] = kernels.ok()
                           ? RunRank(problem, plan, options, std::move((*group)[rank]),
                                     *std::move(kernels), outputs, rank == 0 ? stats : nullptr)
                           : kernels.status();
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int rank = 0; rank < plan.num_ranks(); ++rank) {
    if (!statuses[rank].ok()) {
      return absl::Status(statuses[rank].code(),
                          absl::StrCat("on rank ", rank, ": ", statuses[rank].message()));
    }
  }
  return absl::OkStatus();
}

}  // namespace nsa::test
