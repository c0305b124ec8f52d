#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "comm/conformance/check.h"
#include "comm/conformance/conformance.h"
#include "comm/conformance/waits.h"

namespace nsa::comm::conformance {
namespace {

constexpr absl::Duration kTimeout = absl::Seconds(30);
// Waits that an error ends, end long before their deadline.
constexpr absl::Duration kSoon = absl::Seconds(10);

// After the first error every call returns it.
absl::Status CheckSticky(Communicator& comm, const absl::Status& first) {
  NSA_COMM_CHECK(comm.HealthCheck() == first, comm.HealthCheck().ToString());
  NSA_COMM_CHECK(comm.Barrier() == first, "Barrier");
  NSA_COMM_CHECK(comm.AllGather(nullptr, {}, nullptr) == first, "AllGather");
  NSA_COMM_CHECK(comm.Exchange({}, {}, nullptr) == first, "Exchange");
  NSA_COMM_CHECK(comm.CreateWindow(8).status() == first, "CreateWindow");
  NSA_COMM_CHECK(comm.HostAllGather("x").status() == first, "HostAllGather");
  return absl::OkStatus();
}

// The last rank aborts while all others are in `wait`.
absl::Status AbortDuring(const Context& context, const Wait& wait) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  const int last = context.size - 1;
  auto prepared = wait.prepare(**comm);
  NSA_COMM_OK(prepared.status());
  // On a slow machine the abort comes while a rank is still in the barrier, which is as good.
  absl::Status status = (*comm)->Barrier();
  const absl::Time start = absl::Now();
  if (context.rank == last) {
    absl::SleepFor(absl::Milliseconds(30));
    (*comm)->Abort("loss is NaN");
    status = (*comm)->HealthCheck();
  } else if (status.ok()) {
    status = (*prepared)->Run(last);
  }
  NSA_COMM_FAILS(status, absl::StatusCode::kAborted, absl::StrCat("rank ", last, " aborted"));
  NSA_COMM_FAILS(status, absl::StatusCode::kAborted, "loss is NaN");
  NSA_COMM_CHECK(absl::Now() - start < kSoon, "Abort must end the wait");
  return CheckSticky(**comm, status);
}

absl::Status AbortFromAnotherThread(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  const absl::Time start = absl::Now();
  std::thread aborter;
  if (context.rank == 0) {
    aborter = std::thread([&] {
      absl::SleepFor(absl::Milliseconds(50));
      (*comm)->Abort("from outside");
    });
  }
  // The last rank never comes; alone, a rank has nobody to wait for.
  absl::Status status;
  if (context.rank == context.size - 1) {
    while ((*comm)->HealthCheck().ok() && absl::Now() - start < kSoon) {
      absl::SleepFor(absl::Milliseconds(1));
    }
    status = (*comm)->HealthCheck();
  } else {
    status = (*comm)->Barrier();
  }
  if (aborter.joinable()) aborter.join();
  NSA_COMM_FAILS(status, absl::StatusCode::kAborted, "rank 0 aborted: from outside");
  NSA_COMM_CHECK(absl::Now() - start < kSoon, "Abort must end the wait");
  return CheckSticky(**comm, status);
}

absl::Status FirstAbortWins(const Context& context) {
  auto comm = context.create(kTimeout);
  // A rank may abort while others are still being created.
  if (!comm.ok()) return HasError(comm.status(), absl::StatusCode::kAborted, "reason of ");
  (*comm)->Abort(absl::StrCat("reason of ", context.rank));
  const absl::Status first = (*comm)->HealthCheck();
  NSA_COMM_FAILS(first, absl::StatusCode::kAborted, "aborted: reason of ");
  (*comm)->Abort("again");
  return CheckSticky(**comm, first);
}

// The last rank destroys its communicator while all others are in `wait`.
absl::Status LeaveDuring(const Context& context, const Wait& wait) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  const int last = context.size - 1;
  auto prepared = wait.prepare(**comm);
  NSA_COMM_OK(prepared.status());
  // On a slow machine the news comes while a rank is still in the barrier, which is as good.
  absl::Status status = (*comm)->Barrier();
  if (context.rank == last) {
    absl::SleepFor(absl::Milliseconds(20));
    prepared->reset();
    comm->reset();
    return status;
  }
  const absl::Time start = absl::Now();
  if (status.ok()) status = (*prepared)->Run(last);
  NSA_COMM_FAILS(status, absl::StatusCode::kUnavailable, absl::StrCat("rank ", last));
  NSA_COMM_CHECK(absl::Now() - start < kSoon, "leaving must end the wait");
  return CheckSticky(**comm, status);
}

// The last rank does not come into `wait` in time, but lives.
absl::Status LateIn(const Context& context, const Wait& wait) {
  constexpr absl::Duration kShort = absl::Milliseconds(600);
  auto comm = context.create(kShort);
  NSA_COMM_OK(comm.status());
  const int last = context.size - 1;
  auto prepared = wait.prepare(**comm);
  NSA_COMM_OK(prepared.status());
  NSA_COMM_OK((*comm)->Barrier());
  const absl::Time start = absl::Now();
  if (context.rank == last) {
    // Until the others have given up and left.
    while ((*comm)->HealthCheck().ok() && absl::Now() - start < kSoon) {
      absl::SleepFor(absl::Milliseconds(5));
    }
    return absl::OkStatus();
  }
  const absl::Status status = (*prepared)->Run(last);
  const absl::Duration waited = absl::Now() - start;
  // A rank that was slow to come hears from another that has already given up.
  NSA_COMM_FAILS(status, absl::StatusCode::kDeadlineExceeded, absl::StrCat(wait.call, ": rank "));
  NSA_COMM_FAILS(status, absl::StatusCode::kDeadlineExceeded,
                 absl::StrCat(" waited ", absl::FormatDuration(kShort), " for rank ", last));
  NSA_COMM_CHECK(waited < kShort + kSoon, absl::FormatDuration(waited));
  NSA_COMM_OK(CheckSticky(**comm, status));
  return absl::OkStatus();
}

absl::Status DifferentCalls(const Context& context) {
  auto comm = context.create(kTimeout);
  if (!comm.ok()) {
    return HasError(comm.status(), comm.status().code(), "every rank must make the same calls");
  }
  // Whoever notices first breaks and leaves, the others may learn it from its last words.
  const absl::Status status =
      context.rank == 0 ? (*comm)->Barrier() : (*comm)->HostAllGather("x").status();
  NSA_COMM_CHECK(!status.ok(), "the calls differ");
  NSA_COMM_FAILS(status, status.code(), "every rank must make the same calls");
  return absl::OkStatus();
}

absl::Status BadTimeout(const Context& context) {
  for (const absl::Duration timeout :
       {absl::ZeroDuration(), -absl::Seconds(1), absl::InfiniteDuration()}) {
    NSA_COMM_FAILS(context.create(timeout).status(), absl::StatusCode::kInvalidArgument, "timeout");
  }
  return absl::OkStatus();
}

}  // namespace

std::vector<Test> ErrorTests() {
  std::vector<Test> tests = {
      {"AbortFromAnotherThread", 1, AbortFromAnotherThread},
      {"FirstAbortWins", 1, FirstAbortWins},
      {"DifferentCalls", 2, DifferentCalls},
      {"BadTimeout", 1, BadTimeout},
  };
  for (const Wait& wait : Waits()) {
    tests.push_back({absl::StrCat("AbortDuring", wait.name), 2,
                     [wait](const Context& context) { return AbortDuring(context, wait); }});
    if (!wait.satisfied_by_leaving) {
      tests.push_back({absl::StrCat("LeaveDuring", wait.name), 2,
                       [wait](const Context& context) { return LeaveDuring(context, wait); }});
    }
    tests.push_back({absl::StrCat("LateIn", wait.name), 2,
                     [wait](const Context& context) { return LateIn(context, wait); }});
  }
  return tests;
}

}  // namespace nsa::comm::conformance
