// A shared library that is opened when it is first wanted, so that a program which was built
// against it starts where it is missing. Made by lazy_library of tools/bazel/lazy_library.bzl.
#ifndef COMM_LAZY_LIBRARY_H_
#define COMM_LAZY_LIBRARY_H_

#include "absl/status/status.h"
#include "absl/types/span.h"

namespace nsa::comm {

struct LazyLibrary {
  const char* name;                       // for people
  const char* soname;                     // as the loader looks for it
  absl::Span<const char* const> symbols;  // its functions
  void (**functions)();                   // [symbols] where they are, once it is open
};

// Opens the library, or takes that of this soname which the process has loaded already, and looks
// up its functions. Again when it is open: nothing. Unavailable, naming the library and what is
// missing, otherwise. Thread-safe.
absl::Status OpenLibrary(const LazyLibrary& library);

// What stands for every function of a library that is not open: ends the program. Whoever makes a
// communicator opens its library before.
[[noreturn]] void CalledBeforeOpen();

}  // namespace nsa::comm

#endif  // COMM_LAZY_LIBRARY_H_
