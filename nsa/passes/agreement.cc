#include "nsa/passes/agreement.h"

#include <algorithm>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "nsa/passes/agreement.pb.h"

namespace nsa {
namespace {

constexpr size_t kMostAtOnce = 4096;
// How a message begins.
constexpr absl::string_view kWhole = "whole ", kHash = "hash ";

// A value that some rank holds.
struct Held {
  int rank;
  std::string value;
};

// Compares the fields of all ranks by place; `all` is not empty.
absl::Status CompareFields(const std::vector<AgreementProto>& all) {
  int num_fields = 0;
  for (const AgreementProto& one : all) num_fields = std::max(num_fields, one.fields_size());
  for (int i = 0; i < num_fields; ++i) {
    std::string name;
    std::optional<Held> first;
    for (size_t rank = 0; rank < all.size(); ++rank) {
      const bool has = i < all[rank].fields_size();
      if (has && name.empty()) name = all[rank].fields(i).name();
      const bool same_name = has && all[rank].fields(i).name() == name;
      const std::string value = same_name ? all[rank].fields(i).value() : "no such entry";
      if (value.empty()) continue;
      if (!first) {
        first = {static_cast<int>(rank), value};
      } else if (value != first->value) {
        return absl::InvalidArgumentError(
            absl::StrCat(name, ": rank ", rank, " has ", value, ", rank ", first->rank, " has ",
                         first->value, "; must be the same on all ranks"));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status Agree(comm::Communicator& communicator, const absl::Status& mine,
                   const FieldList& fields) {
  AgreementProto message;
  message.set_status_code(static_cast<int>(mine.code()));
  message.set_status_message(std::string(mine.message()));
  for (const auto& [name, value] : fields) {
    AgreementProto::Field* field = message.add_fields();
    field->set_name(name);
    field->set_value(value);
  }
  // Of what is long, such as the chunks of a thousand documents, first how long and a hash.
  const std::string whole = message.SerializeAsString();
  const std::string brief =
      whole.size() <= kMostAtOnce
          ? absl::StrCat(kWhole, whole)
          : absl::StrCat(kHash, whole.size(), " ", std::hash<std::string>()(whole));
  absl::StatusOr<std::vector<std::string>> gathered = communicator.HostAllGather(brief);
  if (!gathered.ok()) return gathered.status();
  if (mine.ok() && std::all_of(gathered->begin(), gathered->end(),
                               [&](const std::string& other) { return other == brief; })) {
    return absl::OkStatus();
  }
  if (std::any_of(gathered->begin(), gathered->end(),
                  [](const std::string& other) { return absl::StartsWith(other, kHash); })) {
    gathered = communicator.HostAllGather(absl::StrCat(kWhole, whole));
    if (!gathered.ok()) return gathered.status();
  }

  std::vector<AgreementProto> all(gathered->size());
  for (size_t rank = 0; rank < all.size(); ++rank) {
    if (!all[rank].ParseFromString((*gathered)[rank].substr(kWhole.size()))) {
      return absl::InternalError(absl::StrCat("rank ", rank, " sent an unreadable agreement"));
    }
    if (all[rank].status_code() != 0) {
      return absl::Status(static_cast<absl::StatusCode>(all[rank].status_code()),
                          absl::StrCat("rank ", rank, ": ", all[rank].status_message()));
    }
  }
  return CompareFields(all);
}

absl::Status AbortOnError(comm::Communicator& communicator, absl::Status status) {
  if (!status.ok() && communicator.HealthCheck().ok()) communicator.Abort(status.ToString());
  return status;
}

}  // namespace nsa
