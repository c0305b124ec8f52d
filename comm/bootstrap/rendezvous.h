// The first meeting of the ranks of a group: rank 0 listens, the others connect to it.
//
// The listener speaks first, so that a rank which reaches somebody else's server sends it nothing:
//   rank 0 -> rank r   greeting: magic, version, group name, world size
//   rank r -> rank 0   hello:    the same, and its rank
//   rank 0 -> rank r   verdict:  OK once all have come, or the error that all of them get
// A connection with another magic or another group name is not for us; with ours, a difference in
// version or world size is an error, as is a rank that comes twice.
#ifndef COMM_BOOTSTRAP_RENDEZVOUS_H_
#define COMM_BOOTSTRAP_RENDEZVOUS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "comm/bootstrap/socket.h"

namespace nsa::comm {

inline constexpr char kRendezvousMagic[] = "NSA-comm";  // 8 bytes go over the wire
// Of this handshake and of everything that ranks send each other afterwards.
inline constexpr int64_t kRendezvousVersion = 1;

struct Meeting {
  std::string group;  // ranks meet only ranks of the same group name
  int world_size;
  absl::Duration timeout;  // as errors name it
  absl::Time deadline;
};

// Rank 0: waits for all others at `listener`. Element r is the connection to rank r, 0 invalid.
absl::StatusOr<std::vector<Fd>> ServeRendezvous(const Fd& listener, const Meeting& meeting);

// Others: tries `endpoints` in turn, again and again, until one is the rank 0 of the group.
absl::StatusOr<Fd> JoinRendezvous(absl::Span<const SocketAddress> endpoints, int rank,
                                  const Meeting& meeting);

// One attempt of the above. NotFound when `endpoint` is not, or not yet, ours.
absl::StatusOr<Fd> TryJoin(const SocketAddress& endpoint, int rank, const Meeting& meeting);

}  // namespace nsa::comm

#endif  // COMM_BOOTSTRAP_RENDEZVOUS_H_
