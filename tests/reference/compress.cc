#include <cmath>
#include <cstdint>
#include <vector>

#include "tests/reference/reference.h"

namespace nsa::reference {
namespace {

double Gelu(double x) { return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0))); }

double Dot(const double* a, const double* b, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// phi of one block, `x` [l,D] with the position already added, parameters of head `h` of H'.
std::vector<double> Phi(const ReferenceConfig& config, const CompressorParameters& parameters,
                        int64_t h, const std::vector<double>& x, int64_t head_dim) {
  const int64_t l = config.compress_block_tokens;
  const int64_t width = l * head_dim;
  std::vector<double> y(head_dim, 0.0);
  switch (config.compressor) {
    case CompressorKind::kMean:
      for (int64_t j = 0; j < l; ++j) {
        for (int64_t c = 0; c < head_dim; ++c) y[c] += x[j * head_dim + c] / l;
      }
      break;
    case CompressorKind::kWeighted:
      for (int64_t j = 0; j < l; ++j) {
        const double weight = parameters.weight[h * l + j];
        for (int64_t c = 0; c < head_dim; ++c) y[c] += weight * x[j * head_dim + c];
      }
      break;
    case CompressorKind::kLinear:
      for (int64_t c = 0; c < head_dim; ++c) {
        y[c] = Dot(&parameters.w[(h * head_dim + c) * width], x.data(), width);
      }
      break;
    case CompressorKind::kMlp: {
      const int64_t hidden_width = parameters.hidden_width;
      std::vector<double> hidden(hidden_width);
      for (int64_t f = 0; f < hidden_width; ++f) {
        const int64_t row = h * hidden_width + f;
        hidden[f] = Gelu(Dot(&parameters.w1[row * width], x.data(), width) + parameters.b1[row]);
      }
      for (int64_t c = 0; c < head_dim; ++c) {
        const int64_t row = h * head_dim + c;
        y[c] = Dot(&parameters.w2[row * hidden_width], hidden.data(), hidden_width) +
               parameters.b2[row];
      }
      break;
    }
  }
  return y;
}

}  // namespace

int64_t NumCompressBlocks(const ReferenceConfig& config, int64_t num_tokens) {
  if (num_tokens < config.compress_block_tokens) return 0;
  return (num_tokens - config.compress_block_tokens) / config.compress_stride_tokens + 1;
}

std::vector<double> Compress(const ReferenceConfig& config, const CompressorParameters& parameters,
                             const std::vector<int64_t>& cu_seqlens, const std::vector<double>& x,
                             int64_t head_dim) {
  const int64_t l = config.compress_block_tokens;
  const int64_t num_heads = config.num_kv_heads;
  std::vector<double> summaries;
  std::vector<double> block(l * head_dim);
  for (size_t document = 0; document + 1 < cu_seqlens.size(); ++document) {
    const int64_t begin = cu_seqlens[document];
    const int64_t num_blocks = NumCompressBlocks(config, cu_seqlens[document + 1] - begin);
    for (int64_t i = 0; i < num_blocks; ++i) {
      for (int64_t g = 0; g < num_heads; ++g) {
        const int64_t h = parameters.num_heads == 1 ? 0 : g;
        // The mean has no parameters, so no position either.
        const bool has_pe = config.compressor != CompressorKind::kMean && !parameters.pe.empty();
        for (int64_t j = 0; j < l; ++j) {
          const int64_t token = begin + i * config.compress_stride_tokens + j;
          for (int64_t c = 0; c < head_dim; ++c) {
            block[j * head_dim + c] = x[(token * num_heads + g) * head_dim + c];
            if (has_pe) block[j * head_dim + c] += parameters.pe[(h * l + j) * head_dim + c];
          }
        }
        const std::vector<double> y = Phi(config, parameters, h, block, head_dim);
        summaries.insert(summaries.end(), y.begin(), y.end());
      }
    }
  }
  return summaries;
}

}  // namespace nsa::reference
