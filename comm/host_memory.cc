#include "comm/host_memory.h"

#include <fstream>
#include <limits>
#include <string>

#include "absl/strings/str_cat.h"

namespace nsa::comm {
namespace {

// Memory that can be had without swapping; the largest number where the system does not say.
int64_t AvailableBytes() {
  std::ifstream meminfo("/proc/meminfo");
  std::string key;
  int64_t kibibytes;
  std::string unit;
  while (meminfo >> key >> kibibytes) {
    if (key == "MemAvailable:") return kibibytes * 1024;
    std::getline(meminfo, unit);
  }
  return std::numeric_limits<int64_t>::max();
}

}  // namespace

absl::Status OutOfMemory(int64_t num_bytes, absl::string_view why) {
  return absl::ResourceExhaustedError(absl::StrCat("CreateWindow: num_bytes: cannot allocate ",
                                                   num_bytes, ", ", AvailableBytes(),
                                                   " are free: ", why));
}

absl::Status CheckMemoryFor(int64_t num_bytes) {
  if (num_bytes <= AvailableBytes()) return absl::OkStatus();
  return OutOfMemory(num_bytes, "not enough memory on this host");
}

}  // namespace nsa::comm
