// Computing on local memory: one method per stage of the attention, one implementation per device.
//
// A method enqueues its work on `stream` and returns OK when the work is enqueued; host
// implementations ignore `stream` and have finished when they return. Pointers in a Params struct
// refer to the implementation's memory (see Allocate) unless marked "host". Params are trusted: the
// engine validates what a user passes. No result depends on how queries are grouped into calls or
// threads: each query's sums run over blocks in global order in tiles of fixed size.
#ifndef KERNELS_KERNELS_H_
#define KERNELS_KERNELS_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backward_params.h"
#include "kernels/decode_params.h"
#include "kernels/params.h"
#include "kernels/types.h"

namespace nsa::kernels {

// Memory that kernels read and write; freed with the object.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual void* data() = 0;
};

// Work in order, beside that of other streams.
class Stream {
 public:
  virtual ~Stream() = default;
  virtual void* get() = 0;  // what the `stream` parameters take
};

// A point in the work of a stream.
class Event {
 public:
  virtual ~Event() = default;
};
enum class EventUse { kOrder, kTime };

class Kernels {
 public:
  virtual ~Kernels() = default;

  // InvalidArgument, naming the field and what is supported, when no kernel can serve `dims`.
  virtual absl::Status Supports(const AttentionDims& dims) const = 0;
  // Size of one (select block, kv head) record of K and V, in bytes; a multiple of 64.
  virtual int64_t RecordBytes(const AttentionDims& dims) const = 0;

  // What the address of every row of every head of activations has to be a multiple of, in bytes.
  virtual int64_t RowAlignment() const = 0;

  // ResourceExhausted, naming bytes asked and free, when memory is out. 256-byte aligned, zeroed.
  virtual absl::StatusOr<std::unique_ptr<Memory>> Allocate(int64_t num_bytes) = 0;
  virtual absl::Status CopyFromHost(void* dst, const void* host_src, int64_t num_bytes,
                                    void* stream) = 0;
  virtual absl::Status CopyToHost(void* host_dst, const void* src, int64_t num_bytes,
                                  void* stream) = 0;
  // Returns when all work enqueued on `stream` is done.
  virtual absl::Status Synchronize(void* stream) = 0;

  virtual absl::StatusOr<std::unique_ptr<Stream>> CreateStream() = 0;
  virtual absl::StatusOr<std::unique_ptr<Event>> CreateEvent(EventUse use) = 0;
  // `event` becomes the point behind everything that was enqueued on `stream`.
  virtual absl::Status Record(Event& event, void* stream) = 0;
  // What is enqueued on `stream` from now on begins after `event` (kOrder), as last recorded. An
  // event that a graph's capture recorded can be waited for in that capture alone.
  virtual absl::Status WaitFor(Event& event, void* stream) = 0;
  // Whether what is enqueued on `stream` becomes part of a graph that is being captured.
  virtual absl::StatusOr<bool> IsCapturing(void* stream) = 0;
  // Of two events (kTime) that have been reached; FailedPrecondition when one has not.
  virtual absl::StatusOr<double> SecondsBetween(Event& begin, Event& end) = 0;
  // A name for profilers to show over what is enqueued until EndRange.
  virtual void BeginRange(const char* /*name*/) {}
  virtual void EndRange() {}

  virtual absl::Status CopyRows(const CopyRowsParams& params, void* stream) = 0;
  virtual absl::Status Compress(const CompressParams& params, void* stream) = 0;
  virtual absl::Status PackBlocks(const PackBlocksParams& params, void* stream) = 0;
  // Of ScoreAndSelectParams::scratch, for every call within `limits`.
  virtual int64_t ScoreScratchBytes(const AttentionDims& dims, const ScoreLimits& limits) const = 0;
  virtual absl::Status ScoreAndSelect(const ScoreAndSelectParams& params, void* stream) = 0;
  virtual absl::Status PlanFetch(const PlanFetchParams& params, void* stream) = 0;
  virtual absl::Status AttendSelected(const AttendSelectedParams& params, void* stream) = 0;
  virtual absl::Status AttendWindow(const AttendWindowParams& params, void* stream) = 0;

  // The backward; see backward_params.h.
  virtual absl::Status Zero(void* dst, int64_t num_bytes, void* stream) = 0;
  // Of each stage's scratch, for every call within `limits` or of as many blocks.
  virtual int64_t SelectedBackwardScratchBytes(const AttentionDims& dims,
                                               const BackwardLimits& limits) const = 0;
  virtual int64_t WindowBackwardScratchBytes(const AttentionDims& dims,
                                             const BackwardLimits& limits) const = 0;
  virtual int64_t SummariesBackwardScratchBytes(const AttentionDims& dims,
                                                const BackwardLimits& limits) const = 0;
  virtual int64_t CompressBackwardScratchBytes(const AttentionDims& dims, Compressor compressor,
                                               int32_t hidden_width, int64_t num_blocks) const = 0;
  virtual absl::Status GateBackward(const GateBackwardParams& params, void* stream) = 0;
  virtual absl::Status AttendWindowBackward(const AttendWindowBackwardParams& params,
                                            void* stream) = 0;
  virtual absl::Status AttendSelectedBackward(const AttendSelectedBackwardParams& params,
                                              void* stream) = 0;
  virtual absl::Status AttendSummariesBackward(const AttendSummariesBackwardParams& params,
                                               void* stream) = 0;
  virtual absl::Status CompressBackward(const CompressBackwardParams& params, void* stream) = 0;
  virtual absl::Status UnpackGradients(const UnpackGradientsParams& params, void* stream) = 0;
  virtual absl::Status PlanReturn(const PlanReturnParams& params, void* stream) = 0;
  virtual absl::Status AddIndexedRows(const AddIndexedRowsParams& params, void* stream) = 0;
  virtual absl::Status AddRows(const AddRowsParams& params, void* stream) = 0;
  virtual absl::Status StoreGradient(const StoreGradientParams& params, void* stream) = 0;

  // Decoding; see decode_params.h. DecodeScratchBytes: of a step within `limits`.
  virtual int64_t DecodeScratchBytes(const AttentionDims& dims,
                                     const DecodeLimits& limits) const = 0;
  virtual absl::Status AppendTokens(const AppendTokensParams& params, void* stream) = 0;
  virtual absl::Status DecodeSelect(const DecodeSelectParams& params, void* stream) = 0;
  virtual absl::Status DecodeAttend(const DecodeAttendParams& params, void* stream) = 0;
  virtual absl::Status CopyPieces(const CopyPiecesParams& params, void* stream) = 0;
};

}  // namespace nsa::kernels

#endif  // KERNELS_KERNELS_H_
