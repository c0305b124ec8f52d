#include "nsa/plan/rank_plan.h"

#include <algorithm>
#include <utility>

namespace nsa {
namespace {

// Global tokens [begin, end).
struct Range {
  int64_t begin;
  int64_t end;
};

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls visit(document, begin, end) for the parts of global tokens [begin, end) by document.
template <typename Visit>
void ForEachDocument(const BlockMap& blocks, int64_t begin, int64_t end, Visit visit) {
  if (begin >= end) return;
  for (int32_t doc = blocks.DocumentOf(begin); begin < end; ++doc) {
    const kernels::Document& document = blocks.documents[doc];
    const int64_t stop = std::min(end, document.token_begin + document.num_tokens);
    visit(doc, begin, stop);
    begin = stop;
  }
}

// The blocks, one every `stride` tokens and `num_blocks(document)` of them, that begin in the
// chunks.
template <typename NumBlocks>
std::vector<kernels::BlockRun> RunsThatBeginIn(const std::vector<Chunk>& chunks,
                                               const BlockMap& blocks, int64_t stride,
                                               NumBlocks num_blocks) {
  std::vector<kernels::BlockRun> runs;
  for (const Chunk& chunk : chunks) {
    ForEachDocument(blocks, chunk.begin, chunk.end(), [&](int32_t doc, int64_t begin, int64_t end) {
      const kernels::Document& document = blocks.documents[doc];
      const int64_t first = CeilDiv(begin - document.token_begin, stride);
      const int64_t last =
          std::min(CeilDiv(end - document.token_begin, stride), num_blocks(document));
      if (first < last) {
        runs.push_back({.document = doc, .first_block = first, .num_blocks = last - first});
      }
    });
  }
  return runs;
}

std::vector<kernels::BlockRun> OwnSelectRuns(const NsaConfig& config, const ShardPlan& plan,
                                             const BlockMap& blocks, int rank) {
  return RunsThatBeginIn(plan.ChunksOfRank(rank), blocks, config.select_block_tokens,
                         [](const kernels::Document& d) { return d.num_slc_blocks; });
}

// Sorted by begin, and joined where they touch or overlap.
std::vector<Range> Joined(std::vector<Range> ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  std::vector<Range> joined;
  for (const Range& range : ranges) {
    if (!joined.empty() && range.begin <= joined.back().end) {
      joined.back().end = std::max(joined.back().end, range.end);
    } else {
      joined.push_back(range);
    }
  }
  return joined;
}

// Tokens that each branch reads for what a rank owns or queries, own ones included: for compression
// and for select blocks the rest of own blocks that reach into later chunks, for the window the w-1
// tokens before each chunk.
struct NeededTokens {
  std::vector<Range> cmp, slc, win;

  std::vector<Range> Of(int branches) const {
    std::vector<Range> ranges;
    for (auto [bit, of] : {std::pair(kCmpBit, &cmp), {kSlcBit, &slc}, {kWinBit, &win}}) {
      if (branches & bit) ranges.insert(ranges.end(), of->begin(), of->end());
    }
    return Joined(std::move(ranges));
  }
};

NeededTokens TokensNeededBy(const NsaConfig& config, const ShardPlan& plan, const BlockMap& blocks,
                            int rank) {
  const auto of_blocks = [&](const std::vector<kernels::BlockRun>& runs, int64_t stride,
                             int64_t block_tokens) {
    std::vector<Range> ranges;
    for (const kernels::BlockRun& run : runs) {
      const kernels::Document& document = blocks.documents[run.document];
      const int64_t last = (run.first_block + run.num_blocks - 1) * stride + block_tokens;
      ranges.push_back({document.token_begin + run.first_block * stride,
                        document.token_begin + std::min(last, document.num_tokens)});
    }
    return Joined(std::move(ranges));
  };
  std::vector<Range> windows;
  for (const Chunk& chunk : plan.ChunksOfRank(rank)) {
    ForEachDocument(blocks, chunk.begin, chunk.end(), [&](int32_t doc, int64_t begin, int64_t end) {
      const int64_t first =
          std::max(blocks.documents[doc].token_begin, begin - (config.window_tokens - 1));
      windows.push_back({first, end});
    });
  }
  return {.cmp = of_blocks(OwnCompressionRuns(config, plan, blocks, rank),
                           config.compress_stride_tokens, config.compress_block_tokens),
          .slc = of_blocks(OwnSelectRuns(config, plan, blocks, rank), config.select_block_tokens,
                           config.select_block_tokens),
          .win = Joined(std::move(windows))};
}

// Calls visit(chunk index, begin, end) for the parts of `ranges` that lie in `chunks`, both in
// global order.
template <typename Visit>
void ForEachChunk(const std::vector<Range>& ranges, const std::vector<Chunk>& chunks, Visit visit) {
  size_t i = 0;
  for (const Range& range : ranges) {
    while (i < chunks.size() && chunks[i].end() <= range.begin) ++i;
    for (size_t j = i; j < chunks.size() && chunks[j].begin < range.end; ++j) {
      const int64_t begin = std::max(range.begin, chunks[j].begin);
      const int64_t end = std::min(range.end, chunks[j].end());
      if (begin < end) visit(j, begin, end);
    }
  }
}

// What `rank` needs of others, of NeededTokens::Of. By owner, then in global order, in rows one
// after another.
std::vector<HaloPiece> HaloOf(const ShardPlan& plan, int rank, const std::vector<Range>& needed) {
  std::vector<HaloPiece> pieces;
  ForEachChunk(needed, plan.chunks(), [&](size_t chunk, int64_t begin, int64_t end) {
    const int32_t owner = plan.chunks()[chunk].rank;
    if (owner == rank) return;
    pieces.push_back(
        {.owner = owner, .token_begin = begin, .num_tokens = end - begin, .halo_row = 0});
  });
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const HaloPiece& a, const HaloPiece& b) { return a.owner < b.owner; });
  int64_t halo_row = 0;
  for (HaloPiece& piece : pieces) {
    piece.halo_row = halo_row;
    halo_row += piece.num_tokens;
  }
  return pieces;
}

}  // namespace

int32_t BlockMap::DocumentOf(int64_t token) const {
  const auto after =
      std::upper_bound(documents.begin(), documents.end(), token,
                       [](int64_t t, const kernels::Document& d) { return t < d.token_begin; });
  return static_cast<int32_t>(after - documents.begin()) - 1;
}

BlockMap MakeBlockMap(const NsaConfig& config, const ShardPlan& plan) {
  BlockMap blocks;
  const std::vector<int64_t>& cu_seqlens = plan.cu_seqlens();
  for (size_t i = 0; i + 1 < cu_seqlens.size(); ++i) {
    const int64_t length = cu_seqlens[i + 1] - cu_seqlens[i];
    const kernels::Document document = {.token_begin = cu_seqlens[i],
                                        .num_tokens = length,
                                        .cmp_block_begin = blocks.num_cmp_blocks,
                                        .num_cmp_blocks = NumCompressionBlocks(config, length),
                                        .slc_block_begin = blocks.num_slc_blocks,
                                        .num_slc_blocks = NumSelectBlocks(config, length)};
    blocks.num_cmp_blocks += document.num_cmp_blocks;
    blocks.num_slc_blocks += document.num_slc_blocks;
    blocks.documents.push_back(document);
  }
  blocks.slc_owner.resize(blocks.num_slc_blocks);
  blocks.slc_ordinal.resize(blocks.num_slc_blocks);
  for (int rank = 0; rank < plan.num_ranks(); ++rank) {
    int32_t ordinal = 0;
    for (const kernels::BlockRun& run : OwnSelectRuns(config, plan, blocks, rank)) {
      const int64_t begin = blocks.documents[run.document].slc_block_begin + run.first_block;
      for (int64_t block = begin; block < begin + run.num_blocks; ++block) {
        blocks.slc_owner[block] = rank;
        blocks.slc_ordinal[block] = ordinal++;
      }
    }
    blocks.slc_blocks_of_rank.push_back(ordinal);
  }
  return blocks;
}

std::vector<kernels::BlockRun> OwnCompressionRuns(const NsaConfig& config, const ShardPlan& plan,
                                                  const BlockMap& blocks, int rank) {
  return RunsThatBeginIn(plan.ChunksOfRank(rank), blocks, config.compress_stride_tokens,
                         [](const kernels::Document& d) { return d.num_cmp_blocks; });
}

namespace {

// `needed`: by each rank.
BranchKv MakeBranchKv(const ShardPlan& plan, const BlockMap& blocks, int rank,
                      const std::vector<NeededTokens>& needed, int branches) {
  BranchKv kv;
  const std::vector<Chunk>& own = plan.ChunksOfRank(rank);
  std::vector<int64_t> first_rows = {0};  // of own chunks
  for (const Chunk& chunk : own) first_rows.push_back(first_rows.back() + chunk.num_tokens);
  for (int peer = 0; peer < plan.num_ranks(); ++peer) {
    const std::vector<Range> ranges = needed[peer].Of(branches);
    if (peer == rank) {
      kv.receives = HaloOf(plan, rank, ranges);
      continue;
    }
    ForEachChunk(ranges, own, [&](size_t chunk, int64_t begin, int64_t end) {
      kv.sends.push_back({.peer = peer,
                          .row = first_rows[chunk] + begin - own[chunk].begin,
                          .num_tokens = end - begin});
      kv.send_rows += end - begin;
    });
  }

  struct Run {
    Range range;
    int64_t row;
    int32_t is_halo;
  };
  std::vector<Run> runs;
  for (size_t i = 0; i < own.size(); ++i) {
    runs.push_back({{own[i].begin, own[i].end()}, first_rows[i], 0});
  }
  for (const HaloPiece& piece : kv.receives) {
    runs.push_back({{piece.token_begin, piece.token_begin + piece.num_tokens}, piece.halo_row, 1});
    kv.halo_rows += piece.num_tokens;
  }
  std::sort(runs.begin(), runs.end(),
            [](const Run& a, const Run& b) { return a.range.begin < b.range.begin; });
  for (const Run& run : runs) {
    ForEachDocument(blocks, run.range.begin, run.range.end,
                    [&](int32_t doc, int64_t begin, int64_t end) {
                      kv.segments.push_back({.row = run.row + begin - run.range.begin,
                                             .num_tokens = end - begin,
                                             .position = begin - blocks.documents[doc].token_begin,
                                             .document = doc,
                                             .is_halo = run.is_halo});
                    });
  }
  return kv;
}

// Select blocks of other ranks that begin no later than the rank's last query of their document.
int64_t CountRemoteVisible(const RankPlan& rank_plan, const NsaConfig& config) {
  const std::vector<kernels::Segment>& segments = rank_plan.query_segments;
  int64_t visible = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    if (i + 1 < segments.size() && segments[i + 1].document == segments[i].document) continue;
    const int64_t last_position = segments[i].position + segments[i].num_tokens - 1;
    visible += last_position / config.select_block_tokens + 1;
  }
  // A rank sees all of its own blocks, since it holds their first tokens.
  return visible - rank_plan.num_own_slc_blocks;
}

}  // namespace

int64_t NumBlocks(const std::vector<kernels::BlockRun>& runs) {
  int64_t blocks = 0;
  for (const kernels::BlockRun& run : runs) blocks += run.num_blocks;
  return blocks;
}

RankPlan MakeRankPlan(const NsaConfig& config, const ShardPlan& plan, const BlockMap& blocks,
                      int rank) {
  RankPlan result;
  result.rank = rank;
  result.num_tokens = plan.TokensOfRank(rank);
  result.cmp_runs = OwnCompressionRuns(config, plan, blocks, rank);
  result.slc_runs = OwnSelectRuns(config, plan, blocks, rank);
  result.num_own_slc_blocks = blocks.slc_blocks_of_rank[rank];
  std::vector<NeededTokens> needed;
  for (int peer = 0; peer < plan.num_ranks(); ++peer) {
    needed.push_back(TokensNeededBy(config, plan, blocks, peer));
  }
  for (int branches = 1; branches < kNumBranchSets; ++branches) {
    result.kv[branches] = MakeBranchKv(plan, blocks, rank, needed, branches);
  }
  for (const kernels::Segment& segment : result.kv[kSlcBit].segments) {
    if (!segment.is_halo) result.query_segments.push_back(segment);
  }
  result.num_remote_slc_blocks = CountRemoteVisible(result, config);
  return result;
}

}  // namespace nsa
