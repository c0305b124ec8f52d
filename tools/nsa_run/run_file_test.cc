#include "tools/nsa_run/run_file.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"
#include "nsa/stats.pb.h"
#include "tests/testing/delegating_kernels.h"
#include "tests/testing/sharded.h"
#include "tools/launch/launch.h"
#include "tools/nsa_run/input_testlib.h"
#include "tools/safetensors.h"

namespace nsa::tools {
namespace {

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

class RunFileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    // A folder of the test's own: test binaries may run side by side.
    folder_ = absl::StrCat(::testing::TempDir(), "/run_file_test_",
                           ::testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
    options_.input = folder_ + "/in.safetensors";
    options_.output = folder_ + "/out.safetensors";
    options_.print = [this](absl::string_view text) { printed_ += std::string(text); };
  }

  // The problem's tensors as they stand in a file; the run gets its config.
  Entries EntriesOf(const test::Problem& problem, bool shared_kv) {
    options_.config = problem.config;
    return InputEntries(problem, shared_kv);
  }

  void WriteInput(const Entries& entries) {
    const absl::Status status = WriteEntries(entries, options_.input);
    ASSERT_TRUE(status.ok()) << status;
  }

  absl::Status Run(int num_ranks, const std::string& sharding) {
    options_.sharding = sharding;
    return RunRanks(
        {.backend = "loopback", .num_ranks = num_ranks, .num_threads = 1},
        [](const char*) -> const char* { return nullptr; },
        [this](const RankContext& context) { return RunFile(options_, context); });
  }

  // The error of a run with these entries, which must leave no file behind.
  std::string ErrorOf(const Entries& entries, int num_ranks = 2) {
    WriteInput(entries);
    const absl::Status status = Run(num_ranks, "zigzag");
    EXPECT_FALSE(status.ok());
    EXPECT_FALSE(LeftSomething());
    return std::string(status.message());
  }

  bool LeftSomething() const {
    int files = 0;
    for (const auto& entry : std::filesystem::directory_iterator(folder_)) files += entry.exists();
    return files > 1;
  }

  std::string folder_;
  RunOptions options_;
  std::string printed_;
};

TEST_F(RunFileTest, ResultsAreThoseOfTheEngineForEverySharding) {
  const test::Problem problem = SmallProblem(reference::CompressorKind::kMlp, DType::kBF16);
  WriteInput(EntriesOf(problem, /*shared_kv=*/false));
  options_.all_outputs = true;

  const auto plan = ShardPlan::Parse("contiguous", problem.num_tokens(), 1, problem.cu_seqlens);
  test::GlobalOutputs expected(problem);
  ASSERT_TRUE(test::RunLoopback(problem, *plan, {}, &expected).ok());

  for (const auto& [num_ranks, sharding] :
       {std::pair(1, "contiguous"), std::pair(3, "contiguous"), std::pair(3, "zigzag"),
        std::pair(3, "zigzag-per-document"), std::pair(3, "100,0,600")}) {
    SCOPED_TRACE(absl::StrCat(num_ranks, " ranks, ", sharding));
    const absl::Status status = Run(num_ranks, sharding);
    ASSERT_TRUE(status.ok()) << status;
    const auto output = SafetensorsFile::Open(options_.output);
    ASSERT_TRUE(output.ok()) << output.status();
    ASSERT_EQ(output->tensors().size(), 8u);
    using Outputs = test::GlobalOutputs;
    for (const auto& [name, field] :
         {std::pair("o", Outputs::kO), std::pair("o_cmp", Outputs::kOCmp),
          std::pair("o_slc", Outputs::kOSlc), std::pair("o_win", Outputs::kOWin),
          std::pair("lse_cmp", Outputs::kLseCmp), std::pair("lse_slc", Outputs::kLseSlc),
          std::pair("lse_win", Outputs::kLseWin),
          std::pair("block_indices", Outputs::kBlockIndices)}) {
      const TensorView* tensor = output->Find(name);
      ASSERT_NE(tensor, nullptr) << name;
      EXPECT_EQ(tensor->spec.shape[0], problem.num_tokens());
      ASSERT_EQ(static_cast<int64_t>(tensor->bytes.size()),
                problem.num_tokens() * expected.row_bytes(field));
      EXPECT_EQ(std::memcmp(tensor->bytes.data(), expected.data(field), tensor->bytes.size()), 0)
          << name;
    }
    EXPECT_EQ(output->Find("o")->spec.shape, (std::vector<int64_t>{700, 4, 64}));
    EXPECT_EQ(output->Find("lse_cmp")->spec.shape, (std::vector<int64_t>{700, 4}));
    EXPECT_EQ(output->Find("block_indices")->spec.shape, (std::vector<int64_t>{700, 2, 4}));
  }
}

TEST_F(RunFileTest, EveryDTypeAndCompressor) {
  for (const auto& [compressor, dtype] :
       {std::pair(reference::CompressorKind::kMean, DType::kF32),
        std::pair(reference::CompressorKind::kWeighted, DType::kF16),
        std::pair(reference::CompressorKind::kLinear, DType::kBF16)}) {
    const test::Problem problem = SmallProblem(compressor, dtype);
    WriteInput(EntriesOf(problem, /*shared_kv=*/true));
    std::vector<std::string> outputs;
    for (int num_ranks : {1, 3}) {
      const absl::Status status = Run(num_ranks, "zigzag");
      ASSERT_TRUE(status.ok()) << status;
      outputs.push_back(ReadFile(options_.output));
    }
    EXPECT_EQ(outputs[0], outputs[1]);
    const auto output = SafetensorsFile::Open(options_.output);
    ASSERT_TRUE(output.ok()) << output.status();
    ASSERT_EQ(output->tensors().size(), 1u);
    EXPECT_EQ(output->Find("o")->spec.type, TypeOf(dtype));
  }
}

// Refuses f32, as the kernels of GPUs do.
class HalfPrecisionKernels : public test::DelegatingKernels {
 public:
  using DelegatingKernels::DelegatingKernels;
  absl::Status Supports(const kernels::AttentionDims& dims) const override {
    if (dims.dtype != DType::kF32) return DelegatingKernels::Supports(dims);
    return absl::InvalidArgumentError("dtype = f32: these kernels support bf16, f16");
  }
};

TEST_F(RunFileTest, WhatKernelsRefuseNamesTheirDevice) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    WriteInput(
        EntriesOf(SmallProblem(reference::CompressorKind::kMean, dtype), /*shared_kv=*/true));
    const absl::Status status = RunRanks(
        {.num_ranks = 2, .num_threads = 1}, [](const char*) -> const char* { return nullptr; },
        [this](const RankContext& context) {
          RankContext half = context;
          half.kernels = std::make_shared<HalfPrecisionKernels>(context.kernels);
          half.device = "cuda";
          return RunFile(options_, half);
        });
    EXPECT_EQ(status, dtype == DType::kBF16
                          ? absl::OkStatus()
                          : absl::InvalidArgumentError(
                                absl::StrCat("device = \"cuda\": file \"", options_.input,
                                             "\": dtype = f32: these kernels support bf16, f16")));
  }
}

TEST_F(RunFileTest, WritesStatisticsAndDrawings) {
  const test::Problem problem = SmallProblem(reference::CompressorKind::kMean, DType::kBF16);
  Entries entries = EntriesOf(problem, /*shared_kv=*/true);
  entries["cu_seqlen"] = entries["cu_seqlens"];
  entries["cu_seqlen"].spec.name = "cu_seqlen";
  WriteInput(entries);
  options_.print_stats = true;
  options_.stats_proto = folder_ + "/stats.textproto";
  options_.trace = folder_ + "/trace.json";
  options_.svg_folder = folder_ + "/drawings";
  const absl::Status status = Run(3, "zigzag");
  ASSERT_TRUE(status.ok()) << status;

  EXPECT_NE(printed_.find("ignored in " + options_.input + ": cu_seqlen\n"), std::string::npos);
  EXPECT_NE(printed_.find("remote picks"), std::string::npos);
  ForwardStats stats;
  ASSERT_TRUE(
      google::protobuf::TextFormat::ParseFromString(ReadFile(options_.stats_proto), &stats));
  EXPECT_EQ(stats.ranks_size(), 3);
  EXPECT_GT(stats.ranks(0).block_bytes_received(), 0);
  EXPECT_GT(stats.ranks(0).stages_size(), 0);
  const std::string trace = ReadFile(options_.trace);
  EXPECT_EQ(trace.rfind("{\"traceEvents\":[", 0), 0u) << trace;
  EXPECT_NE(trace.find("\"name\":\"attend+gate\",\"pid\":2"), std::string::npos) << trace;
  for (const char* name : {"sharding", "fetch_matrix", "selection_map"}) {
    const std::string svg = ReadFile(absl::StrCat(options_.svg_folder, "/", name, ".svg"));
    EXPECT_NE(svg.find("</svg>"), std::string::npos) << name;
  }
  // Indices were gathered for the drawing alone.
  EXPECT_EQ(SafetensorsFile::Open(options_.output)->tensors().size(), 1u);
}

TEST_F(RunFileTest, NamesWhatIsWrongWithTensors) {
  const test::Problem problem = SmallProblem(reference::CompressorKind::kMlp, DType::kBF16);
  const Entries good = EntriesOf(problem, /*shared_kv=*/false);
  const std::string file = absl::StrCat("file \"", options_.input, "\": tensor ");
  auto without = [&good](const std::string& name) {
    Entries entries = good;
    entries.erase(name);
    return entries;
  };
  for (const char* name : {"q", "gate", "v_slc", "compress_v.b1"}) {
    const std::string error = ErrorOf(without(name));
    EXPECT_NE(error.find(options_.input), std::string::npos) << error;
    EXPECT_NE(error.find(absl::StrCat("\"", name, "\"")), std::string::npos) << error;
  }

  Entries entries = good;
  entries["k_win"].spec.shape = {700, 1, 128};
  EXPECT_EQ(ErrorOf(entries), file + "\"k_win\": shape [700,1,128] must be [700,2,64]");

  entries = good;
  entries["q"].spec.shape = {700, 256};
  EXPECT_EQ(ErrorOf(entries), file + "\"q\": shape [700,256] must be [700,4,64]");

  entries = good;
  entries["q"].spec.type = TensorType::kI16;
  EXPECT_EQ(ErrorOf(entries), file + "\"q\": dtype I16 must be F32 or BF16 or F16");

  entries = good;
  entries["v_cmp"].spec.type = TensorType::kF16;
  EXPECT_EQ(ErrorOf(entries), file + "\"v_cmp\": dtype F16 must be BF16");

  entries = good;
  entries["compress_k.w1"].spec.shape = {1, 8, 2 * 32 * 64};
  const std::string error = ErrorOf(entries);
  EXPECT_NE(error.find(options_.input), std::string::npos) << error;
  EXPECT_NE(error.find("compress_k.w1.shape = [1,8,4096]: must be [1,8,2048]"), std::string::npos)
      << error;
}

TEST_F(RunFileTest, KeysAndValuesAreSharedBothOrNeither) {
  const test::Problem problem = SmallProblem(reference::CompressorKind::kMean, DType::kBF16);
  const Entries shared = EntriesOf(problem, /*shared_kv=*/true);
  const Entries apart = EntriesOf(problem, /*shared_kv=*/false);
  Entries entries = shared;
  entries.erase("v");
  EXPECT_NE(ErrorOf(entries).find("\"v\""), std::string::npos);
  entries = apart;
  entries["v"] = shared.at("v");
  EXPECT_NE(ErrorOf(entries).find("\"k_cmp\": must not stand beside k or v"), std::string::npos);
}

TEST_F(RunFileTest, NamesWhatIsWrongWithDocuments) {
  const test::Problem problem = SmallProblem(reference::CompressorKind::kMean, DType::kBF16);
  const Entries good = EntriesOf(problem, /*shared_kv=*/true);
  auto with = [&good](std::vector<int32_t> ends) {
    Entries entries = good;
    Entry& entry = entries["cu_seqlens"];
    entry.spec.shape = {static_cast<int64_t>(ends.size())};
    entry.bytes.resize(ends.size() * sizeof(int32_t));
    std::memcpy(entry.bytes.data(), ends.data(), entry.bytes.size());
    return entries;
  };
  for (const auto& [ends, rule] :
       {std::pair(std::vector<int32_t>{0, 333, 800}, "must be num_tokens = 700"),
        std::pair(std::vector<int32_t>{1, 333, 700}, "cu_seqlens[0] = 1: must be 0"),
        std::pair(std::vector<int32_t>{0, 400, 399, 700}, "must be at least cu_seqlens[1] = 400"),
        std::pair(std::vector<int32_t>{0, -5, 700}, "must be at least"),
        std::pair(std::vector<int32_t>{0}, "shape [1] must be [documents + 1]")}) {
    const std::string error = ErrorOf(with(ends));
    EXPECT_NE(error.find(absl::StrCat("file \"", options_.input, "\": tensor \"cu_seqlens\": ")),
              std::string::npos)
        << error;
    EXPECT_NE(error.find(rule), std::string::npos) << error;
  }
}

TEST_F(RunFileTest, NamesWhatIsWrongWithFilesAndOptions) {
  const test::Problem problem = SmallProblem(reference::CompressorKind::kMean, DType::kBF16);
  WriteInput(EntriesOf(problem, /*shared_kv=*/true));
  auto error_of = [this](int num_ranks, const std::string& sharding) {
    const absl::Status status = Run(num_ranks, sharding);
    EXPECT_FALSE(status.ok());
    EXPECT_FALSE(LeftSomething());
    return std::string(status.message());
  };
  EXPECT_NE(error_of(2, "zigzog").find("sharding = \"zigzog\""), std::string::npos);
  EXPECT_NE(error_of(3, "350,350").find("has 2 lengths"), std::string::npos);
  EXPECT_NE(error_of(2, "300,300").find("cover 600 tokens"), std::string::npos);

  options_.fetch_budget_bytes = 1;
  EXPECT_NE(error_of(2, "zigzag").find("fetch_budget_bytes = 1"), std::string::npos);
  options_.fetch_budget_bytes = int64_t{1} << 30;

  const std::string output = options_.output;
  options_.output = folder_ + "/no/such/folder/out.safetensors";
  EXPECT_NE(error_of(2, "zigzag").find(options_.output), std::string::npos);
  // The output must not appear when a drawing fails.
  options_.output = output;
  options_.svg_folder = options_.input + "/drawings";
  EXPECT_NE(error_of(2, "zigzag").find(options_.svg_folder), std::string::npos);
  options_.svg_folder.clear();

  std::filesystem::resize_file(options_.input, std::filesystem::file_size(options_.input) - 1);
  EXPECT_NE(error_of(2, "zigzag").find(options_.input), std::string::npos);
  options_.input = folder_ + "/missing.safetensors";
  EXPECT_NE(error_of(2, "zigzag").find(options_.input), std::string::npos);
}

}  // namespace
}  // namespace nsa::tools
