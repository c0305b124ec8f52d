// Agreement of all ranks on something that only some of them may have got wrong, so that every rank
// returns the error and none waits for a peer that has already given up.
#ifndef NSA_PASSES_AGREEMENT_H_
#define NSA_PASSES_AGREEMENT_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "comm/communicator.h"

namespace nsa {

// What must be equal on all ranks, as (name, value) in a fixed order. An empty value has no opinion
// and agrees with any.
using FieldList = std::vector<std::pair<std::string, std::string>>;

// Collective. OK when `mine` is OK and `fields` are equal on every rank. Else, on every rank alike,
// the code and message of the lowest rank that is not OK, prefixed by "rank R: "; or
// InvalidArgument naming the first field that differs, both values and both ranks.
absl::Status Agree(comm::Communicator& communicator, const absl::Status& mine,
                   const FieldList& fields);

// Of a collective call that this rank alone may have failed in, between collectives: aborts, so
// that the others do not wait for it. When the communicator is what failed, they learn of it by
// themselves. Returns `status`.
absl::Status AbortOnError(comm::Communicator& communicator, absl::Status status);

}  // namespace nsa

#endif  // NSA_PASSES_AGREEMENT_H_
