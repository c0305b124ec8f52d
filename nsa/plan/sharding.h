// How the tokens of one global sequence are dealt to the ranks. Pure host data.
//
// Conventions: global tokens are numbered 0..S-1 over all packed documents; a rank holds its chunks
// one after another in global order, which gives its local token numbers 0..T-1.
#ifndef NSA_PLAN_SHARDING_H_
#define NSA_PLAN_SHARDING_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace nsa {

// Tokens [begin, begin + num_tokens) live on `rank`.
struct Chunk {
  int32_t rank;
  int64_t begin;
  int64_t num_tokens;

  int64_t end() const { return begin + num_tokens; }
  bool operator==(const Chunk&) const = default;
};

// Chunk lists in global order. Sizes differ by at most one token where S does not divide.
// S >= 1 and P >= 1 may be anything; ranks may stay empty.
std::vector<Chunk> ContiguousChunks(int64_t num_tokens, int num_ranks);
// 2P chunks; rank r holds chunks r and 2P-1-r, as Megatron's context parallelism deals them.
std::vector<Chunk> ZigZagChunks(int64_t num_tokens, int num_ranks);
// Zig-zag inside each document, as Megatron (Transformer Engine) deals packed sequences.
std::vector<Chunk> ZigZagPerDocumentChunks(absl::Span<const int64_t> cu_seqlens, int num_ranks);
// Rank r holds the next lengths[r] tokens.
std::vector<Chunk> UnevenChunks(absl::Span<const int64_t> lengths);

// Where a token lives.
struct TokenPlace {
  int32_t rank;
  int64_t local;
};

class ShardPlan {
 public:
  // `chunks` must cover [0, num_tokens) in global order without gap or overlap (empty chunks are
  // dropped); `cu_seqlens` is 0, ascending document ends, num_tokens, or empty for one document
  // (empty documents are dropped). InvalidArgument lists what is wrong.
  static absl::StatusOr<ShardPlan> Create(int64_t num_tokens, int num_ranks,
                                          std::vector<Chunk> chunks,
                                          std::vector<int64_t> cu_seqlens = {});

  // `sharding` is "contiguous", "zigzag", "zigzag-per-document" or tokens per rank,
  // comma-separated.
  static absl::StatusOr<ShardPlan> Parse(absl::string_view sharding, int64_t num_tokens,
                                         int num_ranks, std::vector<int64_t> cu_seqlens = {});

  int64_t num_tokens() const { return num_tokens_; }                          // S
  int num_ranks() const { return static_cast<int>(chunks_of_rank_.size()); }  // P
  const std::vector<Chunk>& chunks() const { return chunks_; }                // global order
  const std::vector<int64_t>& cu_seqlens() const { return cu_seqlens_; }      // documents + 1

  int64_t TokensOfRank(int rank) const { return tokens_of_rank_[rank]; }  // T
  // The rank's chunks, in local and global order.
  const std::vector<Chunk>& ChunksOfRank(int rank) const { return chunks_of_rank_[rank]; }
  // `token` in [0, num_tokens).
  TokenPlace Locate(int64_t token) const;
  int64_t GlobalToken(int rank, int64_t local) const;

  // The plan as (name, value), for printing and comparing.
  std::vector<std::pair<std::string, std::string>> Fields() const;

 private:
  ShardPlan() = default;

  int64_t num_tokens_ = 0;
  std::vector<Chunk> chunks_;
  std::vector<int64_t> chunk_local_begin_;  // [chunks] local token of the chunk's first token
  std::vector<std::vector<Chunk>> chunks_of_rank_;
  std::vector<int64_t> tokens_of_rank_;
  std::vector<int64_t> cu_seqlens_;
};

}  // namespace nsa

#endif  // NSA_PLAN_SHARDING_H_
