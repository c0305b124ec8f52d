// Prints what a forward would take, without running it: see kUsage.

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/cpu/cpu_kernels.h"
#include "nsa/config.h"
#include "nsa/plan/sharding.h"
#include "tools/files/files.h"
#include "tools/nsa_plan/report.h"

ABSL_FLAG(std::string, config, "",
          "File with the config: JSON when it ends in .json, else text-proto. Without it, the "
          "defaults of nsa/config.h.");
ABSL_FLAG(int64_t, tokens, 0, "Tokens of the global sequence. Follows from --cu_seqlens if given.");
ABSL_FLAG(int32_t, ranks, 1, "Ranks of the context-parallel group.");
ABSL_FLAG(std::string, sharding, "zigzag",
          "contiguous, zigzag, zigzag-per-document, or the tokens of each rank: 100,200,50.");
ABSL_FLAG(std::vector<std::string>, cu_seqlens, {},
          "Document boundaries, from 0 to the number of tokens: 0,4096,10000. One document without "
          "it.");
ABSL_FLAG(std::string, dtype, "bf16", "Of q, k, v and o: bf16, f16 or f32.");
ABSL_FLAG(int64_t, fetch_budget_mib, 1024, "Most memory for fetched blocks, per rank.");
ABSL_FLAG(int64_t, hidden_width, 0, "Hidden width of the compressor MLP.");
ABSL_FLAG(bool, shared_kv, false, "The three branches are given the same k and v.");
ABSL_FLAG(
    std::string, svg, "",
    "Folder to draw sharding.svg, fetch_matrix.svg and selection_map.svg into, as far as they are "
    "known without running.");

namespace {

constexpr char kUsage[] =
    "Prints, without running anything, what one forward of Native Sparse Attention takes on each "
    "rank: tokens, memory, bytes between ranks, arithmetic and its balance, against dense causal "
    "attention.\n\n"
    "  nsa_plan --tokens 65536 --ranks 8\n"
    "  nsa_plan --config layer.json --cu_seqlens 0,30000,65536 --ranks 4 "
    "--sharding zigzag-per-document --svg drawings";

absl::StatusOr<std::vector<int64_t>> ParseNumbers(const std::vector<std::string>& texts) {
  std::vector<int64_t> numbers;
  for (const std::string& text : texts) {
    if (!absl::SimpleAtoi(text, &numbers.emplace_back())) {
      return absl::InvalidArgumentError(
          absl::StrCat("cu_seqlens: \"", text, "\" must be a whole number"));
    }
  }
  return numbers;
}

absl::StatusOr<nsa::DType> ParseDType(const std::string& name) {
  for (nsa::DType dtype : {nsa::DType::kBF16, nsa::DType::kF16, nsa::DType::kF32}) {
    if (name == nsa::NameOf(dtype)) return dtype;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("dtype = \"", name, "\": must be bf16, f16 or f32"));
}

absl::Status Run() {
  nsa::NsaConfig config;
  if (const std::string path = absl::GetFlag(FLAGS_config); !path.empty()) {
    absl::StatusOr<nsa::NsaConfig> loaded = nsa::LoadConfig(path);
    if (!loaded.ok()) return loaded.status();
    config = *loaded;
  }
  absl::StatusOr<std::vector<int64_t>> cu_seqlens = ParseNumbers(absl::GetFlag(FLAGS_cu_seqlens));
  if (!cu_seqlens.ok()) return cu_seqlens.status();
  int64_t num_tokens = absl::GetFlag(FLAGS_tokens);
  if (num_tokens == 0 && !cu_seqlens->empty()) num_tokens = cu_seqlens->back();
  absl::StatusOr<nsa::ShardPlan> plan = nsa::ShardPlan::Parse(
      absl::GetFlag(FLAGS_sharding), num_tokens, absl::GetFlag(FLAGS_ranks), *cu_seqlens);
  if (!plan.ok()) return plan.status();
  absl::StatusOr<nsa::DType> dtype = ParseDType(absl::GetFlag(FLAGS_dtype));
  if (!dtype.ok()) return dtype.status();
  const int64_t budget_mib = absl::GetFlag(FLAGS_fetch_budget_mib);
  if (budget_mib < 0 || budget_mib > (int64_t{1} << 40)) {
    return absl::InvalidArgumentError(
        absl::StrCat("fetch_budget_mib = ", budget_mib, ": must lie in [0, 2^40]"));
  }
  absl::StatusOr<std::unique_ptr<nsa::kernels::Kernels>> kernels =
      nsa::kernels::CpuKernels::Create({.num_threads = 1});
  if (!kernels.ok()) return kernels.status();

  const nsa::tools::PlanQuestion question = {
      .config = config,
      .plan = *std::move(plan),
      .dtype = *dtype,
      .fetch_budget_bytes = budget_mib << 20,
      .hidden_width = absl::GetFlag(FLAGS_hidden_width),
      .shared_kv = absl::GetFlag(FLAGS_shared_kv),
  };
  absl::StatusOr<std::string> report = nsa::tools::PlanReport(question, **kernels);
  if (!report.ok()) return report.status();
  if (std::fputs(report->c_str(), stdout) < 0 || std::fflush(stdout) != 0) {
    return absl::ErrnoToStatus(errno, "can't write the report to stdout");
  }

  if (const std::string folder = absl::GetFlag(FLAGS_svg); !folder.empty()) {
    absl::StatusOr<nsa::tools::PlanDrawings> drawings = nsa::tools::DrawPlan(question, **kernels);
    if (!drawings.ok()) return drawings.status();
    absl::Status status = nsa::tools::MakeFolder(folder);
    status.Update(nsa::tools::WriteFile(folder + "/sharding.svg", drawings->sharding));
    status.Update(nsa::tools::WriteFile(folder + "/fetch_matrix.svg", drawings->fetch_matrix));
    status.Update(nsa::tools::WriteFile(folder + "/selection_map.svg", drawings->selection_map));
    return status;
  }
  return absl::OkStatus();
}

}  // namespace

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage(kUsage);
  const std::vector<char*> rest = absl::ParseCommandLine(argc, argv);
  const absl::Status status = rest.size() > 1
                                  ? absl::InvalidArgumentError(absl::StrCat(
                                        "\"", rest[1], "\": takes flags only, see nsa_plan --help"))
                                  : Run();
  if (status.ok()) return 0;
  std::fprintf(stderr, "nsa_plan: %s\n", status.ToString().c_str());
  return 1;
}
