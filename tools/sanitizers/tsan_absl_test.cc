// Under --config=tsan: whatever Abseil orders, ThreadSanitizer knows of. A plain int is handed from
// one thread to another by each primitive in turn; a hand-over that the sanitizer misses is a race.

#include <gtest/gtest.h>

#include <thread>

#include "absl/status/status.h"
#include "absl/synchronization/barrier.h"
#include "absl/synchronization/blocking_counter.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace {

constexpr absl::Duration kLong = absl::Minutes(1);

// `give` runs in another thread after it wrote the value, `take` in this one before it reads it.
template <typename Give, typename Take>
void HandOver(Give give, Take take) {
  int value = 0;
  std::thread giver([&] {
    value = 7;
    give();
  });
  take();
  EXPECT_EQ(value, 7);
  giver.join();
}

struct Flag {
  absl::Mutex mutex;
  absl::CondVar changed;
  bool set = false;

  void Set() {
    absl::MutexLock lock(&mutex);
    set = true;
    changed.SignalAll();
  }
  absl::Condition IsSet() { return absl::Condition(&set); }
};

TEST(TsanAbslTest, Notification) {
  absl::Notification a, b, c, d;
  HandOver([&] { a.Notify(); }, [&] { a.WaitForNotification(); });
  HandOver([&] { b.Notify(); }, [&] { b.WaitForNotificationWithTimeout(kLong); });
  HandOver([&] { c.Notify(); }, [&] { c.WaitForNotificationWithDeadline(absl::Now() + kLong); });
  HandOver([&] { d.Notify(); },
           [&] {
             while (!d.HasBeenNotified()) std::this_thread::yield();
           });
}

// Copies of a status share what the last one to go frees.
TEST(TsanAbslTest, Status) {
  for (int i = 0; i < 100; ++i) {
    absl::Status mine = absl::InternalError("long enough to be read");
    std::thread other([copy = mine] { EXPECT_EQ(copy.message().back(), 'd'); });
    EXPECT_EQ(mine.message().front(), 'l');
    mine = absl::OkStatus();
    other.join();
  }
}

TEST(TsanAbslTest, BlockingCounterAndBarrier) {
  absl::BlockingCounter counter(1);
  HandOver([&] { counter.DecrementCount(); }, [&] { counter.Wait(); });
  auto* barrier = new absl::Barrier(2);
  const auto block = [barrier] {
    if (barrier->Block()) delete barrier;
  };
  HandOver(block, block);
}

TEST(TsanAbslTest, MutexPolled) {
  const auto poll = [](auto read) {
    Flag flag;
    HandOver([&] { flag.Set(); },
             [&] {
               while (!read(flag)) std::this_thread::yield();
             });
  };
  poll([](Flag& f) {
    absl::MutexLock lock(&f.mutex);
    return f.set;
  });
  poll([](Flag& f) {
    absl::ReaderMutexLock lock(&f.mutex);
    return f.set;
  });
  poll([](Flag& f) {
    if (!f.mutex.TryLock()) return false;
    const bool set = f.set;
    f.mutex.Unlock();
    return set;
  });
  poll([](Flag& f) {
    if (!f.mutex.ReaderTryLock()) return false;
    const bool set = f.set;
    f.mutex.ReaderUnlock();
    return set;
  });
}

TEST(TsanAbslTest, MutexConditions) {
  const auto wait = [](auto lock_when_set) {
    Flag flag;
    HandOver([&] { flag.Set(); },
             [&] {
               lock_when_set(flag);
               EXPECT_TRUE(flag.set);
               flag.mutex.Unlock();
             });
  };
  wait([](Flag& f) { f.mutex.LockWhen(f.IsSet()); });
  wait([](Flag& f) { f.mutex.LockWhenWithTimeout(f.IsSet(), kLong); });
  wait([](Flag& f) { f.mutex.LockWhenWithDeadline(f.IsSet(), absl::Now() + kLong); });
  wait([](Flag& f) {
    f.mutex.Lock();
    f.mutex.Await(f.IsSet());
  });
  wait([](Flag& f) {
    f.mutex.Lock();
    f.mutex.AwaitWithTimeout(f.IsSet(), kLong);
  });
  wait([](Flag& f) {
    f.mutex.Lock();
    f.mutex.AwaitWithDeadline(f.IsSet(), absl::Now() + kLong);
  });
  wait([](Flag& f) {
    f.mutex.Lock();
    while (!f.set) f.changed.Wait(&f.mutex);
  });
  wait([](Flag& f) {
    f.mutex.Lock();
    while (!f.set) f.changed.WaitWithTimeout(&f.mutex, kLong);
  });
  wait([](Flag& f) {
    f.mutex.Lock();
    while (!f.set) f.changed.WaitWithDeadline(&f.mutex, absl::Now() + kLong);
  });
}

}  // namespace
