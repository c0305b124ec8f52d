#include "tools/nsa_run/input_file.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace nsa::tools {
namespace {

constexpr const char* kBranchTensors[] = {"k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win"};

std::optional<DType> DTypeOf(TensorType type) {
  switch (type) {
    case TensorType::kF32:
      return DType::kF32;
    case TensorType::kBF16:
      return DType::kBF16;
    case TensorType::kF16:
      return DType::kF16;
    default:
      return std::nullopt;
  }
}

TensorType TypeOf(DType dtype) {
  return dtype == DType::kF32    ? TensorType::kF32
         : dtype == DType::kBF16 ? TensorType::kBF16
                                 : TensorType::kF16;
}

struct Parameter {
  const char* name;
  ConstTensor CompressorParams::*member;
};
constexpr Parameter kParameters[] = {
    {"weight", &CompressorParams::weight}, {"pe", &CompressorParams::pe},
    {"w", &CompressorParams::w},           {"w1", &CompressorParams::w1},
    {"b1", &CompressorParams::b1},         {"w2", &CompressorParams::w2},
    {"b2", &CompressorParams::b2}};

std::vector<std::string> RequiredParameters(Compressor compressor) {
  switch (compressor) {
    case Compressor::kMean:
      return {};
    case Compressor::kWeighted:
      return {"weight"};
    case Compressor::kLinear:
      return {"w"};
    case Compressor::kMlp:
      return {"w1", "b1", "w2", "b2"};
  }
  return {};
}

// Allocates dense tensors and fills them.
class Loader {
 public:
  Loader(const ShardPlan& plan, int rank, kernels::Kernels& kernels, RankInputs* loaded)
      : plan_(plan), rank_(rank), kernels_(kernels), loaded_(loaded) {}

  // This rank's rows of a tensor whose first dimension is the global token.
  absl::StatusOr<ConstTensor> Rows(const ConstTensor& global) {
    Dims shape = global.shape;
    shape[0] = plan_.TokensOfRank(rank_);
    const int64_t row_bytes = global.strides[0] * SizeOf(global.dtype);
    absl::StatusOr<std::byte*> memory = Allocate(shape[0] * row_bytes);
    if (!memory.ok()) return memory.status();
    std::byte* next = *memory;
    for (const Chunk& chunk : plan_.ChunksOfRank(rank_)) {
      const std::byte* rows = static_cast<const std::byte*>(global.data) + chunk.begin * row_bytes;
      absl::Status status = Copy(next, rows, chunk.num_tokens * row_bytes);
      if (!status.ok()) return status;
      next += chunk.num_tokens * row_bytes;
    }
    return ConstTensor(*memory, global.dtype, std::move(shape));
  }

  absl::StatusOr<ConstTensor> Whole(const ConstTensor& tensor) {
    int64_t num_bytes = SizeOf(tensor.dtype);
    for (int64_t extent : tensor.shape) num_bytes *= extent;
    absl::StatusOr<std::byte*> memory = Allocate(num_bytes);
    if (!memory.ok()) return memory.status();
    if (absl::Status status = Copy(*memory, tensor.data, num_bytes); !status.ok()) return status;
    return ConstTensor(*memory, tensor.dtype, tensor.shape);
  }

 private:
  absl::StatusOr<std::byte*> Allocate(int64_t num_bytes) {
    absl::StatusOr<std::unique_ptr<kernels::Memory>> memory = kernels_.Allocate(num_bytes);
    if (!memory.ok()) return memory.status();
    loaded_->memory.push_back(*std::move(memory));
    return static_cast<std::byte*>(loaded_->memory.back()->data());
  }

  absl::Status Copy(void* to, const void* from, int64_t num_bytes) {
    if (num_bytes == 0) return absl::OkStatus();
    return kernels_.CopyFromHost(to, from, num_bytes, /*stream=*/nullptr);
  }

  const ShardPlan& plan_;
  const int rank_;
  kernels::Kernels& kernels_;
  RankInputs* const loaded_;
};

}  // namespace

absl::StatusOr<InputFile> InputFile::Open(const std::string& path, const NsaConfig& config) {
  absl::StatusOr<SafetensorsFile> file = SafetensorsFile::Open(path);
  if (!file.ok()) return file.status();
  InputFile input(path, *std::move(file));
  if (absl::Status status = input.Check(config); !status.ok()) return status;
  return input;
}

absl::Status InputFile::Check(const NsaConfig& config) {
  for (auto check :
       {&InputFile::CheckTokens, &InputFile::CheckBranches, &InputFile::CheckParameters}) {
    if (absl::Status status = (this->*check)(config); !status.ok()) return status;
  }
  if (absl::Status status = CheckDocuments(); !status.ok()) return status;
  for (const TensorView& tensor : file_.tensors()) {
    const std::string& name = tensor.spec.name;
    if (!tensors_.contains(name) && name != "cu_seqlens") ignored_.push_back(name);
  }
  return absl::OkStatus();
}

absl::Status InputFile::CheckTokens(const NsaConfig& config) {
  absl::Status status = Take("q", {DType::kF32, DType::kBF16, DType::kF16}, {});
  if (!status.ok()) return status;
  const ConstTensor& q = tensors_.at("q");
  dtype_ = q.dtype;
  num_tokens_ = q.shape.empty() ? 0 : q.shape[0];
  if (num_tokens_ < 1) return Error("q", "must have the shape [S,Hq,Dk] with at least one token");
  status = Take("q", {dtype_}, {num_tokens_, config.num_q_heads, config.head_dim_qk});
  if (!status.ok()) return status;
  return Take("gate", {DType::kF32, dtype_}, {num_tokens_, config.num_q_heads, 3});
}

absl::Status InputFile::CheckBranches(const NsaConfig& config) {
  shared_kv_ = file_.Find("k") != nullptr || file_.Find("v") != nullptr;
  for (const char* name : kBranchTensors) {
    if (shared_kv_ && file_.Find(name) != nullptr) {
      return Error(name, "must not stand beside k or v, which all branches share");
    }
  }
  auto take = [&](const std::string& name) {
    const int64_t head_dim = name[0] == 'k' ? config.head_dim_qk : config.head_dim_v;
    return Take(name, {dtype_}, {num_tokens_, config.num_kv_heads, head_dim});
  };
  if (shared_kv_) {
    absl::Status status = take("k");
    return status.ok() ? take("v") : status;
  }
  for (const char* name : kBranchTensors) {
    if (absl::Status status = take(name); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status InputFile::CheckParameters(const NsaConfig& config) {
  if (config.compressor == Compressor::kMean) return absl::OkStatus();
  const std::vector<std::string> required = RequiredParameters(config.compressor);
  for (const char* owner : {"compress_k.", "compress_v."}) {
    for (const Parameter& parameter : kParameters) {
      const std::string name = absl::StrCat(owner, parameter.name);
      const bool needed =
          std::find(required.begin(), required.end(), parameter.name) != required.end();
      const bool optional = std::strcmp(parameter.name, "pe") == 0;
      if (!needed && !(optional && file_.Find(name) != nullptr)) continue;
      // Shapes hang together; the engine checks them.
      if (absl::Status status = Take(name, {DType::kF32, dtype_}, {}); !status.ok()) return status;
    }
  }
  return absl::OkStatus();
}

absl::Status InputFile::CheckDocuments() {
  const TensorView* tensor = file_.Find("cu_seqlens");
  if (tensor == nullptr) return absl::OkStatus();
  if (tensor->spec.type != TensorType::kI32) {
    return Error("cu_seqlens", absl::StrCat("dtype ", NameOf(tensor->spec.type), " must be I32"));
  }
  if (tensor->spec.shape.size() != 1 || tensor->spec.shape[0] < 2) {
    return Error("cu_seqlens", absl::StrCat("shape [", absl::StrJoin(tensor->spec.shape, ","),
                                            "] must be [documents + 1]"));
  }
  cu_seqlens_.resize(tensor->spec.shape[0]);
  for (size_t i = 0; i < cu_seqlens_.size(); ++i) {
    int32_t value;
    std::memcpy(&value, tensor->bytes.data() + i * sizeof(value), sizeof(value));
    cu_seqlens_[i] = value;
  }
  // The rules on the values are the shard plan's; one rank will do to have them checked.
  const absl::Status status =
      ShardPlan::Parse("contiguous", num_tokens_, /*num_ranks=*/1, cu_seqlens_).status();
  return status.ok() ? status : Error("cu_seqlens", status.message());
}

absl::Status InputFile::Take(const std::string& name, absl::Span<const DType> dtypes,
                             absl::Span<const int64_t> shape) {
  absl::StatusOr<const TensorView*> found = file_.Get(name);
  if (!found.ok()) return found.status();
  const TensorView& tensor = **found;
  const std::optional<DType> dtype = DTypeOf(tensor.spec.type);
  if (!dtype.has_value() || std::find(dtypes.begin(), dtypes.end(), *dtype) == dtypes.end()) {
    std::vector<absl::string_view> allowed;
    for (DType candidate : dtypes) {
      const absl::string_view text = NameOf(TypeOf(candidate));
      if (std::find(allowed.begin(), allowed.end(), text) == allowed.end()) allowed.push_back(text);
    }
    return Error(name, absl::StrCat("dtype ", NameOf(tensor.spec.type), " must be ",
                                    absl::StrJoin(allowed, " or ")));
  }
  if (!shape.empty() && absl::MakeConstSpan(tensor.spec.shape) != shape) {
    return Error(name, absl::StrCat("shape [", absl::StrJoin(tensor.spec.shape, ","), "] must be [",
                                    absl::StrJoin(shape, ","), "]"));
  }
  tensors_[name] = ConstTensor(tensor.bytes.data(), *dtype,
                               Dims(tensor.spec.shape.begin(), tensor.spec.shape.end()));
  return absl::OkStatus();
}

absl::Status InputFile::Error(absl::string_view name, absl::string_view what) const {
  return absl::InvalidArgumentError(
      absl::StrCat("file \"", path_, "\": tensor \"", name, "\": ", what));
}

absl::StatusOr<RankInputs> InputFile::Load(const ShardPlan& plan, int rank,
                                           kernels::Kernels& kernels) const {
  RankInputs loaded;
  Loader loader(plan, rank, kernels, &loaded);
  std::map<std::string, ConstTensor> tensors;
  for (const auto& [name, tensor] : tensors_) {
    const bool is_parameter = absl::StartsWith(name, "compress_");
    absl::StatusOr<ConstTensor> own = is_parameter ? loader.Whole(tensor) : loader.Rows(tensor);
    if (!own.ok()) {
      return absl::Status(own.status().code(),
                          absl::StrCat("input \"", name, "\": ", own.status().message()));
    }
    tensors[name] = *own;
  }
  ForwardInputs& inputs = loaded.inputs;
  inputs.q = tensors["q"];
  inputs.gate = tensors["gate"];
  if (shared_kv_) {
    inputs.SetSharedKv(tensors["k"], tensors["v"]);
  } else {
    inputs.k_cmp = tensors["k_cmp"];
    inputs.v_cmp = tensors["v_cmp"];
    inputs.k_slc = tensors["k_slc"];
    inputs.v_slc = tensors["v_slc"];
    inputs.k_win = tensors["k_win"];
    inputs.v_win = tensors["v_win"];
  }
  for (const Parameter& parameter : kParameters) {
    inputs.compress_k.*parameter.member = tensors[absl::StrCat("compress_k.", parameter.name)];
    inputs.compress_v.*parameter.member = tensors[absl::StrCat("compress_v.", parameter.name)];
  }
  return loaded;
}

}  // namespace nsa::tools
