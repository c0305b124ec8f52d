#!/usr/bin/env bash
# libnsa_test.sh LIBNSA RANKS: what the library shows, and what it wants of others.
set -euo pipefail
library=$1 program=$2

fail() {
  echo "FAILED: $*" >&2
  exit 1
}

others=$(nm -D --defined-only "$library" | grep -v " T nsa_" || true)
[[ -z $others ]] || fail "shows more than nsa_*: $others"
(($(nm -D --defined-only "$library" | grep -c " T nsa_") >= 40)) || fail "shows too little"
# Undefined: of the C and C++ runtimes, by their versions; Abseil's, protobuf's and Highway's, by
# their namespaces; weak ones, which may be missing.
others=$(nm -D --undefined-only "$library" |
  grep -vE "@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+$|^ +w |4absl|6google8protobuf|3hwy| AbslInternal" ||
  true)
[[ -z $others ]] || fail "wants more than it may: $others"
others=$(readelf -d "$library" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' |
  grep -vE "^(lib(c|m|dl|pthread|rt|stdc\+\+|gcc_s|absl_[a-z_]+|protobuf|hwy)|ld-linux-x86-64)\.so" || true)
[[ -z $others ]] || fail "needs $others"

# A running program can open it: it asks for no memory at a fixed place in threads.
python3 -c "import ctypes; ctypes.CDLL('$library')" || fail "cannot be opened"

# Every function of the header is there.
header=nsa/c_api.h
grep -oE "\bnsa_[a-z_]+\(" "$header" | tr -d "(" | sort -u |
  comm -23 - <(nm -D --defined-only "$library" | awk '{ print $3 }' | sort) >"$TEST_TMPDIR/missing"
[[ ! -s $TEST_TMPDIR/missing ]] || fail "lacks $(cat "$TEST_TMPDIR/missing")"

# One rank runs where NCCL and UCX cannot be opened.
mkdir "$TEST_TMPDIR/broken"
touch "$TEST_TMPDIR"/broken/{libnccl.so.2,libucp.so.0,libucs.so.0,libmpi.so.40}
LD_LIBRARY_PATH=$TEST_TMPDIR/broken "$program" cpu || fail "one rank wants more"
