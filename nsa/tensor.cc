#include "nsa/tensor.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace nsa {

absl::Status CheckTensor(absl::string_view name, const ConstTensor& tensor, DType dtype,
                         std::initializer_list<int64_t> shape) {
  auto broken = [&name](auto&&... rule) {
    return absl::InvalidArgumentError(absl::StrCat(name, rule...));
  };
  if (tensor.dtype != dtype) {
    return broken(".dtype = ", NameOf(tensor.dtype), ": must be ", NameOf(dtype));
  }
  const Dims expected(shape);
  if (tensor.shape != expected) {
    return broken(".shape = [", absl::StrJoin(tensor.shape, ","), "]: must be [",
                  absl::StrJoin(expected, ","), "]");
  }
  if (tensor.strides.size() != expected.size()) {
    return broken(".strides: has ", tensor.strides.size(), " entries: must have one for each of ",
                  expected.size(), " dimensions");
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    if (expected[i] == 0) return absl::OkStatus();  // no elements: nothing to point at
  }
  const size_t last = expected.size() - 1;
  if (tensor.strides[last] != 1 && expected[last] != 1) {
    return broken(".strides[", last, "] = ", tensor.strides[last],
                  ": must be 1, the last dimension is contiguous");
  }
  if (tensor.data == nullptr) return broken(".data = null: must point at the tensor");
  if (reinterpret_cast<uintptr_t>(tensor.data) % SizeOf(dtype) != 0) {
    return broken(".data: must be aligned to its element of ", SizeOf(dtype), " bytes");
  }
  return absl::OkStatus();
}

}  // namespace nsa
