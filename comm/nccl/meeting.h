// The kernel in which the streams of all ranks meet before a collective. It also moves what is
// small, through memory that peers load: NCCL takes longer to launch than the links take for it.
#ifndef COMM_NCCL_MEETING_H_
#define COMM_NCCL_MEETING_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "comm/nccl/signals.h"

namespace nsa::comm::nccl {

// What a rank may stage in one meeting.
inline constexpr int64_t kStagingBytes = 16 << 20;
inline constexpr int64_t kStagingBegin = (sizeof(MeetingSignals) + 255) / 256 * 256;
inline constexpr int64_t kMeetingBytes = kStagingBegin + 2 * kStagingBytes;  // of a rank
// Where a piece may begin in the staging area.
inline constexpr int64_t kStagingAlignment = 16;
// As many as fit into the parameters of a kernel.
inline constexpr int kMaxStagedPieces = 1000;

// Contiguous bytes and their place in the staging area of the rank that has them.
struct StagedPiece {
  char* data;
  int64_t staging_offset;  // divisible by kStagingAlignment
  int64_t num_bytes;
  int32_t peer;  // whose staging area
};

struct StagedCopies {
  std::vector<StagedPiece> in;   // data of this rank, to its own staging area
  std::vector<StagedPiece> out;  // from the staging areas of others
};

// Loads the kernels of this file onto the current device, as LoadWindowKernels does.
cudaError_t LoadMeetingKernels();

// Tells all ranks that this rank's stream has come to its next meeting and waits until all have.
// Copies `in` before and `out` after that; at most kMaxStagedPieces together. `memory` begins, at
// signals_offset, with kMeetingBytes. Meetings of a rank must follow one another.
cudaError_t LaunchMeeting(const PeerMemory& memory, WaitingCall call, const StagedCopies& copies,
                          cudaStream_t stream);

}  // namespace nsa::comm::nccl

#endif  // COMM_NCCL_MEETING_H_
