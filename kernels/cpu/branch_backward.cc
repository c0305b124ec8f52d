#include "kernels/cpu/branch_backward.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace nsa::kernels::cpu {

int64_t QueriesPerSum(const AttentionDims& dims) {
  return std::max<int64_t>(1, kBackwardRows / dims.group_size());
}

BranchScratch::BranchScratch(const AttentionDims& dims, int64_t queries, Carver carver) {
  const int64_t rows = std::max(queries, QueriesPerSum(dims)) * dims.group_size();
  const int64_t dk_dim = dims.head_dim_qk, dv_dim = dims.head_dim_v;
  q = carver.Take<float>(rows * dk_dim);
  d_o = carver.Take<float>(rows * dv_dim);
  outputs = carver.Take<RowOutputs>(rows);
  visible = carver.Take<VisibleKeys>(rows);
  p = carver.Take<float>(rows * kTileKeys);
  ds = carver.Take<float>(rows * kTileKeys);
  dq = carver.Take<float>(rows * dk_dim);
  dk = carver.Take<float>(kTileKeys * dk_dim);
  dv = carver.Take<float>(kTileKeys * dv_dim);
  keys = carver.Take<float>(dk_dim * kTileKeys);
  values = carver.Take<float>(dv_dim * kTileKeys);
  key_panels = carver.Take<float>(dk_dim * kTileKeys);
  tokens = carver.Take<const void*>(kTileKeys);
  gradients = carver.Take<float*>(kTileKeys);
  num_bytes = carver.num_bytes();
}

BranchItem::BranchItem(const AttentionDims& dims, const Queries& queries,
                       const OutputGradients& outputs, int32_t kv_head,
                       const BranchScratch& scratch)
    : dims_(dims), queries_(queries), outputs_(outputs), kv_head_(kv_head), s_(scratch) {}

void BranchItem::LoadQueries(const QueryRun& run, int64_t first_query) {
  const int64_t group_size = dims_.group_size();
  const int64_t first_row = first_query * group_size;
  cpu::LoadQueries(dims_, queries_.q, dims_.head_dim_qk, run, kv_head_,
                   s_.q + first_row * dims_.head_dim_qk);
  cpu::LoadQueries(dims_, outputs_.d_o, dims_.head_dim_v, run, kv_head_,
                   s_.d_o + first_row * dims_.head_dim_v);
  RowOutputs* row = s_.outputs + first_row;
  for (int64_t token = run.row; token < run.row + run.num_queries; ++token) {
    const int64_t first_head = token * dims_.num_q_heads + kv_head_ * group_size;
    for (int64_t i = first_head; i < first_head + group_size; ++i) {
      const bool has_keys = outputs_.lse[i] != -std::numeric_limits<float>::infinity();
      *row++ = {.lse = has_keys ? outputs_.lse[i] : std::numeric_limits<float>::infinity(),
                .gate = outputs_.gate[i],
                .delta = outputs_.delta[i]};
    }
  }
}

void BranchItem::LoadKeys(const void* const* tokens, int32_t count) {
  TransposeToFloat(dims_.dtype, tokens, count, dims_.head_dim_qk, s_.keys);
  width_ = (count + kLanes - 1) / kLanes * kLanes;
}

void BranchItem::LoadValues(const void* const* tokens, int32_t count) {
  TransposeToFloat(dims_.dtype, tokens, count, dims_.head_dim_v, s_.values);
}

void BranchItem::LoadKeyColumns(const void* columns, int64_t key_stride, int32_t count) {
  const char* row = static_cast<const char*>(columns);
  for (int64_t i = 0; i < dims_.head_dim_qk; ++i, row += key_stride * SizeOf(dims_.dtype)) {
    ToFloat(dims_.dtype, row, count, s_.keys + i * kTileKeys);
  }
  width_ = count;
}

void BranchItem::StartQueries(const QueryRun& run) {
  LoadQueries(run);
  std::fill_n(s_.dq, run.num_queries * dims_.group_size() * dims_.head_dim_qk, 0.0f);
}

void BranchItem::MakeKeyPanels() {
  const void* rows[kTileKeys];
  for (int64_t panel = 0; panel < dims_.head_dim_qk; panel += kTileKeys) {
    for (int64_t i = 0; i < kTileKeys; ++i) rows[i] = s_.keys + (panel + i) * kTileKeys;
    TransposeToFloat(DType::kF32, rows, kTileKeys, width_, s_.key_panels + panel * kTileKeys);
  }
}

void BranchItem::ComputeTile(int64_t row_begin, int64_t num_rows) {
  MatMul(MatMulArgs{.a = s_.q + row_begin * dims_.head_dim_qk,
                    .a_stride = dims_.head_dim_qk,
                    .b = s_.keys,
                    .b_stride = kTileKeys,
                    .c = s_.p,
                    .c_stride = kTileKeys,
                    .rows = num_rows,
                    .depth = dims_.head_dim_qk,
                    .cols = width_},
         dims_.softmax_scale);
  MatMul(MatMulArgs{.a = s_.d_o + row_begin * dims_.head_dim_v,
                    .a_stride = dims_.head_dim_v,
                    .b = s_.values,
                    .b_stride = kTileKeys,
                    .c = s_.ds,
                    .c_stride = kTileKeys,
                    .rows = num_rows,
                    .depth = dims_.head_dim_v,
                    .cols = width_},
         1.0f);
  for (int64_t i = 0; i < num_rows; ++i) {
    SoftmaxBackward(s_.p + i * kTileKeys, s_.ds + i * kTileKeys, width_, s_.visible[i],
                    s_.outputs[row_begin + i], dims_.softmax_scale);
  }
}

void BranchItem::AddToQueries(int64_t row_begin, int64_t num_rows) {
  ComputeTile(row_begin, num_rows);
  for (int64_t panel = 0; panel < dims_.head_dim_qk; panel += kTileKeys) {
    MatMulAdd(MatMulArgs{.a = s_.ds,
                         .a_stride = kTileKeys,
                         .b = s_.key_panels + panel * kTileKeys,
                         .b_stride = kTileKeys,
                         .c = s_.dq + row_begin * dims_.head_dim_qk + panel,
                         .c_stride = dims_.head_dim_qk,
                         .rows = num_rows,
                         .depth = width_,
                         .cols = kTileKeys});
  }
}

void BranchItem::StoreQueries(const QueryRun& run, const QueryGradients& gradients) {
  const int64_t count = dims_.group_size() * static_cast<int64_t>(dims_.head_dim_qk);
  const HeadRange& heads = queries_.kv_heads;
  for (int64_t i = 0; i < run.num_queries; ++i) {
    float* const dst =
        gradients.dq + ((run.row + i) * heads.size() + (kv_head_ - heads.begin)) * count;
    if (!gradients.adds) std::fill_n(dst, count, 0.0f);
    AddScaled(s_.dq + i * count, count, 1.0f, dst);
  }
}

void BranchItem::StartKeys() {
  std::fill_n(s_.dk, width_ * dims_.head_dim_qk, 0.0f);
  std::fill_n(s_.dv, width_ * dims_.head_dim_v, 0.0f);
}

void BranchItem::AddToKeys(int64_t num_rows) {
  ComputeTile(0, num_rows);
  const auto add = [&](const float* weights, const float* rows, int64_t dim, float* sums) {
    MatMulAdd(MatMulArgs{.a = weights,
                         .a_stride = 1,
                         .a_depth_stride = kTileKeys,
                         .b = rows,
                         .b_stride = dim,
                         .c = sums,
                         .c_stride = dim,
                         .rows = width_,
                         .depth = num_rows,
                         .cols = dim});
  };
  add(s_.p, s_.d_o, dims_.head_dim_v, s_.dv);
  add(s_.ds, s_.q, dims_.head_dim_qk, s_.dk);
}

}  // namespace nsa::kernels::cpu
