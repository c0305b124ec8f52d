#include "nsa/passes/stages.h"

#include <utility>

#include "absl/status/statusor.h"
#include "absl/time/clock.h"

namespace nsa {
namespace {

absl::Status RecordNew(kernels::Kernels& kernels, std::unique_ptr<kernels::Event>& event,
                       void* stream) {
  if (event == nullptr) {
    absl::StatusOr<std::unique_ptr<kernels::Event>> made =
        kernels.CreateEvent(kernels::EventUse::kTime);
    if (!made.ok()) return made.status();
    event = *std::move(made);
  }
  return kernels.Record(*event, stream);
}

}  // namespace

absl::Status Stages::Start(void* stream) {
  num_runs_ = 0;
  if (!is_timed_) return absl::OkStatus();
  absl::Status status = RecordNew(kernels_, start_, stream);
  // Not before the event: what the host does first would seem to end after what it does next.
  host_start_ = absl::Now();
  return status;
}

absl::Status Stages::Read(RankStats& stats) {
  for (size_t i = 0; i < num_runs_; ++i) {
    Run& run = runs_[i];
    StageSpan* span = stats.add_stages();
    span->set_stage(run.stage);
    span->set_track(run.track);
    if (run.is_host) {
      span->set_begin_seconds(absl::ToDoubleSeconds(run.host_begin - host_start_));
      span->set_end_seconds(absl::ToDoubleSeconds(run.host_end - host_start_));
      continue;
    }
    const absl::StatusOr<double> begin = kernels_.SecondsBetween(*start_, *run.begin);
    if (!begin.ok()) return begin.status();
    const absl::StatusOr<double> end = kernels_.SecondsBetween(*start_, *run.end);
    if (!end.ok()) return end.status();
    span->set_begin_seconds(*begin);
    span->set_end_seconds(*end);
  }
  return absl::OkStatus();
}

StageScope::StageScope(Stages& stages, const char* stage, void* stream, Track track)
    : stages_(stages), stream_(stream), is_host_(false) {
  Announce(stage, track == kMain ? "main" : "beside");
  if (run_ != nullptr) Record(&Stages::Run::begin);
}

StageScope::StageScope(Stages& stages, const char* stage)
    : stages_(stages), stream_(nullptr), is_host_(true) {
  Announce(stage, "host");
  if (run_ != nullptr) run_->host_begin = absl::Now();
}

StageScope::~StageScope() {
  stages_.kernels_.EndRange();
  if (run_ == nullptr) return;
  if (is_host_) {
    run_->host_end = absl::Now();
  } else {
    Record(&Stages::Run::end);
  }
  if (run_ != nullptr) ++stages_.num_runs_;
}

void StageScope::Announce(const char* stage, const char* track) {
  if (stages_.on_stage_) stages_.on_stage_(stage);
  stages_.kernels_.BeginRange(stage);
  if (!stages_.is_timed_) return;
  if (stages_.num_runs_ == stages_.runs_.size()) stages_.runs_.emplace_back();
  run_ = &stages_.runs_[stages_.num_runs_];
  run_->stage = stage;
  run_->track = track;
  run_->is_host = is_host_;
}

void StageScope::Record(std::unique_ptr<kernels::Event> Stages::Run::*event) {
  // A call that works is worth more than its times.
  if (!RecordNew(stages_.kernels_, run_->*event, stream_).ok()) run_ = nullptr;
}

}  // namespace nsa
