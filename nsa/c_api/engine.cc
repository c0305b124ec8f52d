// The engine: forward, backward and their statistics.
#include "nsa/engine.h"

#include <memory>
#include <string>
#include <utility>

#include "google/protobuf/message.h"
#include "google/protobuf/util/json_util.h"
#include "nsa/c_api/arguments.h"
#include "nsa/c_api/handles.h"

namespace nsa::c_api {
namespace {

absl::StatusOr<EngineOptions> ToEngineOptions(const nsa_engine_options& options,
                                              const nsa_config* config) {
  absl::StatusOr<NsaConfig> read = ToConfig(config);
  if (!read.ok()) return read.status();
  EngineOptions engine;
  engine.config = *std::move(read);
  Reader reader;
  engine.dtype = reader.ToDType("dtype", options.dtype);
  engine.fetch_budget_bytes = OrDefault(options.fetch_budget_bytes, engine.fetch_budget_bytes);
  engine.agree_in_every_call = options.agree_on_change_only == 0;
  engine.has_backward = options.has_backward != 0;
  engine.max_hidden_width = options.max_hidden_width;
  engine.time_stages = options.time_stages != 0;
  if (!reader.status().ok()) return reader.status();
  return engine;
}

absl::StatusOr<std::unique_ptr<Engine>> MakeEngine(const nsa_engine_options* given,
                                                   const nsa_config* config, const nsa_plan* plan,
                                                   const nsa_group& group) {
  const absl::StatusOr<nsa_engine_options> read = ReadStruct("options", given);
  if (!read.ok()) return FailTogether(group, read.status());
  if (absl::Status s = CheckSet("plan", plan); !s.ok()) return FailTogether(group, s);
  const absl::StatusOr<EngineOptions> options = ToEngineOptions(*read, config);
  if (!options.ok()) return FailTogether(group, options.status());
  return Engine::Create(*options, plan->plan, group.communicator, group.kernels,
                        read->memory_of == nullptr ? nullptr : read->memory_of->engine.get());
}

absl::StatusOr<SaveOptions> ToSaveOptions(const nsa_save_options* options) {
  if (options == nullptr) return SaveOptions();
  const absl::StatusOr<nsa_save_options> read = ReadStruct("options", options);
  if (!read.ok()) return read.status();
  return SaveOptions{.keep_summaries = read->drop_summaries == 0,
                     .keep_blocks = read->keep_blocks != 0,
                     .memory = read->memory,
                     .is_filled = read->is_filled != 0};
}

// These, too, leave what they read empty after an error.
absl::Status ReadForwardOutputs(const nsa_forward_outputs* given, ForwardOutputs& outputs) {
  const absl::StatusOr<nsa_forward_outputs> read = ReadStruct("outputs", given);
  if (!read.ok()) return read.status();
  Reader reader;
  ForwardOutputs made = {.o = reader.ToTensor("o", read->o),
                         .o_cmp = reader.ToTensor("o_cmp", read->o_cmp),
                         .o_slc = reader.ToTensor("o_slc", read->o_slc),
                         .o_win = reader.ToTensor("o_win", read->o_win),
                         .lse_cmp = read->lse_cmp,
                         .lse_slc = read->lse_slc,
                         .lse_win = read->lse_win,
                         .block_indices = read->block_indices};
  if (reader.status().ok()) outputs = std::move(made);
  return reader.status();
}

absl::Status ReadGradients(const nsa_gradients* given, Gradients& gradients) {
  const absl::StatusOr<nsa_gradients> read = ReadStruct("gradients", given);
  if (!read.ok()) return read.status();
  Reader reader;
  Gradients made = {
      .dq = reader.ToTensor("dq", read->dq),
      .dk_cmp = reader.ToTensor("dk_cmp", read->dk_cmp),
      .dv_cmp = reader.ToTensor("dv_cmp", read->dv_cmp),
      .dk_slc = reader.ToTensor("dk_slc", read->dk_slc),
      .dv_slc = reader.ToTensor("dv_slc", read->dv_slc),
      .dk_win = reader.ToTensor("dk_win", read->dk_win),
      .dv_win = reader.ToTensor("dv_win", read->dv_win),
      .dgate = reader.ToTensor("dgate", read->dgate),
      .dcompress_k = reader.ToCompressorGradients("dcompress_k.", read->dcompress_k),
      .dcompress_v = reader.ToCompressorGradients("dcompress_v.", read->dcompress_v),
      .accumulate = read->accumulate != 0,
      .sum_over_ranks = read->sum_over_ranks != 0,
  };
  if (reader.status().ok()) gradients = std::move(made);
  return reader.status();
}

absl::Status ToJson(const google::protobuf::Message& message, const char** text) {
  google::protobuf::util::JsonPrintOptions options;
  options.always_print_primitive_fields = true;
  options.preserve_proto_field_names = true;
  std::string json;
  const auto status = google::protobuf::util::MessageToJsonString(message, &json, options);
  if (!status.ok()) return absl::InternalError(absl::StrCat("JSON: ", status.ToString()));
  *text = KeepText(std::move(json));
  return absl::OkStatus();
}

}  // namespace
}  // namespace nsa::c_api

using nsa::c_api::CallTogether;
using nsa::c_api::CheckSet;
using nsa::c_api::Reader;
using nsa::c_api::ReadStruct;
using nsa::c_api::Run;

nsa_status nsa_engine_create(const nsa_engine_options* options, const nsa_config* config,
                             const nsa_plan* plan, nsa_group* group, nsa_engine** engine) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("group", group, "engine", engine); !s.ok()) return s;
    absl::StatusOr<std::shared_ptr<nsa::Engine>> made =
        nsa::c_api::MakeEngine(options, config, plan, *group);
    if (!made.ok()) return made.status();
    *engine = new nsa_engine{*std::move(made)};
    return absl::OkStatus();
  });
}

void nsa_engine_destroy(nsa_engine* engine) { delete engine; }

nsa_status nsa_engine_saved_bytes(const nsa_engine* engine, const nsa_save_options* options,
                                  int64_t* num_bytes) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("engine", engine, "num_bytes", num_bytes); !s.ok()) return s;
    const absl::StatusOr<nsa::SaveOptions> read = nsa::c_api::ToSaveOptions(options);
    if (!read.ok()) return read.status();
    *num_bytes = engine->engine->SavedForwardBytes(*read);
    return absl::OkStatus();
  });
}

nsa_status nsa_saved_forward_create(nsa_engine* engine, const nsa_save_options* options,
                                    nsa_saved_forward** saved) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("engine", engine, "saved", saved); !s.ok()) return s;
    const absl::StatusOr<nsa::SaveOptions> read = nsa::c_api::ToSaveOptions(options);
    if (!read.ok()) return read.status();
    auto made = engine->engine->CreateSavedForward(*read);
    if (!made.ok()) return made.status();
    *saved = new nsa_saved_forward{engine->engine, *std::move(made)};
    return absl::OkStatus();
  });
}

void nsa_saved_forward_destroy(nsa_saved_forward* saved) { delete saved; }

nsa_status nsa_saved_forward_num_bytes(const nsa_saved_forward* saved, int64_t* num_bytes) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("saved", saved, "num_bytes", num_bytes); !s.ok()) return s;
    *num_bytes = saved->saved->num_bytes();
    return absl::OkStatus();
  });
}

nsa_status nsa_engine_forward(nsa_engine* engine, const nsa_forward_inputs* inputs,
                              const nsa_forward_outputs* outputs, nsa_saved_forward* saved,
                              void* stream) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("engine", engine); !s.ok()) return s;
    nsa::ForwardInputs read_inputs;
    nsa::ForwardOutputs read_outputs;
    absl::Status read = nsa::c_api::ReadForwardInputs(inputs, read_inputs);
    read.Update(nsa::c_api::ReadForwardOutputs(outputs, read_outputs));
    return CallTogether(read, [&] {
      return engine->engine->Forward(read_inputs, read_outputs, stream,
                                     saved == nullptr ? nullptr : saved->saved.get());
    });
  });
}

nsa_status nsa_engine_backward(nsa_engine* engine, const nsa_forward_inputs* inputs,
                               const nsa_tensor* d_o, nsa_saved_forward* saved,
                               const nsa_gradients* gradients, void* stream) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("engine", engine, "d_o", d_o, "saved", saved); !s.ok()) return s;
    nsa::ForwardInputs read_inputs;
    nsa::Gradients read_gradients;
    Reader reader;
    const nsa::Tensor read_d_o = reader.ToTensor("d_o", *d_o);
    absl::Status read = nsa::c_api::ReadForwardInputs(inputs, read_inputs);
    read.Update(reader.status());
    read.Update(nsa::c_api::ReadGradients(gradients, read_gradients));
    // Gradients that could not be read are none, which is no mistake to the other ranks.
    if (!read.ok()) read_inputs = {};
    return CallTogether(read, [&] {
      return engine->engine->Backward(read_inputs, read_d_o, *saved->saved, read_gradients, stream);
    });
  });
}

nsa_status nsa_engine_stats(nsa_engine* engine, const char** text) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("engine", engine, "text", text); !s.ok()) return s;
    const absl::StatusOr<nsa::RankStats> stats = engine->engine->LastStats();
    return stats.ok() ? nsa::c_api::ToJson(*stats, text) : stats.status();
  });
}

nsa_status nsa_engine_gather_stats(nsa_engine* engine, const char** text) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("engine", engine, "text", text); !s.ok()) return s;
    const absl::StatusOr<nsa::ForwardStats> stats = engine->engine->GatherStats();
    return stats.ok() ? nsa::c_api::ToJson(*stats, text) : stats.status();
  });
}
