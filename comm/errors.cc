#include "comm/errors.h"

#include "absl/strings/str_cat.h"

namespace nsa::comm {

std::string RankNames(absl::Span<const int> ranks) {
  if (ranks.empty()) return "no rank";
  if (ranks.size() == 1) return absl::StrCat("rank ", ranks[0]);
  std::string names = "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (i > 0) absl::StrAppend(&names, i + 1 == ranks.size() ? " and " : ", ");
    absl::StrAppend(&names, ranks[i]);
  }
  return names;
}

absl::Status WaitTimedOut(absl::string_view call, int waiting, absl::Span<const int> awaited,
                          absl::Duration timeout) {
  return absl::DeadlineExceededError(absl::StrCat(call, ": rank ", waiting, " waited ",
                                                  absl::FormatDuration(timeout), " for ",
                                                  RankNames(awaited)));
}

absl::Status PeerDied(int rank, absl::string_view how) {
  return absl::UnavailableError(absl::StrCat("rank ", rank, " died: ", how));
}

absl::Status LinkBroke(int rank, absl::string_view how) {
  return absl::UnavailableError(absl::StrCat("the link to rank ", rank, " broke: ", how));
}

absl::Status PeerLeft(absl::string_view call, int waiting, int left) {
  return absl::UnavailableError(absl::StrCat(call, ": rank ", waiting, " waits for rank ", left,
                                             ", which destroyed its communicator"));
}

absl::Status PeerFailed(int rank, const absl::Status& why) {
  const absl::StatusCode code = absl::IsDeadlineExceeded(why) ? absl::StatusCode::kDeadlineExceeded
                                                              : absl::StatusCode::kUnavailable;
  return absl::Status(code,
                      absl::StrCat("rank ", rank, " left the group after: ",
                                   absl::StatusCodeToString(why.code()), ": ", why.message()));
}

absl::Status AbortedBy(int rank, absl::string_view reason) {
  return absl::AbortedError(absl::StrCat("rank ", rank, " aborted: ", reason));
}

absl::Status CheckTimeout(absl::Duration timeout) {
  if (timeout > absl::ZeroDuration() && timeout < absl::InfiniteDuration()) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("timeout: ", absl::FormatDuration(timeout), "; must be positive and finite"));
}

}  // namespace nsa::comm
