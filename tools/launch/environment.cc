#include "tools/launch/environment.h"

#include <algorithm>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace nsa::tools {
namespace {

constexpr int kMaxRanks = 1 << 20;
constexpr int kMaxPort = 65535;

// Reads the variables and remembers the first one that is wrong.
class Reader {
 public:
  explicit Reader(const Environment& environment) : environment_(environment) {}

  bool Has(const char* name) const {
    const char* value = environment_(name);
    return value != nullptr && *value != '\0';
  }

  // A number in [low, high]; `fallback` when the variable is not set.
  int Number(const char* name, int low, int high, int fallback) {
    return Has(name) ? Number(name, low, high) : fallback;
  }

  // A number in [low, high]; the variable must be set.
  int Number(const char* name, int low, int high) {
    const std::string text = Text(name);
    int value = 0;
    if (status_.ok() && (!absl::SimpleAtoi(text, &value) || value < low || value > high)) {
      status_ = absl::InvalidArgumentError(absl::StrCat(
          "environment: ", name, " = \"", text, "\": must be a number in [", low, ", ", high, "]"));
    }
    return value;
  }

  std::string Text(const char* name) {
    if (Has(name)) return environment_(name);
    if (status_.ok()) {
      status_ = absl::InvalidArgumentError(
          absl::StrCat("environment: ", name, ": must be set beside the others of its kind"));
    }
    return "";
  }

  const absl::Status& status() const { return status_; }

 private:
  const Environment& environment_;
  absl::Status status_;
};

}  // namespace

absl::StatusOr<ProcessPlace> FindProcessPlace(const Environment& environment) {
  Reader reader(environment);
  ProcessPlace place;
  if (reader.Has("OMPI_COMM_WORLD_SIZE")) {
    place.origin = Origin::kMpi;
    place.size = reader.Number("OMPI_COMM_WORLD_SIZE", 1, kMaxRanks);
    place.rank = reader.Number("OMPI_COMM_WORLD_RANK", 0, std::max(place.size, 1) - 1);
    place.num_ranks_on_host =
        reader.Number("OMPI_COMM_WORLD_LOCAL_SIZE", 1, std::max(place.size, 1), place.size);
  } else if (reader.Has("RANK") || reader.Has("WORLD_SIZE")) {
    place.origin = Origin::kRendezvous;
    place.size = reader.Number("WORLD_SIZE", 1, kMaxRanks);
    place.rank = reader.Number("RANK", 0, std::max(place.size, 1) - 1);
    place.num_ranks_on_host =
        reader.Number("LOCAL_WORLD_SIZE", 1, std::max(place.size, 1), place.size);
    place.master_address = reader.Text("MASTER_ADDR");
    place.master_port = reader.Number("MASTER_PORT", 1, kMaxPort - 1);
    // torchrun says so when it listens on MASTER_PORT itself.
    if (reader.Has("TORCHELASTIC_USE_AGENT_STORE") &&
        reader.Text("TORCHELASTIC_USE_AGENT_STORE") == "True") {
      ++place.master_port;
    }
  }
  if (!reader.status().ok()) return reader.status();
  return place;
}

}  // namespace nsa::tools
