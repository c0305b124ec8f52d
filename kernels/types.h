// Plain types shared by every kernel: storage types, and where tokens, documents and blocks lie.
#ifndef KERNELS_TYPES_H_
#define KERNELS_TYPES_H_

#include <cstdint>

namespace nsa {

// Storage type of activations. Statistics and accumulators are always f32.
enum class DType : int8_t { kF32 = 0, kBF16 = 1, kF16 = 2 };

constexpr int64_t SizeOf(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

constexpr const char* NameOf(DType dtype) {
  return dtype == DType::kF32 ? "f32" : dtype == DType::kBF16 ? "bf16" : "f16";
}

// phi of NSA equation 7, chosen by name (see nsa/config.h for the formulas).
enum class Compressor : int8_t { kMean = 0, kWeighted = 1, kLinear = 2, kMlp = 3 };

namespace kernels {

// Some of the kv heads, and with each the query heads of its group.
struct HeadRange {
  int32_t begin = 0;
  int32_t end = 0;
  constexpr int32_t size() const { return end - begin; }
};

// The numbers of the attention that kernels need, already validated and resolved.
struct AttentionDims {
  DType dtype;
  int32_t num_q_heads;             // Hq
  int32_t num_kv_heads;            // Hkv
  int32_t head_dim_qk;             // Dk
  int32_t head_dim_v;              // Dv
  int32_t compress_block_tokens;   // l
  int32_t compress_stride_tokens;  // d
  int32_t select_block_tokens;     // l'
  int32_t num_selected_blocks;     // n
  int32_t num_initial_blocks;      // n_init
  int32_t num_local_blocks;        // n_local
  int32_t window_tokens;           // w
  float softmax_scale;

  int32_t group_size() const { return num_q_heads / num_kv_heads; }  // G
  HeadRange all_kv_heads() const { return {0, num_kv_heads}; }
};

// One document of the packed global sequence. The blocks of all documents are numbered one
// document after another; that number is the "global" block index.
struct Document {
  int64_t token_begin;      // global position of its first token
  int64_t num_tokens;       // L
  int64_t cmp_block_begin;  // global index of its first compression block
  int64_t num_cmp_blocks;   // blocks that lie whole in the document
  int64_t slc_block_begin;  // global index of its first select block
  int64_t num_slc_blocks;   // ceil(L / l'); the last one may be partial
};

// A run of tokens of one document that lies in consecutive rows of a tensor.
struct Segment {
  int64_t row;  // row of the first token, in the tensor named by `is_halo`
  int64_t num_tokens;
  int64_t position;  // of the first token inside its document
  int32_t document;  // index into the list of documents
  int32_t is_halo;   // 0: a row of the caller's tensor; 1: a row of the halo buffer
};

// A run of consecutive blocks of one document.
struct BlockRun {
  int32_t document;
  int64_t first_block;  // counted inside the document
  int64_t num_blocks;
};

// A read-only activation tensor [rows, heads, dim]; the last dimension is contiguous.
struct ConstTensor3 {
  const void* data = nullptr;
  int64_t row_stride = 0;   // in elements
  int64_t head_stride = 0;  // in elements
};

// A writable activation tensor [rows, heads, dim]; the last dimension is contiguous.
struct Tensor3 {
  void* data = nullptr;
  int64_t row_stride = 0;   // in elements
  int64_t head_stride = 0;  // in elements
};

}  // namespace kernels
}  // namespace nsa

#endif  // KERNELS_TYPES_H_
