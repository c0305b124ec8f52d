#include "absl/base/config.h"

#if ABSL_LTS_RELEASE_VERSION == 20220623
#include "tools/bazel/pic/cordz_functions.inc"
#include "tools/bazel/pic/sysinfo.inc"
#endif
