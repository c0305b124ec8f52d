// A tensor in the kernels' memory, whose rows are some of the rows of a dense tensor on the host.
#ifndef TESTS_TESTING_LOCAL_TENSOR_H_
#define TESTS_TESTING_LOCAL_TENSOR_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/kernels.h"
#include "nsa/tensor.h"

namespace nsa::test {

class LocalTensor {
 public:
  // Heads, the second of three dimensions, and rows lie further apart than dense by the paddings.
  static absl::StatusOr<LocalTensor> Create(kernels::Kernels& kernels, DType dtype, Dims shape,
                                            int64_t row_padding = 0, int64_t head_padding = 0) {
    LocalTensor tensor;
    tensor.tensor_ = Tensor(nullptr, dtype, std::move(shape));
    Tensor& view = tensor.tensor_;
    if (view.shape.size() == 3) {
      view.strides[1] += head_padding;
      view.strides[0] = view.shape[1] * view.strides[1];
    }
    view.strides[0] += row_padding;
    absl::StatusOr<std::unique_ptr<kernels::Memory>> memory =
        kernels.Allocate(std::max<int64_t>(1, tensor.num_bytes()));
    if (!memory.ok()) return memory.status();
    tensor.memory_ = *std::move(memory);
    view.data = tensor.memory_->data();
    return tensor;
  }

  const Tensor& view() const { return tensor_; }

  // NaN everywhere, in the padding too.
  absl::Status Poison(kernels::Kernels& kernels) {
    return CopyIn(kernels, std::vector<std::byte>(num_bytes(), kPoison));
  }
  // `rows`: of the dense tensor, for each row of this one. The padding becomes NaN.
  absl::Status Load(kernels::Kernels& kernels, const std::byte* dense,
                    const std::vector<int64_t>& rows) {
    std::vector<std::byte> bytes(num_bytes(), kPoison);
    ForEachHead(rows, [&](int64_t here, int64_t there, int64_t count) {
      std::memcpy(&bytes[here], dense + there, count);
    });
    return CopyIn(kernels, bytes);
  }
  absl::Status Store(kernels::Kernels& kernels, std::byte* dense,
                     const std::vector<int64_t>& rows) const {
    std::vector<std::byte> bytes(num_bytes());
    absl::Status status = kernels.CopyToHost(bytes.data(), tensor_.data, num_bytes(), nullptr);
    if (status.ok()) status = kernels.Synchronize(nullptr);
    if (!status.ok()) return status;
    ForEachHead(rows, [&](int64_t here, int64_t there, int64_t count) {
      std::memcpy(dense + there, &bytes[here], count);
    });
    return absl::OkStatus();
  }

 private:
  static constexpr std::byte kPoison{0xff};

  int64_t num_bytes() const {
    return tensor_.shape[0] * tensor_.strides[0] * SizeOf(tensor_.dtype);
  }

  absl::Status CopyIn(kernels::Kernels& kernels, const std::vector<std::byte>& bytes) {
    const absl::Status status =
        kernels.CopyFromHost(tensor_.data, bytes.data(), num_bytes(), nullptr);
    return status.ok() ? kernels.Synchronize(nullptr) : status;
  }

  template <class Copy>
  void ForEachHead(const std::vector<int64_t>& rows, Copy copy) const {
    const bool has_heads = tensor_.shape.size() == 3;
    const int64_t heads = has_heads ? tensor_.shape[1] : 1;
    const int64_t head_bytes = tensor_.shape.back() * SizeOf(tensor_.dtype);
    for (size_t row = 0; row < rows.size(); ++row) {
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t here = row * tensor_.strides[0] + (has_heads ? head * tensor_.strides[1] : 0);
        copy(here * SizeOf(tensor_.dtype), (rows[row] * heads + head) * head_bytes, head_bytes);
      }
    }
  }

  Tensor tensor_;
  std::unique_ptr<kernels::Memory> memory_;
};

}  // namespace nsa::test

#endif  // TESTS_TESTING_LOCAL_TENSOR_H_
