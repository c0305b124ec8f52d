// libprotobuf.a's logging reads stderr at an address that is fixed at link time, so a library that
// holds it needs a stderr of its own: the C library's, copied when the library is loaded.
#include <dlfcn.h>

extern "C" {

void* stderr = nullptr;

__attribute__((constructor(101))) static void CopyStderr() {
  stderr = *static_cast<void**>(dlsym(RTLD_NEXT, "stderr"));
}

}  // extern "C"
