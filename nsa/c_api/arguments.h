// What every function of nsa/c_api.h does with its arguments and its result.
#ifndef NSA_C_API_ARGUMENTS_H_
#define NSA_C_API_ARGUMENTS_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "nsa/c_api.h"
#include "nsa/config.h"
#include "nsa/engine.h"
#include "nsa/tensor.h"

namespace nsa::c_api {

// Keeps the text of `status` for nsa_last_error and returns its code.
nsa_status Report(const absl::Status& status) noexcept;

// The result of a function of the interface: what `body` returns, an absl::Status. No exception
// passes.
template <typename Body>
nsa_status Run(const Body& body) noexcept {
  try {
    return Report(body());
  } catch (const std::bad_alloc&) {
    return Report(absl::ResourceExhaustedError("the host is out of memory"));
  } catch (const std::exception& exception) {
    return Report(absl::InternalError(exception.what()));
  } catch (...) {
    return Report(absl::InternalError("an exception"));
  }
}

// The text that this thread's caller may read until the next one.
const char* KeepText(std::string text);

template <typename... Parts>
absl::Status Invalid(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

// InvalidArgument naming the first of the arguments that is null.
inline absl::Status CheckSet() { return absl::OkStatus(); }
template <typename... Rest>
absl::Status CheckSet(absl::string_view name, const void* pointer, const Rest&... rest) {
  if (pointer == nullptr) return Invalid(name, ": null; must be set");
  return CheckSet(rest...);
}

// InvalidArgument unless `given_bytes`, a struct_size, can be that of a struct of `known_bytes`.
absl::Status CheckStructSize(absl::string_view name, const void* given, size_t first_bytes,
                             size_t known_bytes);

// What the caller passed as a struct of the interface, with zeros in fields that it does not know.
// `kFirstBytes`: the struct's size when it first appeared; to be told once fields are added.
template <typename Struct, size_t kFirstBytes = sizeof(Struct)>
absl::StatusOr<Struct> ReadStruct(absl::string_view name, const Struct* given) {
  if (absl::Status s = CheckSet(name, given); !s.ok()) return s;
  if (absl::Status s = CheckStructSize(name, given, kFirstBytes, sizeof(Struct)); !s.ok()) return s;
  Struct read = {};
  std::memcpy(&read, given, std::min(sizeof(Struct), given->struct_size));
  return read;
}

// Fills the fields that the caller knows.
template <typename Struct, size_t kFirstBytes = sizeof(Struct)>
absl::Status WriteStruct(absl::string_view name, Struct values, Struct* given) {
  if (absl::Status s = CheckSet(name, given); !s.ok()) return s;
  values.struct_size = given->struct_size;
  if (absl::Status s = CheckStructSize(name, given, kFirstBytes, sizeof(Struct)); !s.ok()) return s;
  std::memcpy(given, &values, std::min(sizeof(Struct), given->struct_size));
  return absl::OkStatus();
}

// `value`, or `default_value` for 0.
template <typename Number>
Number OrDefault(Number value, Number default_value) {
  return value == 0 ? default_value : value;
}

// The result of a collective call whose arguments were read with the result `read`. What could not
// be read is empty in the call, which says so to the other ranks, who are in it.
template <typename Call>
absl::Status CallTogether(const absl::Status& read, const Call& call) {
  const absl::Status status = call();
  return read.ok() ? status : read;
}

// Reads tensors and numbers, and keeps the first thing wrong with them.
class Reader {
 public:
  const absl::Status& status() const { return status_; }

  // Unset when the data is null. `prefix`: of the name.
  Tensor ToTensor(absl::string_view name, const nsa_tensor& tensor, absl::string_view prefix = "");
  DType ToDType(absl::string_view name, int32_t dtype);
  CompressorParams ToCompressorParams(absl::string_view prefix,
                                      const nsa_compressor_params& params);
  CompressorGradients ToCompressorGradients(absl::string_view prefix,
                                            const nsa_compressor_gradients& gradients);
  template <typename Value>
  void Require(bool holds, absl::string_view name, const Value& value, absl::string_view rule) {
    if (!holds && status_.ok()) status_ = Invalid(name, " = ", value, ": ", rule);
  }

 private:
  absl::Status status_;
};

// Does not validate.
absl::StatusOr<NsaConfig> ToConfig(const nsa_config* config);

// Empty after an error.
absl::Status ReadForwardInputs(const nsa_forward_inputs* given, ForwardInputs& inputs);

}  // namespace nsa::c_api

#endif  // NSA_C_API_ARGUMENTS_H_
