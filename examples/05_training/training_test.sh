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

run=("$training" --device cpu)
train one "${run[@]}"
train four "${run[@]}" --ranks 4
agree one four 1e-4
train bf16 "${run[@]}" --ranks 4 --dtype bf16
agree one bf16 0.02

# Processes in place of threads. Containers run tests as root, which Open MPI refuses unless told
# twice; its session directory's path must be short enough for a socket.
if command -v mpirun >/dev/null; then
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  TMPDIR=$(mktemp -d /tmp/training.XXXXXX)
  export TMPDIR
  trap 'rm -rf "$TMPDIR"' EXIT
  train mpi mpirun -n 4 --oversubscribe --bind-to none --mca btl self,tcp \
    --mca btl_tcp_if_include lo "${run[@]}"
  agree one mpi 1e-4
else
  echo "no mpirun on this machine: skipped"
fi

# Two steps are too few to learn, and it says so.
output=$("${run[@]}" --steps 2 2>&1) && fail "learned in 2 steps: $output"
grep -q 'loss of new sequences' <<<"$output" || fail "no word of what was not learned: $output"
exit "$((failures > 0))"
