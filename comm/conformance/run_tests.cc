#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "comm/conformance/conformance.h"
#include "comm/conformance/launch.h"

namespace nsa::comm::conformance {

absl::Status RunTestsOnProcesses(const std::vector<Test>& tests, int size,
                                 const CreateGroup& create) {
  const auto run = [&](int rank) {
    std::string failures;
    for (const Test& test : tests) {
      if (test.min_size > size) continue;
      const absl::Time start = absl::Now();
      int created = 0;
      const auto create_next = [&](absl::Duration timeout) {
        return create(absl::StrCat(test.name, ":", ++created), rank, timeout);
      };
      const absl::Status status = test.run({rank, size, create_next});
      if (!status.ok()) absl::StrAppend(&failures, "\n", test.name, ": ", status.ToString());
      std::fprintf(stderr, "  rank %d %s: %s (%s)\n", rank, test.name.c_str(),
                   status.ok() ? "ok" : "FAILED",
                   absl::FormatDuration(absl::Now() - start).c_str());
    }
    return failures.empty() ? absl::OkStatus() : absl::InternalError(failures);
  };
  return RunOnProcesses(size, run, absl::Seconds(300));
}

}  // namespace nsa::comm::conformance
