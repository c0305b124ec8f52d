// Small records in host byte order, for data that ranks of one program version pass around.
#ifndef COMM_WIRE_H_
#define COMM_WIRE_H_

#include <cstdint>
#include <cstring>
#include <string>

#include "absl/strings/string_view.h"

namespace nsa::comm {

class WireWriter {
 public:
  void PutInt64(int64_t value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  void PutString(absl::string_view value) {
    PutInt64(static_cast<int64_t>(value.size()));
    bytes_.append(value.data(), value.size());
  }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

// After a read past the end every value is 0 or empty and ok() is false.
class WireReader {
 public:
  explicit WireReader(absl::string_view bytes) : rest_(bytes) {}

  int64_t GetInt64() {
    int64_t value = 0;
    if (rest_.size() < sizeof(value)) return Fail();
    std::memcpy(&value, rest_.data(), sizeof(value));
    rest_.remove_prefix(sizeof(value));
    return value;
  }
  std::string GetString() {
    const int64_t size = GetInt64();
    if (size < 0 || static_cast<uint64_t>(size) > rest_.size()) {
      Fail();
      return std::string();
    }
    std::string value(rest_.substr(0, size));
    rest_.remove_prefix(size);
    return value;
  }
  bool ok() const { return ok_; }

 private:
  int64_t Fail() {
    ok_ = false;
    rest_ = absl::string_view();
    return 0;
  }

  absl::string_view rest_;
  bool ok_ = true;
};

}  // namespace nsa::comm

#endif  // COMM_WIRE_H_
