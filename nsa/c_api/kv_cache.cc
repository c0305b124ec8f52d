// Decoding.
#include "nsa/serving/kv_cache.h"

#include <memory>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "nsa/c_api/arguments.h"
#include "nsa/c_api/handles.h"

namespace nsa::c_api {
namespace {

using serving::KvCache;
using serving::KvCacheOptions;
using serving::KvTokens;
using serving::StepInputs;
using serving::StepOutputs;
using serving::StepSequence;

absl::StatusOr<KvCacheOptions> ToKvCacheOptions(const nsa_kv_cache_options& options,
                                                const nsa_config* config, int num_ranks) {
  absl::StatusOr<NsaConfig> read = ToConfig(config);
  if (!read.ok()) return read.status();
  KvCacheOptions cache;
  cache.config = *std::move(read);
  Reader reader;
  cache.dtype = reader.ToDType("dtype", options.dtype);
  cache.num_pages = options.num_pages;
  if (options.home_shares != nullptr) {
    cache.home_shares.assign(options.home_shares, options.home_shares + num_ranks);
  }
  cache.max_sequences = OrDefault(options.max_sequences, cache.max_sequences);
  cache.max_tokens = OrDefault(options.max_tokens, cache.max_tokens);
  cache.summary_tokens = options.summary_tokens;
  cache.max_step_rows = OrDefault(options.max_step_rows, cache.max_step_rows);
  cache.shares_kv = options.separate_kv == 0;
  cache.max_rollback_tokens = OrDefault(options.max_rollback_tokens, cache.max_rollback_tokens);
  cache.compress_k = reader.ToCompressorParams("compress_k.", options.compress_k);
  cache.compress_v = reader.ToCompressorParams("compress_v.", options.compress_v);
  if (!reader.status().ok()) return reader.status();
  return cache;
}

absl::StatusOr<std::unique_ptr<KvCache>> MakeKvCache(const nsa_kv_cache_options* given,
                                                     const nsa_config* config,
                                                     const nsa_group& group) {
  const absl::StatusOr<nsa_kv_cache_options> read = ReadStruct("options", given);
  if (!read.ok()) return FailTogether(group, read.status());
  const absl::StatusOr<KvCacheOptions> options =
      ToKvCacheOptions(*read, config, group.communicator->size());
  if (!options.ok()) return FailTogether(group, options.status());
  return KvCache::Create(*options, group.communicator, group.kernels);
}

KvTokens ToKvTokens(const nsa_kv_tokens& tokens, Reader& reader) {
  return {.k_cmp = reader.ToTensor("k_cmp", tokens.k_cmp),
          .k_slc = reader.ToTensor("k_slc", tokens.k_slc),
          .k_win = reader.ToTensor("k_win", tokens.k_win),
          .v_cmp = reader.ToTensor("v_cmp", tokens.v_cmp),
          .v_slc = reader.ToTensor("v_slc", tokens.v_slc),
          .v_win = reader.ToTensor("v_win", tokens.v_win)};
}

absl::Status ReadBatch(const nsa_step_sequence* sequences, int32_t num_sequences,
                       std::vector<StepSequence>& batch) {
  Reader reader;
  reader.Require(num_sequences >= 0, "num_sequences", num_sequences, "must be 0 or more");
  if (!reader.status().ok()) return reader.status();
  if (num_sequences > 0) {
    if (absl::Status s = CheckSet("sequences", sequences); !s.ok()) return s;
  }
  for (const nsa_step_sequence& step : absl::MakeSpan(sequences, num_sequences)) {
    reader.Require(step.reserved == 0, "sequences[].reserved", step.reserved, "must be 0");
    batch.push_back({step.sequence, step.num_new});
  }
  return reader.status();
}

// Leaves them empty after an error.
absl::Status ReadStep(const nsa_step_inputs* given_inputs, const nsa_step_outputs* given_outputs,
                      StepInputs& inputs, StepOutputs& outputs) {
  const auto read_inputs = ReadStruct("inputs", given_inputs);
  if (!read_inputs.ok()) return read_inputs.status();
  const auto read_outputs = ReadStruct("outputs", given_outputs);
  if (!read_outputs.ok()) return read_outputs.status();
  Reader reader;
  StepInputs made_inputs = {.q = reader.ToTensor("q", read_inputs->q),
                            .kv = ToKvTokens(read_inputs->kv, reader),
                            .gate = reader.ToTensor("gate", read_inputs->gate)};
  StepOutputs made_outputs = {.o = reader.ToTensor("o", read_outputs->o),
                              .block_indices = read_outputs->block_indices};
  if (!reader.status().ok()) return reader.status();
  inputs = std::move(made_inputs);
  outputs = std::move(made_outputs);
  return absl::OkStatus();
}

nsa_kv_cache_stats ToStats(const serving::KvCacheStats& stats) {
  return {.struct_size = sizeof(nsa_kv_cache_stats),
          .sequences = stats.sequences,
          .pages = stats.pages,
          .pages_used = stats.pages_used,
          .summary_pages = stats.summary_pages,
          .summary_pages_used = stats.summary_pages_used,
          .steps = stats.steps,
          .tokens_appended = stats.tokens_appended,
          .bytes_fetched = stats.bytes_fetched};
}

// What a call gives, where the caller wants it.
template <typename Given, typename Wanted>
absl::Status Give(const absl::StatusOr<Given>& given, Wanted* wanted) {
  if (!given.ok()) return given.status();
  *wanted = *given;
  return absl::OkStatus();
}

}  // namespace
}  // namespace nsa::c_api

using nsa::c_api::CallTogether;
using nsa::c_api::CheckSet;
using nsa::c_api::Give;
using nsa::c_api::Reader;
using nsa::c_api::ReadStruct;
using nsa::c_api::Run;
using nsa::serving::StepInputs;
using nsa::serving::StepOutputs;
using nsa::serving::StepSequence;

nsa_status nsa_kv_cache_create(const nsa_kv_cache_options* options, const nsa_config* config,
                               nsa_group* group, nsa_kv_cache** cache) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("group", group, "cache", cache); !s.ok()) return s;
    auto made = nsa::c_api::MakeKvCache(options, config, *group);
    if (!made.ok()) return made.status();
    *cache = new nsa_kv_cache{*std::move(made)};
    return absl::OkStatus();
  });
}

void nsa_kv_cache_destroy(nsa_kv_cache* cache) { delete cache; }

nsa_status nsa_kv_cache_is_reachable(const nsa_kv_cache* cache, int32_t* is_reachable) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("cache", cache, "is_reachable", is_reachable); !s.ok()) return s;
    *is_reachable = cache->cache->is_reachable() ? 1 : 0;
    return absl::OkStatus();
  });
}

nsa_status nsa_kv_cache_open(nsa_kv_cache* cache, int64_t* sequence) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("cache", cache, "sequence", sequence); !s.ok()) return s;
    return Give(cache->cache->Open(), sequence);
  });
}

nsa_status nsa_kv_cache_num_tokens(const nsa_kv_cache* cache, int64_t sequence,
                                   int64_t* num_tokens) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("cache", cache, "num_tokens", num_tokens); !s.ok()) return s;
    return Give(cache->cache->NumTokens(sequence), num_tokens);
  });
}

nsa_status nsa_kv_cache_append(nsa_kv_cache* cache, int64_t sequence, const nsa_kv_tokens* tokens,
                               void* stream) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("cache", cache, "tokens", tokens); !s.ok()) return s;
    Reader reader;
    const nsa::serving::KvTokens read = nsa::c_api::ToKvTokens(*tokens, reader);
    if (!reader.status().ok()) return reader.status();
    return cache->cache->Append(sequence, read, stream);
  });
}

nsa_status nsa_kv_cache_append_forward(nsa_kv_cache* cache, int32_t home, int64_t sequence,
                                       nsa_engine* engine, const nsa_forward_inputs* inputs,
                                       int32_t document, void* stream) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("cache", cache, "engine", engine); !s.ok()) return s;
    nsa::ForwardInputs read_inputs;
    const absl::Status read = nsa::c_api::ReadForwardInputs(inputs, read_inputs);
    return CallTogether(read, [&] {
      return cache->cache->AppendForward(home, sequence, *engine->engine, read_inputs, document,
                                         stream);
    });
  });
}

nsa_status nsa_kv_cache_truncate(nsa_kv_cache* cache, int64_t sequence, int64_t num_tokens) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("cache", cache); !s.ok()) return s;
    return cache->cache->Truncate(sequence, num_tokens);
  });
}

nsa_status nsa_kv_cache_fork(nsa_kv_cache* cache, int64_t sequence, int64_t* forked) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("cache", cache, "forked", forked); !s.ok()) return s;
    return Give(cache->cache->Fork(sequence), forked);
  });
}

nsa_status nsa_kv_cache_close(nsa_kv_cache* cache, int64_t sequence) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("cache", cache); !s.ok()) return s;
    return cache->cache->Close(sequence);
  });
}

nsa_status nsa_kv_cache_step(nsa_kv_cache* cache, const nsa_step_sequence* sequences,
                             int32_t num_sequences, const nsa_step_inputs* inputs,
                             const nsa_step_outputs* outputs, void* stream) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("cache", cache); !s.ok()) return s;
    std::vector<StepSequence> batch;
    StepInputs read_inputs;
    StepOutputs read_outputs;
    absl::Status read = nsa::c_api::ReadBatch(sequences, num_sequences, batch);
    read.Update(nsa::c_api::ReadStep(inputs, outputs, read_inputs, read_outputs));
    if (!read.ok() && cache->cache->is_reachable()) return read;  // nobody waits for this rank
    if (!read.ok()) batch.clear();
    return CallTogether(
        read, [&] { return cache->cache->Step(batch, read_inputs, read_outputs, stream); });
  });
}

nsa_status nsa_kv_cache_plan_step(nsa_kv_cache* cache, const nsa_step_sequence* sequences,
                                  int32_t num_sequences, void* stream) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("cache", cache); !s.ok()) return s;
    std::vector<StepSequence> batch;
    absl::Status read = nsa::c_api::ReadBatch(sequences, num_sequences, batch);
    return read.ok() ? cache->cache->PlanStep(batch, stream) : read;
  });
}

nsa_status nsa_kv_cache_run_step(nsa_kv_cache* cache, int64_t num_rows,
                                 const nsa_step_inputs* inputs, const nsa_step_outputs* outputs,
                                 void* stream) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("cache", cache); !s.ok()) return s;
    StepInputs read_inputs;
    StepOutputs read_outputs;
    const absl::Status read = nsa::c_api::ReadStep(inputs, outputs, read_inputs, read_outputs);
    return CallTogether(
        read, [&] { return cache->cache->RunStep(num_rows, read_inputs, read_outputs, stream); });
  });
}

nsa_status nsa_kv_cache_get_stats(const nsa_kv_cache* cache, nsa_kv_cache_stats* stats) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("cache", cache); !s.ok()) return s;
    return nsa::c_api::WriteStruct("stats", nsa::c_api::ToStats(cache->cache->Stats()), stats);
  });
}
