#!/usr/bin/env bash
# The demo finds its needle at depths of 0 to 100 % in steps of 10, on four ranks as threads.
set -euo pipefail
demo=$1
for depth in 0 10 20 30 40 50 60 70 80 90 100; do
  "$demo" --ranks=4 --depth="$depth" --compare=false >"$TEST_TMPDIR/out" 2>&1 || {
    echo "depth $depth %:"
    cat "$TEST_TMPDIR/out"
    exit 1
  }
  echo "depth $depth %: $(grep -a retrieved "$TEST_TMPDIR/out")"
done
