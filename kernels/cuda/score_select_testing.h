// Problems for the compressed branch alone, on the GPU: for its test and its benchmark.
#ifndef KERNELS_CUDA_SCORE_SELECT_TESTING_H_
#define KERNELS_CUDA_SCORE_SELECT_TESTING_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/cuda/launch.h"
#include "kernels/params.h"

namespace nsa::kernels::cuda {

// Device memory with the lifetime of the object. Failures leave data() null.
class TestMemory {
 public:
  explicit TestMemory(size_t num_bytes);
  TestMemory(const void* host, size_t num_bytes);
  ~TestMemory();
  TestMemory(const TestMemory&) = delete;
  TestMemory& operator=(const TestMemory&) = delete;

  template <class T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t num_bytes() const { return num_bytes_; }
  void Fill(int byte) const;
  std::vector<std::byte> ToHost() const;

 private:
  void* data_ = nullptr;
  size_t num_bytes_;
};

// Summaries and queries of packed documents as dense 16-bit tensors in global order.
struct ScoreSelectProblem {
  AttentionDims dims;
  std::vector<Document> documents;
  int64_t num_tokens = 0;   // of all documents
  int64_t query_begin = 0;  // the first one, of the first document, that is a query; T follow
  int64_t num_cmp_blocks = 0;
  std::vector<std::byte> q;   // [T,Hq,Dk]
  std::vector<std::byte> kc;  // [N,Hkv,Dk]
  std::vector<std::byte> vc;  // [N,Hkv,Dv]

  int64_t num_queries() const { return num_tokens - query_begin; }  // T
  // In order, of at most `max_tokens` tokens, their rows in global order.
  std::vector<Segment> Segments(int64_t max_tokens) const;
};

// None of it may show in results, `path` apart.
struct ScoreSelectLayout {
  Path path = Path::kHopper;
  int64_t segment_tokens = int64_t{1} << 40;  // at most, of a segment
  bool reverse_rows = false;  // the segments' rows lie in the tensors last segment first
  int64_t row_padding = 0;    // elements between rows beyond what a dense tensor has
  bool want_lse = true;
};

// In global order, dense; poisoned before the run.
struct ScoreSelectOutputs {
  cudaError_t error = cudaSuccess;
  std::vector<std::byte> o;            // [T,Hq,Dv]
  std::vector<float> lse;              // [T,Hq], empty where it was not wanted
  std::vector<int32_t> block_indices;  // [T,Hkv,n]
};

ScoreSelectOutputs RunScoreSelect(const ScoreSelectProblem& problem,
                                  const ScoreSelectLayout& layout = {});

bool HasHopperGpu();
bool HasGpu();  // of compute capability 8.0 and up

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_SCORE_SELECT_TESTING_H_
