// Times the kernels of the compressed branch on one GPU: bf16, 64 query and 4 kv heads of 128,
// n 16, one document. Usage: score_select_benchmark [--blocks=l,d,l'] [tokens...], 32,16,64 if not
// said.
//
// Each figure is the median of 10 runs with a cold L2. TFLOP/s count what a query sees only. "rank"
// is of the kernel for any dims where Hopper's does not serve; "any" is all of it by such kernels.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "kernels/cuda/score_select_stages.h"
#include "kernels/cuda/score_select_testing.h"

namespace nsa::kernels::cuda {
namespace {

constexpr int kRuns = 10;
constexpr size_t kFlushBytes = size_t{256} << 20;
constexpr int64_t kDistinctTokens = 8192;  // of q; the rest repeats them

// But for the blocks, what all shapes have in common.
constexpr AttentionDims kDims{.dtype = DType::kBF16,
                              .num_q_heads = 64,
                              .num_kv_heads = 4,
                              .head_dim_qk = 128,
                              .head_dim_v = 128,
                              .compress_block_tokens = 32,
                              .compress_stride_tokens = 16,
                              .select_block_tokens = 64,
                              .num_selected_blocks = 16,
                              .num_initial_blocks = 1,
                              .num_local_blocks = 2,
                              .window_tokens = 512,
                              .softmax_scale = 0.08838834764831845f};

// bf16 values of about a normal distribution: a sum of uniform ones, from SplitMix64.
std::vector<uint16_t> RandomValues(int64_t count, uint64_t seed) {
  std::vector<uint16_t> values(count);
  for (uint16_t& value : values) {
    uint64_t z = seed += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    z ^= z >> 31;
    float sum = -2.0f;
    for (int i = 0; i < 4; ++i) sum += static_cast<float>(z >> 16 * i & 0xffff) * 0x1p-16f;
    const float normal = sum * 1.7320508f;
    uint32_t bits;
    std::memcpy(&bits, &normal, sizeof(bits));
    value = static_cast<uint16_t>((bits + 0x8000) >> 16);
  }
  return values;
}

// Of `run`, with `before` outside the time.
double MedianMilliseconds(const TestMemory& flush, const std::function<cudaError_t()>& before,
                          const std::function<cudaError_t()>& run) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<float> times;
  for (int i = 0; i < kRuns + 2; ++i) {
    cudaError_t error = before();
    flush.Fill(i);
    cudaEventRecord(begin);
    if (error == cudaSuccess) error = run();
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
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void Run(const AttentionDims& dims, int64_t num_tokens, int num_sms,
         const std::vector<uint16_t>& some_q, const TestMemory& flush) {
  const int64_t q_row = int64_t{dims.num_q_heads} * dims.head_dim_qk;
  const int64_t kv_row = int64_t{dims.num_kv_heads} * dims.head_dim_qk;
  const int64_t num_blocks =
      (num_tokens - dims.compress_block_tokens) / dims.compress_stride_tokens + 1;
  const Document document{
      .token_begin = 0,
      .num_tokens = num_tokens,
      .cmp_block_begin = 0,
      .num_cmp_blocks = num_blocks,
      .slc_block_begin = 0,
      .num_slc_blocks = (num_tokens + dims.select_block_tokens - 1) / dims.select_block_tokens};
  const Segment segment{
      .row = 0, .num_tokens = num_tokens, .position = 0, .document = 0, .is_halo = 0};
  const TestMemory documents(&document, sizeof(document)), segments(&segment, sizeof(segment));
  const TestMemory q(num_tokens * q_row * 2), o(num_tokens * q_row * 2);
  const TestMemory lse(num_tokens * dims.num_q_heads * sizeof(float));
  const TestMemory indices(num_tokens * dims.num_kv_heads * 16 * sizeof(int32_t));
  for (int64_t t = 0; t < num_tokens; t += kDistinctTokens) {
    cudaMemcpy(q.as<uint16_t>() + t * q_row, some_q.data(),
               std::min(kDistinctTokens, num_tokens - t) * q_row * 2, cudaMemcpyHostToDevice);
  }
  const std::vector<uint16_t> k = RandomValues(num_blocks * kv_row, 2);
  const std::vector<uint16_t> v = RandomValues(num_blocks * kv_row, 3);
  const TestMemory kc(k.data(), k.size() * 2), vc(v.data(), v.size() * 2);
  ScoreAndSelectParams params{.dims = dims,
                              .queries = {.q = {q.as(), q_row, dims.head_dim_qk},
                                          .segments = segments.as<Segment>(),
                                          .num_segments = 1,
                                          .documents = documents.as<Document>(),
                                          .num_tokens = num_tokens,
                                          .kv_heads = dims.all_kv_heads()},
                              .kc = {kc.as(), kv_row, dims.head_dim_qk},
                              .vc = {vc.as(), kv_row, dims.head_dim_v},
                              .num_cmp_blocks = num_blocks,
                              .num_documents = 1,
                              .o_cmp = {o.as(), q_row, dims.head_dim_v},
                              .lse_cmp = lse.as<float>(),
                              .block_indices = indices.as<int32_t>(),
                              .scratch = nullptr};
  const ScoreLimits limits{num_tokens, 1, num_blocks, 1};
  const TestMemory scratch(ScoreSelectScratchBytes(dims, limits));
  params.scratch = scratch.as();
  ScoreSelectScratch carved = CarveScoreSelect(dims, limits, scratch.as());
  carved.lse = params.lse_cmp;

  const auto nothing = [] { return cudaSuccess; };
  const auto prepares = [&] { return LaunchPrepareScoreSelect(params, carved, nullptr); };
  const Device device{num_sms, /*max_shared_bytes=*/0, Path::kHopper};
  const double all = MedianMilliseconds(
      flush, nothing, [&] { return LaunchScoreSelectFast(params, device, nullptr); });
  const double prepare = MedianMilliseconds(flush, nothing, prepares);
  const double attend = MedianMilliseconds(
      flush, prepares, [&] { return LaunchAttendSummaries(params, carved, num_sms, nullptr); });
  const auto packs = [&] {
    return HasFastRank(dims) ? prepares() : LaunchPackKeysAny(params, carved, nullptr);
  };
  const double rank = MedianMilliseconds(flush, packs, [&] {
    return HasFastRank(dims) ? LaunchRankBlocks(params, carved, num_sms, nullptr)
                             : LaunchRankBlocksAny(params, carved, nullptr);
  });
  const double any = MedianMilliseconds(
      flush, nothing, [&] { return LaunchScoreSelectAny(params, device, nullptr); });

  double visible = 0;
  for (int64_t t = dims.compress_block_tokens - 1; t < num_tokens; ++t) {
    visible += (t + 1 - dims.compress_block_tokens) / dims.compress_stride_tokens + 1;
  }
  const double product = visible * dims.num_q_heads * dims.head_dim_qk * 2;  // FLOP of q.kc
  std::printf("%8ld %9.3f %9.3f %9.3f %6.0f %9.3f %6.0f %9.3f\n", static_cast<long>(num_tokens),
              all, prepare, attend, 2 * product / attend * 1e-9, rank, product / rank * 1e-9, any);
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
  int num_sms = 0;
  cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0);
  nsa::kernels::AttentionDims dims = kDims;
  std::vector<int64_t> lengths;
  for (int i = 1; i < argc; ++i) {
    const int num_read = std::sscanf(argv[i], "--blocks=%d,%d,%d", &dims.compress_block_tokens,
                                     &dims.compress_stride_tokens, &dims.select_block_tokens);
    if (num_read == 0) lengths.push_back(std::atoll(argv[i]));
  }
  if (lengths.empty()) lengths = {8192, 16384, 32768, 65536, 131072};
  const TestMemory flush(kFlushBytes);
  const std::vector<uint16_t> q =
      RandomValues(kDistinctTokens * kDims.num_q_heads * kDims.head_dim_qk, 1);
  std::printf("l %d d %d l' %d\n%8s %9s %9s %9s %6s %9s %6s %9s\n", dims.compress_block_tokens,
              dims.compress_stride_tokens, dims.select_block_tokens, "tokens", "all ms", "prepare",
              "attend", "TF/s", "rank", "TF/s", "any");
  for (const int64_t length : lengths) Run(dims, length, num_sms, q, flush);
  return 0;
}
