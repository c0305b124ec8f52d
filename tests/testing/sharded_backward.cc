#include "tests/testing/sharded_backward.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "nsa/plan/workspace.h"
#include "tests/testing/local_tensor.h"

namespace nsa::test {
namespace {

using G = GlobalGradients;

int64_t NumElements(const Dims& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

Tensor Gradients::*FieldOf(G::Field field) {
  constexpr Tensor Gradients::*kFields[] = {
      &Gradients::dq,     &Gradients::dk_cmp, &Gradients::dv_cmp, &Gradients::dk_slc,
      &Gradients::dv_slc, &Gradients::dk_win, &Gradients::dv_win, &Gradients::dgate};
  return kFields[field];
}

Tensor CompressorGradients::*WeightOf(G::Weight weight) {
  using C = CompressorGradients;
  constexpr Tensor C::*kWeights[] = {&C::weight, &C::pe, &C::w, &C::w1, &C::b1, &C::w2, &C::b2};
  return kWeights[weight];
}

std::vector<int64_t> AllRows(const Dims& shape) {
  std::vector<int64_t> rows(shape[0]);
  std::iota(rows.begin(), rows.end(), int64_t{0});
  return rows;
}

}  // namespace

const char* GlobalGradients::Name(Field field) {
  constexpr const char* kNames[] = {"dq",     "dk_cmp", "dv_cmp", "dk_slc",
                                    "dv_slc", "dk_win", "dv_win", "dgate"};
  return kNames[field];
}

const char* GlobalGradients::Name(Weight weight) {
  constexpr const char* kNames[] = {"weight", "pe", "w", "w1", "b1", "w2", "b2"};
  return kNames[weight];
}

GlobalGradients::GlobalGradients(const Problem& problem, int num_ranks, DType gradient_dtype)
    : num_ranks_(num_ranks), dtype_(gradient_dtype) {
  const NsaConfig& config = problem.config;
  const int64_t tokens = problem.num_tokens(), hq = config.num_q_heads, hkv = config.num_kv_heads;
  const int64_t dk = config.head_dim_qk, dv = config.head_dim_v;
  const int64_t l = config.compress_block_tokens;
  for (int field = 0; field < kNumFields; ++field) {
    shapes_[field] = field == kDq      ? Dims{tokens, hq, dk}
                     : field == kDgate ? Dims{tokens, hq, 3}
                                       : Dims{tokens, hkv, field % 2 == kDkCmp % 2 ? dk : dv};
    offset_[field] = num_bytes_;
    num_bytes_ += AlignUp(NumElements(shapes_[field]) * SizeOf(dtype_));
  }
  const std::pair<const EncodedParameters*, int64_t> compressors[] = {
      {&problem.inputs.compress_k, dk}, {&problem.inputs.compress_v, dv}};
  for (int i = 0; i < 2; ++i) {
    const EncodedParameters& p = *compressors[i].first;
    const int64_t d = compressors[i].second, h = p.num_heads, f = p.hidden_width;
    const std::pair<const Bytes*, Dims> weights[] = {
        {&p.weight, {h, l}}, {&p.pe, {h, l, d}}, {&p.w, {h, d, l * d}}, {&p.w1, {h, f, l * d}},
        {&p.b1, {h, f}},     {&p.w2, {h, d, f}}, {&p.b2, {h, d}}};
    for (int w = 0; w < kNumWeights; ++w) {
      if (weights[w].first->empty()) continue;
      weight_shapes_[i][w] = weights[w].second;
      weight_offset_[i][w] = num_bytes_;
      num_bytes_ += num_ranks_ * AlignUp(NumElements(weights[w].second) * int64_t{sizeof(float)});
    }
  }
  memory_ = static_cast<std::byte*>(
      mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  std::memset(memory_, 0xff, num_bytes_);
}

GlobalGradients::~GlobalGradients() { munmap(memory_, num_bytes_); }

int64_t GlobalGradients::num_bytes(Field field) const {
  return NumElements(shapes_[field]) * SizeOf(dtype_);
}

std::vector<double> GlobalGradients::Values(Field field) const {
  return Decode(dtype_, data(field), NumElements(shapes_[field]));
}

std::byte* GlobalGradients::weight_data(int compressor, Weight weight, int rank) const {
  const int64_t size = AlignUp(NumElements(weight_shapes_[compressor][weight]) * 4);
  return memory_ + weight_offset_[compressor][weight] + rank * size;
}

std::vector<double> GlobalGradients::WeightValues(int compressor, Weight weight) const {
  const int64_t count = NumElements(weight_shapes_[compressor][weight]);
  std::vector<double> sum(count, 0.0);
  for (int rank = 0; rank < num_ranks_; ++rank) {
    const auto values = Decode(DType::kF32, weight_data(compressor, weight, rank), count);
    for (int64_t i = 0; i < count; ++i) sum[i] += values[i];
  }
  return sum;
}

absl::Status RunRankBackward(const Problem& problem, const Bytes& d_o, const ShardPlan& plan,
                             const RunOptions& options, const BackwardRun& run,
                             std::shared_ptr<comm::Communicator> communicator,
                             std::shared_ptr<kernels::Kernels> kernels, GlobalOutputs* outputs,
                             GlobalGradients* gradients, ForwardStats* stats) {
  const int rank = communicator->rank();
  RunOptions with_backward = options;
  with_backward.has_backward = true;
  auto forward = RankForward::Create(problem, plan, with_backward, communicator, kernels);
  if (!forward.ok()) return forward.status();
  Engine& engine = (*forward)->engine();
  const ForwardInputs& inputs = (*forward)->inputs();
  const std::vector<int64_t>& rows = (*forward)->rows();
  const auto tokens = static_cast<int64_t>(rows.size());

  // Where gradients go: poisoned unless they are added to.
  std::vector<LocalTensor> fields, weights;
  Gradients wanted;
  wanted.sum_over_ranks = run.sum_over_ranks;
  wanted.accumulate = run.num_accumulated > 1;
  const auto make = [&](DType dtype, Dims shape, int64_t row_padding, int64_t head_padding,
                        std::vector<LocalTensor>* list, Tensor* view) -> absl::Status {
    absl::StatusOr<LocalTensor> tensor =
        LocalTensor::Create(*kernels, dtype, shape, row_padding, head_padding);
    if (!tensor.ok()) return tensor.status();
    if (!wanted.accumulate) {
      if (absl::Status s = tensor->Poison(*kernels); !s.ok()) return s;
    }
    *view = tensor->view();
    list->push_back(*std::move(tensor));
    return absl::OkStatus();
  };
  for (int i = 0; i < G::kNumFields; ++i) {
    const auto field = static_cast<G::Field>(i);
    Dims shape = gradients->shape(field);
    shape[0] = tokens;
    absl::Status status = make(gradients->dtype(), shape, options.row_padding, options.head_padding,
                               &fields, &(wanted.*FieldOf(field)));
    if (!status.ok()) return status;
  }
  if (options.share_kv) wanted.SetSharedKv(wanted.dk_cmp, wanted.dv_cmp);
  for (int c = 0; c < 2; ++c) {
    for (int w = 0; w < G::kNumWeights; ++w) {
      const auto weight = static_cast<G::Weight>(w);
      const Dims shape = gradients->weight_shape(c, weight);
      if (shape.empty()) continue;
      CompressorGradients& to = c == 0 ? wanted.dcompress_k : wanted.dcompress_v;
      absl::Status status = make(DType::kF32, shape, 0, 0, &weights, &(to.*WeightOf(weight)));
      if (!status.ok()) return status;
    }
  }
  const Dims o_shape = {tokens, problem.config.num_q_heads, problem.config.head_dim_v};
  absl::StatusOr<LocalTensor> local_d_o =
      LocalTensor::Create(*kernels, problem.input_options.dtype, o_shape, options.row_padding);
  if (!local_d_o.ok()) return local_d_o.status();
  if (absl::Status s = local_d_o->Load(*kernels, d_o.data(), rows); !s.ok()) return s;

  // The plain forward, for its outputs; then the one that is saved.
  absl::Status status = (*forward)->Run();
  if (status.ok()) status = kernels->Synchronize(nullptr);
  if (status.ok()) status = (*forward)->CopyTo(outputs);
  if (!status.ok()) return status;
  SaveOptions save_options = {.keep_summaries = run.keep_summaries, .keep_blocks = run.keep_blocks};
  const int64_t saved_bytes = engine.SavedForwardBytes(save_options);
  std::unique_ptr<kernels::Memory> original, copy;
  if (run.copies_saved) {
    for (std::unique_ptr<kernels::Memory>* memory : {&original, &copy}) {
      auto made = kernels->Allocate(saved_bytes);
      if (!made.ok()) return made.status();
      *memory = *std::move(made);
    }
    save_options.memory = original->data();
  }
  auto saved = engine.CreateSavedForward(save_options);
  if (!saved.ok()) return saved.status();
  ForwardOutputs only_o;
  only_o.o = (*forward)->outputs().o;
  status = engine.Forward(inputs, only_o, nullptr, saved->get());
  if (!status.ok()) return status;
  if (run.other_forwards_between) {
    auto other = engine.CreateSavedForward(
        {.keep_summaries = !run.keep_summaries, .keep_blocks = !run.keep_blocks});
    if (!other.ok()) return other.status();
    status = engine.Forward(inputs, only_o, nullptr, other->get());
    if (status.ok()) status = (*forward)->Run();
    if (status.ok()) {
      Gradients none;
      status = engine.Backward(inputs, local_d_o->view(), **other, none);
    }
    if (status.ok()) status = kernels->Synchronize(nullptr);
    if (!status.ok()) return status;
  }
  if (run.between != nullptr) {
    if (status = run.between(); !status.ok()) return status;
  }
  if (run.copies_saved) {
    std::string bytes(saved_bytes, '\0');
    status = kernels->CopyToHost(bytes.data(), original->data(), saved_bytes, nullptr);
    if (status.ok()) status = kernels->Synchronize(nullptr);
    original.reset();
    if (status.ok())
      status = kernels->CopyFromHost(copy->data(), bytes.data(), saved_bytes, nullptr);
    if (!status.ok()) return status;
    save_options.memory = copy->data();
    save_options.is_filled = true;
    saved = engine.CreateSavedForward(save_options);
    if (!saved.ok()) return saved.status();
  }
  for (int i = 0; i < run.num_accumulated; ++i) {
    status = engine.Backward(inputs, local_d_o->view(), **saved, wanted);
    if (!status.ok()) return status;
  }
  if (absl::Status s = kernels->Synchronize(nullptr); !s.ok()) return s;
  absl::StatusOr<ForwardStats> gathered = engine.GatherStats();
  if (!gathered.ok()) return gathered.status();
  if (stats != nullptr) *stats = *gathered;

  for (int i = 0; i < G::kNumFields; ++i) {
    const auto field = static_cast<G::Field>(i);
    status = fields[i].Store(*kernels, gradients->data(field), rows);
    if (!status.ok()) return status;
  }
  auto next = weights.begin();
  for (int c = 0; c < 2; ++c) {
    for (int w = 0; w < G::kNumWeights; ++w) {
      const auto weight = static_cast<G::Weight>(w);
      const Dims shape = gradients->weight_shape(c, weight);
      if (shape.empty()) continue;
      status = (next++)->Store(*kernels, gradients->weight_data(c, weight, rank), AllRows(shape));
      if (!status.ok()) return status;
    }
  }
  return absl::OkStatus();
}

absl::Status RunLoopbackBackward(const Problem& problem, const Bytes& d_o, const ShardPlan& plan,
                                 const RunOptions& options, const BackwardRun& run,
                                 GlobalOutputs* outputs, GlobalGradients* gradients,
                                 ForwardStats* stats, const MakeKernels& make_kernels) {
  return OnLoopbackRanks(
      plan.num_ranks(),
      [&](std::shared_ptr<comm::Communicator> communicator,
          std::shared_ptr<kernels::Kernels> kernels) {
        const bool is_first = communicator->rank() == 0;
        return RunRankBackward(problem, d_o, plan, options, run, std::move(communicator),
                               std::move(kernels), outputs, gradients, is_first ? stats : nullptr);
      },
      make_kernels);
}

}  // namespace nsa::test
