#include "comm/lazy_library.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "absl/base/const_init.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"

namespace nsa::comm {

absl::Status OpenLibrary(const LazyLibrary& library) {
  static absl::Mutex mu(absl::kConstInit);
  absl::MutexLock lock(&mu);
  if (library.functions[0] != &CalledBeforeOpen) return absl::OkStatus();
  // Never closed: what was looked up stays.
  void* const handle = dlopen(library.soname, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    return absl::UnavailableError(
        absl::StrCat(library.name, ": ", dlerror(), "; it is looked for among the libraries that ",
                     "this process has loaded, in LD_LIBRARY_PATH, beside the library or program ",
                     "that needs it, and in the system's folders"));
  }
  std::vector<void (*)()> found;
  for (const char* symbol : library.symbols) {
    found.push_back(reinterpret_cast<void (*)()>(dlsym(handle, symbol)));
    if (found.back() == nullptr) {
      return absl::UnavailableError(absl::StrCat(library.name, ": ", library.soname, " has no ",
                                                 symbol, ": another version is needed"));
    }
  }
  std::copy(found.begin(), found.end(), library.functions);
  return absl::OkStatus();
}

void CalledBeforeOpen() {
  (void)std::fputs("nsa: a function of a library was called before the library was opened\n",
                   stderr);
  std::abort();
}

}  // namespace nsa::comm
