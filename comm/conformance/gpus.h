// The GPUs of this host.
#ifndef COMM_CONFORMANCE_GPUS_H_
#define COMM_CONFORMANCE_GPUS_H_

namespace nsa::comm::conformance {

// Asked in a process of its own: CUDA does not survive a fork.
int CountGpus();

}  // namespace nsa::comm::conformance

#endif  // COMM_CONFORMANCE_GPUS_H_
