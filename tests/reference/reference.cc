#include "tests/reference/reference.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "tests/reference/dot.h"
#include "tests/reference/rows.h"

namespace nsa::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Softmax attention of one query head over `rows` of k and v (strides in elements). Writes the
// normalised probabilities and the output, returns the LSE; no rows: zeros and -inf.
double Attend(const double* q, const std::vector<int64_t>& rows, const double* k, int64_t k_stride,
              int64_t head_dim_qk, const double* v, int64_t v_stride, int64_t head_dim_v,
              double scale, std::vector<double>* p, double* o) {
  p->resize(rows.size());
  std::fill(o, o + head_dim_v, 0.0);
  if (rows.empty()) return -kInfinity;
  for (size_t i = 0; i < rows.size(); ++i) {
    (*p)[i] = scale * Dot(q, k + rows[i] * k_stride, head_dim_qk);
  }
  const double largest = *std::max_element(p->begin(), p->end());
  double sum = 0.0;
  for (double& x : *p) sum += x = std::exp(x - largest);
  for (size_t i = 0; i < rows.size(); ++i) {
    (*p)[i] /= sum;
    const double weight = (*p)[i];
    const double* row = v + rows[i] * v_stride;
    for (int64_t c = 0; c < head_dim_v; ++c) o[c] += weight * row[c];
  }
  return largest + std::log(sum);
}

struct Selection {
  std::vector<int64_t> blocks;  // ascending
  double threshold = kInfinity;
  double margin = kInfinity;
};

// Top-n over the candidates (blocks 0 .. scores.size() - 1, the last one holding the query).
Selection Select(const ReferenceConfig& config, const std::vector<double>& scores) {
  const int64_t num_candidates = static_cast<int64_t>(scores.size());
  Selection selection;
  std::vector<int64_t> free_blocks;
  for (int64_t j = 0; j < num_candidates; ++j) {
    const bool is_forced =
        j < config.num_initial_blocks || j > num_candidates - 1 - config.num_local_blocks;
    (is_forced ? selection.blocks : free_blocks).push_back(j);
  }
  const int64_t num_forced = static_cast<int64_t>(selection.blocks.size());
  const int64_t num_places = config.num_selected_blocks - num_forced;
  const int64_t num_free = static_cast<int64_t>(free_blocks.size());
  const int64_t num_taken = std::min(num_places, num_free);
  // Stable: of equal scores the lower index stays first.
  std::stable_sort(free_blocks.begin(), free_blocks.end(),
                   [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  if (num_taken > 0 && num_free > num_taken) {
    selection.threshold = scores[free_blocks[num_taken - 1]];
    selection.margin = selection.threshold - scores[free_blocks[num_taken]];
  }
  selection.blocks.insert(selection.blocks.end(), free_blocks.begin(),
                          free_blocks.begin() + num_taken);
  std::sort(selection.blocks.begin(), selection.blocks.end());
  return selection;
}

// One (query token, kv head) after another; each writes only its own rows of the outputs.
class QueryLoop {
 public:
  QueryLoop(const ReferenceConfig& config, const ReferenceInputs& inputs,
            const ReferenceOptions& options, ReferenceOutputs* outputs)
      : config_(config),
        inputs_(inputs),
        options_(options),
        kc_(options.given_kc != nullptr ? *options.given_kc : outputs->kc),
        vc_(options.given_vc != nullptr ? *options.given_vc : outputs->vc),
        scale_(config.softmax_scale.value_or(1.0 / std::sqrt(double(config.head_dim_qk)))),
        out_(outputs) {}

  void Compute(int64_t token) {
    token_ = token;
    query_ = Locate(config_, inputs_.cu_seqlens, token);
    for (int64_t g = 0; g < config_.num_kv_heads; ++g) {
      const std::vector<double> scores = CompressedBranch(g);
      SelectBlocks(g, scores);
      SelectedBranch(g);
      WindowBranch(g);
    }
    if (!inputs_.gate.empty()) Gate();
  }

 private:
  // Attends all heads of group g to `rows`; `on_head` is called after each with p still in place.
  template <typename OnHead>
  void AttendGroup(int64_t g, const std::vector<int64_t>& rows, const std::vector<double>& k,
                   const std::vector<double>& v, std::vector<double>* o, std::vector<double>* lse,
                   OnHead on_head) {
    const int64_t group_size = config_.num_q_heads / config_.num_kv_heads;
    const int64_t dk = config_.head_dim_qk, dv = config_.head_dim_v;
    for (int64_t h = g * group_size; h < (g + 1) * group_size; ++h) {
      const int64_t row = token_ * config_.num_q_heads + h;
      (*lse)[row] =
          Attend(&inputs_.q[row * dk], rows, k.data() + g * dk, config_.num_kv_heads * dk, dk,
                 v.data() + g * dv, config_.num_kv_heads * dv, dv, scale_, &p_, &(*o)[row * dv]);
      on_head();
    }
  }

  // Returns the importance of each candidate block.
  std::vector<double> CompressedBranch(int64_t g) {
    const int64_t l = config_.compress_block_tokens, d = config_.compress_stride_tokens;
    const int64_t select_tokens = config_.select_block_tokens;
    const std::vector<int64_t> rows = CompressedRows(config_, query_);
    const int64_t num_visible = static_cast<int64_t>(rows.size());
    std::vector<double> scores(query_.t / select_tokens + 1, 0.0);
    AttendGroup(g, rows, kc_, vc_, &out_->o_cmp, &out_->lse_cmp, [&] {
      for (size_t j = 0; j < scores.size(); ++j) {
        for (int64_t a = 0; a < select_tokens / d; ++a) {
          for (int64_t b = 0; b < l / d; ++b) {
            const int64_t i = select_tokens / d * static_cast<int64_t>(j) + a - b;
            if (i >= 0 && i < num_visible) scores[j] += p_[i];
          }
        }
      }
    });
    return scores;
  }

  void SelectBlocks(int64_t g, const std::vector<double>& scores) {
    const Selection selection = Select(config_, scores);
    const int64_t row = token_ * config_.num_kv_heads + g;
    std::copy(selection.blocks.begin(), selection.blocks.end(),
              out_->block_indices.begin() + row * config_.num_selected_blocks);
    std::copy(scores.begin(), scores.end(), out_->scores.begin() + row * out_->max_blocks);
    out_->threshold[row] = selection.threshold;
    out_->margin[row] = selection.margin;
  }

  void SelectedBranch(int64_t g) {
    const std::vector<int32_t>& blocks = options_.given_block_indices != nullptr
                                             ? *options_.given_block_indices
                                             : out_->block_indices;
    const int64_t row = token_ * config_.num_kv_heads + g;
    const std::vector<int64_t> rows =
        SelectedRows(config_, query_, &blocks[row * config_.num_selected_blocks]);
    AttendGroup(g, rows, inputs_.k_slc, inputs_.v_slc, &out_->o_slc, &out_->lse_slc, [] {});
  }

  void WindowBranch(int64_t g) {
    AttendGroup(g, WindowRows(config_, query_), inputs_.k_win, inputs_.v_win, &out_->o_win,
                &out_->lse_win, [] {});
  }

  void Gate() {
    for (int64_t h = 0; h < config_.num_q_heads; ++h) {
      const int64_t row = token_ * config_.num_q_heads + h;
      const double* gate = &inputs_.gate[row * 3];
      for (int64_t i = row * config_.head_dim_v; i < (row + 1) * config_.head_dim_v; ++i) {
        out_->o[i] = gate[0] * out_->o_cmp[i] + gate[1] * out_->o_slc[i] + gate[2] * out_->o_win[i];
      }
    }
  }

  const ReferenceConfig& config_;
  const ReferenceInputs& inputs_;
  const ReferenceOptions& options_;
  const std::vector<double>& kc_;
  const std::vector<double>& vc_;
  const double scale_;
  ReferenceOutputs* const out_;

  // Of the query being computed.
  int64_t token_ = 0;  // in the packed sequence
  QueryPosition query_;
  std::vector<double> p_;  // probabilities of the head computed last
};

class Checker {
 public:
  void Require(bool holds, const std::string& rule) {
    if (!holds && status_.ok()) status_ = absl::InvalidArgumentError(rule);
  }
  template <typename T>
  void Size(const char* name, const std::vector<T>& values, int64_t expected) {
    Require(static_cast<int64_t>(values.size()) == expected,
            absl::StrCat(name, " has ", values.size(), " elements, must have ", expected));
  }
  const absl::Status& status() const { return status_; }

 private:
  absl::Status status_;
};

void CheckParameters(const ReferenceConfig& config, const CompressorParameters& parameters,
                     int64_t head_dim, Checker* check) {
  const int64_t heads = parameters.num_heads, l = config.compress_block_tokens;
  const int64_t width = parameters.hidden_width;
  if (config.compressor == CompressorKind::kMean) return;
  check->Require(heads == 1 || heads == config.num_kv_heads,
                 absl::StrCat("compressor num_heads is ", heads, ", must be 1 or num_kv_heads"));
  if (!parameters.pe.empty()) check->Size("pe", parameters.pe, heads * l * head_dim);
  switch (config.compressor) {
    case CompressorKind::kMean:
      break;
    case CompressorKind::kWeighted:
      check->Size("weight", parameters.weight, heads * l);
      break;
    case CompressorKind::kLinear:
      check->Size("w", parameters.w, heads * head_dim * l * head_dim);
      break;
    case CompressorKind::kMlp:
      check->Size("w1", parameters.w1, heads * width * l * head_dim);
      check->Size("b1", parameters.b1, heads * width);
      check->Size("w2", parameters.w2, heads * head_dim * width);
      check->Size("b2", parameters.b2, heads * head_dim);
      break;
  }
}

absl::Status Check(const ReferenceConfig& config, const ReferenceInputs& inputs,
                   const ReferenceOptions& options) {
  Checker check;
  const int64_t l = config.compress_block_tokens, d = config.compress_stride_tokens;
  const int64_t hq = config.num_q_heads, hkv = config.num_kv_heads;
  const int64_t dk = config.head_dim_qk, dv = config.head_dim_v;
  check.Require(hkv >= 1 && hq >= 1 && dk >= 1 && dv >= 1, "heads and dims must be >= 1");
  check.Require(d >= 1 && l >= 1 && config.select_block_tokens >= 1, "blocks must be >= 1 token");
  check.Require(config.window_tokens >= 1, "window_tokens must be >= 1");
  check.Require(
      config.num_initial_blocks >= 0 && config.num_local_blocks >= 1 &&
          config.num_selected_blocks >= config.num_initial_blocks + config.num_local_blocks,
      "num_selected_blocks must hold the forced blocks, at least one of them local");
  const auto& cu_seqlens = inputs.cu_seqlens;
  check.Require(cu_seqlens.size() >= 2 && cu_seqlens.front() == 0, "cu_seqlens must start at 0");
  if (!check.status().ok()) return check.status();
  check.Require(hq % hkv == 0, "num_kv_heads must divide num_q_heads");
  check.Require(l % d == 0 && config.select_block_tokens % d == 0,
                "compress_stride_tokens must divide both block sizes");
  check.Require(std::is_sorted(cu_seqlens.begin(), cu_seqlens.end()), "cu_seqlens must ascend");
  const int64_t s = cu_seqlens.back();
  check.Size("q", inputs.q, s * hq * dk);
  check.Size("k_cmp", inputs.k_cmp, s * hkv * dk);
  check.Size("v_cmp", inputs.v_cmp, s * hkv * dv);
  check.Size("k_slc", inputs.k_slc, s * hkv * dk);
  check.Size("v_slc", inputs.v_slc, s * hkv * dv);
  check.Size("k_win", inputs.k_win, s * hkv * dk);
  check.Size("v_win", inputs.v_win, s * hkv * dv);
  if (!inputs.gate.empty()) check.Size("gate", inputs.gate, s * hq * 3);
  CheckParameters(config, inputs.compress_k, dk, &check);
  CheckParameters(config, inputs.compress_v, dv, &check);
  int64_t num_blocks = 0;
  for (size_t i = 0; i + 1 < cu_seqlens.size(); ++i) {
    num_blocks += NumCompressBlocks(config, cu_seqlens[i + 1] - cu_seqlens[i]);
  }
  if (options.given_kc != nullptr) {
    check.Size("given_kc", *options.given_kc, num_blocks * hkv * dk);
  }
  if (options.given_vc != nullptr) {
    check.Size("given_vc", *options.given_vc, num_blocks * hkv * dv);
  }
  if (options.given_block_indices != nullptr) {
    check.Size("given_block_indices", *options.given_block_indices,
               s * hkv * config.num_selected_blocks);
  }
  if (options.query_tokens != nullptr) {
    for (int64_t token : *options.query_tokens) {
      check.Require(token >= 0 && token < s, absl::StrCat("query token ", token, " of ", s));
    }
  }
  return check.status();
}

std::vector<double> Rounded(Rounding rounding, std::vector<double> values) {
  for (double& x : values) x = Round(rounding, x);
  return values;
}

}  // namespace

absl::StatusOr<ReferenceOutputs> Forward(const ReferenceConfig& config,
                                         const ReferenceInputs& inputs,
                                         const ReferenceOptions& options) {
  const absl::Status valid = Check(config, inputs, options);
  if (!valid.ok()) return valid;
  const int64_t s = inputs.cu_seqlens.back();
  const int64_t hq = config.num_q_heads, hkv = config.num_kv_heads;
  ReferenceOutputs out;
  out.kc = Rounded(options.summary_rounding, Compress(config, inputs.compress_k, inputs.cu_seqlens,
                                                      inputs.k_cmp, config.head_dim_qk));
  out.vc = Rounded(options.summary_rounding, Compress(config, inputs.compress_v, inputs.cu_seqlens,
                                                      inputs.v_cmp, config.head_dim_v));
  for (size_t i = 0; i + 1 < inputs.cu_seqlens.size(); ++i) {
    const int64_t num_tokens = inputs.cu_seqlens[i + 1] - inputs.cu_seqlens[i];
    out.max_blocks = std::max(
        out.max_blocks, (num_tokens + config.select_block_tokens - 1) / config.select_block_tokens);
  }
  for (auto* o : {&out.o_cmp, &out.o_slc, &out.o_win}) o->assign(s * hq * config.head_dim_v, 0.0);
  if (!inputs.gate.empty()) out.o.assign(s * hq * config.head_dim_v, 0.0);
  for (auto* lse : {&out.lse_cmp, &out.lse_slc, &out.lse_win}) lse->assign(s * hq, 0.0);
  out.block_indices.assign(s * hkv * config.num_selected_blocks, -1);
  out.scores.assign(s * hkv * out.max_blocks, 0.0);
  out.threshold.assign(s * hkv, kInfinity);
  out.margin.assign(s * hkv, kInfinity);

  std::vector<int64_t> tokens;
  if (options.query_tokens != nullptr) {
    tokens = *options.query_tokens;
  } else {
    tokens.resize(s);
    std::iota(tokens.begin(), tokens.end(), int64_t{0});
  }
  const int64_t num_threads = std::max(1, options.num_threads);
  const auto work = [&](int64_t thread) {
    QueryLoop loop(config, inputs, options, &out);
    for (size_t i = thread; i < tokens.size(); i += num_threads) loop.Compute(tokens[i]);
  };
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < num_threads; ++i) threads.emplace_back(work, i);
  work(0);
  for (std::thread& thread : threads) thread.join();
  return out;
}

}  // namespace nsa::reference
