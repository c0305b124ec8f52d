// Times a step of decoding on one GPU, replayed as a CUDA graph: bf16, 64 query and 4 kv heads of
// 128, l 32, d 16, l' 64, n 16, w 512, mean compression, one new token of each sequence, all of the
// same length. Usage: decode_benchmark [tokens,sequences...].
//
// Each figure is the mean over the replays, one behind the other, of the median of 5 rounds;
// replays take turns with so many sets of sequences that none finds its own in the L2. The columns
// are the graphs of the first stage, the first two, and all three, and the bytes that a step has to
// read by the time of all three.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/cuda/decode_work.h"
#include "kernels/cuda/dispatch.h"
#include "kernels/cuda/record_layout.h"

namespace nsa::kernels::cuda {
namespace {

constexpr int kRounds = 5;
constexpr int kReplays = 200;
constexpr int64_t kTurnBytes = int64_t{200} << 20;  // of all sets together, at least
constexpr int64_t kDistinctBytes = int64_t{64} << 20;

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

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define NSA_CHECK_CUDA(expression) Check(expression, #expression)

// Memory of values that are about normal, as bf16: the first of it over and over.
char* AllocateValues(int64_t num_bytes) {
  static const std::vector<uint16_t> kValues = [] {
    std::vector<uint16_t> values(kDistinctBytes / 2);
    uint64_t state = 1;
    for (uint16_t& value : values) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      float normal = -2.0f;
      for (int i = 0; i < 4; ++i)
        normal += static_cast<float>(state >> (16 * i) & 0xffff) * 0x1p-16f;
      uint32_t bits;
      std::memcpy(&bits, &normal, sizeof(bits));
      value = static_cast<uint16_t>(bits >> 16);
    }
    return values;
  }();
  char* memory = nullptr;
  NSA_CHECK_CUDA(cudaMalloc(&memory, num_bytes));
  for (int64_t begin = 0; begin < num_bytes; begin += kDistinctBytes) {
    const int64_t size = std::min(kDistinctBytes, num_bytes - begin);
    if (begin == 0) {
      NSA_CHECK_CUDA(cudaMemcpy(memory, kValues.data(), size, cudaMemcpyHostToDevice));
    } else {
      NSA_CHECK_CUDA(cudaMemcpy(memory + begin, memory, size, cudaMemcpyDeviceToDevice));
    }
  }
  return memory;
}

template <class T>
T* Upload(const std::vector<T>& values) {
  T* memory = nullptr;
  NSA_CHECK_CUDA(cudaMalloc(&memory, values.size() * sizeof(T)));
  NSA_CHECK_CUDA(
      cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return memory;
}

void Run(int64_t tokens, int64_t sequences, const Device& device) {
  const AttentionDims& d = kDims;
  const int64_t kv_row = int64_t{d.num_kv_heads} * (d.head_dim_qk + d.head_dim_v) * 2;
  const int64_t step_bytes =
      sequences * kv_row *
      (tokens / d.compress_stride_tokens + int64_t{d.num_selected_blocks} * d.select_block_tokens +
       d.window_tokens);
  const int64_t num_sets = std::max<int64_t>(1, kTurnBytes / step_bytes);
  const int64_t all = num_sets * sequences, max_tokens = tokens + 1;
  const int64_t max_pages = tokens / d.select_block_tokens + 1;
  const int64_t max_summary_pages = tokens / d.compress_stride_tokens / kSummaryPageBlocks + 1;
  const int64_t page_bytes = kv_row * d.select_block_tokens;
  const int64_t summary_page_bytes = kv_row * kSummaryPageBlocks;

  std::vector<void*> memory;
  const auto pages = [&](int64_t count, int64_t bytes) {
    char* const values = AllocateValues(count * bytes);
    memory.push_back(values);
    std::vector<void*> table(count);
    for (int64_t i = 0; i < count; ++i) table[i] = values + i * bytes;
    void** const on_device = Upload(table);
    memory.push_back(on_device);
    return on_device;
  };
  PageTables tables{};
  tables.slc = tables.win = tables.cmp = pages(all * max_pages, page_bytes);
  tables.summaries = pages(all * max_summary_pages, summary_page_bytes);
  tables.max_pages = max_pages;
  tables.max_summary_pages = max_summary_pages;

  const int64_t q_row = int64_t{d.num_q_heads} * d.head_dim_qk;
  char* const values = AllocateValues(sequences * (2 * q_row + kv_row) * 2);
  memory.push_back(values);
  const char* const k = values + sequences * q_row * 2;
  const char* const v = k + sequences * kv_row / 2;
  char* const o = values + sequences * (q_row * 2 + kv_row);
  float* const gate = Upload(std::vector<float>(sequences * d.num_q_heads * 3, 0.5f));
  memory.push_back(gate);
  int32_t* const indices =
      Upload(std::vector<int32_t>(sequences * d.num_kv_heads * d.num_selected_blocks, -1));
  memory.push_back(indices);
  const int64_t scratch_bytes = sequences * d.num_kv_heads * MakeDecodeScratch(d, max_tokens).bytes;
  char* const scratch = Upload(std::vector<char>(scratch_bytes));
  memory.push_back(scratch);

  cudaStream_t stream;
  NSA_CHECK_CUDA(cudaStreamCreate(&stream));
  cudaEvent_t begin, end;
  NSA_CHECK_CUDA(cudaEventCreate(&begin));
  NSA_CHECK_CUDA(cudaEventCreate(&end));
  double microseconds[3];
  for (int num_stages = 1; num_stages <= 3; ++num_stages) {
    std::vector<cudaGraphExec_t> graphs;
    for (int64_t set = 0; set < num_sets; ++set) {
      std::vector<DecodeRow> rows(sequences);
      for (int64_t i = 0; i < sequences; ++i) {
        rows[i] = {static_cast<int32_t>(set * sequences + i), tokens};
      }
      DecodeRow* const on_device = Upload(rows);
      memory.push_back(on_device);
      AppendTokensParams append{};
      append.dims = d;
      append.rows = on_device;
      append.num_rows = sequences;
      append.tables = tables;
      append.slc.k = {k, int64_t{d.num_kv_heads} * d.head_dim_qk, d.head_dim_qk};
      append.slc.v = {v, int64_t{d.num_kv_heads} * d.head_dim_v, d.head_dim_v};
      append.win = append.cmp = append.slc;
      append.compresses = true;
      append.compressor = Compressor::kMean;
      DecodeSelectParams select{};
      select.dims = d;
      select.rows = on_device;
      select.num_rows = sequences;
      select.max_tokens = max_tokens;
      select.tables = tables;
      select.q = {values, q_row, d.head_dim_qk};
      select.block_indices = indices;
      select.scratch = scratch;
      DecodeAttendParams attend{};
      attend.dims = d;
      attend.rows = on_device;
      attend.num_rows = sequences;
      attend.max_tokens = max_tokens;
      attend.tables = tables;
      attend.q = select.q;
      attend.block_indices = indices;
      attend.gate = gate;
      attend.gate_dtype = DType::kF32;
      attend.gate_row_stride = int64_t{d.num_q_heads} * 3;
      attend.gate_head_stride = 3;
      attend.o = {o, q_row, d.head_dim_v};
      attend.scratch = scratch;

      cudaGraph_t graph;
      cudaGraphExec_t exec;
      NSA_CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
      NSA_CHECK_CUDA(kAppendTokens.Choose(d, device.path)(append, device, stream));
      if (num_stages > 1)
        NSA_CHECK_CUDA(kDecodeSelect.Choose(d, device.path)(select, device, stream));
      if (num_stages > 2)
        NSA_CHECK_CUDA(kDecodeAttend.Choose(d, device.path)(attend, device, stream));
      NSA_CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
      NSA_CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
      NSA_CHECK_CUDA(cudaGraphDestroy(graph));
      graphs.push_back(exec);
    }
    std::vector<double> rounds;
    for (int round = 0; round <= kRounds; ++round) {
      NSA_CHECK_CUDA(cudaEventRecord(begin, stream));
      for (int i = 0; i < kReplays; ++i) {
        NSA_CHECK_CUDA(cudaGraphLaunch(graphs[i % graphs.size()], stream));
      }
      NSA_CHECK_CUDA(cudaEventRecord(end, stream));
      NSA_CHECK_CUDA(cudaStreamSynchronize(stream));
      float milliseconds = 0;
      NSA_CHECK_CUDA(cudaEventElapsedTime(&milliseconds, begin, end));
      if (round > 0) rounds.push_back(milliseconds * 1000.0 / kReplays);  // the first warms up
    }
    std::sort(rounds.begin(), rounds.end());
    microseconds[num_stages - 1] = rounds[kRounds / 2];
    for (cudaGraphExec_t graph : graphs) NSA_CHECK_CUDA(cudaGraphExecDestroy(graph));
  }
  std::printf("%8lld %5lld %8.1f %8.1f %8.1f %8.2f\n", static_cast<long long>(tokens),
              static_cast<long long>(sequences), microseconds[0], microseconds[1], microseconds[2],
              step_bytes / microseconds[2] * 1e-6);
  for (void* pointer : memory) NSA_CHECK_CUDA(cudaFree(pointer));
}

}  // namespace
}  // namespace nsa::kernels::cuda

int main(int argc, char** argv) {
  using nsa::kernels::cuda::Path;
  int major = 0, num_sms = 0, shared_bytes = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0);
  cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  const nsa::kernels::cuda::Device device{num_sms, shared_bytes,
                                          major == 9 ? Path::kHopper : Path::kPortable};
  std::printf("  tokens  seqs  append/us  +select  +attend  TB/s\n");
  std::vector<std::pair<int64_t, int64_t>> shapes;
  for (int i = 1; i < argc; ++i) {
    long long tokens = 0, sequences = 0;
    if (std::sscanf(argv[i], "%lld,%lld", &tokens, &sequences) != 2) return 1;
    shapes.emplace_back(tokens, sequences);
  }
  if (shapes.empty()) {
    for (int64_t tokens : {16, 64, 256, 1024}) {
      for (int64_t sequences : {1, 8, 32}) {
        if (tokens * sequences <= 8192) shapes.emplace_back(tokens * 1024, sequences);
      }
    }
  }
  for (const auto& [tokens, sequences] : shapes) {
    nsa::kernels::cuda::Run(tokens, sequences, device);
  }
  return 0;
}
