#include "tools/nsa_plan/report.h"

#include <memory>
#include <string>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "nsa/plan/cost.h"
#include "nsa/stats.h"

namespace nsa::tools {
namespace {

class PlanReportTest : public ::testing::Test {
 protected:
  PlanReportTest() : kernels_(*kernels::CpuKernels::Create({.num_threads = 1})) {}

  static PlanQuestion Question(const std::string& sharding, int64_t num_tokens, int num_ranks) {
    return {.config = {}, .plan = *ShardPlan::Parse(sharding, num_tokens, num_ranks)};
  }

  std::string Report(const PlanQuestion& question) {
    const absl::StatusOr<std::string> report = PlanReport(question, *kernels_);
    EXPECT_TRUE(report.ok()) << report.status();
    return report.ok() ? *report : "";
  }

  // The line of `rank` in the table under `section`.
  static std::string Line(const std::string& report, const std::string& section,
                          const std::string& rank) {
    const size_t begin = report.find(section);
    if (begin == std::string::npos) return "";
    size_t at = report.find("\n", report.find("rank", begin));
    while (at != std::string::npos) {
      const size_t end = report.find("\n", at + 1);
      const std::string line = report.substr(at + 1, end - at - 1);
      const size_t text = line.find_first_not_of(' ');
      if (text == std::string::npos) return "";
      if (line.compare(text, rank.size() + 1, rank + " ") == 0) return line;
      at = end;
    }
    return "";
  }

  std::unique_ptr<kernels::Kernels> kernels_;
};

TEST_F(PlanReportTest, PrintsWhatPlanFunctionsSay) {
  const PlanQuestion question = Question("zigzag", 8192, 4);
  const std::string report = Report(question);
  const BlockMap blocks = MakeBlockMap(question.config, question.plan);
  const RankPlan rank_plan = MakeRankPlan(question.config, question.plan, blocks, 2);
  const kernels::AttentionDims dims = MakeDims(question.config, question.dtype);
  const ForwardBytes bytes =
      BytesOfRank(dims, blocks, rank_plan, kernels_->RecordBytes(dims), 8192, 4, false);
  const std::string line = Line(report, "Bytes between ranks", "2");
  for (int64_t value : {bytes.halo_sent, bytes.halo_received, bytes.summaries_received,
                        bytes.blocks_received_at_most, bytes.dense_all_gather_received}) {
    EXPECT_NE(line.find(FormatBytes(static_cast<double>(value))), std::string::npos) << line;
  }
  EXPECT_NE(Line(report, "Sharding", "2").find("[2048, 3072) [5120, 6144)"), std::string::npos);
  EXPECT_NE(report.find("num_selected_blocks      16\n"), std::string::npos);
}

TEST_F(PlanReportTest, ZigZagBalancesTheLoad) {
  const std::string zigzag = Line(Report(Question("zigzag", 65536, 4)), "Arithmetic", "3");
  const std::string contiguous = Line(Report(Question("contiguous", 65536, 4)), "Arithmetic", "3");
  EXPECT_NE(zigzag.find(" 1.00 "), std::string::npos) << zigzag;
  // Of dense attention, the last quarter of the queries does 7/16.
  EXPECT_NE(contiguous.find(" 1.75 "), std::string::npos) << contiguous;
}

TEST_F(PlanReportTest, AnyPlanCanBePrinted) {
  for (int num_ranks : {1, 3, 64}) {
    for (int64_t num_tokens : {1, 31, 1000}) {
      EXPECT_FALSE(Report(Question("zigzag", num_tokens, num_ranks)).empty());
    }
  }
}

TEST_F(PlanReportTest, SharedKeysAreHeldAndSentOnce) {
  PlanQuestion question = Question("contiguous", 4096, 2);
  const std::string apart = Report(question);
  question.shared_kv = true;
  const std::string shared = Report(question);
  EXPECT_NE(apart.find("branches share k and v   no"), std::string::npos);
  EXPECT_NE(shared.find("branches share k and v   yes"), std::string::npos);
  EXPECT_NE(Line(apart, "Memory", "0"), Line(shared, "Memory", "0"));
  EXPECT_NE(Line(apart, "Bytes between ranks", "1"), Line(shared, "Bytes between ranks", "1"));
}

TEST_F(PlanReportTest, NamesWhatIsWrong) {
  PlanQuestion question = Question("contiguous", 4096, 2);
  question.fetch_budget_bytes = 1000;
  absl::Status status = PlanReport(question, *kernels_).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("rank 1: fetch_budget_bytes = 1000"), std::string::npos)
      << status;

  question = Question("contiguous", 4096, 2);
  question.config.compressor = Compressor::kMlp;
  status = PlanReport(question, *kernels_).status();
  EXPECT_EQ(status.message(), "hidden_width = 0: must be >= 1 for the MLP compressor");
  question.hidden_width = 128;
  EXPECT_FALSE(Report(question).empty());

  question.config.window_tokens = 0;
  EXPECT_EQ(PlanReport(question, *kernels_).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace nsa::tools
