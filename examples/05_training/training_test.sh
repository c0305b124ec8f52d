#!/usr/bin/env bash
# The program learns on one rank, and on four with the same losses: as threads and under mpirun.
set -uo pipefail
training=$1
failures=0

fail() {
  echo "FAILED: $*" >&2
  failures=$((failures + 1))
}

# train NAME COMMAND...: it must succeed, and print losses.
train() {
  local name=$1
  shift
  timeout 250 "$@" >"$TEST_TMPDIR/$name" 2>&1 || fail "$*: exit code $?: $(cat "$TEST_TMPDIR/$name")"
  grep -E '^(step|new)' "$TEST_TMPDIR/$name" >"$TEST_TMPDIR/$name.losses"
}

# agree FILE FILE TOLERANCE: the same lines, in which no loss differs by more.
agree() {
  paste "$TEST_TMPDIR/$1.losses" "$TEST_TMPDIR/$2.losses" | awk -v tolerance="$3" '
    { half = NF / 2; difference = $4 - $(half + 4) }
    NF % 2 || difference > tolerance || -difference > tolerance { print; bad = 1 }
    END { exit bad || NR == 0 }' || fail "losses of $1 and $2 differ"
}
