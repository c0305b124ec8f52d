// A cache of keys and values for decoding, pooled over the ranks of a communicator.
//
// Each sequence has a home: the rank that opened it, appends to it, holds its summaries and runs
// its queries. Its keys and values lie in pages of one select block (l' tokens of all kv heads),
// which may lie on any rank. Every rank's memory for pages is dealt out to the homes at creation,
// and a home alone says what becomes of its pages, wherever they are: so sequences are opened,
// appended to, rolled back, forked and closed, and decoded, without a word to other ranks. Kernels
// read pages of other ranks in place, where these can be loaded; elsewhere a step fetches what it
// selects
// (`is_reachable`).
//
// What is computed is the forward's function (nsa/engine.h) for the new tokens, each as token t of
// its sequence (semantics: "Decode").
//
// One thread of a rank calls at a time. Errors leave every sequence as it was, those of kernels and
// communicator as far back as max_rollback_tokens; RunStep's leave what its PlanStep has added.
//   InvalidArgument    names the field, the value and the rule
//   NotFound           there is no such sequence on this rank
//   ResourceExhausted  pages, summary pages or sequences of this home: how many are asked and free
//   Unavailable        the sequence has pages on a rank that was lost: its rank
#ifndef NSA_SERVING_KV_CACHE_H_
#define NSA_SERVING_KV_CACHE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "comm/communicator.h"
#include "kernels/kernels.h"
#include "nsa/config.h"
#include "nsa/engine.h"
#include "nsa/tensor.h"

namespace nsa::serving {

// Of a sequence; never used again once it is closed.
using SequenceId = int64_t;

struct KvCacheOptions {
  NsaConfig config;
  DType dtype = DType::kBF16;  // of q, k, v, o and of the summaries
  // Pages of this rank's memory, for all homes together; may differ between ranks.
  int64_t num_pages = 0;
  // What part of every rank's pages each home gets, in proportion; empty: equal parts.
  std::vector<double> home_shares;  // [P]
  int32_t max_sequences = 64;       // that this rank is home of
  int64_t max_tokens = 1 << 20;     // of a sequence
  // Tokens that the summaries of this rank's sequences hold; 0: as many as its pages on all ranks.
  int64_t summary_tokens = 0;
  int32_t max_step_rows = 64;  // new tokens of all sequences in one step
  // The branches are given the same k and v. Else pages of the window's and of the compression's
  // are kept beside the selected branch's, for the tokens that these still need.
  bool shares_kv = true;
  // Tokens that Truncate can take back where those pages are kept (`!shares_kv ||
  // !is_reachable()`).
  int64_t max_rollback_tokens = 64;
  CompressorParams compress_k;  // must outlive the cache
  CompressorParams compress_v;
};

// New tokens of a sequence. Shapes and rules as in ForwardInputs; with shares_kv only k_slc and
// v_slc are read.
struct KvTokens {
  ConstTensor k_cmp, k_slc, k_win;  // [T,Hkv,Dk]
  ConstTensor v_cmp, v_slc, v_win;  // [T,Hkv,Dv]
};

// Sequences that a step works on, each with its new tokens (1 to 64), in the order of their rows.
struct StepSequence {
  SequenceId sequence;
  int32_t num_new;
};

// Rows are the new tokens of all sequences, R in number.
struct StepInputs {
  ConstTensor q;     // [R,Hq,Dk]
  KvTokens kv;       // [R,...]
  ConstTensor gate;  // [R,Hq,3] f32 or options.dtype, after its sigmoid, order (cmp, slc, win)
};

struct StepOutputs {
  Tensor o;                          // [R,Hq,Dv] options.dtype
  int32_t* block_indices = nullptr;  // [R,Hkv,n] dense, -1 padded; optional
};

struct KvCacheStats {
  int32_t sequences = 0;
  int64_t pages = 0;                        // of this home, on all ranks
  int64_t pages_used = 0;                   // shared ones counted once
  std::vector<int64_t> pages_used_of_rank;  // [P] of this home
  int64_t summary_pages = 0;
  int64_t summary_pages_used = 0;
  int64_t steps = 0;
  int64_t tokens_appended = 0;
  int64_t bytes_fetched =
      0;  // by steps, of records from other ranks (0 where they are read in place)
};

class KvCache {
 public:
  // Collective. InvalidArgument on every rank, naming rank, field, value and rule, when options are
  // invalid or differ between ranks where they must not; ResourceExhausted on every rank when one
  // lacks the memory.
  static absl::StatusOr<std::unique_ptr<KvCache>> Create(
      const KvCacheOptions& options, std::shared_ptr<comm::Communicator> communicator,
      std::shared_ptr<kernels::Kernels> kernels);
  virtual ~KvCache() = default;

  // Whether kernels load the pages of every rank in place. Else Step is collective: every rank
  // calls it, with no sequences if it has none.
  virtual bool is_reachable() const = 0;

  // An empty sequence, whose home is this rank.
  virtual absl::StatusOr<SequenceId> Open() = 0;
  virtual absl::StatusOr<int64_t> NumTokens(SequenceId sequence) const = 0;
  // Appends T >= 1 tokens without attending to anything.
  virtual absl::Status Append(SequenceId sequence, const KvTokens& tokens,
                              void* stream = nullptr) = 0;
  // Collective: appends to an empty sequence of rank `home` (others pass any `sequence`) the tokens
  // of one document of the last Forward of `engine`, which had these `inputs`, of the same config,
  // dtype, communicator and kernels. Blocks stay on the ranks that own them; the home gets the
  // summaries, and the tokens of the last, partial block and of the window. `stream` need not be
  // the Forward's. FailedPrecondition when another engine was called in that one's memory since.
  virtual absl::Status AppendForward(int home, SequenceId sequence, Engine& engine,
                                     const ForwardInputs& inputs, int32_t document,
                                     void* stream = nullptr) = 0;
  // Takes back all tokens from `num_tokens` on.
  virtual absl::Status Truncate(SequenceId sequence, int64_t num_tokens) = 0;
  // A sequence with the same tokens, which shares pages until one of the two writes to them.
  virtual absl::StatusOr<SequenceId> Fork(SequenceId sequence) = 0;
  virtual absl::Status Close(SequenceId sequence) = 0;

  // Appends each sequence's new tokens and attends with them. All or nothing: an error of one
  // sequence is the step's; Check tells which. `stream` and graphs: a step is PlanStep, which takes
  // pages and uploads what the kernels need to know, and RunStep, which only enqueues kernels; no
  // call that changes the cache comes between the two. The latter may be captured in a CUDA graph
  // where is_reachable(); a graph serves every later step of as many rows (or fewer) and the same
  // tensors, each launched after its own PlanStep on the same stream, and the cache's other calls
  // must not run beside a launch. PlanStep is local; where not is_reachable(), RunStep is what is
  // collective.
  absl::Status Step(absl::Span<const StepSequence> batch, const StepInputs& inputs,
                    const StepOutputs& outputs, void* stream = nullptr);
  virtual absl::Status PlanStep(absl::Span<const StepSequence> batch, void* stream = nullptr) = 0;
  // The tensors have `num_rows` rows, at least those of the plan.
  virtual absl::Status RunStep(int64_t num_rows, const StepInputs& inputs,
                               const StepOutputs& outputs, void* stream = nullptr) = 0;
  // What Step asks of the tensors.
  virtual absl::Status CheckTensors(int64_t num_rows, const StepInputs& inputs,
                                    const StepOutputs& outputs) const = 0;
  // Whether this sequence alone could take a step of `num_new` tokens now.
  virtual absl::Status Check(const StepSequence& step) const = 0;

  virtual KvCacheStats Stats() const = 0;
};

}  // namespace nsa::serving

#endif  // NSA_SERVING_KV_CACHE_H_
