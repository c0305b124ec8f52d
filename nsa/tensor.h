// Views of tensors that the caller owns. No memory is held or freed here.
#ifndef NSA_TENSOR_H_
#define NSA_TENSOR_H_

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "kernels/types.h"

namespace nsa {

using Dims = std::vector<int64_t>;

// `Data` is void for tensors that are written and const void for tensors that are only read.
template <typename Data>
struct BasicTensor {
  Data* data = nullptr;
  DType dtype = DType::kF32;
  Dims shape;
  Dims strides;  // in elements, one per dimension

  BasicTensor() = default;
  BasicTensor(Data* data, DType dtype, Dims shape, Dims strides)
      : data(data), dtype(dtype), shape(std::move(shape)), strides(std::move(strides)) {}
  // Dense, last dimension fastest.
  BasicTensor(Data* data, DType dtype, Dims dense_shape)
      : data(data), dtype(dtype), shape(std::move(dense_shape)), strides(shape.size()) {
    int64_t stride = 1;
    for (size_t i = shape.size(); i-- > 0;) {
      strides[i] = stride;
      stride *= shape[i];
    }
  }
  // A tensor that may be written may be read.
  operator BasicTensor<const void>() const { return {data, dtype, shape, strides}; }

  bool is_set() const { return data != nullptr; }
};

using Tensor = BasicTensor<void>;
using ConstTensor = BasicTensor<const void>;

// Two views of the same elements.
inline bool SameTensor(const ConstTensor& a, const ConstTensor& b) {
  return a.data == b.data && a.dtype == b.dtype && a.shape == b.shape && a.strides == b.strides;
}

// What a tensor called `name` must be: this dtype and shape, the last dimension contiguous, data
// set (unless it has no elements) and aligned to its element. InvalidArgument names the field, the
// value and the rule.
absl::Status CheckTensor(absl::string_view name, const ConstTensor& tensor, DType dtype,
                         std::initializer_list<int64_t> shape);

}  // namespace nsa

#endif  // NSA_TENSOR_H_
