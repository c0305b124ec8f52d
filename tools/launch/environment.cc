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

// What one launcher calls them.
struct Names {
  const char* size;
  const char* rank;
  const char* local_size;
  const char* local_rank;
};
constexpr Names kMpiNames = {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK",
                             "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"};
constexpr Names kTorchrunNames = {"WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"};

absl::StatusOr<int> Number(const Environment& environment, const char* name, int low, int high) {
  if (!Has(environment, name)) {
    return absl::InvalidArgumentError(absl::StrCat("environment: ", name, ": must be set"));
  }
  int number = 0;
  if (!absl::SimpleAtoi(environment(name), &number) || number < low || number > high) {
    return absl::InvalidArgumentError(absl::StrCat("environment: ", name, " = \"",
                                                   environment(name), "\": must be a number in [",
                                                   low, ", ", high, "]"));
  }
  return number;
}

absl::StatusOr<ProcessPlace> Read(const Environment& environment, Origin origin,
                                  const Names& names) {
  const absl::StatusOr<int> size = Number(environment, names.size, 1, kMaxRanks);
  if (!size.ok()) return size.status();
  const absl::StatusOr<int> rank = Number(environment, names.rank, 0, *size - 1);
  if (!rank.ok()) return rank.status();
  const absl::StatusOr<int> local_size =
      Has(environment, names.local_size) ? Number(environment, names.local_size, 1, *size) : size;
  if (!local_size.ok()) return local_size.status();
  const absl::StatusOr<int> local_rank =
      Has(environment, names.local_rank) ? Number(environment, names.local_rank, 0, *local_size - 1)
                                         : *rank % *local_size;
  if (!local_rank.ok()) return local_rank.status();
  return ProcessPlace{.origin = origin,
                      .size = *size,
                      .rank = *rank,
                      .num_ranks_on_host = *local_size,
                      .local_rank = *local_rank};
}

}  // namespace

absl::StatusOr<ProcessPlace> FindProcessPlace(const Environment& environment) {
  if (Has(environment, kMpiNames.size)) {
    return Read(environment, Origin::kMpi, kMpiNames);
  }
  if (Has(environment, kTorchrunNames.rank) || Has(environment, kTorchrunNames.size)) {
    return Read(environment, Origin::kRendezvous, kTorchrunNames);
  }
  return ProcessPlace{};
}

}  // namespace nsa::tools
