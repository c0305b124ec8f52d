#include "tools/nsa_run/input_testlib.h"

#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "tests/testing/generate.h"

namespace nsa::tools {

TensorType TypeOf(DType dtype) {
  return dtype == DType::kF32    ? TensorType::kF32
         : dtype == DType::kBF16 ? TensorType::kBF16
                                 : TensorType::kF16;
}

test::Problem SmallProblem(reference::CompressorKind compressor, DType dtype) {
  reference::ReferenceConfig config;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim_qk = 64;
  config.head_dim_v = 64;
  config.num_selected_blocks = 4;
  config.window_tokens = 40;
  config.compressor = compressor;
  const test::InputOptions input_options = {
      .dtype = dtype, .gate_dtype = dtype, .hidden_width = 16};
  return test::RandomProblem(config, {0, 333, 350, 700}, input_options, /*seed=*/7);
}

Entries InputEntries(const test::Problem& problem, bool shared_kv) {
  Entries entries;
  auto add = [&entries](const std::string& name, TensorType type, std::vector<int64_t> shape,
                        const test::Bytes& bytes) {
    if (!bytes.empty()) entries[name] = {{name, type, std::move(shape)}, bytes};
  };
  const TensorType type = TypeOf(problem.input_options.dtype);
  const int64_t s = problem.num_tokens();
  const int64_t hq = problem.config.num_q_heads;
  const int64_t hkv = problem.config.num_kv_heads;
  const int64_t dk = problem.config.head_dim_qk;
  const int64_t dv = problem.config.head_dim_v;
  const int64_t l = problem.config.compress_block_tokens;
  const test::EncodedInputs& inputs = problem.inputs;
  add("q", type, {s, hq, dk}, inputs.q);
  add("gate", TypeOf(problem.input_options.gate_dtype), {s, hq, 3}, inputs.gate);
  if (shared_kv) {
    add("k", type, {s, hkv, dk}, inputs.k_cmp);
    add("v", type, {s, hkv, dv}, inputs.v_cmp);
  } else {
    add("k_cmp", type, {s, hkv, dk}, inputs.k_cmp);
    add("v_cmp", type, {s, hkv, dv}, inputs.v_cmp);
    add("k_slc", type, {s, hkv, dk}, inputs.k_slc);
    add("v_slc", type, {s, hkv, dv}, inputs.v_slc);
    add("k_win", type, {s, hkv, dk}, inputs.k_win);
    add("v_win", type, {s, hkv, dv}, inputs.v_win);
  }
  for (const auto& [prefix, parameters, d] :
       {std::tuple(std::string("compress_k."), &inputs.compress_k, dk),
        std::tuple(std::string("compress_v."), &inputs.compress_v, dv)}) {
    const TensorType parameter_type = TypeOf(parameters->dtype);
    const int64_t h = parameters->num_heads;
    const int64_t f = parameters->hidden_width;
    add(prefix + "weight", parameter_type, {h, l}, parameters->weight);
    add(prefix + "pe", parameter_type, {h, l, d}, parameters->pe);
    add(prefix + "w", parameter_type, {h, d, l * d}, parameters->w);
    add(prefix + "w1", parameter_type, {h, f, l * d}, parameters->w1);
    add(prefix + "b1", parameter_type, {h, f}, parameters->b1);
    add(prefix + "w2", parameter_type, {h, d, f}, parameters->w2);
    add(prefix + "b2", parameter_type, {h, d}, parameters->b2);
  }
  test::Bytes cu_seqlens(problem.cu_seqlens.size() * sizeof(int32_t));
  for (size_t i = 0; i < problem.cu_seqlens.size(); ++i) {
    const int32_t end = static_cast<int32_t>(problem.cu_seqlens[i]);
    std::memcpy(cu_seqlens.data() + i * sizeof(end), &end, sizeof(end));
  }
  add("cu_seqlens", TensorType::kI32, {static_cast<int64_t>(problem.cu_seqlens.size())},
      cu_seqlens);
  return entries;
}

absl::Status WriteEntries(const Entries& entries, const std::string& path) {
  std::vector<TensorView> views;
  for (const auto& [name, entry] : entries) views.push_back({entry.spec, entry.bytes});
  return WriteSafetensors(path, views);
}

}  // namespace nsa::tools
