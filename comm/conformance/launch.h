// Running a function as the ranks of a group: on threads, or on processes.
#ifndef COMM_CONFORMANCE_LAUNCH_H_
#define COMM_CONFORMANCE_LAUNCH_H_

#include <sys/types.h>

#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace nsa::comm::conformance {

using RankFunction = std::function<absl::Status(int rank)>;

// OK when every rank returned OK, else their errors.
absl::Status RunOnThreads(int size, const RankFunction& function);

// What became of one process.
struct ProcessResult {
  bool exited = false;  // returned by itself, as opposed to being killed
  int signal = 0;       // that killed it
  absl::Status status;  // what its function returned, when it exited
  absl::Duration run_time;
};

// The ranks as forked processes. The caller must have no other threads and must not have used UCX
// or MPI, which do not survive a fork.
class Processes {
 public:
  // A process that has not returned after `limit` is killed.
  Processes(int size, const RankFunction& function, absl::Duration limit = absl::Seconds(60));
  // Kills and reaps what is left.
  ~Processes();
  Processes(const Processes&) = delete;
  Processes& operator=(const Processes&) = delete;

  void Signal(int rank, int signal);
  // Blocks until process `rank` writes its next byte with Notify.
  bool AwaitNotify(int rank, absl::Duration limit);
  // Blocks until process `rank` has ended, within the limit.
  void Await(int rank);
  // Reaps all; element r is the result of rank r.
  std::vector<ProcessResult> Join();

 private:
  struct Process {
    pid_t pid = -1;
    int result_fd = -1;  // read end; carries the status
    int notify_fd = -1;  // read end
    bool reaped = false;
    ProcessResult result;
  };
  // False when the process runs on and has time left.
  bool TryReap(Process& process);
  void Reap(Process& process);

  std::vector<Process> processes_;
  absl::Time start_;
  absl::Time deadline_;
};

// In a process of Processes: lets AwaitNotify of the parent return.
void Notify();

// Runs on processes and sums up like RunOnThreads.
absl::Status RunOnProcesses(int size, const RankFunction& function,
                            absl::Duration limit = absl::Seconds(60));

// A TCP port of this host that was free a moment ago.
int FreePort();

}  // namespace nsa::comm::conformance

#endif  // COMM_CONFORMANCE_LAUNCH_H_
