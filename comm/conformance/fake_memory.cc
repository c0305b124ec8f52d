#include "comm/conformance/fake_memory.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace nsa::comm::conformance {
namespace {

// Above all addresses of a process.
constexpr uintptr_t kBegin = uintptr_t{1} << 47;
constexpr int64_t kAlignment = 256;

char* Real(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return reinterpret_cast<char*>(address >= kBegin ? address - kBegin : address);
}

class FakeMemory final : public DeviceMemory {
 public:
  explicit FakeMemory(int64_t limit_bytes) : limit_bytes_(limit_bytes) {}

  absl::StatusOr<Block> Allocate(int64_t num_bytes) override {
    if (num_bytes > limit_bytes_) {
      return absl::ResourceExhaustedError(absl::StrCat("CreateWindow: num_bytes: cannot allocate ",
                                                       num_bytes, ", ", limit_bytes_, " are free"));
    }
    const int64_t size = (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
    char* const real = static_cast<char*>(std::aligned_alloc(kAlignment, size));
    std::memset(real, 0, size);
    return Block(reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(real) + kBegin),
                 [](char* memory) { std::free(Real(memory)); });
  }
  absl::StatusOr<Block> AllocateHost(int64_t num_bytes) override {
    return Block(static_cast<char*>(std::malloc(num_bytes)), [](char* host) { std::free(host); });
  }
  absl::Status Copy(void* dst, const void* src, int64_t num_bytes, void* /*stream*/) override {
    if (num_bytes > 0) std::memcpy(Real(dst), Real(src), num_bytes);
    return absl::OkStatus();
  }
  absl::Status Synchronize(void* /*stream*/) override { return absl::OkStatus(); }

 private:
  const int64_t limit_bytes_;
};

}  // namespace

std::shared_ptr<DeviceMemory> MakeFakeMemory(int64_t limit_bytes) {
  return std::make_shared<FakeMemory>(limit_bytes);
}

}  // namespace nsa::comm::conformance
