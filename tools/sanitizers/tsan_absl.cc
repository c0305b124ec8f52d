// Tells ThreadSanitizer what Abseil's synchronization orders.
//
// Debian's Abseil is compiled without the sanitizer, so the order that a Mutex makes between
// threads would be invisible and every use of one reported as a race. The linker (--wrap) sends
// each call through here: what makes an order releases or acquires the object's address.

#include <cstdint>

#include "absl/synchronization/barrier.h"
#include "absl/synchronization/blocking_counter.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"

extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
}

namespace {

// Lives around a call: releases what the call gives up and acquires what it has got. A try that
// fails acquires too, which can only hide a race. Reads in between are not watched: Abseil
// evaluates a waiter's Condition in whichever thread unlocks.
class Order {
 public:
  Order(const void* release, const void* acquire) : acquire_(const_cast<void*>(acquire)) {
    if (release != nullptr) __tsan_release(const_cast<void*>(release));
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  }
  ~Order() {
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    if (acquire_ != nullptr) __tsan_acquire(acquire_);
  }
  Order(const Order&) = delete;
  Order& operator=(const Order&) = delete;

 private:
  void* acquire_;
};

// The flag behind HasBeenNotified(), which is inline and loads it with acquire.
const void* Flag(const absl::Notification* notification) {
  return reinterpret_cast<const char*>(notification) + sizeof(absl::Mutex);
}

}  // namespace

// WRAP(result, linker name, parameters, arguments, releases, acquires)
#define WRAP(Result, symbol, parameters, arguments, released, acquired) \
  extern "C" Result __real_##symbol parameters;                         \
  extern "C" Result __wrap_##symbol parameters {                        \
    const Order order(released, acquired);                              \
    return __real_##symbol arguments;                                   \
  }

using absl::Condition;
using absl::CondVar;
using absl::Duration;
using absl::Mutex;
using absl::Notification;
using absl::Time;

WRAP(void, _ZN4absl7debian35Mutex4LockEv, (Mutex * m), (m), nullptr, m)
WRAP(void, _ZN4absl7debian35Mutex6UnlockEv, (Mutex * m), (m), m, nullptr)
WRAP(bool, _ZN4absl7debian35Mutex7TryLockEv, (Mutex * m), (m), nullptr, m)
WRAP(void, _ZN4absl7debian35Mutex10ReaderLockEv, (Mutex * m), (m), nullptr, m)
WRAP(void, _ZN4absl7debian35Mutex12ReaderUnlockEv, (Mutex * m), (m), m, nullptr)
WRAP(bool, _ZN4absl7debian35Mutex13ReaderTryLockEv, (Mutex * m), (m), nullptr, m)
WRAP(void, _ZN4absl7debian35Mutex5AwaitERKNS0_9ConditionE, (Mutex * m, const Condition& c), (m, c),
     m, m)
WRAP(bool, _ZN4absl7debian35Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE,
     (Mutex * m, const Condition& c, Duration d), (m, c, d), m, m)
WRAP(bool, _ZN4absl7debian35Mutex17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE,
     (Mutex * m, const Condition& c, Time t), (m, c, t), m, m)
WRAP(void, _ZN4absl7debian35Mutex8LockWhenERKNS0_9ConditionE, (Mutex * m, const Condition& c),
     (m, c), nullptr, m)
WRAP(bool, _ZN4absl7debian35Mutex19LockWhenWithTimeoutERKNS0_9ConditionENS0_8DurationE,
     (Mutex * m, const Condition& c, Duration d), (m, c, d), nullptr, m)
WRAP(bool, _ZN4absl7debian35Mutex20LockWhenWithDeadlineERKNS0_9ConditionENS0_4TimeE,
     (Mutex * m, const Condition& c, Time t), (m, c, t), nullptr, m)
WRAP(void, _ZN4absl7debian37CondVar4WaitEPNS0_5MutexE, (CondVar * v, Mutex* m), (v, m), m, m)
WRAP(bool, _ZN4absl7debian37CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE,
     (CondVar * v, Mutex* m, Duration d), (v, m, d), m, m)
WRAP(bool, _ZN4absl7debian37CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE,
     (CondVar * v, Mutex* m, Time t), (v, m, t), m, m)
WRAP(void, _ZN4absl7debian312Notification6NotifyEv, (Notification * n), (n), Flag(n), nullptr)
WRAP(void, _ZNK4absl7debian312Notification19WaitForNotificationEv, (const Notification* n), (n),
     nullptr, Flag(n))
WRAP(bool, _ZNK4absl7debian312Notification30WaitForNotificationWithTimeoutENS0_8DurationE,
     (const Notification* n, Duration d), (n, d), nullptr, Flag(n))
WRAP(bool, _ZNK4absl7debian312Notification31WaitForNotificationWithDeadlineENS0_4TimeE,
     (const Notification* n, Time t), (n, t), nullptr, Flag(n))
WRAP(bool, _ZN4absl7debian315BlockingCounter14DecrementCountEv, (absl::BlockingCounter * b), (b), b,
     nullptr)
WRAP(void, _ZN4absl7debian315BlockingCounter4WaitEv, (absl::BlockingCounter * b), (b), nullptr, b)
WRAP(bool, _ZN4absl7debian37Barrier5BlockEv, (absl::Barrier * b), (b), b, b)

// Lets go of what copies of a status share; the last one frees it, after all others.
extern "C" void __real__ZN4absl7debian36Status15UnrefNonInlinedEm(uintptr_t rep);
extern "C" void __wrap__ZN4absl7debian36Status15UnrefNonInlinedEm(uintptr_t rep) {
  __tsan_release(reinterpret_cast<void*>(rep));
  __tsan_acquire(reinterpret_cast<void*>(rep));
  __real__ZN4absl7debian36Status15UnrefNonInlinedEm(rep);
}
