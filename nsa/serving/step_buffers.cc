#include "nsa/serving/step_buffers.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace nsa::serving {
namespace {

constexpr int64_t kPieceBytes = 16;  // that CopyPieces copies in
constexpr int64_t kAlignBytes = 256;
constexpr int64_t kMaxNewTokens = 64;  // of a sequence in a step

// visit(name, tensor, dtype, heads, dim) for each tensor [T,heads,dim] that a cache with these
// options reads. `Inputs` is StepInputs, const or not.
template <typename Inputs, typename Visit>
void ForEachTensor(const ServiceOptions& options, Inputs& inputs, const Visit& visit) {
  const NsaConfig& config = options.cache.config;
  const DType dtype = options.cache.dtype;
  const int64_t hkv = config.num_kv_heads;
  visit("q", inputs.q, dtype, config.num_q_heads, config.head_dim_qk);
  visit("gate", inputs.gate, options.gate_dtype, config.num_q_heads, 3);
  visit("k_slc", inputs.kv.k_slc, dtype, hkv, config.head_dim_qk);
  visit("v_slc", inputs.kv.v_slc, dtype, hkv, config.head_dim_v);
  if (options.cache.shares_kv) return;
  visit("k_cmp", inputs.kv.k_cmp, dtype, hkv, config.head_dim_qk);
  visit("v_cmp", inputs.kv.v_cmp, dtype, hkv, config.head_dim_v);
  visit("k_win", inputs.kv.k_win, dtype, hkv, config.head_dim_qk);
  visit("v_win", inputs.kv.v_win, dtype, hkv, config.head_dim_v);
}

// A tensor [T,heads,dim] whose rows can be copied in pieces.
absl::Status CheckRows(absl::string_view name, const ConstTensor& tensor, DType dtype,
                       int64_t num_tokens, int64_t heads, int64_t dim) {
  if (absl::Status status = CheckTensor(name, tensor, dtype, {num_tokens, heads, dim});
      !status.ok()) {
    return status;
  }
  if (heads > 1 && tensor.strides[1] != dim) {
    return absl::InvalidArgumentError(absl::StrCat(name, ".strides[1] = ", tensor.strides[1],
                                                   ": must be ", dim, ", a token's row is dense"));
  }
  if (num_tokens > 1 && tensor.strides[0] * SizeOf(dtype) % kPieceBytes != 0) {
    return absl::InvalidArgumentError(absl::StrCat(name, ".strides[0] = ", tensor.strides[0],
                                                   ": must be a multiple of ", kPieceBytes,
                                                   " bytes"));
  }
  if (reinterpret_cast<uintptr_t>(tensor.data) % kPieceBytes != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ".data: its address must be a multiple of ", kPieceBytes, " bytes"));
  }
  return absl::OkStatus();
}

}  // namespace

int64_t MaxNewTokens(const ServiceOptions& options) {
  return std::min<int64_t>(kMaxNewTokens, options.cache.max_step_rows);
}

bool AppendsOnly(const DecodeRequest& request) {
  return !request.inputs.q.is_set() && !request.inputs.gate.is_set() && !request.o.is_set();
}

int64_t NumTokens(const DecodeRequest& request) {
  const Dims& shape = request.inputs.kv.k_slc.shape;
  return shape.empty() ? 0 : shape[0];
}

absl::Status CheckDecodeRequest(const ServiceOptions& options, const DecodeRequest& request) {
  const bool appends_only = AppendsOnly(request);
  const int64_t num_tokens = NumTokens(request);
  const int64_t most = appends_only ? options.cache.max_tokens : MaxNewTokens(options);
  if (num_tokens < 1 || num_tokens > most) {
    return absl::InvalidArgumentError(
        absl::StrCat("k_slc.shape[0] = ", num_tokens, ": new tokens must be 1 to ", most));
  }
  absl::Status status;
  ForEachTensor(options, request.inputs,
                [&](absl::string_view name, const ConstTensor& tensor, DType dtype, int64_t heads,
                    int64_t dim) {
                  if (appends_only && (name == "q" || name == "gate")) return;
                  status.Update(CheckRows(name, tensor, dtype, num_tokens, heads, dim));
                });
  if (!status.ok() || appends_only) return status;
  const NsaConfig& config = options.cache.config;
  return CheckRows("o", request.o, options.cache.dtype, num_tokens, config.num_q_heads,
                   config.head_dim_v);
}

absl::StatusOr<std::unique_ptr<StepBuffers>> StepBuffers::Create(
    const ServiceOptions& options, std::shared_ptr<kernels::Kernels> kernels) {
  const int64_t gate_bytes =
      int64_t{options.cache.config.num_q_heads} * 3 * SizeOf(options.gate_dtype);
  if (gate_bytes % kPieceBytes != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_q_heads = ", options.cache.config.num_q_heads, ": a token's gates, ",
                     gate_bytes, " bytes, must be a multiple of ", kPieceBytes, " bytes"));
  }
  std::unique_ptr<StepBuffers> buffers(new StepBuffers(options, std::move(kernels)));
  if (absl::Status status = buffers->Allocate(); !status.ok()) return status;
  return buffers;
}

absl::Status StepBuffers::Allocate() {
  const NsaConfig& config = options_.cache.config;
  const int64_t max_rows = options_.cache.max_step_rows;
  ForEachTensor(
      options_, inputs_,
      [&](absl::string_view, ConstTensor& tensor, DType dtype, int64_t heads, int64_t dim) {
        tensor = ConstTensor(nullptr, dtype, {max_rows, heads, dim});
        row_bytes_.push_back(heads * dim * SizeOf(dtype));
      });
  o_ = Tensor(nullptr, options_.cache.dtype, {max_rows, config.num_q_heads, config.head_dim_v});
  row_bytes_.push_back(o_.strides[0] * SizeOf(o_.dtype));

  std::vector<int64_t> begins;  // of lanes
  int64_t num_bytes = 0;
  for (int64_t row_bytes : row_bytes_) {
    begins.push_back(num_bytes);
    num_bytes += (max_rows * row_bytes + kAlignBytes - 1) / kAlignBytes * kAlignBytes;
  }
  const int64_t num_pointers = static_cast<int64_t>(row_bytes_.size()) * max_rows;
  auto memory = kernels_->Allocate(num_bytes + 2 * num_pointers * int64_t{sizeof(void*)});
  if (!memory.ok()) return memory.status();
  memory_ = *std::move(memory);
  char* const base = static_cast<char*>(memory_->data());
  own_rows_ = reinterpret_cast<void**>(base + num_bytes);
  caller_rows_ = own_rows_ + num_pointers;

  size_t lane = 0;
  ForEachTensor(options_, inputs_,
                [&](absl::string_view, ConstTensor& tensor, DType, int64_t, int64_t) {
                  tensor.data = base + begins[lane++];
                });
  o_.data = base + begins[lane];
  std::vector<void*> addresses;
  for (size_t i = 0; i < begins.size(); ++i) {
    for (int64_t row = 0; row < max_rows; ++row) {
      addresses.push_back(base + begins[i] + row * row_bytes_[i]);
    }
  }
  absl::Status status =
      kernels_->CopyFromHost(own_rows_, addresses.data(), num_pointers * int64_t{sizeof(void*)},
                             /*stream=*/nullptr);
  status.Update(kernels_->Synchronize(/*stream=*/nullptr));
  return status;
}

absl::Status StepBuffers::RunStep(absl::Span<const DecodeRequest* const> requests, KvCache& cache,
                                  void* stream) {
  int64_t num_rows = 0;
  for (const DecodeRequest* request : requests) num_rows += NumTokens(*request);
  const size_t num_lanes = row_bytes_.size();
  std::vector<void*> callers(num_lanes * num_rows);
  int64_t row = 0;
  for (const DecodeRequest* request : requests) {
    const int64_t num_tokens = NumTokens(*request);
    size_t lane = 0;
    auto add = [&](const ConstTensor& tensor) {
      char* const data = static_cast<char*>(const_cast<void*>(tensor.data));
      for (int64_t i = 0; i < num_tokens; ++i) {
        callers[lane * num_rows + row + i] = data + i * tensor.strides[0] * SizeOf(tensor.dtype);
      }
      ++lane;
    };
    ForEachTensor(options_, request->inputs,
                  [&](absl::string_view, const ConstTensor& tensor, DType, int64_t, int64_t) {
                    add(tensor);
                  });
    add(request->o);
    row += num_tokens;
  }

  ForEachTensor(options_, inputs_,
                [&](absl::string_view, ConstTensor& tensor, DType, int64_t, int64_t) {
                  tensor.shape[0] = num_rows;
                });
  o_.shape[0] = num_rows;
  absl::Status status = kernels_->CopyFromHost(
      caller_rows_, callers.data(), static_cast<int64_t>(callers.size() * sizeof(void*)), stream);
  const size_t o_lane = num_lanes - 1;
  for (size_t lane = 0; lane < o_lane && status.ok(); ++lane) {
    status = Copy(lane, num_rows, /*to_caller=*/false, stream);
  }
  if (status.ok()) {
    status = cache.RunStep(num_rows, inputs_, {.o = o_}, stream);
  } else if (!cache.is_reachable()) {
    // The others take this rank to be in the step.
    cache.RunStep(/*num_rows=*/0, {}, {}, stream).IgnoreError();
  }
  if (status.ok()) status = Copy(o_lane, num_rows, /*to_caller=*/true, stream);
  // Also after an error: callers may then do with their tensors what they like.
  status.Update(kernels_->Synchronize(stream));
  return status;
}

absl::Status StepBuffers::Copy(size_t lane, int64_t num_rows, bool to_caller, void* stream) {
  if (num_rows == 0) return absl::OkStatus();
  void* const* const own = own_rows_ + lane * options_.cache.max_step_rows;
  void* const* const callers = caller_rows_ + lane * num_rows;
  return kernels_->CopyPieces({.src = to_caller ? own : callers,
                               .dst = to_caller ? callers : own,
                               .count = num_rows,
                               .num_bytes = row_bytes_[lane]},
                              stream);
}

}  // namespace nsa::serving
