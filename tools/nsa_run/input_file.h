// The tensors of one layer's forward in a safetensors file, in global token order.
#ifndef TOOLS_NSA_RUN_INPUT_FILE_H_
#define TOOLS_NSA_RUN_INPUT_FILE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/kernels.h"
#include "kernels/types.h"
#include "nsa/config.h"
#include "nsa/engine.h"
#include "nsa/plan/sharding.h"
#include "tools/safetensors.h"

namespace nsa::tools {

// One rank's inputs and the memory that they lie in.
struct RankInputs {
  ForwardInputs inputs;
  std::vector<std::unique_ptr<kernels::Memory>> memory;
};

// Names: q, gate; k and v for all branches or k_cmp, v_cmp, k_slc, v_slc, k_win, v_win;
// compress_k.weight, ... and compress_v.weight, ...; cu_seqlens. Shapes as in nsa/engine.h with S,
// the tokens of the whole sequence, for T.
class InputFile {
 public:
  // Errors name file, tensor, value and rule.
  static absl::StatusOr<InputFile> Open(const std::string& path, const NsaConfig& config);

  int64_t num_tokens() const { return num_tokens_; }                      // S
  DType dtype() const { return dtype_; }                                  // of q
  const std::vector<int64_t>& cu_seqlens() const { return cu_seqlens_; }  // empty: one document
  // Names that mean nothing to this config.
  const std::vector<std::string>& ignored() const { return ignored_; }

  // Copies the rows of `rank`, and the compressors' parameters, into memory of `kernels`.
  absl::StatusOr<RankInputs> Load(const ShardPlan& plan, int rank, kernels::Kernels& kernels) const;

 private:
  InputFile(std::string path, SafetensorsFile file)
      : path_(std::move(path)), file_(std::move(file)) {}

  absl::Status Check(const NsaConfig& config);
  absl::Status CheckTokens(const NsaConfig& config);
  absl::Status CheckBranches(const NsaConfig& config);
  absl::Status CheckParameters(const NsaConfig& config);
  absl::Status CheckDocuments();

  // Takes note of a tensor in its role; `shape` empty: any.
  absl::Status Take(const std::string& name, absl::Span<const DType> dtypes,
                    absl::Span<const int64_t> shape);
  absl::Status Error(absl::string_view name, absl::string_view what) const;

  std::string path_;
  SafetensorsFile file_;
  int64_t num_tokens_ = 0;
  DType dtype_ = DType::kF32;
  bool shared_kv_ = false;
  std::vector<int64_t> cu_seqlens_;
  std::map<std::string, ConstTensor> tensors_;  // that are used; data in the file
  std::vector<std::string> ignored_;
};

}  // namespace nsa::tools

#endif  // TOOLS_NSA_RUN_INPUT_FILE_H_
