#!/usr/bin/env bash
# All answers are right: on one rank, on four as threads, and on four as processes, which read pages in
# place or, over TCP, fetch them.
set -euo pipefail
decode=$1

# answers COMMAND...: it succeeds and 8 of 8 answers are right.
answers() {
  output=$("$@" 2>&1) && grep -qa '^8 of 8 answers are right' <<<"$output" && return
  echo "$*: $output"
  exit 1
}

small=("$decode" --device=cpu --tokens=8192 --sequences=4 --decode=128)
answers "${small[@]}" --ranks=1
answers "${small[@]}" --ranks=4

# Containers run tests as root, which Open MPI refuses unless told twice; its session directory's
# path must be short enough for a socket.
if command -v mpirun >/dev/null; then
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  TMPDIR=$(mktemp -d /tmp/decode.XXXXXX)
  export TMPDIR
  trap 'rm -rf "$TMPDIR"' EXIT
  mpirun=(mpirun -n 4 --oversubscribe --bind-to none --mca btl self,tcp --mca btl_tcp_if_include lo)
  answers "${mpirun[@]}" "${small[@]}"
  answers "${mpirun[@]}" -x UCX_TLS=tcp,self -x UCX_NET_DEVICES=lo "${small[@]}"
  grep -qa 'fetched from other ranks in all' <<<"$output" || { echo "read in place: $output"; exit 1; }
else
  echo "no mpirun on this machine: skipped"
fi

# A text without room for the riddles is refused.
! output=$("$decode" --device=cpu --tokens=300 2>&1) || { echo "took 300 tokens"; exit 1; }
grep -q 'riddles = 32: must' <<<"$output" || { echo "no word of riddles: $output"; exit 1; }
