// The table of kernels: what serves a stage.
//
// On Hopper, a stage's Hopper kernel serves the dims that it is made for; a portable kernel serves
// all dims that SupportsDims (supports.h) allows, on any GPU from compute capability 8.0 on. Where
// there is no Hopper kernel, the portable one is as fast as its stage needs.
#ifndef KERNELS_CUDA_DISPATCH_H_
#define KERNELS_CUDA_DISPATCH_H_

#include <cuda_runtime_api.h>

#include "kernels/backward_params.h"
#include "kernels/cuda/attend_backward.h"
#include "kernels/cuda/decode.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/score_select.h"
#include "kernels/decode_params.h"
#include "kernels/params.h"

namespace nsa::kernels::cuda {

template <class Params>
struct Stage {
  using Launch = cudaError_t (*)(const Params& params, const Device& device, cudaStream_t stream);

  const char* name;
  Launch portable;
  Launch hopper = nullptr;  // null: there is none
  bool (*hopper_serves)(const AttentionDims& dims) = nullptr;

  constexpr Launch Choose(const AttentionDims& dims, Path path) const {
    return path == Path::kHopper && hopper != nullptr && hopper_serves(dims) ? hopper : portable;
  }
};

inline constexpr Stage<CopyRowsParams> kCopyRows = {"CopyRows", LaunchCopyRows};
inline constexpr Stage<CompressParams> kCompress = {"Compress", LaunchCompress};
inline constexpr Stage<PackBlocksParams> kPackBlocks = {"PackBlocks", LaunchPackBlocks};
inline constexpr Stage<ScoreAndSelectParams> kScoreAndSelect = {
    "ScoreAndSelect", LaunchScoreSelectAny, LaunchScoreSelectFast, HasFastScoreSelect};
inline constexpr Stage<PlanFetchParams> kPlanFetch = {"PlanFetch", LaunchPlanFetch};
inline constexpr Stage<AttendSelectedParams> kAttendSelected = {
    "AttendSelected", LaunchAttendSelectedAny, LaunchAttendSelectedFast, HasFastAttendSelected};
inline constexpr Stage<AttendWindowParams> kAttendWindow = {
    "AttendWindow", LaunchAttendWindowAny, LaunchAttendWindowFast, HasFastAttendWindow};
inline constexpr Stage<AttendWindowBackwardParams> kAttendWindowBackward = {
    "AttendWindowBackward", LaunchAttendWindowBackwardAny, LaunchAttendWindowBackwardFast,
    HasFastAttendWindowBackward};
inline constexpr Stage<AttendSummariesBackwardParams> kAttendSummariesBackward = {
    "AttendSummariesBackward", LaunchAttendSummariesBackwardAny, LaunchAttendSummariesBackwardFast,
    HasFastAttendSummariesBackward};

inline constexpr Stage<GateBackwardParams> kGateBackward = {"GateBackward", LaunchGateBackward};
inline constexpr Stage<AttendSelectedBackwardParams> kAttendSelectedBackward = {
    "AttendSelectedBackward", LaunchAttendSelectedBackwardAny, LaunchAttendSelectedBackwardFast,
    HasFastAttendSelectedBackward};
inline constexpr Stage<CompressBackwardParams> kCompressBackward = {"CompressBackward",
                                                                    LaunchCompressBackward};
inline constexpr Stage<UnpackGradientsParams> kUnpackGradients = {"UnpackGradients",
                                                                  LaunchUnpackGradients};
inline constexpr Stage<PlanReturnParams> kPlanReturn = {"PlanReturn", LaunchPlanReturn};
inline constexpr Stage<AddIndexedRowsParams> kAddIndexedRows = {"AddIndexedRows",
                                                                LaunchAddIndexedRows};
inline constexpr Stage<AddRowsParams> kAddRows = {"AddRows", LaunchAddRows};
inline constexpr Stage<StoreGradientParams> kStoreGradient = {"StoreGradient", LaunchStoreGradient};

constexpr bool ServesAll(const AttentionDims&) { return true; }
inline constexpr Stage<AppendTokensParams> kAppendTokens = {"AppendTokens", LaunchAppendTokensAny,
                                                            LaunchAppendTokensFast, ServesAll};
inline constexpr Stage<DecodeSelectParams> kDecodeSelect = {"DecodeSelect", LaunchDecodeSelectAny,
                                                            LaunchDecodeSelectFast, ServesAll};
inline constexpr Stage<DecodeAttendParams> kDecodeAttend = {"DecodeAttend", LaunchDecodeAttendAny,
                                                            LaunchDecodeAttendFast, ServesAll};
inline constexpr Stage<CopyPiecesParams> kCopyPieces = {"CopyPieces", LaunchCopyPieces};

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DISPATCH_H_
