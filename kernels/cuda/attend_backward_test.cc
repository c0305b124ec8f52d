// The backward of the window and of the compressed branch on the GPU: against fp64, and against
// itself under other layouts of the same tokens.
#include "kernels/cuda/attend_backward.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cuda/dispatch.h"
#include "kernels/cuda/score_select_testing.h"
#include "tests/testing/compare.h"
#include "tests/testing/generate.h"
#include "tests/testing/numeric.h"
#include "tests/testing/random.h"

namespace nsa::kernels::cuda {
namespace {

using reference::ReferenceConfig;

enum class Branch { kWindow, kSummaries };

// Dense tensors in global order, of values that dims.dtype has.
struct Problem {
  Branch branch;
  AttentionDims dims;
  std::vector<Document> documents;
  std::vector<double> q, d_o;           // [S,Hq,D]
  std::vector<double> k, v;             // [K,Hkv,D] of tokens or of summaries
  std::vector<float> lse, gate, delta;  // [S,Hq]
  std::vector<double> dq, dk, dv;       // what is expected; as q, k, v

  int64_t num_tokens() const { return documents.back().token_begin + documents.back().num_tokens; }
  int64_t num_keys() const {
    const Document& last = documents.back();
    return branch == Branch::kWindow ? num_tokens() : last.cmp_block_begin + last.num_cmp_blocks;
  }
  int64_t FirstKey(const Document& document) const {
    return branch == Branch::kWindow ? document.token_begin : document.cmp_block_begin;
  }
};

// Row `row` of `head`, of `dim` values.
template <class Values>
auto* RowOf(Values& values, int64_t row, int64_t num_heads, int64_t head, int64_t dim) {
  return values.data() + (row * num_heads + head) * dim;
}

double Dot(const double* a, const double* b, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

// What a query head gives to the gradients of its kv head, [K,D].
struct HeadGradients {
  std::vector<double> dk, dv;
};

// Forward and backward of one query head, in fp64; lse and delta are rounded before they are used.
void AttendHead(int64_t head, Problem* problem, HeadGradients* gradients) {
  Problem& p = *problem;
  const int64_t hq = p.dims.num_q_heads, hkv = p.dims.num_kv_heads, kv_head = head / (hq / hkv);
  const int64_t dk = p.dims.head_dim_qk, dv = p.dims.head_dim_v;
  const double scale = p.dims.softmax_scale;
  gradients->dk.resize(p.num_keys() * dk);
  gradients->dv.resize(p.num_keys() * dv);
  for (const Document& document : p.documents) {
    for (int64_t t = 0; t < document.num_tokens; ++t) {
      int64_t begin = std::max<int64_t>(t - p.dims.window_tokens + 1, 0), end = t + 1;
      if (p.branch == Branch::kSummaries) {
        begin = end = 0;
        while (end < document.num_cmp_blocks &&
               end * p.dims.compress_stride_tokens + p.dims.compress_block_tokens - 1 <= t) {
          ++end;
        }
      }
      const int64_t row = document.token_begin + t;
      const double* const q = RowOf(p.q, row, hq, head, dk);
      const double* const d_o = RowOf(p.d_o, row, hq, head, dv);
      const auto key = [&](int64_t i) { return p.FirstKey(document) + i; };
      std::vector<double> logits, dp;
      double max = -INFINITY, sum = 0;
      for (int64_t i = begin; i < end; ++i) {
        logits.push_back(scale * Dot(q, RowOf(p.k, key(i), hkv, kv_head, dk), dk));
        dp.push_back(Dot(d_o, RowOf(p.v, key(i), hkv, kv_head, dv), dv));
        max = std::max(max, logits.back());
      }
      for (double logit : logits) sum += std::exp(logit - max);
      const float lse = end > begin ? static_cast<float>(max + std::log(sum)) : -INFINITY;
      const double gate = p.gate[row * hq + head];
      double mean_dp = 0;
      for (size_t i = 0; i < dp.size(); ++i) mean_dp += std::exp(logits[i] - lse) * dp[i];
      const float delta = static_cast<float>(gate * mean_dp);
      p.lse[row * hq + head] = lse;
      p.delta[row * hq + head] = delta;
      double* const dq_row = RowOf(p.dq, row, hq, head, dk);
      for (int64_t i = begin; i < end; ++i) {
        const double probability = std::exp(logits[i - begin] - lse);
        const double ds = scale * probability * (gate * dp[i - begin] - delta);
        const double* const k = RowOf(p.k, key(i), hkv, kv_head, dk);
        double* const dk_row = &gradients->dk[key(i) * dk];
        double* const dv_row = &gradients->dv[key(i) * dv];
        for (int64_t c = 0; c < dk; ++c) dq_row[c] += ds * k[c];
        for (int64_t c = 0; c < dk; ++c) dk_row[c] += ds * q[c];
        for (int64_t c = 0; c < dv; ++c) dv_row[c] += gate * probability * d_o[c];
      }
    }
  }
}

// Without dq, dk, dv, and with lse and delta that need not fit.
Problem MakeInputs(Branch branch, const ReferenceConfig& config,
                   const std::vector<int64_t>& cu_seqlens, DType dtype, uint64_t seed) {
  Problem p;
  p.branch = branch;
  p.dims = test::MakeDims(config, dtype);
  p.documents = test::MakeDocuments(config, cu_seqlens);
  test::Random random(seed);
  const auto normal = [&](int64_t rows, int64_t size) {
    std::vector<double> values(rows * size);
    for (double& value : values) value = random.Normal();
    return test::Rounded(dtype, values);
  };
  const int64_t hq = config.num_q_heads, hkv = config.num_kv_heads, s = p.num_tokens();
  p.q = normal(s * hq, config.head_dim_qk);
  p.d_o = normal(s * hq, config.head_dim_v);
  p.k = normal(p.num_keys() * hkv, config.head_dim_qk);
  p.v = normal(p.num_keys() * hkv, config.head_dim_v);
  p.gate.resize(s * hq);
  for (float& gate : p.gate) gate = static_cast<float>(random.Uniform());
  p.lse.assign(s * hq, 5.0f);
  p.delta.assign(s * hq, 0.1f);
  return p;
}

Problem MakeProblem(Branch branch, const ReferenceConfig& config,
                    const std::vector<int64_t>& cu_seqlens, DType dtype, uint64_t seed) {
  Problem p = MakeInputs(branch, config, cu_seqlens, dtype, seed);
  p.dq.resize(p.q.size());
  p.dk.resize(p.k.size());
  p.dv.resize(p.v.size());
  const int64_t hq = config.num_q_heads, hkv = config.num_kv_heads;
  std::vector<HeadGradients> of_heads(hq);
  std::vector<std::thread> threads;
  for (int64_t h = 0; h < hq; ++h) threads.emplace_back(AttendHead, h, &p, &of_heads[h]);
  for (std::thread& thread : threads) thread.join();
  const auto add = [&](const std::vector<double>& of_head, int64_t head, int64_t dim,
                       std::vector<double>* sums) {
    for (int64_t i = 0; i < static_cast<int64_t>(of_head.size()); ++i) {
      (*sums)[(i / dim * hkv + head / (hq / hkv)) * dim + i % dim] += of_head[i];
    }
  };
  for (int64_t h = 0; h < hq; ++h) {
    add(of_heads[h].dk, h, config.head_dim_qk, &p.dk);
    add(of_heads[h].dv, h, config.head_dim_v, &p.dv);
  }
  return p;
}

// None of it may show in results, `path` apart.
struct Layout {
  int64_t segment_tokens = int64_t{1} << 40;  // at most; their rows lie last segment first
  bool use_halo = false;                      // of keys, every second segment's
  bool one_kv_head_a_call = false;
  int64_t row_padding = 0;  // elements between the rows of activations
  int64_t query_begin = 0;  // tokens before it, of the first document, are no queries
  bool adds = false;        // to ones
};

struct Gradients {
  cudaError_t error = cudaSuccess;
  std::vector<double> dq, dk, dv;  // as q, k, v; less what they were added to
};

constexpr int kPoison = 0xff;  // a NaN in every type

// Rows of a tensor, last segment first; those of halos in a tensor of their own.
struct Placement {
  std::vector<Segment> segments;
  std::vector<int64_t> row;  // of each token from the first one on
  std::vector<bool> is_halo;
  int64_t num_rows[2] = {0, 0};
};

Placement Place(const Problem& problem, const Layout& layout, int64_t query_begin, bool use_halo) {
  Placement place;
  for (size_t d = 0; d < problem.documents.size(); ++d) {
    int64_t position = d == 0 ? query_begin : 0;
    while (position < problem.documents[d].num_tokens) {
      const int64_t count =
          std::min(layout.segment_tokens, problem.documents[d].num_tokens - position);
      place.segments.push_back(
          {0, count, position, static_cast<int32_t>(d), use_halo && place.segments.size() % 2});
      position += count;
    }
  }
  for (auto segment = place.segments.rbegin(); segment != place.segments.rend(); ++segment) {
    segment->row = place.num_rows[segment->is_halo];
    place.num_rows[segment->is_halo] += segment->num_tokens;
  }
  for (const Segment& segment : place.segments) {
    for (int64_t i = 0; i < segment.num_tokens; ++i) {
      place.row.push_back(segment.row + i);
      place.is_halo.push_back(segment.is_halo != 0);
    }
  }
  return place;
}

// Rows of `bytes` bytes from `first_row` of a dense tensor on, to their places, `stride` apart.
std::vector<std::byte> Scatter(const std::byte* dense, int64_t bytes, int64_t stride,
                               const Placement& place, bool halo) {
  std::vector<std::byte> rows(place.num_rows[halo] * stride, std::byte{kPoison});
  for (size_t i = 0; i < place.row.size(); ++i) {
    if (place.is_halo[i] == halo) {
      std::memcpy(&rows[place.row[i] * stride], dense + i * bytes, bytes);
    }
  }
  return rows;
}

class DeviceRows {
 public:
  DeviceRows(DType dtype, const std::vector<double>& values, int64_t first_row, int64_t row_size,
             int64_t padding, const Placement& place)
      : stride(row_size + padding) {
    const test::Bytes bytes = test::Encode(dtype, values);
    const int64_t row_bytes = row_size * SizeOf(dtype);
    const auto make = [&](bool halo) {
      return Scatter(bytes.data() + first_row * row_bytes, row_bytes, stride * SizeOf(dtype), place,
                     halo);
    };
    const std::vector<std::byte> rows[2] = {make(false), make(true)};
    own = std::make_unique<TestMemory>(rows[0].data(), rows[0].size());
    halo = std::make_unique<TestMemory>(rows[1].data(), rows[1].size());
  }
  int64_t stride;
  std::unique_ptr<TestMemory> own, halo;
};

// f32 rows to be filled by a kernel.
class GradientMemory {
 public:
  GradientMemory(int64_t num_rows, int64_t row_size, bool adds)
      : row_size_(row_size), adds_(adds), memory_(num_rows * row_size * sizeof(float)) {
    memory_.Fill(kPoison);
    if (!adds) return;
    const std::vector<float> ones(num_rows * row_size, 1.0f);
    cudaMemcpy(memory_.as(), ones.data(), memory_.num_bytes(), cudaMemcpyHostToDevice);
  }
  float* data() const { return memory_.as<float>(); }
  // The rows at their places, to `dense` [rows of `place`, row_size].
  void Gather(const Placement& place, bool halo, int64_t first_row,
              std::vector<double>* dense) const {
    const std::vector<std::byte> bytes = memory_.ToHost();
    const float* const values = reinterpret_cast<const float*>(bytes.data());
    for (size_t i = 0; i < place.row.size(); ++i) {
      if (place.is_halo[i] != halo) continue;
      for (int64_t c = 0; c < row_size_; ++c) {
        (*dense)[(first_row + i) * row_size_ + c] =
            values[place.row[i] * row_size_ + c] - (adds_ ? 1.0 : 0.0);
      }
    }
  }

 private:
  int64_t row_size_;
  bool adds_;
  TestMemory memory_;
};

TestMemory Upload(const std::vector<std::byte>& bytes) { return {bytes.data(), bytes.size()}; }

Gradients RunStage(const Problem& problem, Path path, const Layout& layout = {}) {
  const AttentionDims& dims = problem.dims;
  const bool is_window = problem.branch == Branch::kWindow;
  const int64_t hq = dims.num_q_heads, hkv = dims.num_kv_heads;
  const int64_t dk = dims.head_dim_qk, dv = dims.head_dim_v;
  const int64_t first = layout.query_begin, t = problem.num_tokens() - first;
  const Placement queries = Place(problem, layout, first, false);
  Placement keys = Place(problem, layout, 0, layout.use_halo);
  if (!is_window) {
    keys = {};
    for (int64_t i = 0; i < problem.num_keys(); ++i) keys.row.push_back(i);
    keys.is_halo.resize(problem.num_keys(), false);
    keys.num_rows[0] = problem.num_keys();
  }
  const DeviceRows q(dims.dtype, problem.q, first, hq * dk, layout.row_padding, queries);
  const DeviceRows d_o(dims.dtype, problem.d_o, first, hq * dv, layout.row_padding, queries);
  const DeviceRows k(dims.dtype, problem.k, 0, hkv * dk, layout.row_padding, keys);
  const DeviceRows v(dims.dtype, problem.v, 0, hkv * dv, layout.row_padding, keys);
  const auto statistics = [&](const std::vector<float>& values) {
    return Upload(Scatter(reinterpret_cast<const std::byte*>(values.data() + first * hq), hq * 4,
                          hq * 4, queries, false));
  };
  const TestMemory lse = statistics(problem.lse), gate = statistics(problem.gate);
  const TestMemory delta = statistics(problem.delta);
  const TestMemory query_segments(queries.segments.data(),
                                  queries.segments.size() * sizeof(Segment));
  const TestMemory key_segments(keys.segments.data(), keys.segments.size() * sizeof(Segment));
  const TestMemory documents(problem.documents.data(), problem.documents.size() * sizeof(Document));
  const GradientMemory dk_own(keys.num_rows[0], hkv * dk, layout.adds);
  const GradientMemory dk_halo(keys.num_rows[1], hkv * dk, layout.adds);
  const GradientMemory dv_own(keys.num_rows[0], hkv * dv, layout.adds);
  const GradientMemory dv_halo(keys.num_rows[1], hkv * dv, layout.adds);
  const GradientMemory d_summaries(keys.num_rows[0], hkv * (dk + dv), false);
  const int32_t num_segments = static_cast<int32_t>(queries.segments.size());
  const int32_t num_documents = static_cast<int32_t>(problem.documents.size());
  const BackwardLimits limits = {.num_tokens = t,
                                 .num_segments = num_segments,
                                 .num_kv_heads = static_cast<int32_t>(hkv),
                                 .num_cmp_blocks = problem.num_keys(),
                                 .num_slc_blocks = 0,
                                 .num_records = 0,
                                 .num_documents = num_documents};
  const TestMemory scratch(is_window ? WindowBackwardScratchBytes(dims, limits)
                                     : SummariesBackwardScratchBytes(dims, limits));
  Device device{0, 0, path};
  cudaDeviceGetAttribute(&device.num_sms, cudaDevAttrMultiProcessorCount, 0);

  Gradients gradients;
  gradients.dq.assign(problem.q.size(), 0.0);
  gradients.dk.assign(problem.k.size(), 0.0);
  gradients.dv.assign(problem.v.size(), 0.0);
  for (int32_t head = 0; head < hkv; head += layout.one_kv_head_a_call ? 1 : hkv) {
    const HeadRange kv_heads = {head,
                                layout.one_kv_head_a_call ? head + 1 : static_cast<int32_t>(hkv)};
    const int64_t group_row = kv_heads.size() * hq / hkv * dk;
    const GradientMemory dq(t, group_row, layout.adds);
    scratch.Fill(kPoison);
    const Queries call_queries = {.q = {q.own->as(), q.stride, dk},
                                  .segments = query_segments.as<Segment>(),
                                  .num_segments = num_segments,
                                  .documents = documents.as<Document>(),
                                  .num_tokens = t,
                                  .kv_heads = kv_heads};
    const OutputGradients outputs = {.d_o = {d_o.own->as(), d_o.stride, dv},
                                     .lse = lse.as<float>(),
                                     .gate = gate.as<float>(),
                                     .delta = delta.as<float>()};
    const auto launch = [&](const auto& stage, const auto& params) {
      gradients.error = stage.Choose(dims, path)(params, device, nullptr);
    };
    if (is_window) {
      const auto tokens = [&](const DeviceRows& rows, int64_t dim) {
        return TokenRows{{rows.own->as(), rows.stride, dim},
                         {rows.halo->as(), rows.stride, dim},
                         key_segments.as<Segment>(),
                         static_cast<int32_t>(keys.segments.size())};
      };
      launch(kAttendWindowBackward,
             AttendWindowBackwardParams{.dims = dims,
                                        .queries = call_queries,
                                        .k = tokens(k, dk),
                                        .v = tokens(v, dv),
                                        .outputs = outputs,
                                        .queries_gradients = {dq.data(), layout.adds},
                                        .dk = {dk_own.data(), dk_halo.data(), layout.adds},
                                        .dv = {dv_own.data(), dv_halo.data(), layout.adds},
                                        .scratch = scratch.as()});
    } else {
      launch(kAttendSummariesBackward,
             AttendSummariesBackwardParams{.dims = dims,
                                           .queries = call_queries,
                                           .kc = {k.own->as(), k.stride, dk},
                                           .vc = {v.own->as(), v.stride, dv},
                                           .num_cmp_blocks = problem.num_keys(),
                                           .num_documents = num_documents,
                                           .outputs = outputs,
                                           .queries_gradients = {dq.data(), layout.adds},
                                           .d_summaries = d_summaries.data(),
                                           .scratch = scratch.as()});
    }
    if (gradients.error == cudaSuccess) gradients.error = cudaDeviceSynchronize();
    if (gradients.error != cudaSuccess) return gradients;
    std::vector<double> rows((first + t) * group_row);
    dq.Gather(queries, false, first, &rows);
    for (int64_t row = first; row < first + t; ++row) {
      std::copy_n(&rows[row * group_row], group_row,
                  RowOf(gradients.dq, row, hq, kv_heads.begin * hq / hkv, dk));
    }
  }
  if (is_window) {
    dk_own.Gather(keys, false, 0, &gradients.dk);
    dk_halo.Gather(keys, true, 0, &gradients.dk);
    dv_own.Gather(keys, false, 0, &gradients.dv);
    dv_halo.Gather(keys, true, 0, &gradients.dv);
  } else {
    const int64_t row_size = hkv * (dk + dv);
    std::vector<double> rows(problem.num_keys() * row_size);
    d_summaries.Gather(keys, false, 0, &rows);
    for (int64_t i = 0; i < problem.num_keys(); ++i) {
      std::copy_n(&rows[i * row_size], hkv * dk, &gradients.dk[i * hkv * dk]);
      std::copy_n(&rows[i * row_size + hkv * dk], hkv * dv, &gradients.dv[i * hkv * dv]);
    }
  }
  return gradients;
}

class AttendBackwardTest : public ::testing::TestWithParam<std::tuple<Path, Branch>> {
 protected:
  void SetUp() override {
    if (path() == Path::kHopper && !HasHopperGpu()) GTEST_SKIP() << "no Hopper GPU";
    if (!HasGpu()) GTEST_SKIP() << "no GPU";
  }
  static Path path() { return std::get<0>(GetParam()); }
  static Branch branch() { return std::get<1>(GetParam()); }

  Gradients RunHere(const Problem& problem, const Layout& layout = {}) {
    Gradients gradients = RunStage(problem, path(), layout);
    EXPECT_EQ(gradients.error, cudaSuccess) << cudaGetErrorString(gradients.error);
    return gradients;
  }

  void ExpectAgreement(const ReferenceConfig& config, const std::vector<int64_t>& cu_seqlens,
                       DType dtype, uint64_t seed, const Layout& layout = {}) {
    SCOPED_TRACE(test::Describe(config));
    const Problem problem = MakeProblem(branch(), config, cu_seqlens, dtype, seed);
    const Gradients out = RunHere(problem, layout);
    if (out.error != cudaSuccess) return;
    const double tolerance = test::DefaultTolerance(dtype);
    const auto expect = [&](const char* name, const std::vector<double>& wanted,
                            const std::vector<double>& actual, int64_t dim) {
      // Where queries see a single key, dS is a rounding error about zero.
      const auto is_noise = [](double value) { return std::abs(value) < 1e-5; };
      if (std::all_of(wanted.begin(), wanted.end(), is_noise)) {
        EXPECT_TRUE(std::all_of(actual.begin(), actual.end(), is_noise)) << name;
      } else {
        EXPECT_TRUE(test::Close(name, wanted, actual, dim, tolerance));
      }
    };
    expect("dq", problem.dq, out.dq, config.head_dim_qk);
    expect("dk", problem.dk, out.dk, config.head_dim_qk);
    expect("dv", problem.dv, out.dv, config.head_dim_v);
  }
};

INSTANTIATE_TEST_SUITE_P(
    Stages, AttendBackwardTest,
    ::testing::Combine(::testing::Values(Path::kHopper, Path::kPortable),
                       ::testing::Values(Branch::kWindow, Branch::kSummaries)),
    [](const auto& info) {
      return std::string(std::get<0>(info.param) == Path::kHopper ? "Hopper" : "Portable") +
             (std::get<1>(info.param) == Branch::kWindow ? "Window" : "Summaries");
    });

ReferenceConfig Config(int64_t q_heads, int64_t kv_heads, int64_t dk, int64_t dv) {
  ReferenceConfig config;
  config.num_q_heads = q_heads;
  config.num_kv_heads = kv_heads;
  config.head_dim_qk = dk;
  config.head_dim_v = dv;
  config.window_tokens = 70;
  return config;
}

TEST_P(AttendBackwardTest, HeadDims) {
  for (int64_t dk : {64, 128, 192, 256}) {
    for (int64_t dv : {64, 128, 192, 256}) {
      for (DType dtype : {DType::kBF16, DType::kF16}) {
        ExpectAgreement(Config(8, 2, dk, dv), {0, 433}, dtype, 1);
      }
    }
  }
}

TEST_P(AttendBackwardTest, GroupSizes) {
  for (int64_t group_size : {1, 3, 5, 16, 24, 48, 64, 130}) {
    ExpectAgreement(Config(group_size, 1, 128, 128), {0, 400}, DType::kBF16, 2);
  }
}

TEST_P(AttendBackwardTest, DocumentsOfAnyLength) {
  for (int64_t dim : {64, 128}) {
    ExpectAgreement(Config(8, 2, dim, dim), {0, 1, 2, 33, 65, 97, 98, 161, 225, 290, 802, 818, 833},
                    DType::kF16, 3);
    ExpectAgreement(Config(8, 2, dim, dim), {0, 1}, DType::kBF16, 4);
  }
}

TEST_P(AttendBackwardTest, WindowsAndBlocks) {
  struct Sizes {
    int64_t window, l, d;
  };
  for (const Sizes& sizes : {Sizes{1, 16, 16}, Sizes{2, 64, 16}, Sizes{63, 64, 64},
                             Sizes{64, 128, 32}, Sizes{129, 48, 48}, Sizes{100000, 320, 16}}) {
    ReferenceConfig config = Config(16, 1, 64, 64);
    config.window_tokens = sizes.window;
    config.compress_block_tokens = sizes.l;
    config.compress_stride_tokens = sizes.d;
    config.select_block_tokens = 4 * sizes.d;
    ExpectAgreement(config, {0, 400, 500}, DType::kF16, 5);
  }
}

// Several tiles of keys that a query sees whole.
TEST_P(AttendBackwardTest, LongSequences) {
  for (auto [dk, dv] : {std::pair<int64_t, int64_t>{64, 64}, {128, 128}, {192, 128}}) {
    ReferenceConfig config = Config(8, 2, dk, dv);
    config.window_tokens = 300;
    config.compress_block_tokens = config.compress_stride_tokens = 16;
    ExpectAgreement(config, {0, 2300}, DType::kBF16, 6);
  }
}

TEST_P(AttendBackwardTest, AddsToWhatIsThere) {
  for (int64_t dk : {128, 256}) {
    ExpectAgreement(Config(8, 2, dk, 128), {0, 300, 500}, DType::kBF16, 8, {.adds = true});
  }
}

TEST_P(AttendBackwardTest, KeysWithoutQueriesGetZeros) {
  const Problem problem = MakeInputs(branch(), Config(8, 2, 128, 128), {0, 300}, DType::kBF16, 9);
  const Gradients out = RunHere(problem, {.query_begin = 300});
  EXPECT_EQ(out.dk, std::vector<double>(problem.k.size()));
  EXPECT_EQ(out.dv, std::vector<double>(problem.v.size()));
}

TEST_P(AttendBackwardTest, LayoutsGiveTheSameValues) {
  for (const Layout& layout : {Layout{.segment_tokens = 1},
                               Layout{.segment_tokens = 7, .use_halo = true, .row_padding = 8},
                               Layout{.segment_tokens = 100, .one_kv_head_a_call = true},
                               Layout{.segment_tokens = 90, .use_halo = true, .adds = true}}) {
    ExpectAgreement(Config(8, 2, 128, 128), {0, 1, 40, 311, 601}, DType::kF16, 9, layout);
  }
}

TEST_P(AttendBackwardTest, RunsAndCutsGiveTheSameBits) {
  for (auto [dk, dv] : {std::pair<int64_t, int64_t>{64, 64}, {128, 128}, {192, 128}, {256, 64}}) {
    ReferenceConfig config = Config(16, 2, dk, dv);
    config.window_tokens = 200;
    config.compress_block_tokens = config.compress_stride_tokens = 16;
    const Problem problem = MakeInputs(branch(), config, {0, 2300, 2400}, DType::kBF16, 10 + dk);
    const Gradients expected = RunHere(problem);
    if (HasFailure()) return;
    for (int i = 0; i < 5; ++i) {
      const Gradients again = RunHere(problem);
      EXPECT_TRUE(expected.dq == again.dq && expected.dk == again.dk && expected.dv == again.dv);
    }
    for (const Layout& layout :
         {Layout{.segment_tokens = 1}, Layout{.segment_tokens = 333, .one_kv_head_a_call = true}}) {
      EXPECT_TRUE(RunHere(problem, layout).dq == expected.dq) << layout.segment_tokens;
    }
    const Gradients part = RunHere(problem, {.segment_tokens = 210, .query_begin = 777});
    const size_t begin = 777 * 16 * dk;
    EXPECT_TRUE(std::equal(part.dq.begin() + begin, part.dq.end(), expected.dq.begin() + begin));
  }
}

}  // namespace
}  // namespace nsa::kernels::cuda
