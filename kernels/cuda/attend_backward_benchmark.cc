// Times the backward of the window and of the compressed branch on one GPU: bf16, 64 query and 4 kv
// heads, l 32, d 16, w 512, one document. Usage: attend_backward_benchmark [--dims=Dk,Dv]
// [tokens...], 128,128 if not said.
//
// Each figure is the median of 7 runs with a cold L2. TFLOP/s count five products of what a query
// sees.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "kernels/cuda/dispatch.h"
#include "kernels/cuda/score_select_testing.h"

namespace nsa::kernels::cuda {
namespace {

constexpr int kRuns = 7;
constexpr size_t kFlushBytes = size_t{256} << 20;
constexpr int64_t kDistinctValues = int64_t{1} << 24;  // of a tensor; the rest repeats them

AttentionDims Dims(int32_t dk, int32_t dv) {
  AttentionDims dims{};
  dims.dtype = DType::kBF16;
  dims.num_q_heads = 64;
  dims.num_kv_heads = 4;
  dims.head_dim_qk = dk;
  dims.head_dim_v = dv;
  dims.compress_block_tokens = 32;
  dims.compress_stride_tokens = 16;
  dims.window_tokens = 512;
  dims.softmax_scale = 0.088f;
  return dims;
}

// `count` values of `bits`, of which those at the front are repeated.
template <class T>
void Repeat(const std::vector<T>& some, int64_t count, const TestMemory& to) {
  const int64_t size = static_cast<int64_t>(some.size());
  for (int64_t i = 0; i < count; i += size) {
    cudaMemcpy(to.as<T>() + i, some.data(), std::min(size, count - i) * sizeof(T),
               cudaMemcpyHostToDevice);
  }
}

double MedianMilliseconds(const TestMemory& flush, const std::function<cudaError_t()>& run) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<float> times;
  for (int i = 0; i < kRuns + 2; ++i) {
    flush.Fill(i);
    cudaEventRecord(begin);
    cudaError_t error = run();
    cudaEventRecord(end);
    if (error == cudaSuccess) error = cudaEventSynchronize(end);
    if (error != cudaSuccess) {
      std::printf("failed: %s\n", cudaGetErrorString(error));
      std::exit(1);
    }
    float milliseconds = 0;
    cudaEventElapsedTime(&milliseconds, begin, end);
    if (i >= 2) times.push_back(milliseconds);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void Run(const AttentionDims& dims, int64_t num_tokens, const Device& device,
         const std::vector<uint16_t>& some, const TestMemory& flush) {
  const int64_t hq = dims.num_q_heads, hkv = dims.num_kv_heads;
  const int64_t dk = dims.head_dim_qk, dv = dims.head_dim_v;
  const int64_t num_blocks =
      (num_tokens - dims.compress_block_tokens) / dims.compress_stride_tokens + 1;
  const Document document{.token_begin = 0,
                          .num_tokens = num_tokens,
                          .cmp_block_begin = 0,
                          .num_cmp_blocks = num_blocks,
                          .slc_block_begin = 0,
                          .num_slc_blocks = 0};
  const Segment segment{
      .row = 0, .num_tokens = num_tokens, .position = 0, .document = 0, .is_halo = 0};
  const TestMemory documents(&document, sizeof(document)), segments(&segment, sizeof(segment));
  const TestMemory q(num_tokens * hq * dk * 2), d_o(num_tokens * hq * dv * 2);
  const TestMemory k(num_tokens * hkv * dk * 2), v(num_tokens * hkv * dv * 2);
  const TestMemory lse(num_tokens * hq * 4), gate(num_tokens * hq * 4), delta(num_tokens * hq * 4);
  const TestMemory dq(num_tokens * hq * dk * 4);
  const TestMemory dk_rows(num_tokens * hkv * dk * 4), dv_rows(num_tokens * hkv * dv * 4);
  const TestMemory d_summaries(num_blocks * hkv * (dk + dv) * 4);
  Repeat(some, num_tokens * hq * dk, q);
  Repeat(some, num_tokens * hq * dv, d_o);
  Repeat(some, num_tokens * hkv * dk, k);
  Repeat(some, num_tokens * hkv * dv, v);
  Repeat(std::vector<float>(kDistinctValues, 9.0f), num_tokens * hq, lse);
  Repeat(std::vector<float>(kDistinctValues, 0.3f), num_tokens * hq, gate);
  Repeat(std::vector<float>(kDistinctValues, 0.1f), num_tokens * hq, delta);
  const BackwardLimits limits{num_tokens, 1, static_cast<int32_t>(hkv), num_blocks, 0, 0, 1};
  const TestMemory scratch(std::max(SummariesBackwardScratchBytes(dims, limits),
                                    WindowBackwardScratchBytes(dims, limits)));
  const Queries queries = {.q = {q.as(), hq * dk, dk},
                           .segments = segments.as<Segment>(),
                           .num_segments = 1,
                           .documents = documents.as<Document>(),
                           .num_tokens = num_tokens,
                           .kv_heads = dims.all_kv_heads()};
  const OutputGradients outputs = {
      {d_o.as(), hq * dv, dv}, lse.as<float>(), gate.as<float>(), delta.as<float>()};
  const AttendWindowBackwardParams window = {
      .dims = dims,
      .queries = queries,
      .k = {{k.as(), hkv * dk, dk}, {}, segments.as<Segment>(), 1},
      .v = {{v.as(), hkv * dv, dv}, {}, segments.as<Segment>(), 1},
      .outputs = outputs,
      .queries_gradients = {dq.as<float>(), false},
      .dk = {dk_rows.as<float>(), nullptr, false},
      .dv = {dv_rows.as<float>(), nullptr, false},
      .scratch = scratch.as()};
  const AttendSummariesBackwardParams summaries = {.dims = dims,
                                                   .queries = queries,
                                                   .kc = {k.as(), hkv * dk, dk},
                                                   .vc = {v.as(), hkv * dv, dv},
                                                   .num_cmp_blocks = num_blocks,
                                                   .num_documents = 1,
                                                   .outputs = outputs,
                                                   .queries_gradients = {dq.as<float>(), true},
                                                   .d_summaries = d_summaries.as<float>(),
                                                   .scratch = scratch.as()};
  const auto time = [&](const auto& stage, const auto& params) {
    return MedianMilliseconds(
        flush, [&] { return stage.Choose(dims, device.path)(params, device, nullptr); });
  };
  const double window_ms = time(kAttendWindowBackward, window);
  const double summaries_ms = time(kAttendSummariesBackward, summaries);
  double seen = 0, seen_summaries = 0;
  for (int64_t t = 0; t < num_tokens; ++t) {
    seen += static_cast<double>(std::min<int64_t>(t + 1, dims.window_tokens));
    if (t + 1 >= dims.compress_block_tokens) {
      seen_summaries += (t + 1 - dims.compress_block_tokens) / dims.compress_stride_tokens + 1;
    }
  }
  const double flops = static_cast<double>(hq * 2 * (3 * dk + 2 * dv));
  std::printf("%8ld %9.3f %6.0f %9.3f %6.0f %9.3f\n", static_cast<long>(num_tokens), window_ms,
              seen * flops / window_ms * 1e-9, summaries_ms,
              seen_summaries * flops / summaries_ms * 1e-9, window_ms + summaries_ms);
  std::fflush(stdout);
}

}  // namespace
}  // namespace nsa::kernels::cuda

int main(int argc, char** argv) {
  using namespace nsa::kernels::cuda;  // NOLINT
  if (!HasHopperGpu()) {
    std::printf("no Hopper GPU\n");
    return 0;
  }
  int dk = 128, dv = 128;
  std::vector<int64_t> lengths;
  for (int i = 1; i < argc; ++i) {
    if (std::sscanf(argv[i], "--dims=%d,%d", &dk, &dv) != 2) lengths.push_back(std::atoll(argv[i]));
  }
  if (lengths.empty()) lengths = {16384, 32768, 65536, 131072};
  Device device{0, 0, Path::kHopper};
  cudaDeviceGetAttribute(&device.num_sms, cudaDevAttrMultiProcessorCount, 0);
  const TestMemory flush(kFlushBytes);
  // bf16 of about a normal distribution.
  std::vector<uint16_t> some(kDistinctValues);
  std::minstd_rand random;
  std::normal_distribution<float> normal;
  for (uint16_t& value : some) {
    const float x = normal(random);
    uint32_t bits;
    static_assert(sizeof(bits) == sizeof(x));
    std::memcpy(&bits, &x, sizeof(bits));
    value = static_cast<uint16_t>((bits + 0x8000) >> 16);
  }
  std::printf("%8s %9s %6s %9s %6s %9s\n", "tokens", "window ms", "TF/s", "summaries", "TF/s",
              "both");
  for (const int64_t length : lengths) Run(Dims(dk, dv), length, device, some, flush);
  return 0;
}
