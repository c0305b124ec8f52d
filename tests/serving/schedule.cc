#include "tests/serving/schedule.h"

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "nsa/engine.h"
#include "nsa/serving/kv_cache.h"
#include "tests/reference/reference.h"
#include "tests/testing/compare.h"
#include "tests/testing/generate.h"
#include "tests/testing/local_tensor.h"
#include "tests/testing/sharded.h"

namespace nsa::test {
namespace {

using serving::KvCache;
using serving::KvCacheOptions;
using serving::KvTokens;
using serving::SequenceId;
using serving::StepInputs;
using serving::StepOutputs;
using serving::StepSequence;

constexpr int64_t kUniverse = 6000;
constexpr int kMaxSequences = 16;
constexpr int64_t kMaxTokens = 400;
constexpr int64_t kMaxRollback = 50;

reference::ReferenceConfig ConfigOf(const Variant& variant) {
  reference::ReferenceConfig config;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim_qk = config.head_dim_v = 64;
  config.compress_block_tokens = 32;
  config.compress_stride_tokens = 16;
  config.select_block_tokens = 32;
  config.num_selected_blocks = 4;
  config.num_initial_blocks = 1;
  config.num_local_blocks = 1;
  config.window_tokens = 41;
  config.compressor = variant.compressor;
  return config;
}

// Rows of the universe as tensors in the kernels' memory.
class Rows {
 public:
  Rows(const Universe& universe, const std::vector<int64_t>& tokens, kernels::Kernels& kernels) {
    const reference::ReferenceConfig& c = universe.config;
    const EncodedInputs& in = universe.encoded;
    const DType dtype = universe.options.dtype;
    const auto take = [&](const Bytes& from, DType type, int64_t heads,
                          int64_t dim) -> ConstTensor {
      auto tensor =
          LocalTensor::Create(kernels, type, {static_cast<int64_t>(tokens.size()), heads, dim});
      EXPECT_TRUE(tensor.ok() && tensor->Load(kernels, from.data(), tokens).ok());
      tensors_.push_back(*std::move(tensor));
      return tensors_.back().view();
    };
    inputs.q = take(in.q, dtype, c.num_q_heads, c.head_dim_qk);
    inputs.SetSharedKv(take(in.k_slc, dtype, c.num_kv_heads, c.head_dim_qk),
                       take(in.v_slc, dtype, c.num_kv_heads, c.head_dim_v));
    if (!universe.options.share_keys) {
      inputs.k_cmp = take(in.k_cmp, dtype, c.num_kv_heads, c.head_dim_qk);
      inputs.v_cmp = take(in.v_cmp, dtype, c.num_kv_heads, c.head_dim_v);
      inputs.k_win = take(in.k_win, dtype, c.num_kv_heads, c.head_dim_qk);
      inputs.v_win = take(in.v_win, dtype, c.num_kv_heads, c.head_dim_v);
    }
    inputs.gate = take(in.gate, universe.options.gate_dtype, c.num_q_heads, 3);
  }

  KvTokens kv() const {
    return {inputs.k_cmp, inputs.k_slc, inputs.k_win, inputs.v_cmp, inputs.v_slc, inputs.v_win};
  }

  ForwardInputs inputs;

 private:
  std::vector<LocalTensor> tensors_;
};

// A compressor's parameters in the kernels' memory.
class Params {
 public:
  Params(const EncodedParameters& p, int64_t l, int64_t dim, kernels::Kernels& kernels) {
    const int64_t h = p.num_heads, f = p.hidden_width;
    const auto take = [&](const Bytes& bytes, Dims shape) -> ConstTensor {
      if (bytes.empty()) return {};
      auto tensor = LocalTensor::Create(kernels, p.dtype,
                                        {1, static_cast<int64_t>(bytes.size()) / SizeOf(p.dtype)});
      EXPECT_TRUE(tensor.ok() && tensor->Load(kernels, bytes.data(), {0}).ok());
      tensors_.push_back(*std::move(tensor));
      return ConstTensor(tensors_.back().view().data, p.dtype, std::move(shape));
    };
    params = {take(p.weight, {h, l}),      take(p.pe, {h, l, dim}), take(p.w, {h, dim, l * dim}),
              take(p.w1, {h, f, l * dim}), take(p.b1, {h, f}),      take(p.w2, {h, dim, f}),
              take(p.b2, {h, dim})};
  }

  CompressorParams params;

 private:
  std::vector<LocalTensor> tensors_;
};

// One rank of the schedule.
class RankRun {
 public:
  RankRun(const Variant& variant, const Universe& universe,
          std::shared_ptr<comm::Communicator> communicator,
          std::shared_ptr<kernels::Kernels> kernels)
      : variant_(variant),
        universe_(universe),
        communicator_(std::move(communicator)),
        kernels_(std::move(kernels)),
        compress_k_(universe.encoded.compress_k, universe.config.compress_block_tokens,
                    universe.config.head_dim_qk, *kernels_),
        compress_v_(universe.encoded.compress_v, universe.config.compress_block_tokens,
                    universe.config.head_dim_v, *kernels_),
        mine_(1000 + communicator_->rank()) {}

  ScheduleCounts counts() const {
    return {cache_ == nullptr ? 0 : cache_->Stats().bytes_fetched, num_exhausted_};
  }

  void Run() {
    const reference::ReferenceConfig& c = universe_.config;
    KvCacheOptions options;
    options.config = MakeNsaConfig(c);
    options.dtype = variant_.dtype;
    // Room runs out now and then; without others' pages it would most of the time.
    options.num_pages = variant_.is_reachable ? 120 : 300;
    options.max_sequences = kMaxSequences;
    options.max_tokens = kMaxTokens;
    options.shares_kv = variant_.shares_kv;
    options.max_rollback_tokens = kMaxRollback;
    options.compress_k = compress_k_.params;
    options.compress_v = compress_v_.params;
    auto cache = KvCache::Create(options, communicator_, kernels_);
    ASSERT_TRUE(cache.ok()) << cache.status();
    cache_ = *std::move(cache);
    EXPECT_EQ(cache_->is_reachable(), variant_.is_reachable);

    for (int i = 0; i < variant_.num_operations && !testing::Test::HasFailure(); ++i) {
      if (i % 60 == 20) {
        Forward();
      } else if (shared_.OneIn(2)) {
        Step();
      } else {
        LocalOperation();
      }
      for (const auto& [id, tokens] : sequences_) {
        ASSERT_EQ(*cache_->NumTokens(id), static_cast<int64_t>(tokens.size()));
      }
    }
    EXPECT_GT(num_compared_, variant_.num_operations / 4);
    for (const auto& [id, tokens] : sequences_) EXPECT_TRUE(cache_->Close(id).ok());
    EXPECT_EQ(cache_->Stats().pages_used, 0);
    EXPECT_EQ(cache_->Stats().summary_pages_used, 0);
    EXPECT_EQ(cache_->Stats().sequences, 0);
    EXPECT_TRUE(communicator_->Barrier().ok());
  }

 private:
  int num_ranks() const { return communicator_->size(); }

  std::vector<int64_t> NewTokens(int64_t count) {
    std::vector<int64_t> tokens(count);
    for (int64_t& token : tokens) token = mine_.Int(0, kUniverse - 1);
    return tokens;
  }

  SequenceId RandomSequence() {
    auto at = sequences_.begin();
    std::advance(at, mine_.Int(0, static_cast<int64_t>(sequences_.size()) - 1));
    return at->first;
  }

  // Whether an operation went through; the only reason for which it may not have is room.
  bool Went(const absl::Status& status) {
    if (absl::IsResourceExhausted(status)) ++num_exhausted_;
    EXPECT_TRUE(status.ok() || absl::IsResourceExhausted(status)) << status;
    return status.ok();
  }

  void LocalOperation() {
    const int64_t kind = mine_.Int(0, 9);
    if (sequences_.empty() || kind <= 1) {
      const auto id = cache_->Open();
      if (static_cast<int>(sequences_.size()) == kMaxSequences) {
        EXPECT_TRUE(absl::IsResourceExhausted(id.status()));
      } else if (Went(id.status())) {
        sequences_[*id];
      }
      return;
    }
    const SequenceId id = RandomSequence();
    std::vector<int64_t>& tokens = sequences_[id];
    const auto length = static_cast<int64_t>(tokens.size());
    if (kind <= 4) {
      const int64_t room = kMaxTokens - length;
      if (room == 0) return;
      const std::vector<int64_t> more = NewTokens(mine_.Int(1, std::min<int64_t>(room, 150)));
      if (Went(cache_->Append(id, Rows(universe_, more, *kernels_).kv()))) {
        tokens.insert(tokens.end(), more.begin(), more.end());
      }
    } else if (kind <= 6) {
      const int64_t to = mine_.Int(std::max<int64_t>(0, length - 70), length);
      const absl::Status status = cache_->Truncate(id, to);
      // Further back than what is kept where the branches have pages of their own.
      int64_t& longest = longest_[id];
      longest = std::max(longest, length);
      const bool may_refuse =
          (!variant_.shares_kv || !variant_.is_reachable) && longest - to > kMaxRollback;
      if (status.ok()) {
        tokens.resize(to);
      } else {
        EXPECT_TRUE(may_refuse) << length << " to " << to << status;
        EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
      }
    } else if (kind <= 8) {
      const auto forked = cache_->Fork(id);
      if (static_cast<int>(sequences_.size()) == kMaxSequences) {
        EXPECT_TRUE(absl::IsResourceExhausted(forked.status()));
      } else if (Went(forked.status())) {
        const std::vector<int64_t> copy = tokens;
        sequences_[*forked] = copy;
        longest_[*forked] = std::max(longest_[id], length);
      }
    } else {
      EXPECT_TRUE(cache_->Close(id).ok());
      EXPECT_TRUE(absl::IsNotFound(cache_->Close(id)));
      sequences_.erase(id);
    }
  }

  void Step() {
    std::vector<StepSequence> batch;
    std::vector<int64_t> all;
    std::vector<std::vector<int64_t>> news;
    for (const auto& [id, tokens] : sequences_) {
      const int64_t room = kMaxTokens - static_cast<int64_t>(tokens.size());
      if (room == 0 || mine_.OneIn(2) || batch.size() == 4) continue;
      const int64_t count = std::min<int64_t>(room, mine_.OneIn(6) ? mine_.Int(1, 16) : 1);
      batch.push_back({id, static_cast<int32_t>(count)});
      news.push_back(NewTokens(count));
      all.insert(all.end(), news.back().begin(), news.back().end());
    }
    const Rows rows(universe_, all, *kernels_);
    const reference::ReferenceConfig& c = universe_.config;
    const auto num_rows = static_cast<int64_t>(all.size());
    const int64_t o_row = c.num_q_heads * c.head_dim_v,
                  picks = c.num_kv_heads * c.num_selected_blocks;
    auto o =
        LocalTensor::Create(*kernels_, variant_.dtype, {num_rows, c.num_q_heads, c.head_dim_v});
    auto picked = LocalTensor::Create(*kernels_, DType::kF32, {num_rows, picks});
    ASSERT_TRUE(o.ok() && picked.ok());
    ASSERT_TRUE(o->Poison(*kernels_).ok());
    const StepOutputs outputs = {.o = o->view(),
                                 .block_indices = static_cast<int32_t*>(picked->view().data)};
    const absl::Status status =
        cache_->Step(batch, {rows.inputs.q, rows.kv(), rows.inputs.gate}, outputs);
    if (!Went(status)) return;
    Bytes bytes(num_rows * o_row * SizeOf(variant_.dtype));
    std::vector<int32_t> indices(num_rows * picks);
    std::vector<int64_t> every(num_rows);
    std::iota(every.begin(), every.end(), 0);
    ASSERT_TRUE(o->Store(*kernels_, bytes.data(), every).ok());
    ASSERT_TRUE(picked->Store(*kernels_, reinterpret_cast<std::byte*>(indices.data()), every).ok());
    const std::vector<double> values = Decode(variant_.dtype, bytes);
    int64_t row = 0;
    for (size_t i = 0; i < batch.size(); ++i) {
      std::vector<int64_t>& tokens = sequences_[batch[i].sequence];
      tokens.insert(tokens.end(), news[i].begin(), news[i].end());
      const int64_t count = batch[i].num_new;
      Compare(tokens, count, &values[row * o_row], &indices[row * picks]);
      row += count;
    }
  }

  // The last `count` tokens' o and block indices.
  void Compare(const std::vector<int64_t>& tokens, int64_t count, const double* o,
               const int32_t* indices) {
    const reference::ReferenceConfig& c = universe_.config;
    const reference::ReferenceInputs& from = universe_.inputs;
    const auto length = static_cast<int64_t>(tokens.size());
    reference::ReferenceInputs inputs;
    inputs.cu_seqlens = {0, length};
    const auto take = [&](const std::vector<double>& all, int64_t row) {
      std::vector<double> taken;
      for (int64_t token : tokens) {
        taken.insert(taken.end(), all.begin() + token * row, all.begin() + (token + 1) * row);
      }
      return taken;
    };
    inputs.q = take(from.q, c.num_q_heads * c.head_dim_qk);
    inputs.k_cmp = take(from.k_cmp, c.num_kv_heads * c.head_dim_qk);
    inputs.v_cmp = take(from.v_cmp, c.num_kv_heads * c.head_dim_v);
    inputs.k_slc = take(from.k_slc, c.num_kv_heads * c.head_dim_qk);
    inputs.v_slc = take(from.v_slc, c.num_kv_heads * c.head_dim_v);
    inputs.k_win = take(from.k_win, c.num_kv_heads * c.head_dim_qk);
    inputs.v_win = take(from.v_win, c.num_kv_heads * c.head_dim_v);
    inputs.gate = take(from.gate, c.num_q_heads * 3);
    inputs.compress_k = from.compress_k;
    inputs.compress_v = from.compress_v;
    std::vector<int64_t> queries(count);
    for (int64_t i = 0; i < count; ++i) queries[i] = length - count + i;
    const int64_t picks = c.num_kv_heads * c.num_selected_blocks;
    std::vector<int32_t> given(length * picks, -1);
    std::copy(indices, indices + count * picks, given.end() - count * picks);
    const auto expected = reference::Forward(c, inputs,
                                             {.summary_rounding = SummaryRounding(variant_.dtype),
                                              .given_block_indices = &given,
                                              .query_tokens = &queries,
                                              .num_threads = 1});
    ASSERT_TRUE(expected.ok()) << expected.status();
    const int64_t o_row = c.num_q_heads * c.head_dim_v;
    const std::vector<double> wanted(expected->o.end() - count * o_row, expected->o.end());
    const std::vector<double> actual(o, o + count * o_row);
    EXPECT_LE(RelativeL2(wanted, actual), variant_.dtype == DType::kF32 ? 1e-5 : 6e-3)
        << length << " tokens, " << count << " new";
    // Selected are the reference's own choice, but for near-ties.
    for (int64_t i = 0; i < count * c.num_kv_heads; ++i) {
      const int64_t place = (length - count) * c.num_kv_heads + i;
      if (expected->margin[place] < (variant_.dtype == DType::kF32 ? 1e-5 : 5e-2)) continue;
      for (int64_t j = 0; j < c.num_selected_blocks; ++j) {
        EXPECT_EQ(expected->block_indices[place * c.num_selected_blocks + j],
                  indices[i * c.num_selected_blocks + j]);
      }
    }
    ++num_compared_;
  }

  // A sharded forward of two documents, of which a random one becomes a sequence of a random rank.
  void Forward() {
    const reference::ReferenceConfig& c = universe_.config;
    const int home = static_cast<int>(shared_.Int(0, num_ranks() - 1));
    const int64_t num_tokens = shared_.Int(2, kMaxTokens);
    const std::vector<int64_t> cu_seqlens = {0, shared_.Int(1, num_tokens - 1), num_tokens};
    const auto document = static_cast<int32_t>(shared_.Int(0, 1));
    const std::string sharding =
        shared_.Pick<std::string>({"contiguous", "zigzag", "zigzag-per-document"});
    std::vector<int64_t> tokens(num_tokens);
    for (int64_t& token : tokens) token = shared_.Int(0, kUniverse - 1);

    EngineOptions options;
    options.config = MakeNsaConfig(c);
    options.dtype = variant_.dtype;
    auto engine =
        Engine::Create(options, *ShardPlan::Parse(sharding, num_tokens, num_ranks(), cu_seqlens),
                       communicator_, kernels_);
    ASSERT_TRUE(engine.ok()) << engine.status();
    std::vector<int64_t> own;
    for (const Chunk& chunk : (*engine)->shard_plan().ChunksOfRank(communicator_->rank())) {
      own.insert(own.end(), tokens.begin() + chunk.begin, tokens.begin() + chunk.end());
    }
    Rows rows(universe_, own, *kernels_);
    rows.inputs.compress_k = compress_k_.params;
    rows.inputs.compress_v = compress_v_.params;
    const auto count = static_cast<int64_t>(own.size());
    auto o = LocalTensor::Create(*kernels_, variant_.dtype, {count, c.num_q_heads, c.head_dim_v});
    ASSERT_TRUE(o.ok());
    ForwardOutputs outputs;
    outputs.o = o->view();
    // Which AppendForward, on the default one, waits for.
    const auto stream = kernels_->CreateStream();
    ASSERT_TRUE(stream.ok());
    ASSERT_TRUE((*engine)->Forward(rows.inputs, outputs, (*stream)->get()).ok());

    SequenceId id = -1;
    if (communicator_->rank() == home) {
      if (static_cast<int>(sequences_.size()) == kMaxSequences) {
        EXPECT_TRUE(cache_->Close(sequences_.begin()->first).ok());
        sequences_.erase(sequences_.begin());
      }
      id = *cache_->Open();
      sequences_[id];
    }
    if (Went(cache_->AppendForward(home, id, **engine, rows.inputs, document)) && id >= 0) {
      sequences_[id].assign(tokens.begin() + cu_seqlens[document],
                            tokens.begin() + cu_seqlens[document + 1]);
    }
  }

  const Variant& variant_;
  const Universe& universe_;
  const std::shared_ptr<comm::Communicator> communicator_;
  const std::shared_ptr<kernels::Kernels> kernels_;
  const Params compress_k_, compress_v_;
  std::unique_ptr<KvCache> cache_;
  Random shared_{7};  // the same on every rank
  Random mine_;
  std::map<SequenceId, std::vector<int64_t>> sequences_;  // tokens of the universe
  int num_compared_ = 0, num_exhausted_ = 0;
  std::map<SequenceId, int64_t> longest_;  // that one has been when it was rolled back
};

}  // namespace

Universe::Universe(const Variant& variant) : config(ConfigOf(variant)) {
  Random random(17);
  options.dtype = variant.dtype;
  options.share_keys = variant.shares_kv;
  options.hidden_width = 24;
  inputs = RandomInputs(config, {0, kUniverse}, options, &random);
  encoded = Encode(inputs, options);
}

ScheduleCounts RunSchedule(const Variant& variant, const Universe& universe,
                           std::shared_ptr<comm::Communicator> communicator,
                           std::shared_ptr<kernels::Kernels> kernels) {
  RankRun run(variant, universe, std::move(communicator), std::move(kernels));
  run.Run();
  return run.counts();
}

}  // namespace nsa::test
