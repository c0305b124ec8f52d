#include "tools/launch/environment.h"

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace nsa::tools {
namespace {

constexpr int kMaxRanks = 1 << 20;

bool Has(const Environment& environment, const char* name) {
  const char* value = environment(name);
  return value != nullptr && *value != '\0';
}

// A number in [1, high].
absl::StatusOr<int> Count(const Environment& environment, const char* name, int high) {
  if (!Has(environment, name)) {
    return absl::InvalidArgumentError(absl::StrCat("environment: ", name, ": must be set"));
  }
  int count = 0;
  if (!absl::SimpleAtoi(environment(name), &count) || count < 1 || count > high) {
    return absl::InvalidArgumentError(absl::StrCat("environment: ", name, " = \"",
                                                   environment(name),
                                                   "\": must be a number in [1, ", high, "]"));
  }
  return count;
}

// `local_size` is optional: without it all ranks are taken to be on one host.
absl::StatusOr<ProcessPlace> Read(const Environment& environment, Origin origin, const char* size,
                                  const char* local_size) {
  absl::StatusOr<int> ranks = Count(environment, size, kMaxRanks);
  if (!ranks.ok()) return ranks.status();
  ProcessPlace place = {.origin = origin, .size = *ranks, .num_ranks_on_host = *ranks};
  if (Has(environment, local_size)) {
    absl::StatusOr<int> local = Count(environment, local_size, *ranks);
    if (!local.ok()) return local.status();
    place.num_ranks_on_host = *local;
  }
  return place;
}

}  // namespace

absl::StatusOr<ProcessPlace> FindProcessPlace(const Environment& environment) {
  if (Has(environment, "OMPI_COMM_WORLD_SIZE")) {
    return Read(environment, Origin::kMpi, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE");
  }
  if (Has(environment, "RANK") || Has(environment, "WORLD_SIZE")) {
    return Read(environment, Origin::kRendezvous, "WORLD_SIZE", "LOCAL_WORLD_SIZE");
  }
  return ProcessPlace{};
}

}  // namespace nsa::tools
