// Failing a conformance test: its functions run on ranks that may be threads or processes, so they
// return a Status instead of talking to a test framework.
#ifndef COMM_CONFORMANCE_CHECK_H_
#define COMM_CONFORMANCE_CHECK_H_

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace nsa::comm::conformance {

inline absl::Status Failure(absl::string_view file, int line, absl::string_view what) {
  return absl::InternalError(absl::StrCat(file, ":", line, ": ", what));
}

// OK if `status` has `code` and its message holds `part`.
inline absl::Status HasError(const absl::Status& status, absl::StatusCode code,
                             absl::string_view part) {
  if (status.code() == code && absl::StrContains(status.message(), part)) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("expected ", absl::StatusCodeToString(code), " with '",
                                          part, "', got ", status.ToString()));
}

// Returns from the enclosing function when the condition is false.
#define NSA_COMM_CHECK(condition, detail)                                               \
  do {                                                                                  \
    if (!(condition)) {                                                                 \
      return ::nsa::comm::conformance::Failure(__FILE__, __LINE__,                      \
                                               absl::StrCat(#condition, ": ", detail)); \
    }                                                                                   \
  } while (false)

// Returns from the enclosing function when the expression is an error.
#define NSA_COMM_OK(expression)                                                             \
  do {                                                                                      \
    if (absl::Status nsa_comm_status = (expression); !nsa_comm_status.ok()) {               \
      return ::nsa::comm::conformance::Failure(                                             \
          __FILE__, __LINE__, absl::StrCat(#expression, ": ", nsa_comm_status.ToString())); \
    }                                                                                       \
  } while (false)

// Returns from the enclosing function unless the expression fails with that code and text.
#define NSA_COMM_FAILS(expression, code, part) \
  NSA_COMM_OK(::nsa::comm::conformance::HasError((expression), (code), (part)))

}  // namespace nsa::comm::conformance

#endif  // COMM_CONFORMANCE_CHECK_H_
