#include "kernels/cuda/score_select_testing.h"

#include <algorithm>
#include <cstring>

#include "kernels/cuda/dispatch.h"
#include "kernels/cuda/score_select.h"

namespace nsa::kernels::cuda {
namespace {

constexpr int kPoison = 0xff;  // a NaN in every type

// Rows of a dense tensor, `padding` elements further apart, row i at place[i].
struct PlacedRows {
  PlacedRows(int64_t num_rows, int64_t row_elements, int64_t padding)
      : row_bytes(row_elements * 2),
        stride(row_elements + padding),
        bytes(num_rows * stride * 2, std::byte{kPoison}) {}

  void Scatter(const std::vector<std::byte>& dense, const std::vector<int64_t>& place) {
    for (size_t i = 0; i < place.size(); ++i) {
      std::memcpy(&bytes[place[i] * stride * 2], &dense[i * row_bytes], row_bytes);
    }
  }

  int64_t row_bytes;
  int64_t stride;
  std::vector<std::byte> bytes;
};

template <class T>
std::vector<T> Gather(const std::vector<std::byte>& rows, int64_t row_bytes, int64_t stride_bytes,
                      const std::vector<int64_t>& place) {
  std::vector<T> dense(place.size() * row_bytes / sizeof(T));
  for (size_t i = 0; i < place.size(); ++i) {
    std::memcpy(reinterpret_cast<std::byte*>(dense.data()) + i * row_bytes,
                &rows[place[i] * stride_bytes], row_bytes);
  }
  return dense;
}

}  // namespace

std::vector<Segment> ScoreSelectProblem::Segments(int64_t max_tokens) const {
  std::vector<Segment> segments;
  for (size_t d = 0; d < documents.size(); ++d) {
    const Document& document = documents[d];
    int64_t position = d == 0 ? query_begin : 0;
    while (position < document.num_tokens) {
      const int64_t count = std::min(max_tokens, document.num_tokens - position);
      segments.push_back({.row = document.token_begin + position - query_begin,
                          .num_tokens = count,
                          .position = position,
                          .document = static_cast<int32_t>(d),
                          .is_halo = 0});
      position += count;
    }
  }
  return segments;
}

TestMemory::TestMemory(size_t num_bytes) : num_bytes_(num_bytes) {
  if (cudaMalloc(&data_, std::max<size_t>(num_bytes, 1)) != cudaSuccess) data_ = nullptr;
}

TestMemory::TestMemory(const void* host, size_t num_bytes) : TestMemory(num_bytes) {
  cudaMemcpy(data_, host, num_bytes, cudaMemcpyHostToDevice);
}

TestMemory::~TestMemory() { cudaFree(data_); }

void TestMemory::Fill(int byte) const { cudaMemset(data_, byte, num_bytes_); }

std::vector<std::byte> TestMemory::ToHost() const {
  std::vector<std::byte> host(num_bytes_);
  cudaMemcpy(host.data(), data_, num_bytes_, cudaMemcpyDeviceToHost);
  return host;
}

ScoreSelectOutputs RunScoreSelect(const ScoreSelectProblem& problem,
                                  const ScoreSelectLayout& layout) {
  const AttentionDims& dims = problem.dims;
  const int64_t hq = dims.num_q_heads, hkv = dims.num_kv_heads;
  const int64_t dk = dims.head_dim_qk, dv = dims.head_dim_v, n = dims.num_selected_blocks;
  const int64_t num_queries = problem.num_queries();
  std::vector<Segment> segments = problem.Segments(layout.segment_tokens);
  std::vector<int64_t> place(num_queries);  // of a query's row
  int64_t rows_after = num_queries;
  for (Segment& segment : segments) {
    const int64_t row = segment.row;
    rows_after -= segment.num_tokens;
    if (layout.reverse_rows) segment.row = rows_after;
    for (int64_t i = 0; i < segment.num_tokens; ++i) place[row + i] = segment.row + i;
  }
  std::vector<int64_t> in_order(problem.num_cmp_blocks);
  for (int64_t i = 0; i < problem.num_cmp_blocks; ++i) in_order[i] = i;

  PlacedRows q(num_queries, hq * dk, layout.row_padding);
  PlacedRows kc(problem.num_cmp_blocks, hkv * dk, layout.row_padding);
  PlacedRows vc(problem.num_cmp_blocks, hkv * dv, layout.row_padding);
  const PlacedRows o(num_queries, hq * dv, layout.row_padding);
  q.Scatter(problem.q, place);
  kc.Scatter(problem.kc, in_order);
  vc.Scatter(problem.vc, in_order);

  const TestMemory device_q(q.bytes.data(), q.bytes.size());
  const TestMemory device_kc(kc.bytes.data(), kc.bytes.size());
  const TestMemory device_vc(vc.bytes.data(), vc.bytes.size());
  const TestMemory device_segments(segments.data(), segments.size() * sizeof(Segment));
  const TestMemory device_documents(problem.documents.data(),
                                    problem.documents.size() * sizeof(Document));
  const TestMemory device_o(o.bytes.data(), o.bytes.size());
  const TestMemory device_lse(num_queries * hq * sizeof(float));
  const TestMemory device_indices(num_queries * hkv * n * sizeof(int32_t));
  device_lse.Fill(kPoison);
  device_indices.Fill(kPoison - 1);

  ScoreAndSelectParams params{.dims = dims,
                              .queries = {.q = {device_q.as(), q.stride, dk},
                                          .segments = device_segments.as<Segment>(),
                                          .num_segments = static_cast<int32_t>(segments.size()),
                                          .documents = device_documents.as<Document>(),
                                          .num_tokens = num_queries,
                                          .kv_heads = dims.all_kv_heads()},
                              .kc = {device_kc.as(), kc.stride, dk},
                              .vc = {device_vc.as(), vc.stride, dv},
                              .num_cmp_blocks = problem.num_cmp_blocks,
                              .num_documents = static_cast<int32_t>(problem.documents.size()),
                              .o_cmp = {device_o.as(), o.stride, dv},
                              .lse_cmp = layout.want_lse ? device_lse.as<float>() : nullptr,
                              .block_indices = device_indices.as<int32_t>(),
                              .scratch = nullptr};
  const TestMemory scratch(ScoreSelectScratchBytes(
      dims,
      {num_queries, params.queries.num_segments, params.num_cmp_blocks, params.num_documents}));
  scratch.Fill(kPoison);
  params.scratch = scratch.as();
  int num_sms = 0;
  cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0);

  ScoreSelectOutputs outputs;
  const auto launch = kScoreAndSelect.Choose(dims, layout.path);
  outputs.error = launch(params, {num_sms, /*max_shared_bytes=*/0, layout.path}, nullptr);
  if (outputs.error == cudaSuccess) outputs.error = cudaDeviceSynchronize();
  if (outputs.error != cudaSuccess) return outputs;
  outputs.o = Gather<std::byte>(device_o.ToHost(), o.row_bytes, o.stride * 2, place);
  if (layout.want_lse) {
    outputs.lse = Gather<float>(device_lse.ToHost(), hq * 4, hq * 4, place);
  }
  outputs.block_indices = Gather<int32_t>(device_indices.ToHost(), hkv * n * 4, hkv * n * 4, place);
  return outputs;
}

namespace {

// 0: there is no GPU.
int MajorComputeCapability() {
  int count = 0, major = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  return major;
}

}  // namespace

bool HasHopperGpu() { return MajorComputeCapability() == 9; }
bool HasGpu() { return MajorComputeCapability() >= 8; }

}  // namespace nsa::kernels::cuda
