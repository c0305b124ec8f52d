#include "comm/conformance/launch.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <thread>

#include "absl/strings/str_cat.h"
#include "comm/wire.h"

namespace nsa::comm::conformance {
namespace {

// Where a child finds its ends of the pipes; the same numbers in every child.
constexpr int kNotifyFd = 998;
constexpr int kResultFd = 999;

absl::Status Summary(const std::vector<absl::Status>& ranks) {
  std::string errors;
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    if (!ranks[rank].ok()) {
      absl::StrAppend(&errors, "\n  rank ", rank, ": ", ranks[rank].ToString());
    }
  }
  return errors.empty() ? absl::OkStatus() : absl::InternalError(errors);
}

std::string ReadAll(int fd) {
  std::string bytes;
  char buffer[4096];
  while (true) {
    const ssize_t n = read(fd, buffer, sizeof(buffer));
    if (n <= 0) return bytes;
    bytes.append(buffer, n);
  }
}

[[noreturn]] void RunChild(int rank, const RankFunction& function) {
  const absl::Status status = function(rank);
  WireWriter writer;
  writer.PutInt64(static_cast<int64_t>(status.code()));
  writer.PutString(status.message());
  const std::string& bytes = writer.bytes();
  const ssize_t written = write(kResultFd, bytes.data(), bytes.size());
  // Not exit(): the parent's test framework must not run its ends here.
  _exit(written == static_cast<ssize_t>(bytes.size()) ? 0 : 1);
}

}  // namespace

absl::Status RunOnThreads(int size, const RankFunction& function) {
  std::vector<absl::Status> results(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] { results[rank] = function(rank); });
  }
  for (std::thread& thread : threads) thread.join();
  return Summary(results);
}

Processes::Processes(int size, const RankFunction& function, absl::Duration limit)
    : processes_(size), start_(absl::Now()), deadline_(start_ + limit) {
  for (int rank = 0; rank < size; ++rank) {
    int result[2];
    int notify[2];
    if (pipe2(result, O_CLOEXEC) != 0 || pipe2(notify, O_CLOEXEC) != 0) return;
    const pid_t pid = fork();
    if (pid == 0) {
      // Ends of earlier ranks' pipes are inherited too; they are read ends and do no harm.
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      dup2(result[1], kResultFd);
      dup2(notify[1], kNotifyFd);
      for (int fd : {result[0], result[1], notify[0], notify[1]}) close(fd);
      RunChild(rank, function);
    }
    close(result[1]);
    close(notify[1]);
    processes_[rank].pid = pid;
    processes_[rank].result_fd = result[0];
    processes_[rank].notify_fd = notify[0];
  }
}

Processes::~Processes() {
  for (Process& process : processes_) {
    if (process.pid > 0 && !process.reaped) {
      kill(process.pid, SIGKILL);
      Reap(process);
    }
    close(process.result_fd);
    close(process.notify_fd);
  }
}

void Processes::Signal(int rank, int signal) {
  if (processes_[rank].pid > 0 && !processes_[rank].reaped) kill(processes_[rank].pid, signal);
}

bool Processes::AwaitNotify(int rank, absl::Duration limit) {
  pollfd wait = {processes_[rank].notify_fd, POLLIN, 0};
  if (poll(&wait, 1, static_cast<int>(absl::ToInt64Milliseconds(limit))) != 1) return false;
  char byte;
  return read(processes_[rank].notify_fd, &byte, 1) == 1;
}

void Processes::Reap(Process& process) {
  int status = 0;
  while (waitpid(process.pid, &status, 0) < 0 && errno == EINTR) {
  }
  process.reaped = true;
  process.result.run_time = absl::Now() - start_;
  if (WIFSIGNALED(status)) {
    process.result.signal = WTERMSIG(status);
    process.result.status =
        absl::InternalError(absl::StrCat("killed by signal ", process.result.signal));
    return;
  }
  process.result.exited = true;
  const std::string bytes = ReadAll(process.result_fd);
  WireReader reader(bytes);
  const auto code = static_cast<absl::StatusCode>(reader.GetInt64());
  const std::string message = reader.GetString();
  process.result.status =
      reader.ok() ? absl::Status(code, message)
                  : absl::InternalError(absl::StrCat("exit status ", WEXITSTATUS(status)));
}

bool Processes::TryReap(Process& process) {
  if (process.reaped || process.pid <= 0) return true;
  siginfo_t info = {};
  waitid(P_PID, process.pid, &info, WEXITED | WNOHANG | WNOWAIT);
  if (info.si_pid != process.pid) {
    if (absl::Now() < deadline_) return false;
    kill(process.pid, SIGKILL);
  }
  Reap(process);
  return true;
}

void Processes::Await(int rank) {
  while (!TryReap(processes_[rank])) absl::SleepFor(absl::Milliseconds(1));
}

std::vector<ProcessResult> Processes::Join() {
  std::vector<ProcessResult> results;
  for (size_t rank = 0; rank < processes_.size(); ++rank) {
    Await(static_cast<int>(rank));
    results.push_back(processes_[rank].result);
  }
  return results;
}

void Notify() {
  const char byte = 1;
  if (write(kNotifyFd, &byte, 1) != 1) _exit(1);
}

absl::Status RunOnProcesses(int size, const RankFunction& function, absl::Duration limit) {
  Processes processes(size, function, limit);
  std::vector<absl::Status> statuses;
  for (const ProcessResult& result : processes.Join()) statuses.push_back(result.status);
  return Summary(statuses);
}

int FreePort() {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  int port = 0;
  if (bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0 &&
      getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length) == 0) {
    port = ntohs(address.sin_port);
  }
  close(fd);
  return port;
}

}  // namespace nsa::comm::conformance
