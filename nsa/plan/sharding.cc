#include "nsa/plan/sharding.h"

#include <algorithm>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"

namespace nsa {
namespace {

// Keeps block numbers inside int32 and products of tokens and row sizes inside int64.
constexpr int64_t kMaxTokens = int64_t{1} << 32;
constexpr int kMaxRanks = 1 << 20;

// Tokens [begin, end) in `parts` parts whose sizes differ by at most one.
int64_t PartBegin(int64_t begin, int64_t end, int64_t part, int64_t parts) {
  const int64_t length = end - begin;
  return begin + length / parts * part + std::min(part, length % parts);
}

void AppendZigZag(int64_t begin, int64_t end, int num_ranks, std::vector<Chunk>& chunks) {
  const int64_t parts = 2 * int64_t{num_ranks};
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = PartBegin(begin, end, part, parts);
    const int64_t last = PartBegin(begin, end, part + 1, parts);
    chunks.push_back({.rank = static_cast<int32_t>(std::min(part, parts - 1 - part)),
                      .begin = first,
                      .num_tokens = last - first});
  }
}

}  // namespace

std::vector<Chunk> ContiguousChunks(int64_t num_tokens, int num_ranks) {
  std::vector<Chunk> chunks;
  for (int rank = 0; rank < num_ranks; ++rank) {
    const int64_t begin = PartBegin(0, num_tokens, rank, num_ranks);
    const int64_t end = PartBegin(0, num_tokens, rank + 1, num_ranks);
    chunks.push_back({.rank = rank, .begin = begin, .num_tokens = end - begin});
  }
  return chunks;
}

std::vector<Chunk> ZigZagChunks(int64_t num_tokens, int num_ranks) {
  std::vector<Chunk> chunks;
  AppendZigZag(0, num_tokens, num_ranks, chunks);
  return chunks;
}

std::vector<Chunk> ZigZagPerDocumentChunks(absl::Span<const int64_t> cu_seqlens, int num_ranks) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i + 1 < cu_seqlens.size(); ++i) {
    AppendZigZag(cu_seqlens[i], cu_seqlens[i + 1], num_ranks, chunks);
  }
  return chunks;
}

std::vector<Chunk> UnevenChunks(absl::Span<const int64_t> lengths) {
  std::vector<Chunk> chunks;
  int64_t begin = 0;
  for (size_t rank = 0; rank < lengths.size(); ++rank) {
    chunks.push_back(
        {.rank = static_cast<int32_t>(rank), .begin = begin, .num_tokens = lengths[rank]});
    begin += lengths[rank];
  }
  return chunks;
}

absl::StatusOr<ShardPlan> ShardPlan::Create(int64_t num_tokens, int num_ranks,
                                            std::vector<Chunk> chunks,
                                            std::vector<int64_t> cu_seqlens) {
  std::vector<std::string> broken;
  if (num_tokens < 1 || num_tokens > kMaxTokens) {
    broken.push_back(
        absl::StrCat("num_tokens = ", num_tokens, ": must lie in [1, ", kMaxTokens, "]"));
  }
  if (num_ranks < 1 || num_ranks > kMaxRanks) {
    broken.push_back(absl::StrCat("num_ranks = ", num_ranks, ": must lie in [1, ", kMaxRanks, "]"));
  }
  int64_t next = 0;
  for (size_t i = 0; i < chunks.size(); ++i) {
    const Chunk& chunk = chunks[i];
    const std::string name = absl::StrCat("chunks[", i, "]");
    if (chunk.rank < 0 || chunk.rank >= num_ranks) {
      broken.push_back(
          absl::StrCat(name, ".rank = ", chunk.rank, ": must lie in [0, ", num_ranks - 1, "]"));
    }
    if (chunk.num_tokens < 0 || chunk.num_tokens > kMaxTokens) {
      broken.push_back(absl::StrCat(name, ".num_tokens = ", chunk.num_tokens, ": must lie in [0, ",
                                    kMaxTokens, "]"));
      break;
    }
    if (chunk.begin != next) {
      broken.push_back(absl::StrCat(name, ".begin = ", chunk.begin, ": must be ", next,
                                    ", the end of the chunk before"));
      break;
    }
    next = chunk.end();
    if (next > kMaxTokens) break;
  }
  if (broken.empty() && next != num_tokens) {
    broken.push_back(
        absl::StrCat("chunks: cover ", next, " tokens: must cover num_tokens = ", num_tokens));
  }
  if (cu_seqlens.empty()) cu_seqlens = {0, num_tokens};
  if (cu_seqlens.front() != 0) {
    broken.push_back(absl::StrCat("cu_seqlens[0] = ", cu_seqlens.front(), ": must be 0"));
  }
  if (cu_seqlens.back() != num_tokens) {
    broken.push_back(absl::StrCat("cu_seqlens[", cu_seqlens.size() - 1, "] = ", cu_seqlens.back(),
                                  ": must be num_tokens = ", num_tokens));
  }
  for (size_t i = 1; i < cu_seqlens.size(); ++i) {
    if (cu_seqlens[i] < cu_seqlens[i - 1]) {
      broken.push_back(absl::StrCat("cu_seqlens[", i, "] = ", cu_seqlens[i],
                                    ": must be at least cu_seqlens[", i - 1,
                                    "] = ", cu_seqlens[i - 1]));
      break;
    }
  }
  if (!broken.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("shard plan: ", absl::StrJoin(broken, "; ")));
  }

  ShardPlan plan;
  plan.num_tokens_ = num_tokens;
  plan.cu_seqlens_ = std::move(cu_seqlens);
  plan.cu_seqlens_.erase(std::unique(plan.cu_seqlens_.begin(), plan.cu_seqlens_.end()),
                         plan.cu_seqlens_.end());
  plan.chunks_of_rank_.resize(num_ranks);
  for (const Chunk& chunk : chunks) {
    if (chunk.num_tokens == 0) continue;
    // Two neighbouring chunks of one rank are one chunk: fewer seams, same tokens.
    if (!plan.chunks_.empty() && plan.chunks_.back().rank == chunk.rank) {
      plan.chunks_.back().num_tokens += chunk.num_tokens;
    } else {
      plan.chunks_.push_back(chunk);
    }
  }
  plan.tokens_of_rank_.resize(num_ranks);
  for (const Chunk& chunk : plan.chunks_) {
    plan.chunk_local_begin_.push_back(plan.tokens_of_rank_[chunk.rank]);
    plan.tokens_of_rank_[chunk.rank] += chunk.num_tokens;
    plan.chunks_of_rank_[chunk.rank].push_back(chunk);
  }
  return plan;
}

absl::StatusOr<ShardPlan> ShardPlan::Parse(absl::string_view sharding, int64_t num_tokens,
                                           int num_ranks, std::vector<int64_t> cu_seqlens) {
  // Bad sizes are reported by Create; the chunk makers need sizes they can work with.
  const bool sizes_ok =
      num_tokens >= 1 && num_tokens <= kMaxTokens && num_ranks >= 1 && num_ranks <= kMaxRanks;
  std::vector<Chunk> chunks;
  if (!sizes_ok) {
  } else if (sharding == "contiguous") {
    chunks = ContiguousChunks(num_tokens, num_ranks);
  } else if (sharding == "zigzag") {
    chunks = ZigZagChunks(num_tokens, num_ranks);
  } else if (sharding == "zigzag-per-document") {
    if (cu_seqlens.empty()) cu_seqlens = {0, num_tokens};
    // Documents that Create is about to reject are not dealt.
    if (cu_seqlens.front() == 0 && cu_seqlens.back() == num_tokens &&
        std::is_sorted(cu_seqlens.begin(), cu_seqlens.end())) {
      chunks = ZigZagPerDocumentChunks(cu_seqlens, num_ranks);
    }
  } else {
    std::vector<int64_t> lengths;
    for (absl::string_view part : absl::StrSplit(sharding, ',')) {
      int64_t length = 0;
      if (!absl::SimpleAtoi(part, &length) || length < 0 || length > kMaxTokens) {
        return absl::InvalidArgumentError(absl::StrCat(
            "sharding = \"", sharding,
            "\": must be contiguous, zigzag, zigzag-per-document, or tokens per rank as "
            "comma-separated numbers >= 0"));
      }
      lengths.push_back(length);
    }
    if (static_cast<int>(lengths.size()) != num_ranks) {
      return absl::InvalidArgumentError(absl::StrCat("sharding = \"", sharding, "\": has ",
                                                     lengths.size(),
                                                     " lengths, must have one for "
                                                     "each of the ",
                                                     num_ranks, " ranks"));
    }
    chunks = UnevenChunks(lengths);
  }
  return Create(num_tokens, num_ranks, std::move(chunks), std::move(cu_seqlens));
}

TokenPlace ShardPlan::Locate(int64_t token) const {
  const auto after = std::upper_bound(chunks_.begin(), chunks_.end(), token,
                                      [](int64_t t, const Chunk& c) { return t < c.begin; });
  const size_t index = after - chunks_.begin() - 1;
  return {.rank = chunks_[index].rank,
          .local = chunk_local_begin_[index] + token - chunks_[index].begin};
}

int64_t ShardPlan::GlobalToken(int rank, int64_t local) const {
  for (const Chunk& chunk : chunks_of_rank_[rank]) {
    if (local < chunk.num_tokens) return chunk.begin + local;
    local -= chunk.num_tokens;
  }
  return num_tokens_;
}

std::vector<std::pair<std::string, std::string>> ShardPlan::Fields() const {
  std::vector<std::pair<std::string, std::string>> fields = {
      {"num_tokens", absl::StrCat(num_tokens_)}, {"num_ranks", absl::StrCat(num_ranks())}};
  for (size_t i = 0; i < chunks_.size(); ++i) {
    fields.emplace_back(absl::StrCat("chunks[", i, "]"),
                        absl::StrCat("tokens [", chunks_[i].begin, ", ", chunks_[i].end(),
                                     ") on rank ", chunks_[i].rank));
  }
  for (size_t i = 0; i < cu_seqlens_.size(); ++i) {
    fields.emplace_back(absl::StrCat("cu_seqlens[", i, "]"), absl::StrCat(cu_seqlens_[i]));
  }
  return fields;
}

}  // namespace nsa
