// Streams and events of kernels whose calls have finished when they return: the order of the calls
// is the order of the work. Rows may lie anywhere.
#ifndef KERNELS_HOST_ORDER_H_
#define KERNELS_HOST_ORDER_H_

#include <cstdint>
#include <cstring>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "kernels/kernels.h"

namespace nsa::kernels {

class HostOrder : public Kernels {
 public:
  int64_t RowAlignment() const override { return 1; }
  absl::Status Synchronize(void* /*stream*/) override { return absl::OkStatus(); }
  absl::Status Zero(void* dst, int64_t num_bytes, void* /*stream*/) override {
    if (num_bytes > 0) std::memset(dst, 0, num_bytes);
    return absl::OkStatus();
  }
  absl::StatusOr<std::unique_ptr<Stream>> CreateStream() override {
    return std::make_unique<HostStream>();
  }
  absl::StatusOr<std::unique_ptr<Event>> CreateEvent(EventUse /*use*/) override {
    return std::make_unique<HostEvent>();
  }
  absl::Status Record(Event& event, void* /*stream*/) override {
    static_cast<HostEvent&>(event).time = absl::Now();
    return absl::OkStatus();
  }
  absl::Status WaitFor(Event& /*event*/, void* /*stream*/) override { return absl::OkStatus(); }
  absl::StatusOr<bool> IsCapturing(void* /*stream*/) override { return false; }
  absl::StatusOr<double> SecondsBetween(Event& begin, Event& end) override {
    return absl::ToDoubleSeconds(static_cast<HostEvent&>(end).time -
                                 static_cast<HostEvent&>(begin).time);
  }

 private:
  struct HostStream : Stream {
    void* get() override { return nullptr; }
  };
  struct HostEvent : Event {
    absl::Time time;
  };
};

}  // namespace nsa::kernels

#endif  // KERNELS_HOST_ORDER_H_
