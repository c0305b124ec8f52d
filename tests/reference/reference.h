// The forward of Native Sparse Attention in fp64, as plainly as it can be written: one loop over
// the queries of the whole packed sequence, no tiles, no online softmax, no shards. It is what
// every backend is compared with, so it shares no code with them: it includes nothing of this
// library.
//
// Symbols: S tokens of all documents, Hq, Hkv, G = Hq / Hkv, Dk, Dv, l, d, l', n as in the fields
// of ReferenceConfig; N compression blocks of all documents, one document after another; B the
// largest number of selection blocks of a document. All tensors are dense, last dimension fastest.
#ifndef TESTS_REFERENCE_REFERENCE_H_
#define TESTS_REFERENCE_REFERENCE_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "tests/reference/rounding.h"

namespace nsa::reference {

enum class CompressorKind { kMean, kWeighted, kLinear, kMlp };

struct ReferenceConfig {
  int64_t num_q_heads = 1;                             // Hq
  int64_t num_kv_heads = 1;                            // Hkv
  int64_t head_dim_qk = 1;                             // Dk
  int64_t head_dim_v = 1;                              // Dv
  int64_t compress_block_tokens = 32;                  // l
  int64_t compress_stride_tokens = 16;                 // d
  int64_t select_block_tokens = 64;                    // l'
  int64_t num_selected_blocks = 16;                    // n
  int64_t num_initial_blocks = 1;                      // n_init
  int64_t num_local_blocks = 2;                        // n_local
  int64_t window_tokens = 512;                         // w
  std::optional<double> softmax_scale = std::nullopt;  // 1/sqrt(Dk) when absent
  CompressorKind compressor = CompressorKind::kMean;
};

// Parameters of one tensor's compressor; D is Dk for k and Dv for v. Only those of the configured
// compressor are read; an empty pe is zero.
struct CompressorParameters {
  int64_t num_heads = 1;       // H': 1 or Hkv
  int64_t hidden_width = 0;    // F
  std::vector<double> weight;  // [H',l]      weighted
  std::vector<double> pe;      // [H',l,D]    weighted, linear, mlp; may be empty
  std::vector<double> w;       // [H',D,l*D]  linear
  std::vector<double> w1;      // [H',F,l*D]  mlp
  std::vector<double> b1;      // [H',F]      mlp
  std::vector<double> w2;      // [H',D,F]    mlp
  std::vector<double> b2;      // [H',D]      mlp
};

struct ReferenceInputs {
  std::vector<int64_t> cu_seqlens;  // [documents + 1] from 0 to S, ascending
  std::vector<double> q;            // [S,Hq,Dk]
  std::vector<double> k_cmp;        // [S,Hkv,Dk]
  std::vector<double> v_cmp;        // [S,Hkv,Dv]
  std::vector<double> k_slc;        // [S,Hkv,Dk]
  std::vector<double> v_slc;        // [S,Hkv,Dv]
  std::vector<double> k_win;        // [S,Hkv,Dk]
  std::vector<double> v_win;        // [S,Hkv,Dv]
  std::vector<double> gate;         // [S,Hq,3] order (cmp, slc, win)
  CompressorParameters compress_k;
  CompressorParameters compress_v;
};

struct ReferenceOptions {
  // Summaries are kept in the activations' dtype: the only rounding there is.
  Rounding summary_rounding = Rounding::kNone;
  // Summaries to use in place of the reference's own, [N,Hkv,Dk] and [N,Hkv,Dv]: what was computed
  // by a backend under test, so that the rounding of its summaries does not blur what follows.
  const std::vector<double>* given_kc = nullptr;
  const std::vector<double>* given_vc = nullptr;
  // Blocks [S,Hkv,n], -1 padded, that the selected branch attends to in place of the reference's
  // own choice, so that a near-tie decided otherwise does not spoil the comparison of o_slc and o.
  // They are also what holds the selection fixed for a numerical derivative.
  const std::vector<int32_t>* given_block_indices = nullptr;
  // Only these tokens (positions in the packed sequence) are computed; rows of others stay zero
  // (block indices -1). Null: all.
  const std::vector<int64_t>* query_tokens = nullptr;
  int num_threads = 2;
};

struct ReferenceOutputs {
  std::vector<double> kc;  // [N,Hkv,Dk]
  std::vector<double> vc;  // [N,Hkv,Dv]

  std::vector<double> o;        // [S,Hq,Dv]
  std::vector<double> o_cmp;    // [S,Hq,Dv]
  std::vector<double> o_slc;    // [S,Hq,Dv]
  std::vector<double> o_win;    // [S,Hq,Dv]
  std::vector<double> lse_cmp;  // [S,Hq] natural log; -inf when the query has no key
  std::vector<double> lse_slc;  // [S,Hq]
  std::vector<double> lse_win;  // [S,Hq]

  // The reference's own choice, also where other blocks were given. Counted in the document.
  std::vector<int32_t> block_indices;  // [S,Hkv,n] ascending, -1 padded
  int64_t max_blocks = 0;              // B
  std::vector<double> scores;          // [S,Hkv,B] importance; 0 past the candidates
  // The score of the last free block that was taken, and by how much it beat the best one that was
  // not. Where nothing was left out, or no place was free to contend for, both are +inf.
  std::vector<double> threshold;  // [S,Hkv]
  std::vector<double> margin;     // [S,Hkv]
};

// Number of compression blocks of a document of `num_tokens` tokens.
int64_t NumCompressBlocks(const ReferenceConfig& config, int64_t num_tokens);

// Summaries [N,Hkv,head_dim] of x [S,Hkv,head_dim], unrounded.
std::vector<double> Compress(const ReferenceConfig& config, const CompressorParameters& parameters,
                             const std::vector<int64_t>& cu_seqlens, const std::vector<double>& x,
                             int64_t head_dim);

// InvalidArgument, naming the field, when a size does not fit the configuration.
absl::StatusOr<ReferenceOutputs> Forward(const ReferenceConfig& config,
                                         const ReferenceInputs& inputs,
                                         const ReferenceOptions& options = {});

}  // namespace nsa::reference

#endif  // TESTS_REFERENCE_REFERENCE_H_
