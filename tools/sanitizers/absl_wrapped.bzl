"""Functions of Debian's Abseil that tsan_absl.cc wraps, by their linker names."""

WRAPPED = [
    "_ZN4absl7debian35Mutex" + name
    for name in [
        "4LockEv",
        "6UnlockEv",
        "7TryLockEv",
        "10ReaderLockEv",
        "12ReaderUnlockEv",
        "13ReaderTryLockEv",
        "5AwaitERKNS0_9ConditionE",
        "16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE",
        "17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE",
        "8LockWhenERKNS0_9ConditionE",
        "19LockWhenWithTimeoutERKNS0_9ConditionENS0_8DurationE",
        "20LockWhenWithDeadlineERKNS0_9ConditionENS0_4TimeE",
    ]
] + [
    "_ZN4absl7debian37CondVar4WaitEPNS0_5MutexE",
    "_ZN4absl7debian37CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE",
    "_ZN4absl7debian37CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE",
    "_ZN4absl7debian312Notification6NotifyEv",
    "_ZNK4absl7debian312Notification19WaitForNotificationEv",
    "_ZNK4absl7debian312Notification30WaitForNotificationWithTimeoutENS0_8DurationE",
    "_ZNK4absl7debian312Notification31WaitForNotificationWithDeadlineENS0_4TimeE",
    "_ZN4absl7debian315BlockingCounter14DecrementCountEv",
    "_ZN4absl7debian315BlockingCounter4WaitEv",
    "_ZN4absl7debian37Barrier5BlockEv",
    "_ZN4absl7debian36Status15UnrefNonInlinedEm",
]
