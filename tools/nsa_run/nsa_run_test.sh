#!/usr/bin/env bash
# The program's flags, exit codes and files; what it computes is tested in run_file_test.cc.
set -uo pipefail
nsa_run=$1 write_test_input=$2
failures=0
files=$TEST_TMPDIR/files
mkdir -p "$files"
"$write_test_input" "$files" || exit 1

fail() {
  echo "FAILED: $*" >&2
  failures=$((failures + 1))
}

# expect CODE PATTERN COMMAND...: the exit code, and a pattern in what it prints.
expect() {
  local code=$1 pattern=$2 output actual
  shift 2
  output=$("$@" 2>&1)
  actual=$?
  if [[ $actual != "$code" ]] || ! grep -qE -- "$pattern" <<<"$output"; then
    fail "$*: exit code $actual, expected $code and /$pattern/ in: $output"
  fi
}

run=("$nsa_run" --config "$files/config.json" --input "$files/in.safetensors" --device cpu)
expect 0 '' "${run[@]}" --output "$files/one" --all
expect 0 'remote picks' "${run[@]}" --output "$files/three" --all --backend loopback --ranks 3 \
  --threads 1 --stats --stats_proto "$files/stats.textproto" --trace "$files/trace.json" \
  --svg "$files/drawings"
cmp "$files/one" "$files/three" || fail "one rank and three ranks differ"
[[ -s $files/stats.textproto ]] || fail "no stats.textproto"
python3 -m json.tool "$files/trace.json" >/dev/null || fail "trace.json is not JSON"
[[ $(ls "$files/drawings") == $'fetch_matrix.svg\nselection_map.svg\nsharding.svg' ]] ||
  fail "drawings: $(ls "$files/drawings")"

"${run[@]}" --output "$files/unprinted" --stats >/dev/full 2>/dev/null &&
  fail "succeeds although the statistics could not be printed"

bad=("${run[@]}" --output "$files/bad")
expect 1 'Native Sparse Attention' "$nsa_run" --help
expect 1 'backend' "$nsa_run" --help
expect 1 'input: must name a file' "$nsa_run" --output "$files/bad"
expect 1 'output: must name a file' "${run[@]}"
expect 1 'no_such_file' "${bad[@]}" --input no_such_file
expect 1 'no_such_config.json' "${bad[@]}" --config no_such_config.json
expect 1 'no_such_flag' "${bad[@]}" --no_such_flag
expect 1 'only flags are taken' "${bad[@]}" 3
expect 1 'backend = "telepathy"' "${bad[@]}" --backend telepathy
expect 1 'device = "gpu": must be' "${bad[@]}" --device gpu
expect 1 'backend = "nccl": moves GPUs' "${bad[@]}" --backend nccl
expect 1 'backend = "loopback": moves the host' "${bad[@]}" --device cuda --backend loopback
expect 1 'ranks = 2: must be 0 or 1 on GPUs' "${bad[@]}" --device cuda --ranks 2
expect 1 'ranks = -2' "${bad[@]}" --ranks=-2
expect 1 'threads = -1' "${bad[@]}" --threads=-1
expect 1 'timeout_s = 0' "${bad[@]}" --timeout_s 0
expect 1 'fetch_budget_mib = -1' "${bad[@]}" --fetch_budget_mib=-1
expect 1 'sharding = "zigzog"' "${bad[@]}" --sharding zigzog
expect 1 'WORLD_SIZE' env RANK=0 "${bad[@]}"
[[ ! -e $files/bad ]] || fail "an output was written in spite of an error"

# Processes in place of threads. Containers run tests as root, which Open MPI refuses unless told
# twice; its session directory's path must be short enough for a socket.
if command -v mpirun >/dev/null; then
  # Open MPI leaks from plugins that it unloads, where no suppression can name them.
  export ASAN_OPTIONS=detect_leaks=0
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  TMPDIR=$(mktemp -d /tmp/nsa_run.XXXXXX)
  export TMPDIR
  trap 'rm -rf "$TMPDIR"' EXIT
  mpirun=(timeout 120 mpirun -n 2 --oversubscribe --bind-to none --mca btl self,tcp
    --mca btl_tcp_if_include lo)
  expect 0 'remote picks' "${mpirun[@]}" "${run[@]}" --output "$files/mpi" --all --backend ucx \
    --threads 1 --stats
  cmp "$files/one" "$files/mpi" || fail "one process and two under mpirun differ"
  expect 1 'sharding = "zigzog"' "${mpirun[@]}" "${bad[@]}" --sharding zigzog
  expect 1 'ranks = 3' "${mpirun[@]}" "${bad[@]}" --ranks 3
  # Rank 0 alone can't write; rank 1 must not take the run for a success.
  expect 1 'no/such/folder' "${mpirun[@]}" "${run[@]}" --output "$files/no/such/folder/bad"
else
  echo "no mpirun on this machine: skipped"
fi

# What torchrun leaves in the environment.
export WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + $$ % 20000))
RANK=1 timeout 120 "${run[@]}" --output "$files/rendezvous" --all --threads 1 &
peer=$!
RANK=0 expect 0 '' timeout 120 "${run[@]}" --output "$files/rendezvous" --all --threads 1
wait "$peer" || fail "rank 1 of a rendezvous: exit code $?"
cmp "$files/one" "$files/rendezvous" || fail "one process and two of a rendezvous differ"
[[ ! -e $files/bad ]] || fail "an output was written in spite of an error"

exit "$((failures > 0))"
