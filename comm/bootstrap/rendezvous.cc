#include "comm/bootstrap/rendezvous.h"

#include <poll.h>

#include <algorithm>
#include <list>
#include <optional>
#include <utility>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "comm/errors.h"
#include "comm/wire.h"

namespace nsa::comm {
namespace {

constexpr size_t kMagicBytes = 8;
constexpr size_t kHeadBytes = kMagicBytes + sizeof(int64_t);
constexpr int64_t kMaxMessageBytes = 1 << 16;
// A server that is not ours need not say anything; ours greets at once.
constexpr absl::Duration kGreetingTime = absl::Seconds(1);
constexpr absl::Duration kConnectTime = absl::Seconds(2);
// A verdict is a few bytes to an idle connection.
constexpr absl::Duration kVerdictTime = absl::Seconds(1);
constexpr absl::Duration kLatecomerTime = absl::Seconds(2);
constexpr absl::Duration kFirstRetry = absl::Milliseconds(5);
constexpr absl::Duration kLastRetry = absl::Milliseconds(100);

// [magic 8][length int64][payload]
std::string Envelope(const WireWriter& payload) {
  WireWriter length;
  length.PutInt64(static_cast<int64_t>(payload.bytes().size()));
  return absl::StrCat(absl::string_view(kRendezvousMagic, kMagicBytes), length.bytes(),
                      payload.bytes());
}

// From the first kHeadBytes of an envelope.
absl::StatusOr<int64_t> PayloadBytes(absl::string_view head) {
  WireReader reader(head.substr(kMagicBytes));
  const int64_t length = reader.GetInt64();
  if (head.substr(0, kMagicBytes) != absl::string_view(kRendezvousMagic, kMagicBytes) ||
      length < 0 || length > kMaxMessageBytes) {
    return absl::NotFoundError("not our protocol");
  }
  return length;
}

absl::StatusOr<std::string> ReceiveEnvelope(const Fd& socket, absl::Time deadline) {
  std::string head;
  if (absl::Status s = ReceiveAll(socket, kHeadBytes, head, deadline); !s.ok()) return s;
  const absl::StatusOr<int64_t> length = PayloadBytes(head);
  if (!length.ok()) return length.status();
  std::string payload;
  if (absl::Status s = ReceiveAll(socket, *length, payload, deadline); !s.ok()) return s;
  return payload;
}

// Greeting and hello. The group comes first in every version, so that strangers are told apart from
// ranks of another build.
struct Introduction {
  std::string group;
  int64_t version = 0;
  int64_t world_size = 0;
  int64_t rank = 0;
  bool ok = false;
};

std::string Introduce(const Meeting& meeting, int rank) {
  WireWriter payload;
  payload.PutString(meeting.group);
  payload.PutInt64(kRendezvousVersion);
  payload.PutInt64(meeting.world_size);
  payload.PutInt64(rank);
  return Envelope(payload);
}

Introduction ReadIntroduction(absl::string_view payload) {
  WireReader reader(payload);
  Introduction introduction;
  introduction.group = reader.GetString();
  introduction.version = reader.GetInt64();
  introduction.world_size = reader.GetInt64();
  introduction.rank = reader.GetInt64();
  introduction.ok = reader.ok();
  return introduction;
}

std::string Verdict(const absl::Status& status) {
  WireWriter payload;
  payload.PutInt64(static_cast<int64_t>(status.code()));
  payload.PutString(status.message());
  return Envelope(payload);
}

// What keeps a newcomer of our group from taking part.
absl::Status CheckNewcomer(const Introduction& hello, const Meeting& meeting,
                           absl::Span<const Fd> joined) {
  if (hello.version != kRendezvousVersion) {
    return absl::FailedPreconditionError(absl::StrCat(
        "rendezvous: rank ", hello.rank, " speaks protocol version ", hello.version,
        ", rank 0 version ", kRendezvousVersion, "; all ranks must run the same build"));
  }
  if (!hello.ok || hello.world_size != meeting.world_size) {
    return absl::InvalidArgumentError(absl::StrCat("world_size (WORLD_SIZE): rank ", hello.rank,
                                                   " says ", hello.world_size, ", rank 0 says ",
                                                   meeting.world_size, "; all ranks must agree"));
  }
  const bool in_range = hello.rank >= 0 && hello.rank < meeting.world_size;
  if (!in_range || hello.rank == 0 || joined[hello.rank].valid()) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank (RANK): two processes of the group say that they are rank ", hello.rank,
                     "; each must have its own"));
  }
  return absl::OkStatus();
}

// The state of rank 0 while it waits.
class Server {
 public:
  explicit Server(const Meeting& meeting) : meeting_(meeting), joined_(meeting.world_size) {}

  absl::StatusOr<std::vector<Fd>> Serve(const Fd& listener) {
    const absl::Status status = WaitForAll(listener);
    const std::string verdict = Verdict(status);
    const absl::Time deadline = absl::Now() + kVerdictTime;
    absl::Status sent;
    for (int rank = 1; rank < meeting_.world_size; ++rank) {
      if (!joined_[rank].valid()) continue;
      if (absl::Status s = SendAll(joined_[rank], verdict, deadline); !s.ok() && sent.ok()) {
        sent = PeerDied(rank, absl::StrCat("during rendezvous: ", s.message()));
      }
    }
    for (const Fd& rejected : rejected_) SendAll(rejected, verdict, deadline).IgnoreError();
    if (!status.ok()) {
      joined_.clear();  // told, and room for others
      TellLatecomers(listener, verdict);
      return status;
    }
    if (!sent.ok()) return sent;
    return std::move(joined_);
  }

 private:
  struct Guest {
    Fd socket;
    std::string received;  // of its hello
  };

  absl::Status WaitForAll(const Fd& listener) {
    while (num_joined_ + 1 < meeting_.world_size) {
      if (absl::Now() >= meeting_.deadline) {
        std::vector<int> missing;
        for (int rank = 1; rank < meeting_.world_size; ++rank) {
          if (!joined_[rank].valid()) missing.push_back(rank);
        }
        return WaitTimedOut("rendezvous", 0, missing, meeting_.timeout);
      }
      std::vector<pollfd> entries = {{listener.get(), POLLIN, 0}};
      for (const Guest& guest : guests_) entries.push_back({guest.socket.get(), POLLIN, 0});
      for (const Fd& rank : joined_) entries.push_back({rank.get(), POLLIN, 0});  // -1 is ignored
      if (poll(entries.data(), entries.size(), PollTimeout(meeting_.deadline)) <= 0) continue;

      size_t entry = 1 + guests_.size();
      const absl::Status heard = HearGuests(entries, [this](const Introduction& hello, Fd guest) {
        return Admit(hello, std::move(guest));
      });
      if (!heard.ok()) return heard;
      for (int rank = 0; rank < meeting_.world_size; ++rank, ++entry) {
        // A rank that has said hello is silent until its verdict.
        if (entries[entry].revents != 0) return PeerDied(rank, "it left during rendezvous");
      }
      if (absl::Status s = Greet(listener); !s.ok()) return s;
    }
    return absl::OkStatus();
  }

  // ResourceExhausted when a connection that waits cannot be taken.
  absl::Status Greet(const Fd& listener) {
    while (true) {
      absl::StatusOr<Fd> guest = Accept(listener);
      if (!guest.ok()) {
        return absl::Status(guest.status().code(),
                            absl::StrCat("rendezvous: rank 0: ", guest.status().message()));
      }
      if (!guest->valid()) return absl::OkStatus();
      if (SendAll(*guest, greeting_, absl::Now() + kVerdictTime).ok()) {
        guests_.push_back({*std::move(guest), ""});
      }
    }
  }

  // After an error, for ranks that are still on their way: else they would look for rank 0 until
  // their deadline and not learn why.
  void TellLatecomers(const Fd& listener, absl::string_view verdict) {
    const absl::Time end = std::min(meeting_.deadline, absl::Now() + kLatecomerTime);
    int left = meeting_.world_size - 1 - num_joined_ - static_cast<int>(rejected_.size());
    while (left > 0 && absl::Now() < end) {
      std::vector<pollfd> entries = {{listener.get(), POLLIN, 0}};
      for (const Guest& guest : guests_) entries.push_back({guest.socket.get(), POLLIN, 0});
      if (poll(entries.data(), entries.size(), PollTimeout(end)) <= 0) continue;
      HearGuests(entries, [&](const Introduction&, Fd guest) {
        SendAll(guest, verdict, end).IgnoreError();
        --left;
        return absl::OkStatus();
      }).IgnoreError();
      Greet(listener).IgnoreError();
    }
  }

  // Takes what guests have sent, whose `entries` of poll(2) stand behind the listener's. Those that
  // have said all of their hello go to `arrive`, strangers go.
  absl::Status HearGuests(
      absl::Span<const pollfd> entries,
      absl::FunctionRef<absl::Status(const Introduction& hello, Fd guest)> arrive) {
    size_t entry = 1;
    for (auto guest = guests_.begin(); guest != guests_.end(); ++entry) {
      if (entries[entry].revents == 0) {
        ++guest;
        continue;
      }
      const absl::StatusOr<std::optional<Introduction>> hello = Hear(*guest);
      if (hello.ok() && !hello->has_value()) {
        ++guest;
        continue;
      }
      Fd socket = std::move(guest->socket);
      guest = guests_.erase(guest);
      if (!hello.ok()) continue;
      if (absl::Status s = arrive(**hello, std::move(socket)); !s.ok()) return s;
    }
    return absl::OkStatus();
  }

  // Takes what a guest has sent: nothing to return before its hello is whole. NotFound: it is a
  // stranger, or gone. Never waits, as a stranger may send a part and no more.
  absl::StatusOr<std::optional<Introduction>> Hear(Guest& guest) const {
    char buffer[4096];
    const ssize_t n = recv(guest.socket.get(), buffer, sizeof(buffer), 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return std::nullopt;
    if (n <= 0) return absl::NotFoundError("the connection was closed");
    guest.received.append(buffer, n);
    const absl::string_view received = guest.received;
    if (received.size() < kHeadBytes) return std::nullopt;
    const absl::StatusOr<int64_t> payload_bytes = PayloadBytes(received);
    if (!payload_bytes.ok()) return payload_bytes.status();
    if (received.size() < kHeadBytes + *payload_bytes) return std::nullopt;
    Introduction hello = ReadIntroduction(received.substr(kHeadBytes, *payload_bytes));
    if (hello.group != meeting_.group) return absl::NotFoundError("of another group");
    return hello;
  }

  // Lets a guest join.
  absl::Status Admit(const Introduction& hello, Fd guest) {
    if (absl::Status s = CheckNewcomer(hello, meeting_, joined_); !s.ok()) {
      rejected_.push_back(std::move(guest));
      return s;
    }
    joined_[hello.rank] = std::move(guest);
    ++num_joined_;
    return absl::OkStatus();
  }

  const Meeting& meeting_;
  const std::string greeting_ = Introduce(meeting_, 0);
  std::list<Guest> guests_;   // greeted, have not answered
  std::vector<Fd> joined_;    // [world size]
  std::vector<Fd> rejected_;  // still to be told why
  int num_joined_ = 0;
};

}  // namespace

absl::StatusOr<std::vector<Fd>> ServeRendezvous(const Fd& listener, const Meeting& meeting) {
  return Server(meeting).Serve(listener);
}

absl::StatusOr<Fd> TryJoin(const SocketAddress& endpoint, int rank, const Meeting& meeting) {
  const absl::Time now = absl::Now();
  absl::StatusOr<Fd> socket = Connect(endpoint, std::min(meeting.deadline, now + kConnectTime));
  if (!socket.ok()) return absl::NotFoundError(socket.status().message());
  const absl::StatusOr<std::string> greeting =
      ReceiveEnvelope(*socket, std::min(meeting.deadline, absl::Now() + kGreetingTime));
  if (!greeting.ok() || ReadIntroduction(*greeting).group != meeting.group) {
    return absl::NotFoundError(
        absl::StrCat(endpoint.ToString(), " is not the rank 0 of this group"));
  }
  if (absl::Status s = SendAll(*socket, Introduce(meeting, rank), meeting.deadline); !s.ok()) {
    return absl::NotFoundError(s.message());
  }
  // Rank 0 has the same deadline, give or take, and knows who is missing: let it speak first.
  const absl::StatusOr<std::string> payload =
      ReceiveEnvelope(*socket, meeting.deadline + kVerdictTime);
  if (absl::IsDeadlineExceeded(payload.status())) {
    return WaitTimedOut("rendezvous", rank, {0}, meeting.timeout);
  }
  if (!payload.ok()) {
    return PeerDied(0, absl::StrCat("during rendezvous: ", payload.status().message()));
  }
  WireReader reader(*payload);
  const auto code = static_cast<absl::StatusCode>(reader.GetInt64());
  const std::string message = reader.GetString();
  if (!reader.ok()) return absl::InternalError("rendezvous: rank 0 sent no verdict");
  if (code != absl::StatusCode::kOk) return absl::Status(code, message);
  return socket;
}

absl::StatusOr<Fd> JoinRendezvous(absl::Span<const SocketAddress> endpoints, int rank,
                                  const Meeting& meeting) {
  absl::Duration pause = kFirstRetry;
  std::string last;
  while (true) {
    for (const SocketAddress& endpoint : endpoints) {
      absl::StatusOr<Fd> socket = TryJoin(endpoint, rank, meeting);
      if (socket.ok() || !absl::IsNotFound(socket.status())) return socket;
      // The first attempt always counts, later ones only if they had any time.
      if (last.empty() || absl::Now() < meeting.deadline) {
        last = std::string(socket.status().message());
      }
    }
    if (absl::Now() >= meeting.deadline) {
      const absl::Status late = WaitTimedOut("rendezvous", rank, {0}, meeting.timeout);
      return absl::DeadlineExceededError(
          absl::StrCat(late.message(), " at ", endpoints.front().ToString(), " to ",
                       endpoints.back().ToString(), "; the last attempt: ", last));
    }
    absl::SleepFor(std::min(pause, meeting.deadline - absl::Now()));
    pause = std::min(pause * 2, kLastRetry);
  }
}

}  // namespace nsa::comm
