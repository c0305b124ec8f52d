// The wording of the errors that communicator.h promises, so that every backend says the same.
#ifndef COMM_ERRORS_H_
#define COMM_ERRORS_H_

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace nsa::comm {

// "rank 1", "ranks 1 and 2", "ranks 1, 2 and 5".
std::string RankNames(absl::Span<const int> ranks);

// DeadlineExceeded: `waiting` waited in `call` for `awaited`.
absl::Status WaitTimedOut(absl::string_view call, int waiting, absl::Span<const int> awaited,
                          absl::Duration timeout);

// Unavailable: the process of `rank` is gone.
absl::Status PeerDied(int rank, absl::string_view how);

// Unavailable: the link to `rank` broke, though nobody reported its death.
absl::Status LinkBroke(int rank, absl::string_view how);

// Unavailable: `waiting` needs `left` in `call`, which destroyed its communicator in good order.
absl::Status PeerLeft(absl::string_view call, int waiting, int left);

// `rank` gave up after `why` and destroyed its communicator. DeadlineExceeded when a deadline made
// it give up, so that a stopped rank looks the same to those that waited longest and those that
// learn it from them; else Unavailable.
absl::Status PeerFailed(int rank, const absl::Status& why);

// Aborted: `rank` called Abort(reason).
absl::Status AbortedBy(int rank, absl::string_view reason);

// InvalidArgument unless `timeout` is positive and finite.
absl::Status CheckTimeout(absl::Duration timeout);

}  // namespace nsa::comm

#endif  // COMM_ERRORS_H_
