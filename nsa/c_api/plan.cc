// Shard plans.
#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_join.h"
#include "absl/types/span.h"
#include "nsa/c_api/arguments.h"
#include "nsa/c_api/handles.h"
#include "nsa/plan/sharding.h"

namespace nsa::c_api {
namespace {

// As ShardPlan::Parse calls them, by nsa_sharding.
constexpr const char* kShardingNames[] = {"contiguous", "zigzag", "zigzag-per-document"};
constexpr int64_t kMaxDocuments = int64_t{1} << 31;

absl::StatusOr<ShardPlan> MakePlan(const nsa_plan_options& options) {
  const bool has_documents = options.cu_seqlens != nullptr;
  Reader reader;
  reader.Require(
      has_documents ? options.num_cu_seqlens >= 2 && options.num_cu_seqlens <= kMaxDocuments
                    : options.num_cu_seqlens == 0,
      "num_cu_seqlens", options.num_cu_seqlens,
      has_documents ? "must lie in [2, 2^31] with cu_seqlens" : "must be 0 without cu_seqlens");
  const bool is_uneven = options.sharding == NSA_SHARDING_UNEVEN;
  reader.Require(
      options.sharding >= NSA_SHARDING_CONTIGUOUS && options.sharding <= NSA_SHARDING_UNEVEN,
      "sharding", options.sharding, "must be one of nsa_sharding, 0 to 3");
  reader.Require((options.tokens_of_rank != nullptr) == is_uneven, "tokens_of_rank",
                 is_uneven ? "null" : "an array",
                 "must be given for NSA_SHARDING_UNEVEN, and for that alone");
  const int32_t num_ranks = OrDefault(options.num_ranks, 1);
  reader.Require(num_ranks >= 0, "num_ranks", num_ranks, "must be 0, for one rank, or more");
  if (!reader.status().ok()) return reader.status();

  std::vector<int64_t> cu_seqlens;
  if (has_documents)
    cu_seqlens.assign(options.cu_seqlens, options.cu_seqlens + options.num_cu_seqlens);
  const int64_t num_tokens =
      options.num_tokens == 0 && has_documents ? cu_seqlens.back() : options.num_tokens;
  return ShardPlan::Parse(
      is_uneven ? absl::StrJoin(absl::MakeSpan(options.tokens_of_rank, num_ranks), ",")
                : kShardingNames[options.sharding],
      num_tokens, num_ranks, std::move(cu_seqlens));
}

absl::Status CheckRank(const ShardPlan& plan, int32_t rank) {
  Reader reader;
  reader.Require(rank >= 0 && rank < plan.num_ranks(), "rank", rank,
                 absl::StrCat("must lie in [0, ", plan.num_ranks(), ")"));
  return reader.status();
}

void WritePositions(const ShardPlan& plan, int32_t rank, int64_t* global, int64_t* in_document,
                    int32_t* document) {
  const std::vector<int64_t>& ends = plan.cu_seqlens();
  int64_t row = 0;
  for (const Chunk& chunk : plan.ChunksOfRank(rank)) {
    auto end = std::upper_bound(ends.begin(), ends.end(), chunk.begin);
    for (int64_t token = chunk.begin; token < chunk.end(); ++token, ++row) {
      if (token == *end) ++end;
      if (global != nullptr) global[row] = token;
      if (in_document != nullptr) in_document[row] = token - end[-1];
      if (document != nullptr) document[row] = static_cast<int32_t>(end - ends.begin() - 1);
    }
  }
}

}  // namespace
}  // namespace nsa::c_api

using nsa::ShardPlan;
using nsa::c_api::CheckSet;
using nsa::c_api::Run;

nsa_status nsa_plan_create(const nsa_plan_options* options, nsa_plan** plan) {
  return Run([&]() -> absl::Status {
    const auto read = nsa::c_api::ReadStruct("options", options);
    if (!read.ok()) return read.status();
    if (absl::Status s = CheckSet("plan", plan); !s.ok()) return s;
    absl::StatusOr<ShardPlan> made = nsa::c_api::MakePlan(*read);
    if (!made.ok()) return made.status();
    *plan = new nsa_plan{*std::move(made)};
    return absl::OkStatus();
  });
}

void nsa_plan_destroy(nsa_plan* plan) { delete plan; }

nsa_status nsa_plan_size(const nsa_plan* plan, int64_t* num_tokens, int32_t* num_ranks,
                         int32_t* num_documents) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("plan", plan); !s.ok()) return s;
    if (num_tokens != nullptr) *num_tokens = plan->plan.num_tokens();
    if (num_ranks != nullptr) *num_ranks = plan->plan.num_ranks();
    if (num_documents != nullptr) {
      *num_documents = static_cast<int32_t>(plan->plan.cu_seqlens().size()) - 1;
    }
    return absl::OkStatus();
  });
}

nsa_status nsa_plan_tokens_of_rank(const nsa_plan* plan, int32_t rank, int64_t* num_tokens) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("plan", plan, "num_tokens", num_tokens); !s.ok()) return s;
    if (absl::Status s = nsa::c_api::CheckRank(plan->plan, rank); !s.ok()) return s;
    *num_tokens = plan->plan.TokensOfRank(rank);
    return absl::OkStatus();
  });
}

nsa_status nsa_plan_positions(const nsa_plan* plan, int32_t rank, int64_t* global,
                              int64_t* in_document, int32_t* document) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("plan", plan); !s.ok()) return s;
    if (absl::Status s = nsa::c_api::CheckRank(plan->plan, rank); !s.ok()) return s;
    nsa::c_api::WritePositions(plan->plan, rank, global, in_document, document);
    return absl::OkStatus();
  });
}

nsa_status nsa_plan_text(const nsa_plan* plan, const char** text) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("plan", plan, "text", text); !s.ok()) return s;
    std::string lines;
    for (const auto& [name, value] : plan->plan.Fields()) {
      absl::StrAppend(&lines, name, ": ", value, "\n");
    }
    *text = nsa::c_api::KeepText(std::move(lines));
    return absl::OkStatus();
  });
}
