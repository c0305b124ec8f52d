// The device's copies of what one call of MirroredKernels reads and writes.
#ifndef KERNELS_CUDA_MIRROR_H_
#define KERNELS_CUDA_MIRROR_H_

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "kernels/kernels.h"

namespace nsa::kernels::cuda {

// The memory of one call. Every method passes null on; the first error is kept for Finish.
class Mirror {
 public:
  explicit Mirror(Kernels& device) : device_(device) {}

  // What the call reads.
  template <class T>
  const T* In(const T* host, int64_t count) {
    return static_cast<const T*>(Place(host, count * int64_t{sizeof(T)}, false));
  }
  const void* InBytes(const void* host, int64_t num_bytes) { return Place(host, num_bytes, false); }
  // What it writes, or writes a part of.
  template <class T>
  T* Out(T* host, int64_t count) {
    return static_cast<T*>(Place(host, count * int64_t{sizeof(T)}, true));
  }
  void* OutBytes(void* host, int64_t num_bytes) { return Place(host, num_bytes, true); }

  ConstTensor3 In(const ConstTensor3& tensor, int64_t rows, int64_t heads, int64_t dim,
                  int64_t element_bytes) {
    const int64_t elements = Extent(tensor.row_stride, tensor.head_stride, rows, heads, dim);
    return {InBytes(tensor.data, elements * element_bytes), tensor.row_stride, tensor.head_stride};
  }
  Tensor3 Out(const Tensor3& tensor, int64_t rows, int64_t heads, int64_t dim,
              int64_t element_bytes) {
    const int64_t elements = Extent(tensor.row_stride, tensor.head_stride, rows, heads, dim);
    return {OutBytes(tensor.data, elements * element_bytes), tensor.row_stride, tensor.head_stride};
  }

  TokenRows In(const TokenRows& tokens, int64_t heads, int64_t dim, int64_t element_bytes) {
    return {
        In(tokens.own, NumRows(tokens.segments, tokens.num_segments, 0), heads, dim, element_bytes),
        In(tokens.halo, NumRows(tokens.segments, tokens.num_segments, 1), heads, dim,
           element_bytes),
        In(tokens.segments, tokens.num_segments), tokens.num_segments};
  }

  TokenGradients Out(const TokenGradients& gradients, const Segment* segments, int32_t num_segments,
                     int64_t row_elements) {
    return {Out(gradients.own, NumRows(segments, num_segments, 0) * row_elements),
            Out(gradients.halo, NumRows(segments, num_segments, 1) * row_elements), gradients.adds};
  }

  OutputGradients In(const OutputGradients& outputs, const AttentionDims& dims,
                     int64_t num_tokens) {
    const int64_t num_rows = num_tokens * dims.num_q_heads;
    return {In(outputs.d_o, num_tokens, dims.num_q_heads, dims.head_dim_v, SizeOf(dims.dtype)),
            In(outputs.lse, num_rows), In(outputs.gate, num_rows), In(outputs.delta, num_rows)};
  }

  QueryGradients Out(const QueryGradients& gradients, const AttentionDims& dims,
                     const Queries& queries) {
    return {Out(gradients.dq, queries.num_tokens * queries.kv_heads.size() * dims.group_size() *
                                  dims.head_dim_qk),
            gradients.adds};
  }

  CompressorWeights In(const CompressorWeights& weights, int64_t block_tokens, int64_t head_dim) {
    CompressorWeights result = weights;
    const int64_t heads_bytes = weights.num_heads * SizeOf(weights.dtype);
    const int64_t row = block_tokens * head_dim, width = weights.hidden_width;
    result.weight = InBytes(weights.weight, heads_bytes * block_tokens);
    result.pe = InBytes(weights.pe, heads_bytes * row);
    result.w = InBytes(weights.w, heads_bytes * head_dim * row);
    result.w1 = InBytes(weights.w1, heads_bytes * width * row);
    result.b1 = InBytes(weights.b1, heads_bytes * width);
    result.w2 = InBytes(weights.w2, heads_bytes * width * head_dim);
    result.b2 = InBytes(weights.b2, heads_bytes * head_dim);
    return result;
  }

  Queries In(const Queries& queries, int64_t heads, int64_t dim, int64_t element_bytes) {
    int32_t num_documents = 0;
    for (int32_t i = 0; i < queries.num_segments; ++i) {
      num_documents = std::max(num_documents, queries.segments[i].document + 1);
    }
    Queries result = queries;
    result.q = In(queries.q, queries.num_tokens, heads, dim, element_bytes);
    result.segments = In(queries.segments, queries.num_segments);
    result.documents = In(queries.documents, num_documents);
    return result;
  }

  // Copies back what was written, once `status` says that the call was enqueued.
  absl::Status Finish(absl::Status status) {
    Keep(std::move(status));
    Keep(device_.Synchronize(nullptr));
    for (auto& [host, piece] : pieces_) {
      if (!status_.ok() || !piece.is_written) continue;
      Keep(device_.CopyToHost(const_cast<void*>(host), piece.memory->data(), piece.num_bytes,
                              nullptr));
    }
    Keep(device_.Synchronize(nullptr));
    return status_;
  }
  const absl::Status& status() const { return status_; }

  static int64_t NumRows(const Segment* segments, int32_t num_segments, int32_t is_halo) {
    int64_t rows = 0;
    for (int32_t i = 0; i < num_segments; ++i) {
      if (segments[i].is_halo == is_halo) {
        rows = std::max(rows, segments[i].row + segments[i].num_tokens);
      }
    }
    return rows;
  }

 private:
  struct Piece {
    std::unique_ptr<Memory> memory;
    int64_t num_bytes = 0;
    bool is_written = false;
  };

  static int64_t Extent(int64_t row_stride, int64_t head_stride, int64_t rows, int64_t heads,
                        int64_t dim) {
    return rows == 0 ? 0 : (rows - 1) * row_stride + (heads - 1) * head_stride + dim;
  }

  void Keep(absl::Status status) {
    if (status_.ok()) status_ = std::move(status);
  }

  // The same host memory has the same place: o may be o_cmp's memory. Of several lengths the
  // longest counts, as what is empty may have the address of what comes after it; no call has begun
  // yet.
  void* Place(const void* host, int64_t num_bytes, bool is_written) {
    if (host == nullptr) return nullptr;
    Piece& piece = pieces_[host];
    piece.is_written |= is_written;
    if (piece.memory == nullptr || piece.num_bytes < num_bytes) {
      auto memory = device_.Allocate(num_bytes);
      if (!memory.ok()) {
        Keep(memory.status());
        return nullptr;
      }
      piece.memory = *std::move(memory);
      piece.num_bytes = num_bytes;
      Keep(device_.CopyFromHost(piece.memory->data(), host, num_bytes, nullptr));
    }
    return piece.memory->data();
  }

  Kernels& device_;
  std::map<const void*, Piece> pieces_;
  absl::Status status_;
};

inline int64_t NumDocuments(const BlockRun* runs, int32_t num_runs) {
  int64_t count = 0;
  for (int32_t r = 0; r < num_runs; ++r) count = std::max<int64_t>(count, runs[r].document + 1);
  return count;
}

// Rows up to the last summary of the runs.
inline int64_t NumSummaries(const Document* documents, const BlockRun* runs, int32_t num_runs) {
  int64_t rows = 0;
  for (int32_t r = 0; r < num_runs; ++r) {
    if (runs[r].num_blocks == 0) continue;
    rows = std::max(rows, documents[runs[r].document].cmp_block_begin + runs[r].first_block +
                              runs[r].num_blocks);
  }
  return rows;
}

// Slots that `locations` names for the queries' kv heads; for the others it may say anything.
template <class Params>
int64_t NumSlots(const Params& params) {
  const HeadRange heads = params.queries.kv_heads;
  int64_t num_records = params.num_own_records;
  for (int64_t i = heads.begin * params.num_blocks; i < heads.end * params.num_blocks; ++i) {
    num_records = std::max<int64_t>(num_records, params.locations[i] + 1);
  }
  return num_records - params.num_own_records;
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_MIRROR_H_
