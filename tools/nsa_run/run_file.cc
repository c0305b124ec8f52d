#include "tools/nsa_run/run_file.h"

#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "google/protobuf/text_format.h"
#include "nsa/engine.h"
#include "nsa/stats.h"
#include "tools/files/files.h"
#include "tools/nsa_run/gather_rows.h"
#include "tools/nsa_run/input_file.h"
#include "tools/safetensors.h"
#include "tools/svg/drawings.h"

namespace nsa::tools {
namespace {

#define NSA_RETURN_IF_ERROR(expression) \
  if (absl::Status status_of_call = (expression); !status_of_call.ok()) return status_of_call

constexpr int kDrawnKvHead = 0;

TensorType TypeOf(DType dtype) {
  return dtype == DType::kF32    ? TensorType::kF32
         : dtype == DType::kBF16 ? TensorType::kBF16
                                 : TensorType::kF16;
}

// `status` with the whole path: where a path stands in quotes, a long one is cut.
absl::Status Naming(const std::string& path, const absl::Status& status) {
  if (status.ok() || absl::StrContains(status.message(), path)) return status;
  return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
}

// A result of this rank.
struct Result {
  TensorSpec spec;  // of the whole sequence
  bool is_written;  // else only drawn
  std::unique_ptr<kernels::Memory> memory;

  int64_t row_bytes() const {
    int64_t bytes = SizeOf(spec.type);
    for (size_t i = 1; i < spec.shape.size(); ++i) bytes *= spec.shape[i];
    return bytes;
  }
};

class FileRun {
 public:
  FileRun(const RunOptions& options, InputFile file, const RankContext& context)
      : options_(options), file_(std::move(file)), context_(context) {}

  absl::Status Run() {
    NSA_RETURN_IF_ERROR(CreateEngine());
    NSA_RETURN_IF_ERROR(Forward());
    NSA_RETURN_IF_ERROR(GatherResults());
    if (wants_stats()) {
      absl::StatusOr<ForwardStats> stats = engine_->GatherStats();
      if (!stats.ok()) return stats.status();
      if (is_first()) NSA_RETURN_IF_ERROR(Report(*stats));
    }
    if (is_first()) NSA_RETURN_IF_ERROR(Naming(options_.output, writer_->Finish()));
    // No rank reports success before the output is there.
    return context_.communicator->Barrier();
  }

 private:
  bool is_first() const { return context_.communicator->rank() == 0; }
  bool draws() const { return !options_.svg_folder.empty(); }
  bool wants_stats() const {
    return options_.print_stats || !options_.stats_proto.empty() || !options_.trace.empty() ||
           draws();
  }

  absl::Status CreateEngine() {
    NSA_RETURN_IF_ERROR(Validate(options_.config));
    const absl::Status supported =
        context_.kernels->Supports(MakeDims(options_.config, file_.dtype()));
    if (!supported.ok()) {
      // Those of the other device may take it.
      return absl::InvalidArgumentError(absl::StrCat("device = \"", context_.device, "\": file \"",
                                                     options_.input, "\": ", supported.message()));
    }
    absl::StatusOr<ShardPlan> plan = ShardPlan::Parse(
        options_.sharding, file_.num_tokens(), context_.communicator->size(), file_.cu_seqlens());
    if (!plan.ok()) return plan.status();
    EngineOptions engine_options;
    engine_options.config = options_.config;
    engine_options.dtype = file_.dtype();
    engine_options.fetch_budget_bytes = options_.fetch_budget_bytes;
    engine_options.time_stages = wants_stats();
    absl::StatusOr<std::unique_ptr<Engine>> engine =
        Engine::Create(engine_options, *std::move(plan), context_.communicator, context_.kernels);
    if (!engine.ok()) return engine.status();
    engine_ = *std::move(engine);
    return absl::OkStatus();
  }

  // Memory for this rank's rows of a result with `shape` after the token.
  absl::StatusOr<void*> AddResult(const std::string& name, TensorType type,
                                  std::vector<int64_t> shape, bool is_written) {
    shape.insert(shape.begin(), file_.num_tokens());
    Result result = {.spec = {.name = name, .type = type, .shape = std::move(shape)},
                     .is_written = is_written,
                     .memory = nullptr};
    const int64_t num_rows = engine_->shard_plan().TokensOfRank(context_.communicator->rank());
    absl::StatusOr<std::unique_ptr<kernels::Memory>> memory =
        context_.kernels->Allocate(num_rows * result.row_bytes());
    if (!memory.ok()) return memory.status();
    result.memory = *std::move(memory);
    results_.push_back(std::move(result));
    return results_.back().memory->data();
  }

  absl::Status AddOutputs(ForwardOutputs& outputs) {
    const NsaConfig& config = options_.config;
    const int64_t num_rows = engine_->shard_plan().TokensOfRank(context_.communicator->rank());
    const int64_t hq = config.num_q_heads;
    const int64_t dv = config.head_dim_v;
    auto add_o = [&](const char* name, Tensor& tensor) {
      absl::StatusOr<void*> data = AddResult(name, TypeOf(file_.dtype()), {hq, dv}, true);
      if (data.ok()) tensor = Tensor(*data, file_.dtype(), {num_rows, hq, dv});
      return data.status();
    };
    auto add_lse = [&](const char* name, float*& lse) {
      absl::StatusOr<void*> data = AddResult(name, TensorType::kF32, {hq}, true);
      if (data.ok()) lse = static_cast<float*>(*data);
      return data.status();
    };
    NSA_RETURN_IF_ERROR(add_o("o", outputs.o));
    if (options_.all_outputs) {
      NSA_RETURN_IF_ERROR(add_o("o_cmp", outputs.o_cmp));
      NSA_RETURN_IF_ERROR(add_o("o_slc", outputs.o_slc));
      NSA_RETURN_IF_ERROR(add_o("o_win", outputs.o_win));
      NSA_RETURN_IF_ERROR(add_lse("lse_cmp", outputs.lse_cmp));
      NSA_RETURN_IF_ERROR(add_lse("lse_slc", outputs.lse_slc));
      NSA_RETURN_IF_ERROR(add_lse("lse_win", outputs.lse_win));
    }
    if (options_.all_outputs || draws()) {
      absl::StatusOr<void*> data =
          AddResult("block_indices", TensorType::kI32,
                    {config.num_kv_heads, config.num_selected_blocks}, options_.all_outputs);
      if (!data.ok()) return data.status();
      outputs.block_indices = static_cast<int32_t*>(*data);
    }
    return absl::OkStatus();
  }

  absl::Status Forward() {
    absl::StatusOr<RankInputs> inputs =
        file_.Load(engine_->shard_plan(), context_.communicator->rank(), *context_.kernels);
    if (!inputs.ok()) return inputs.status();
    ForwardOutputs outputs;
    NSA_RETURN_IF_ERROR(AddOutputs(outputs));
    absl::Status status = engine_->Forward(inputs->inputs, outputs);
    // The first forward on GPUs connects them and loads the kernels: times are of the second.
    if (status.ok() && wants_stats() && context_.device == "cuda") {
      status = engine_->Forward(inputs->inputs, outputs);
    }
    if (status.ok()) return context_.Wait();
    if (!absl::IsInvalidArgument(status)) return status;
    // What the engine finds wrong with the tensors stands in the file.
    return absl::InvalidArgumentError(
        absl::StrCat("file \"", options_.input, "\": ", status.message()));
  }

  absl::Status GatherResults() {
    if (is_first()) {
      std::vector<TensorSpec> specs;
      for (const Result& result : results_) {
        if (result.is_written) specs.push_back(result.spec);
      }
      absl::StatusOr<SafetensorsWriter> writer = SafetensorsWriter::Create(options_.output, specs);
      if (!writer.ok()) return Naming(options_.output, writer.status());
      writer_.emplace(*std::move(writer));
    }
    for (const Result& result : results_) {
      NSA_RETURN_IF_ERROR(GatherRows(context_, engine_->shard_plan(), result.memory->data(),
                                     result.row_bytes(), [&](absl::Span<const std::byte> rows) {
                                       if (draws() && result.spec.name == "block_indices")
                                         KeepForDrawing(rows);
                                       if (!result.is_written) return absl::OkStatus();
                                       return Naming(options_.output,
                                                     writer_->Append(result.spec.name, rows));
                                     }));
    }
    return absl::OkStatus();
  }

  // Rows are [Hkv,n]; one kv head is drawn.
  void KeepForDrawing(absl::Span<const std::byte> rows) {
    const int64_t n = options_.config.num_selected_blocks;
    const int64_t head_bytes = n * int64_t{sizeof(int32_t)};
    const int64_t row_bytes = options_.config.num_kv_heads * head_bytes;
    for (int64_t row = 0; row < static_cast<int64_t>(rows.size()); row += row_bytes) {
      drawn_indices_.resize(drawn_indices_.size() + n);
      std::memcpy(&*(drawn_indices_.end() - n), rows.data() + row + kDrawnKvHead * head_bytes,
                  head_bytes);
    }
  }

  absl::Status Report(const ForwardStats& stats) {
    if (options_.print_stats) options_.print(FormatTable(stats));
    if (!options_.stats_proto.empty()) {
      std::string text;
      google::protobuf::TextFormat::PrintToString(stats, &text);
      NSA_RETURN_IF_ERROR(WriteFile(options_.stats_proto, text));
    }
    if (!options_.trace.empty()) {
      NSA_RETURN_IF_ERROR(WriteFile(options_.trace, FormatChromeTrace(stats)));
    }
    return draws() ? Draw(stats) : absl::OkStatus();
  }

  absl::Status Draw(const ForwardStats& stats) {
    const std::string& folder = options_.svg_folder;
    NSA_RETURN_IF_ERROR(MakeFolder(folder));
    NSA_RETURN_IF_ERROR(WriteFile(folder + "/sharding.svg", DrawSharding(engine_->shard_plan())));
    absl::StatusOr<std::string> matrix = DrawFetchMatrix(stats);
    if (!matrix.ok()) return matrix.status();
    NSA_RETURN_IF_ERROR(WriteFile(folder + "/fetch_matrix.svg", *matrix));
    absl::StatusOr<std::string> map = DrawSelectionMap({.config = options_.config,
                                                        .plan = engine_->shard_plan(),
                                                        .blocks = engine_->block_map(),
                                                        .block_indices = drawn_indices_,
                                                        .kv_head = kDrawnKvHead});
    if (!map.ok()) return map.status();
    return WriteFile(folder + "/selection_map.svg", *map);
  }

  const RunOptions& options_;
  const InputFile file_;
  const RankContext& context_;
  std::unique_ptr<Engine> engine_;
  std::vector<Result> results_;
  std::optional<SafetensorsWriter> writer_;  // at rank 0
  std::vector<int32_t> drawn_indices_;       // [S,n] at rank 0
};

}  // namespace

absl::Status RunFile(const RunOptions& options, const RankContext& context) {
  absl::StatusOr<InputFile> file = InputFile::Open(options.input, options.config);
  if (!file.ok()) return Naming(options.input, file.status());
  if (context.communicator->rank() == 0 && !file->ignored().empty() && options.print) {
    options.print(absl::StrCat("ignored in ", options.input, ": ",
                               absl::StrJoin(file->ignored(), ", "), "\n"));
  }
  return FileRun(options, *std::move(file), context).Run();
}

}  // namespace nsa::tools
