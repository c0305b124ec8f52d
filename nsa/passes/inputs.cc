#include "nsa/passes/inputs.h"

#include <string>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "nsa/passes/context.h"

namespace nsa {
namespace {

// A tensor whose dtype may be f32 or that of the activations.
absl::Status CheckTensorOrF32(absl::string_view name, const ConstTensor& tensor, DType dtype,
                              std::initializer_list<int64_t> shape) {
  return CheckTensor(name, tensor, tensor.dtype == DType::kF32 ? DType::kF32 : dtype, shape);
}

// Of [T,heads,dim].
absl::Status CheckRowsAligned(absl::string_view name, const ConstTensor& tensor,
                              int64_t row_alignment) {
  for (int i = 0; i < 2; ++i) {
    if (tensor.strides[i] * SizeOf(tensor.dtype) % row_alignment != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ".strides[", i, "] = ", tensor.strides[i], ": must be a multiple of ",
                       row_alignment, " bytes on this device"));
    }
  }
  if (reinterpret_cast<uintptr_t>(tensor.data) % row_alignment != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        name, ".data: its address must be a multiple of ", row_alignment, " bytes on this device"));
  }
  return absl::OkStatus();
}

// An activation, on a device that reads whole rows at a time.
absl::Status CheckActivation(absl::string_view name, const ConstTensor& tensor, DType dtype,
                             std::initializer_list<int64_t> shape, int64_t row_alignment) {
  const absl::Status status = CheckTensor(name, tensor, dtype, shape);
  if (!status.ok() || *shape.begin() == 0) return status;
  return CheckRowsAligned(name, tensor, row_alignment);
}

absl::Status CheckDense(absl::string_view name, const ConstTensor& tensor) {
  const ConstTensor dense(tensor.data, tensor.dtype, tensor.shape);
  // Of a dimension of one element any stride will do.
  bool is_dense = tensor.strides.size() == dense.strides.size();
  for (size_t i = 0; i < dense.strides.size() && is_dense; ++i) {
    is_dense = tensor.strides[i] == dense.strides[i] || tensor.shape[i] == 1;
  }
  if (is_dense) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, ".strides: must be those of a dense tensor"));
}

// The parameters of the compressor of k or of v.
class ParamsChecker {
 public:
  ParamsChecker(const EngineOptions& options, absl::string_view prefix, int64_t head_dim,
                const CompressorParams& params)
      : options_(options), prefix_(prefix), head_dim_(head_dim), params_(params) {}

  absl::Status Check() const {
    NSA_RETURN_IF_ERROR(CheckUnused());
    const int64_t l = options_.config.compress_block_tokens;
    const int64_t d = head_dim_;
    switch (options_.config.compressor) {
      case Compressor::kMean:
        return absl::OkStatus();
      case Compressor::kWeighted: {
        NSA_RETURN_IF_ERROR(CheckHeads("weight", params_.weight));
        NSA_RETURN_IF_ERROR(
            CheckOne("weight", params_.weight, params_.weight, {Heads(params_.weight), l}));
        return CheckPosition(params_.weight);
      }
      case Compressor::kLinear: {
        NSA_RETURN_IF_ERROR(CheckHeads("w", params_.w));
        NSA_RETURN_IF_ERROR(CheckOne("w", params_.w, params_.w, {Heads(params_.w), d, l * d}));
        return CheckPosition(params_.w);
      }
      case Compressor::kMlp: {
        NSA_RETURN_IF_ERROR(CheckHeads("w1", params_.w1));
        const int64_t heads = Heads(params_.w1);
        const int64_t f = HiddenWidth(params_);
        if (f < 1) {
          return absl::InvalidArgumentError(
              absl::StrCat(prefix_, ".w1.shape[1] = ", f, ": must be a hidden width >= 1"));
        }
        NSA_RETURN_IF_ERROR(CheckOne("w1", params_.w1, params_.w1, {heads, f, l * d}));
        NSA_RETURN_IF_ERROR(CheckOne("b1", params_.b1, params_.w1, {heads, f}));
        NSA_RETURN_IF_ERROR(CheckOne("w2", params_.w2, params_.w1, {heads, d, f}));
        NSA_RETURN_IF_ERROR(CheckOne("b2", params_.b2, params_.w1, {heads, d}));
        return CheckPosition(params_.w1);
      }
    }
    return absl::InternalError("unknown compressor");
  }

 private:
  static int64_t Heads(const ConstTensor& tensor) {
    return tensor.shape.empty() ? 0 : tensor.shape[0];
  }

  std::string Name(absl::string_view field) const { return absl::StrCat(prefix_, ".", field); }

  // What is set tells H' and the dtype, and gets a gradient.
  absl::Status CheckUnused() const {
    const Compressor compressor = options_.config.compressor;
    const bool is_weighted = compressor == Compressor::kWeighted;
    const bool is_linear = compressor == Compressor::kLinear;
    const bool is_mlp = compressor == Compressor::kMlp;
    const std::tuple<const char*, const ConstTensor&, bool> all[] = {
        {"weight", params_.weight, is_weighted},
        {"pe", params_.pe, is_weighted || is_linear || is_mlp},
        {"w", params_.w, is_linear},
        {"w1", params_.w1, is_mlp},
        {"b1", params_.b1, is_mlp},
        {"w2", params_.w2, is_mlp},
        {"b2", params_.b2, is_mlp}};
    for (const auto& [field, tensor, is_used] : all) {
      if (is_used || !tensor.is_set()) continue;
      return absl::InvalidArgumentError(
          absl::StrCat(Name(field), ": must be unset, the compressor does not use it"));
    }
    return absl::OkStatus();
  }

  // Of the tensor that tells H' and the parameters' dtype.
  absl::Status CheckHeads(absl::string_view field, const ConstTensor& tensor) const {
    if (!tensor.is_set()) {
      return absl::InvalidArgumentError(
          absl::StrCat(Name(field), ".data = null: the compressor needs it"));
    }
    const int64_t heads = Heads(tensor);
    if (heads == 1 || heads == options_.config.num_kv_heads) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(Name(field), ".shape[0] = ", heads,
                     ": must be 1 or num_kv_heads = ", options_.config.num_kv_heads));
  }

  absl::Status CheckOne(absl::string_view field, const ConstTensor& tensor,
                        const ConstTensor& leader, std::initializer_list<int64_t> shape) const {
    const std::string name = Name(field);
    if (tensor.dtype != leader.dtype) return CheckTensor(name, tensor, leader.dtype, shape);
    NSA_RETURN_IF_ERROR(CheckTensorOrF32(name, tensor, options_.dtype, shape));
    return CheckDense(name, tensor);
  }

  absl::Status CheckPosition(const ConstTensor& leader) const {
    if (!params_.pe.is_set()) return absl::OkStatus();
    return CheckOne("pe", params_.pe, leader,
                    {Heads(leader), options_.config.compress_block_tokens, head_dim_});
  }

  const EngineOptions& options_;
  absl::string_view prefix_;
  int64_t head_dim_;
  const CompressorParams& params_;
};

}  // namespace

int64_t HiddenWidth(const CompressorParams& params) {
  return params.w1.shape.size() > 1 ? params.w1.shape[1] : 0;
}

std::array<BranchInputs, 3> BranchesOf(const ForwardInputs& inputs) {
  std::array<BranchInputs, 3> branches = {{{inputs.k_cmp, inputs.v_cmp, 0},
                                           {inputs.k_slc, inputs.v_slc, 0},
                                           {inputs.k_win, inputs.v_win, 0}}};
  constexpr int kBits[] = {kCmpBit, kSlcBit, kWinBit};
  for (BranchInputs& branch : branches) {
    for (int other = 0; other < 3; ++other) {
      if (SameTensor(branch.k, branches[other].k) && SameTensor(branch.v, branches[other].v)) {
        branch.branches |= kBits[other];
      }
    }
  }
  return branches;
}

absl::Status CheckKeysAndValues(const EngineOptions& options, int64_t num_tokens,
                                int64_t row_alignment, const ForwardInputs& inputs) {
  const int64_t hkv = options.config.num_kv_heads;
  const int64_t dk = options.config.head_dim_qk;
  const int64_t dv = options.config.head_dim_v;
  const auto check = [&](absl::string_view name, const ConstTensor& tensor, int64_t heads,
                         int64_t dim) {
    return CheckActivation(name, tensor, options.dtype, {num_tokens, heads, dim}, row_alignment);
  };
  NSA_RETURN_IF_ERROR(check("k_cmp", inputs.k_cmp, hkv, dk));
  NSA_RETURN_IF_ERROR(check("v_cmp", inputs.v_cmp, hkv, dv));
  NSA_RETURN_IF_ERROR(check("k_slc", inputs.k_slc, hkv, dk));
  NSA_RETURN_IF_ERROR(check("v_slc", inputs.v_slc, hkv, dv));
  NSA_RETURN_IF_ERROR(check("k_win", inputs.k_win, hkv, dk));
  NSA_RETURN_IF_ERROR(check("v_win", inputs.v_win, hkv, dv));
  NSA_RETURN_IF_ERROR(ParamsChecker(options, "compress_k", dk, inputs.compress_k).Check());
  return ParamsChecker(options, "compress_v", dv, inputs.compress_v).Check();
}

namespace {

absl::Status CheckInputs(const EngineOptions& options, int64_t num_tokens, int64_t row_alignment,
                         const ForwardInputs& inputs) {
  const int64_t hq = options.config.num_q_heads;
  NSA_RETURN_IF_ERROR(CheckActivation("q", inputs.q, options.dtype,
                                      {num_tokens, hq, options.config.head_dim_qk}, row_alignment));
  NSA_RETURN_IF_ERROR(CheckTensorOrF32("gate", inputs.gate, options.dtype, {num_tokens, hq, 3}));
  return CheckKeysAndValues(options, num_tokens, row_alignment, inputs);
}

// One of Gradients, which may be unset.
absl::Status CheckGradient(absl::string_view name, const Tensor& gradient, DType dtype,
                           std::initializer_list<int64_t> shape, int64_t row_alignment) {
  if (!gradient.is_set()) return absl::OkStatus();
  const DType own = gradient.dtype == DType::kF32 ? DType::kF32 : dtype;
  return CheckActivation(name, gradient, own, shape, row_alignment);
}

absl::Status CheckCompressorGradients(absl::string_view prefix, const CompressorParams& params,
                                      const CompressorGradients& gradients) {
  const std::tuple<const char*, const ConstTensor&, const Tensor&> all[] = {
      {"weight", params.weight, gradients.weight},
      {"pe", params.pe, gradients.pe},
      {"w", params.w, gradients.w},
      {"w1", params.w1, gradients.w1},
      {"b1", params.b1, gradients.b1},
      {"w2", params.w2, gradients.w2},
      {"b2", params.b2, gradients.b2}};
  for (const auto& [field, weight, gradient] : all) {
    if (!gradient.is_set()) continue;
    const std::string name = absl::StrCat(prefix, ".", field);
    if (!weight.is_set()) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": must be unset, as the parameter is"));
    }
    if (gradient.dtype != DType::kF32 || gradient.shape != weight.shape) {
      return absl::InvalidArgumentError(absl::StrCat(
          name, ": must be f32 of the parameter's shape [", absl::StrJoin(weight.shape, ","), "]"));
    }
    NSA_RETURN_IF_ERROR(CheckDense(name, gradient));
    if (reinterpret_cast<uintptr_t>(gradient.data) % sizeof(float) != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ".data: must be aligned to its element of ", sizeof(float), " bytes"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckForward(const EngineOptions& options, int64_t num_tokens, int64_t row_alignment,
                          const ForwardInputs& inputs, const ForwardOutputs& outputs) {
  NSA_RETURN_IF_ERROR(CheckInputs(options, num_tokens, row_alignment, inputs));
  const auto check = [&](absl::string_view name, const ConstTensor& tensor) {
    return CheckActivation(name, tensor, options.dtype,
                           {num_tokens, options.config.num_q_heads, options.config.head_dim_v},
                           row_alignment);
  };
  NSA_RETURN_IF_ERROR(check("o", outputs.o));
  const std::pair<const char*, const Tensor*> branch_outputs[] = {
      {"o_cmp", &outputs.o_cmp}, {"o_slc", &outputs.o_slc}, {"o_win", &outputs.o_win}};
  for (const auto& [name, tensor] : branch_outputs) {
    if (tensor->is_set()) NSA_RETURN_IF_ERROR(check(name, *tensor));
  }
  return absl::OkStatus();
}

absl::Status CheckBackward(const EngineOptions& options, int64_t num_tokens, int64_t row_alignment,
                           const ForwardInputs& inputs, const ConstTensor& d_o,
                           const Gradients& gradients) {
  NSA_RETURN_IF_ERROR(CheckInputs(options, num_tokens, row_alignment, inputs));
  const NsaConfig& config = options.config;
  const int64_t hq = config.num_q_heads, hkv = config.num_kv_heads;
  const int64_t dk = config.head_dim_qk, dv = config.head_dim_v;
  for (const CompressorParams* params : {&inputs.compress_k, &inputs.compress_v}) {
    if (config.compressor == Compressor::kMlp && HiddenWidth(*params) > options.max_hidden_width) {
      return absl::InvalidArgumentError(absl::StrCat(
          params == &inputs.compress_k ? "compress_k" : "compress_v",
          ".w1.shape[1] = ", HiddenWidth(*params),
          ": must be at most EngineOptions::max_hidden_width = ", options.max_hidden_width));
    }
  }
  NSA_RETURN_IF_ERROR(
      CheckActivation("d_o", d_o, options.dtype, {num_tokens, hq, dv}, row_alignment));
  const auto check = [&](absl::string_view name, const Tensor& gradient, int64_t heads,
                         int64_t dim) {
    return CheckGradient(name, gradient, options.dtype, {num_tokens, heads, dim}, row_alignment);
  };
  NSA_RETURN_IF_ERROR(check("dq", gradients.dq, hq, dk));
  NSA_RETURN_IF_ERROR(CheckGradient("dgate", gradients.dgate, options.dtype, {num_tokens, hq, 3},
                                    /*row_alignment=*/1));
  const struct {
    const char* name;
    const Tensor& dk;
    const Tensor& dv;
  } branches[] = {{"cmp", gradients.dk_cmp, gradients.dv_cmp},
                  {"slc", gradients.dk_slc, gradients.dv_slc},
                  {"win", gradients.dk_win, gradients.dv_win}};
  const std::array<BranchInputs, 3> inputs_of = BranchesOf(inputs);
  for (int i = 0; i < 3; ++i) {
    const std::string suffix = absl::StrCat("_", branches[i].name);
    NSA_RETURN_IF_ERROR(check("dk" + suffix, branches[i].dk, hkv, dk));
    NSA_RETURN_IF_ERROR(check("dv" + suffix, branches[i].dv, hkv, dv));
    for (int j = 0; j < i && num_tokens > 0; ++j) {
      const bool shares = inputs_of[i].branches == inputs_of[j].branches;
      const bool same_k = SameTensor(branches[i].dk, branches[j].dk);
      const bool same_v = SameTensor(branches[i].dv, branches[j].dv);
      const bool collide =
          (branches[i].dk.is_set() && same_k) || (branches[i].dv.is_set() && same_v);
      if (shares ? same_k && same_v : !collide) continue;
      return absl::InvalidArgumentError(absl::StrCat(
          "dk", suffix, ", dv", suffix, ": must", shares ? "" : " not", " be those of _",
          branches[j].name, ", as the branches", shares ? "" : " do not", " share k and v"));
    }
  }
  NSA_RETURN_IF_ERROR(
      CheckCompressorGradients("dcompress_k", inputs.compress_k, gradients.dcompress_k));
  return CheckCompressorGradients("dcompress_v", inputs.compress_v, gradients.dcompress_v);
}

namespace {

// What of a compressor's parameters is for the caller to choose.
std::string ShapesOf(const CompressorParams& params) {
  int64_t heads = 0;
  for (const ConstTensor* tensor : {&params.weight, &params.w, &params.w1}) {
    if (!tensor->shape.empty()) heads = tensor->shape[0];
  }
  return absl::StrCat("shape[0] = ", heads, ", hidden width ", HiddenWidth(params), ", ",
                      params.pe.is_set() ? "pe" : "no pe");
}

}  // namespace

FieldList FieldsOfBackward(const ForwardInputs& inputs, const Gradients& gradients) {
  FieldList fields = FieldsOfCall(inputs);
  fields.emplace_back("sum_over_ranks", gradients.sum_over_ranks ? "true" : "false");
  return fields;
}

FieldList FieldsOfCall(const ForwardInputs& inputs) {
  const std::array<BranchInputs, 3> branches = BranchesOf(inputs);
  // A rank without tokens may pass no tensors at all, and takes no part in the halo.
  const bool has_tokens = !inputs.k_cmp.shape.empty() && inputs.k_cmp.shape[0] > 0;
  auto shared = [](int set) {
    std::string names;
    if (set & kCmpBit) names += "cmp ";
    if (set & kSlcBit) names += "slc ";
    if (set & kWinBit) names += "win ";
    names.pop_back();
    return absl::StrCat("{", names, "}");
  };
  return {{"branches that share k and v",
           has_tokens ? absl::StrCat(shared(branches[0].branches), shared(branches[1].branches),
                                     shared(branches[2].branches))
                      : ""},
          {"compress_k", ShapesOf(inputs.compress_k)},
          {"compress_v", ShapesOf(inputs.compress_v)}};
}

}  // namespace nsa
