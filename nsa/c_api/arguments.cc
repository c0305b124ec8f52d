#include "nsa/c_api/arguments.h"

#include <utility>

namespace nsa::c_api {
namespace {

// A struct_size beyond this is not one.
constexpr size_t kMaxStructBytes = 1 << 16;
constexpr int32_t kMaxDims = 4;

bool IsDType(int32_t dtype) { return dtype >= NSA_F32 && dtype <= NSA_F16; }

std::string& LastError() {
  thread_local std::string text;
  return text;
}

}  // namespace

nsa_status Report(const absl::Status& status) noexcept {
  try {
    LastError().assign(status.message().data(), status.message().size());
  } catch (...) {
    LastError().clear();
  }
  return static_cast<nsa_status>(status.code());
}

const char* KeepText(std::string text) {
  thread_local std::string kept;
  kept = std::move(text);
  return kept.c_str();
}

absl::Status CheckStructSize(absl::string_view name, const void* given, size_t first_bytes,
                             size_t known_bytes) {
  size_t given_bytes = 0;
  std::memcpy(&given_bytes, given, sizeof(given_bytes));
  if (given_bytes < first_bytes || given_bytes > kMaxStructBytes) {
    return Invalid(name, ".struct_size = ", given_bytes, ": must be the struct's size, which is ",
                   known_bytes, " in version ", NSA_API_VERSION, " of the interface");
  }
  const auto* const bytes = static_cast<const char*>(given);
  for (size_t i = known_bytes; i < given_bytes; ++i) {
    if (bytes[i] != 0) {
      return Invalid(name, ": byte ", i, " is set; this library knows the first ", known_bytes,
                     " bytes, of version ", NSA_API_VERSION, " of the interface");
    }
  }
  return absl::OkStatus();
}

Tensor Reader::ToTensor(absl::string_view name, const nsa_tensor& tensor,
                        absl::string_view prefix) {
  const bool has_dims = tensor.ndim >= 0 && tensor.ndim <= kMaxDims;
  if (!has_dims || !IsDType(tensor.dtype)) {  // names cost more than all else here
    const std::string full_name = absl::StrCat(prefix, name);
    Require(has_dims, absl::StrCat(full_name, ".ndim"), tensor.ndim, "must lie in [0, 4]");
    (void)ToDType(absl::StrCat(full_name, ".dtype"), tensor.dtype);
    return {};
  }
  return Tensor(tensor.data, static_cast<DType>(tensor.dtype),
                Dims(tensor.shape, tensor.shape + tensor.ndim),
                Dims(tensor.strides, tensor.strides + tensor.ndim));
}

DType Reader::ToDType(absl::string_view name, int32_t dtype) {
  Require(IsDType(dtype), name, dtype, "must be NSA_F32 (0), NSA_BF16 (1) or NSA_F16 (2)");
  return static_cast<DType>(dtype);
}

CompressorParams Reader::ToCompressorParams(absl::string_view prefix,
                                            const nsa_compressor_params& params) {
  auto read = [&](absl::string_view name, const nsa_tensor& tensor) {
    return ToTensor(name, tensor, prefix);
  };
  return {.weight = read("weight", params.weight),
          .pe = read("pe", params.pe),
          .w = read("w", params.w),
          .w1 = read("w1", params.w1),
          .b1 = read("b1", params.b1),
          .w2 = read("w2", params.w2),
          .b2 = read("b2", params.b2)};
}

CompressorGradients Reader::ToCompressorGradients(absl::string_view prefix,
                                                  const nsa_compressor_gradients& gradients) {
  auto read = [&](absl::string_view name, const nsa_tensor& tensor) {
    return ToTensor(name, tensor, prefix);
  };
  return {.weight = read("weight", gradients.weight),
          .pe = read("pe", gradients.pe),
          .w = read("w", gradients.w),
          .w1 = read("w1", gradients.w1),
          .b1 = read("b1", gradients.b1),
          .w2 = read("w2", gradients.w2),
          .b2 = read("b2", gradients.b2)};
}

absl::Status ReadForwardInputs(const nsa_forward_inputs* given, ForwardInputs& inputs) {
  const absl::StatusOr<nsa_forward_inputs> read = ReadStruct("inputs", given);
  if (!read.ok()) return read.status();
  Reader reader;
  ForwardInputs made = {
      .q = reader.ToTensor("q", read->q),
      .k_cmp = reader.ToTensor("k_cmp", read->k_cmp),
      .v_cmp = reader.ToTensor("v_cmp", read->v_cmp),
      .k_slc = reader.ToTensor("k_slc", read->k_slc),
      .v_slc = reader.ToTensor("v_slc", read->v_slc),
      .k_win = reader.ToTensor("k_win", read->k_win),
      .v_win = reader.ToTensor("v_win", read->v_win),
      .gate = reader.ToTensor("gate", read->gate),
      .compress_k = reader.ToCompressorParams("compress_k.", read->compress_k),
      .compress_v = reader.ToCompressorParams("compress_v.", read->compress_v),
  };
  if (reader.status().ok()) inputs = std::move(made);
  return reader.status();
}

}  // namespace nsa::c_api

const char* nsa_last_error(void) { return nsa::c_api::LastError().c_str(); }

const char* nsa_version(void) { return NSA_VERSION; }

int32_t nsa_api_version(void) { return NSA_API_VERSION; }
