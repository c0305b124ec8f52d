#include <cmath>
#include <cstdint>
#include <vector>

#include "tests/reference/dot.h"
#include "tests/reference/gradients.h"
#include "tests/reference/reference.h"

namespace nsa::reference {
namespace {

double Gelu(double x) { return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0))); }

double GeluDerivative(double x) {
  const double density = std::exp(-0.5 * x * x) / std::sqrt(2.0 * std::acos(-1.0));
  return 0.5 * (1.0 + std::erf(x / std::sqrt(2.0))) + x * density;
}

// What the mlp's gelu is applied to, [F].
std::vector<double> HiddenInputs(const CompressorParameters& parameters, int64_t h,
                                 const std::vector<double>& x) {
  const int64_t width = static_cast<int64_t>(x.size());
  std::vector<double> inputs(parameters.hidden_width);
  for (int64_t f = 0; f < parameters.hidden_width; ++f) {
    const int64_t row = h * parameters.hidden_width + f;
    inputs[f] = Dot(&parameters.w1[row * width], x.data(), width) + parameters.b1[row];
  }
  return inputs;
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
      std::vector<double> hidden = HiddenInputs(parameters, h, x);
      for (double& value : hidden) value = Gelu(value);
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

// The gradient of x, `x` and `h` as Phi takes them, from that of phi(x), `dy` [D]; adds to the
// gradients of the parameters that phi multiplies by or adds.
std::vector<double> PhiBackward(const ReferenceConfig& config,
                                const CompressorParameters& parameters, int64_t h,
                                const std::vector<double>& x, const double* dy, int64_t head_dim,
                                CompressorParameters* gradients) {
  const int64_t l = config.compress_block_tokens;
  const int64_t width = l * head_dim;
  std::vector<double> dx(width, 0.0);
  switch (config.compressor) {
    case CompressorKind::kMean:
      for (int64_t i = 0; i < width; ++i) dx[i] = dy[i % head_dim] / l;
      break;
    case CompressorKind::kWeighted:
      for (int64_t j = 0; j < l; ++j) {
        gradients->weight[h * l + j] += Dot(dy, &x[j * head_dim], head_dim);
        for (int64_t c = 0; c < head_dim; ++c) {
          dx[j * head_dim + c] = dy[c] * parameters.weight[h * l + j];
        }
      }
      break;
    case CompressorKind::kLinear:
      for (int64_t c = 0; c < head_dim; ++c) {
        const int64_t row = (h * head_dim + c) * width;
        for (int64_t i = 0; i < width; ++i) {
          gradients->w[row + i] += dy[c] * x[i];
          dx[i] += dy[c] * parameters.w[row + i];
        }
      }
      break;
    case CompressorKind::kMlp: {
      const int64_t hidden_width = parameters.hidden_width;
      const std::vector<double> inputs = HiddenInputs(parameters, h, x);
      for (int64_t c = 0; c < head_dim; ++c) gradients->b2[h * head_dim + c] += dy[c];
      for (int64_t f = 0; f < hidden_width; ++f) {
        const double hidden = Gelu(inputs[f]);
        double dhidden = 0.0;
        for (int64_t c = 0; c < head_dim; ++c) {
          const int64_t i = (h * head_dim + c) * hidden_width + f;
          gradients->w2[i] += dy[c] * hidden;
          dhidden += dy[c] * parameters.w2[i];
        }
        const double dinput = dhidden * GeluDerivative(inputs[f]);
        const int64_t row = h * hidden_width + f;
        gradients->b1[row] += dinput;
        for (int64_t i = 0; i < width; ++i) {
          gradients->w1[row * width + i] += dinput * x[i];
          dx[i] += dinput * parameters.w1[row * width + i];
        }
      }
      break;
    }
  }
  return dx;
}

// The mean has no parameters, so no position either.
bool HasPe(const ReferenceConfig& config, const CompressorParameters& parameters) {
  return config.compressor != CompressorKind::kMean && !parameters.pe.empty();
}

// Calls f(token, g, h, x) for each summary in its order: the first of the block's tokens in the
// packed sequence, the head, the head of its parameters, and what phi takes, [l,D].
template <typename F>
void ForEachSummary(const ReferenceConfig& config, const CompressorParameters& parameters,
                    const std::vector<int64_t>& cu_seqlens, const std::vector<double>& x,
                    int64_t head_dim, F f) {
  const int64_t l = config.compress_block_tokens;
  const int64_t num_heads = config.num_kv_heads;
  const bool has_pe = HasPe(config, parameters);
  std::vector<double> block(l * head_dim);
  for (size_t document = 0; document + 1 < cu_seqlens.size(); ++document) {
    const int64_t begin = cu_seqlens[document];
    const int64_t num_blocks = NumCompressBlocks(config, cu_seqlens[document + 1] - begin);
    for (int64_t i = 0; i < num_blocks; ++i) {
      const int64_t token = begin + i * config.compress_stride_tokens;
      for (int64_t g = 0; g < num_heads; ++g) {
        const int64_t h = parameters.num_heads == 1 ? 0 : g;
        for (int64_t j = 0; j < l; ++j) {
          for (int64_t c = 0; c < head_dim; ++c) {
            block[j * head_dim + c] = x[((token + j) * num_heads + g) * head_dim + c];
            if (has_pe) block[j * head_dim + c] += parameters.pe[(h * l + j) * head_dim + c];
          }
        }
        f(token, g, h, block);
      }
    }
  }
}

}  // namespace

int64_t NumCompressBlocks(const ReferenceConfig& config, int64_t num_tokens) {
  if (num_tokens < config.compress_block_tokens) return 0;
  return (num_tokens - config.compress_block_tokens) / config.compress_stride_tokens + 1;
}

std::vector<double> Compress(const ReferenceConfig& config, const CompressorParameters& parameters,
                             const std::vector<int64_t>& cu_seqlens, const std::vector<double>& x,
                             int64_t head_dim) {
  std::vector<double> summaries;
  ForEachSummary(config, parameters, cu_seqlens, x, head_dim,
                 [&](int64_t, int64_t, int64_t h, const std::vector<double>& block) {
                   const std::vector<double> y = Phi(config, parameters, h, block, head_dim);
                   summaries.insert(summaries.end(), y.begin(), y.end());
                 });
  return summaries;
}

CompressorParameters CompressBackward(const ReferenceConfig& config,
                                      const CompressorParameters& parameters,
                                      const std::vector<int64_t>& cu_seqlens,
                                      const std::vector<double>& x, int64_t head_dim,
                                      const std::vector<double>& dy, std::vector<double>* dx) {
  const int64_t l = config.compress_block_tokens;
  const bool has_pe = HasPe(config, parameters);
  CompressorParameters gradients = parameters;
  for (auto* p : {&gradients.weight, &gradients.pe, &gradients.w, &gradients.w1, &gradients.b1,
                  &gradients.w2, &gradients.b2}) {
    p->assign(p->size(), 0.0);
  }
  dx->assign(x.size(), 0.0);
  const double* dy_row = dy.data();
  ForEachSummary(config, parameters, cu_seqlens, x, head_dim,
                 [&](int64_t token, int64_t g, int64_t h, const std::vector<double>& block) {
                   const std::vector<double> dblock =
                       PhiBackward(config, parameters, h, block, dy_row, head_dim, &gradients);
                   dy_row += head_dim;
                   for (int64_t j = 0; j < l; ++j) {
                     const int64_t row = (token + j) * config.num_kv_heads + g;
                     for (int64_t c = 0; c < head_dim; ++c) {
                       const double value = dblock[j * head_dim + c];
                       (*dx)[row * head_dim + c] += value;
                       if (has_pe) gradients.pe[(h * l + j) * head_dim + c] += value;
                     }
                   }
                 });
  return gradients;
}

}  // namespace nsa::reference
