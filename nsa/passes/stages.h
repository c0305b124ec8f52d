// The stages of a call as its caller sees them: announced, named for profilers and, if asked for,
// timed where they run.
#ifndef NSA_PASSES_STAGES_H_
#define NSA_PASSES_STAGES_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "kernels/kernels.h"
#include "nsa/stats.pb.h"

namespace nsa {

// Lives as long as the engine: events are made once and used by every call.
class Stages {
 public:
  Stages(kernels::Kernels& kernels, std::function<void(absl::string_view stage)> on_stage,
         bool is_timed)
      : kernels_(kernels), on_stage_(std::move(on_stage)), is_timed_(is_timed) {}

  // A call begins.
  absl::Status Start(void* stream);
  // The stages of the last call, once it has ended on the device. FailedPrecondition when it was
  // captured in a graph that has not run.
  absl::Status Read(RankStats& stats);

 private:
  friend class StageScope;
  struct Run {
    const char* stage;
    const char* track;
    bool is_host;
    absl::Time host_begin, host_end;             // is_host
    std::unique_ptr<kernels::Event> begin, end;  // otherwise
  };

  kernels::Kernels& kernels_;
  const std::function<void(absl::string_view stage)> on_stage_;
  const bool is_timed_;
  absl::Time host_start_;
  std::unique_ptr<kernels::Event> start_;
  std::vector<Run> runs_;  // the first num_runs_ are of the call in progress, or the last one
  size_t num_runs_ = 0;
};

// What is enqueued during its life is a run of the stage.
class StageScope {
 public:
  // On the caller's stream, or on the engine's own beside it.
  enum Track { kMain, kBeside };
  StageScope(Stages& stages, const char* stage, void* stream, Track track = kMain);
  // On the host alone.
  StageScope(Stages& stages, const char* stage);
  ~StageScope();
  StageScope(const StageScope&) = delete;
  StageScope& operator=(const StageScope&) = delete;

 private:
  void Announce(const char* stage, const char* track);
  // Records one of the run's events, making it first if need be.
  void Record(std::unique_ptr<kernels::Event> Stages::Run::*event);

  Stages& stages_;
  void* const stream_;
  const bool is_host_;
  Stages::Run* run_ = nullptr;  // null: not timed
};

}  // namespace nsa

#endif  // NSA_PASSES_STAGES_H_
