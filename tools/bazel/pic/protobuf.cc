#include "google/protobuf/stubs/common.h"

#if GOOGLE_PROTOBUF_VERSION == 3021012
#include "tools/bazel/pic/arena.inc"
#endif
