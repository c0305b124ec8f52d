#include "kernels/cpu/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace nsa::kernels::cpu {
namespace {

// Pages from the system are zero, and aligned to far more than 256 bytes.
class MappedMemory : public Memory {
 public:
  MappedMemory(void* data, int64_t num_bytes) : data_(data), num_bytes_(num_bytes) {}
  ~MappedMemory() override { munmap(data_, num_bytes_); }
  MappedMemory(const MappedMemory&) = delete;
  MappedMemory& operator=(const MappedMemory&) = delete;

  void* data() override { return data_; }

 private:
  void* const data_;
  const int64_t num_bytes_;
};

// Bytes that the system can give without swapping; no limit where it does not say.
int64_t AvailableBytes() {
  std::ifstream meminfo("/proc/meminfo");
  std::string field, unit;
  int64_t kibibytes = 0;
  while (meminfo >> field >> kibibytes) {
    if (field == "MemAvailable:") return kibibytes * 1024;
    std::getline(meminfo, unit);
  }
  return std::numeric_limits<int64_t>::max();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Memory>> AllocateMemory(int64_t num_bytes) {
  if (num_bytes < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_bytes = ", num_bytes, " must not be negative"));
  }
  const int64_t available = AvailableBytes();
  const int64_t mapped_bytes = std::max<int64_t>(num_bytes, 1);
  void* data = MAP_FAILED;
  if (num_bytes <= available) {
    // Populated at once, so that the next request sees what is really left.
    data = mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  }
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("host memory: ", num_bytes, " bytes asked, ", available, " bytes free"));
  }
  return std::make_unique<MappedMemory>(data, mapped_bytes);
}

}  // namespace nsa::kernels::cpu
