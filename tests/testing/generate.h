// Random configurations, documents and inputs, the same for a seed everywhere. Values are already
// rounded to the storage type, so that the reference and the code under test see the same numbers.
#ifndef TESTS_TESTING_GENERATE_H_
#define TESTS_TESTING_GENERATE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/types.h"
#include "tests/reference/reference.h"
#include "tests/testing/numeric.h"
#include "tests/testing/random.h"

namespace nsa::test {

// Bounds of RandomConfig; every configuration it makes is a valid one of the library.
struct ConfigBounds {
  int64_t max_q_heads = 16;
  int64_t max_head_dim = 128;              // at least 64
  int64_t max_compress_block_tokens = 64;  // at least 16
  int64_t max_select_block_tokens = 128;   // at least 64
  int64_t max_selected_blocks = 8;         // at least 3
  int64_t max_window_tokens = 200;
};

reference::ReferenceConfig RandomConfig(const ConfigBounds& bounds, Random* random);

// cu_seqlens of up to `max_documents` documents with `num_tokens` tokens together, none empty;
// short ones (one token, less than a compression block) come up often. num_tokens >= 1.
std::vector<int64_t> RandomDocuments(const reference::ReferenceConfig& config, int64_t num_tokens,
                                     int64_t max_documents, Random* random);

struct InputOptions {
  DType dtype = DType::kF32;  // of q, k and v
  DType gate_dtype = DType::kF32;
  DType parameter_dtype = DType::kF32;  // of the compressors' parameters
  bool parameters_per_head = false;     // H' = Hkv in place of 1
  bool with_pe = true;
  int64_t hidden_width = 32;  // F of the mlp
  double logit_scale = 1.0;   // multiplies q: 30 and more make softmax take one key and drop others
  bool share_keys = false;    // the three branches get the same k and v
};

// Logits have a standard deviation near logit_scale. Keys of the compressed branch vary from block
// to block, so that importance is not flat and few selections are near-ties.
reference::ReferenceInputs RandomInputs(const reference::ReferenceConfig& config,
                                        const std::vector<int64_t>& cu_seqlens,
                                        const InputOptions& options, Random* random);

// The same configuration as kernels take it.
kernels::AttentionDims MakeDims(const reference::ReferenceConfig& config, DType dtype);
Compressor MakeCompressor(reference::CompressorKind kind);
reference::Rounding SummaryRounding(DType dtype);
std::vector<kernels::Document> MakeDocuments(const reference::ReferenceConfig& config,
                                             const std::vector<int64_t>& cu_seqlens);

// A compressor's parameters as bytes; what the configuration does not use is empty.
struct EncodedParameters {
  DType dtype = DType::kF32;
  int32_t num_heads = 1;
  int32_t hidden_width = 0;
  Bytes weight, pe, w, w1, b1, w2, b2;

  // Points into this object.
  kernels::CompressorWeights view() const;
};

// Inputs as bytes, dense.
struct EncodedInputs {
  Bytes q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win;  // dtype
  Bytes gate;                                         // gate_dtype
  EncodedParameters compress_k, compress_v;
};

EncodedInputs Encode(const reference::ReferenceInputs& inputs, const InputOptions& options);

// One line with every field, for a failing test to print.
std::string Describe(const reference::ReferenceConfig& config);

}  // namespace nsa::test

#endif  // TESTS_TESTING_GENERATE_H_
