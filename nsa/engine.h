// Native Sparse Attention over a sequence sharded across the ranks of a communicator.
//
//   auto engine = nsa::Engine::Create(options, std::move(plan), communicator, kernels);
//   absl::Status status = (*engine)->Forward(inputs, outputs);
//
// The function computed is NSA (arXiv:2502.11089) equations 5 to 12; shapes use its symbols as in
// nsa/config.h, with T the tokens of this rank under the shard plan. Create and Forward are
// collective: every rank of the group makes the same calls in the same order. The result does not
// depend, bit for bit, on the number of ranks or on the sharding.
#ifndef NSA_ENGINE_H_
#define NSA_ENGINE_H_

#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "comm/communicator.h"
#include "kernels/kernels.h"
#include "nsa/config.h"
#include "nsa/plan/rank_plan.h"
#include "nsa/plan/sharding.h"
#include "nsa/stats.pb.h"
#include "nsa/tensor.h"

namespace nsa {

struct EngineOptions {
  NsaConfig config;
  DType dtype = DType::kBF16;  // of q, k, v, o and of the summaries
  // Upper bound of the memory for fetched blocks, per rank. When the remote blocks of all kv heads
  // do not fit, kv heads are processed some at a time; when those of one head do not, queries are,
  // and the host waits for each piece. At least one query's worth: num_selected_blocks *
  // num_kv_heads records.
  int64_t fetch_budget_bytes = int64_t{1} << 30;
  // Compare the ranks' arguments in every call: the host of each rank waits for all others. False:
  // in the first call, and in one whose arguments differ in more than their data from those of this
  // rank's call before. A mistake of one rank alone then breaks the communicator on all. Where a
  // rank has no tokens it is as if true.
  bool agree_in_every_call = true;
  // Take the memory of Backward as well. The fetch budget must then hold the remote blocks of at
  // least one kv head.
  bool has_backward = false;
  // Of the MLP compressors that Backward may be given, the largest hidden width F; at most 2^20.
  int64_t max_hidden_width = 0;
  // Measure when each stage ran, for LastStats and GatherStats. Costs about a percent of a call of
  // 8k tokens on a GPU.
  bool time_stages = false;
  // Called on the host at the start of each stage of a call, e.g. to show progress. Must not call
  // the engine.
  std::function<void(absl::string_view stage)> on_stage = nullptr;
};

// Learned parameters of one compressor (semantics of each: nsa/config.h); unused ones stay unset.
// H' is 1 (shared by the heads) or Hkv, D is Dk for k and Dv for v, F any width >= 1. All in one
// dtype, f32 or that of the activations.
struct CompressorParams {
  ConstTensor weight;  // [H',l]       WEIGHTED
  ConstTensor pe;      // [H',l,D]     WEIGHTED, LINEAR, MLP; optional, absent means zero
  ConstTensor w;       // [H',D,l*D]   LINEAR
  ConstTensor w1;      // [H',F,l*D]   MLP
  ConstTensor b1;      // [H',F]       MLP
  ConstTensor w2;      // [H',D,F]     MLP
  ConstTensor b2;      // [H',D]       MLP
};

// All tensors in options.dtype unless said; last dimension contiguous, other strides free but for
// Kernels::RowAlignment; memory of the kernels' device. Branches that are given the same k and the
// same v share one halo exchange.
struct ForwardInputs {
  ConstTensor q;      // [T,Hq,Dk]
  ConstTensor k_cmp;  // [T,Hkv,Dk]
  ConstTensor v_cmp;  // [T,Hkv,Dv]
  ConstTensor k_slc;  // [T,Hkv,Dk]
  ConstTensor v_slc;  // [T,Hkv,Dv]
  ConstTensor k_win;  // [T,Hkv,Dk]
  ConstTensor v_win;  // [T,Hkv,Dv]
  ConstTensor gate;   // [T,Hq,3] f32 or options.dtype, after its sigmoid, order (cmp, slc, win)
  CompressorParams compress_k;
  CompressorParams compress_v;

  // The same k and v for the three branches.
  void SetSharedKv(const ConstTensor& k, const ConstTensor& v) {
    k_cmp = k_slc = k_win = k;
    v_cmp = v_slc = v_win = v;
  }
};

// Optional ones are skipped when unset. Contents are undefined after an error.
struct ForwardOutputs {
  Tensor o;                    // [T,Hq,Dv] options.dtype
  Tensor o_cmp, o_slc, o_win;  // [T,Hq,Dv] options.dtype, optional
  float* lse_cmp = nullptr;    // [T,Hq] dense, natural log, -inf without a key; optional
  float* lse_slc = nullptr;    // [T,Hq] optional
  float* lse_win = nullptr;    // [T,Hq] optional
  int32_t* block_indices =
      nullptr;  // [T,Hkv,n] dense, in the query's document, -1 padded; optional
};

struct SaveOptions {
  // The summaries of the whole sequence, else Backward compresses and gathers them again.
  bool keep_summaries = true;
  // The remote blocks that the forward fetches, else Backward fetches them again: memory for all
  // that are visible to this rank's queries.
  bool keep_blocks = false;
  // The caller's: Engine::SavedForwardBytes of the kernels' device, 64-byte aligned, for as long as
  // the SavedForward. Null: memory of its own.
  void* memory = nullptr;
  // `memory` holds, also as a copy, what a Forward of this engine left in another SavedForward.
  bool is_filled = false;
};

// What a Forward leaves for its Backward: the branches' outputs and LSEs, the block indices and
// what SaveOptions keeps. Any number of forwards may wait for their backwards, as pipeline
// parallelism needs; may be used again. Must not outlive its engine.
class SavedForward {
 public:
  virtual ~SavedForward() = default;
  virtual int64_t num_bytes() const = 0;
};

// In the shapes of CompressorParams, f32, dense; unset: not wanted.
struct CompressorGradients {
  Tensor weight, pe, w, w1, b1, w2, b2;
};

// Where Backward puts gradients: f32 or options.dtype each, last dimension contiguous; unset: not
// wanted. Branches that share k and v share their gradients' tensors as well, which get the sum.
struct Gradients {
  Tensor dq;      // [T,Hq,Dk]
  Tensor dk_cmp;  // [T,Hkv,Dk]
  Tensor dv_cmp;  // [T,Hkv,Dv]
  Tensor dk_slc;  // [T,Hkv,Dk]
  Tensor dv_slc;  // [T,Hkv,Dv]
  Tensor dk_win;  // [T,Hkv,Dk]
  Tensor dv_win;  // [T,Hkv,Dv]
  Tensor dgate;   // [T,Hq,3]
  CompressorGradients dcompress_k;
  CompressorGradients dcompress_v;

  // Add to what the tensors hold, in f32, rounded once; else overwrite it.
  bool accumulate = false;
  // Compressors' gradients of all ranks' tokens, the same bits on every rank; else of this rank's
  // own blocks.
  bool sum_over_ranks = false;

  // The same dk and dv for the three branches.
  void SetSharedKv(const Tensor& dk, const Tensor& dv) {
    dk_cmp = dk_slc = dk_win = dk;
    dv_cmp = dv_slc = dv_win = dv;
  }
};

// What a Forward leaves in the engine's memory, until the next call in it: what a cache takes
// over (nsa/serving/kv_cache.h).
struct ForwardBlocks {
  bool is_there = false;  // nothing, when that call has come
  // [N,Hkv*(Dk+Dv)] of the whole sequence: kc [Hkv,Dk] and then vc [Hkv,Dv] in each row.
  // In the SavedForward of the call, if that keeps them: as long as it lives.
  const void* summaries = nullptr;
  // [Hkv,own select blocks] records of this rank, in the layout of Kernels::PackBlocks.
  const void* records = nullptr;
};

class Engine {
 public:
  // Collective. Takes all memory that later calls use. Engines whose calls may run at the same time
  // on a device need a communicator each.
  // `memory_of`: an engine of the same communicator and kernels, whose calls' memory this one uses
  // as well, of any config and plan; takes more only if it needs more. For plans that change, as
  // those of packed documents do from step to step. Each lives as long as it likes. Their calls run
  // in the order they are made in, and none beside the launch of a graph of another's.
  // InvalidArgument on every rank, naming rank, field, value and rule, when any rank's options are
  // invalid or differ from another's, as fetch_budget_bytes, time_stages and on_stage may;
  // ResourceExhausted on every rank when one lacks the memory.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(
      const EngineOptions& options, ShardPlan plan,
      std::shared_ptr<comm::Communicator> communicator, std::shared_ptr<kernels::Kernels> kernels,
      const Engine* memory_of = nullptr);
  virtual ~Engine() = default;

  // Collective. InvalidArgument on every rank when any rank's tensors are wrong; the engine stays
  // usable then. Any other error breaks the communicator on every rank (see comm/communicator.h).
  // `stream`: of the kernels' device; host kernels ignore it and have finished on return. On a GPU
  // the call enqueues, allocates nothing and, unless the fetch budget is below one kv head's remote
  // blocks, waits on the host for no more than the comparison of arguments. Calls of one engine run
  // in the order they are made in, on whatever streams. A call may be captured in a CUDA graph
  // where the communicator's can: then all ranks capture and launch the same calls, and the
  // engine's other calls must not run beside a launch.
  // `saved`: of this engine, filled for a Backward; the optional outputs must then be unset. A
  // Forward of the same inputs leaves the same bits there, so activations may be recomputed.
  virtual absl::Status Forward(const ForwardInputs& inputs, const ForwardOutputs& outputs,
                               void* stream = nullptr, SavedForward* saved = nullptr) = 0;

  // Of this rank, with these options; 0 without EngineOptions::has_backward.
  virtual int64_t SavedForwardBytes(const SaveOptions& options = {}) const = 0;
  // Collective unless the caller gives the memory. FailedPrecondition without
  // EngineOptions::has_backward; ResourceExhausted on every rank when one lacks the memory.
  virtual absl::StatusOr<std::unique_ptr<SavedForward>> CreateSavedForward(
      const SaveOptions& options = {}) = 0;

  // Collective. The gradients of the sum of o * d_o (semantics: "Backward"), with the block indices
  // held fixed, of the Forward that filled `saved` last, which must have had the same inputs.
  // d_o: [T,Hq,Dv] options.dtype. Errors, streams and graphs as for Forward; the same bits in every
  // call; dq and dgate do not depend, bit for bit, on the number of ranks or on the sharding.
  virtual absl::Status Backward(const ForwardInputs& inputs, const ConstTensor& d_o,
                                SavedForward& saved, const Gradients& gradients,
                                void* stream = nullptr) = 0;

  // What the last call of this rank, or the last launch of a graph of it, moved and took. Waits
  // for its end (a graph's: its owner does). FailedPrecondition before the first call, and when
  // another engine was called in the same memory since.
  virtual absl::StatusOr<RankStats> LastStats() = 0;
  // Collective: the same of all ranks, block_bytes_sent filled in.
  virtual absl::StatusOr<ForwardStats> GatherStats() = 0;

  virtual ForwardBlocks LastBlocks() const = 0;
  // What is enqueued on `stream` from now on begins after the last call (a graph's launch: its
  // owner sees to that).
  virtual absl::Status WaitForLastCall(void* stream) = 0;

  virtual const ShardPlan& shard_plan() const = 0;
  virtual const BlockMap& block_map() const = 0;
};

}  // namespace nsa

#endif  // NSA_ENGINE_H_
