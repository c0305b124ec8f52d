#include "hwy/base.h"
#include "hwy/highway.h"

#if HWY_MAJOR == 1 && HWY_MINOR == 0 && HWY_PATCH == 3
#include "tools/bazel/pic/targets.inc"
#endif
