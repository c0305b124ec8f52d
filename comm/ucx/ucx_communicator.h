// A communicator over UCX: shared memory and TCP with Debian's UCX, other networks with builds of
// UCX that have them. For host memory, or for that of a device.
#ifndef COMM_UCX_UCX_COMMUNICATOR_H_
#define COMM_UCX_UCX_COMMUNICATOR_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "comm/bootstrap/bootstrap.h"
#include "comm/communicator.h"
#include "comm/device_memory.h"

namespace nsa::comm {

struct UcxOptions {
  absl::Duration timeout = absl::Seconds(60);          // of every wait
  absl::Duration connect_timeout = absl::Seconds(60);  // of those in Create

  // Which transports and devices to use, in UCX's words. Empty: those of UCX_TLS, or shared memory
  // and TCP; those of UCX_NET_DEVICES, or all. Ranks must name the same transports and may name
  // different devices: "eth0,lo".
  std::string tls;
  std::string net_devices;

  // Where buffers, windows and lists lie, such as CreateCudaMemory of comm/cuda_memory.h; null: in
  // host memory. A call waits for what its stream, one of the device's, holds, and has finished
  // when it returns. Bytes go through the host (comm/staged_communicator.h), but for a Gather from
  // windows of CUDA devices with a UCX that has transports for these.
  std::shared_ptr<DeviceMemory> device_memory;

  // Reads of one Gather under way at a time. Over TCP a single one is bound by latency.
  int max_reads_in_flight = 128;
  // How long a waiting call polls before it sleeps. More lowers latency where a rank has cores to
  // itself.
  absl::Duration poll_time = absl::Microseconds(20);

  // UCX reports links that break, which this library expects and turns into errors, on stderr.
  // Unless its log level was set (UCX_LOG_LEVEL), this lowers it to fatal, for the whole process.
  bool quiet = true;
};

class UcxCommunicator {
 public:
  // Collective. Connects all ranks to each other.
  //
  // The communicator's end is bounded in time: in good order it waits, up to `timeout`, for peers
  // that may still read its windows, and some seconds at most for those that do not answer. A
  // broken one ends at once.
  static absl::StatusOr<std::unique_ptr<Communicator>> Create(std::unique_ptr<Bootstrap> bootstrap,
                                                              const UcxOptions& options = {});
};

}  // namespace nsa::comm

#endif  // COMM_UCX_UCX_COMMUNICATOR_H_
