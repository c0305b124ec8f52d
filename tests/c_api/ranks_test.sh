#!/usr/bin/env bash
# ranks_test.sh PROGRAM: as ranks that RANK and its like tell apart, and as ranks of mpirun.
set -euo pipefail
program=$1
port=$((20000 + RANDOM % 20000))
export UCX_WARN_UNUSED_ENV_VARS=n

# start SIZE [RANK=VALUE of LD_LIBRARY_PATH]: every rank's output in out.RANK, its exit code in codes.
start() {
  local size=$1 without=${2-} rank pids=()
  for ((rank = 0; rank < size; ++rank)); do
    local path=${LD_LIBRARY_PATH-}
    [[ ${without%%=*} != "$rank" ]] || path=${without#*=}
    RANK=$rank WORLD_SIZE=$size MASTER_ADDR=127.0.0.1 MASTER_PORT=$port LD_LIBRARY_PATH=$path \
      timeout 120 "$program" cpu >"$folder/out.$rank" 2>&1 &
    pids+=($!)
  done
  codes=()
  for pid in "${pids[@]}"; do
    local code=0
    wait "$pid" || code=$?
    codes+=("$code")
  done
}

fail() {
  echo "FAILED: $*" >&2
  tail -n 20 "$folder"/out.* >&2
  exit 1
}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

timeout 120 "$program" cpu >"$folder/out.0" 2>&1 || fail "one rank"
start 3
[[ ${codes[*]} == "0 0 0" ]] || fail "three ranks: ${codes[*]}"
grep -q "rank 2 of 3: passed" "$folder/out.2" || fail "three ranks"
sed 's/^/rank 1: /' "$folder/out.1"

# A rank without UCX cannot take part, and says so to the other.
mkdir "$folder/broken"
: >"$folder/broken/libucp.so.0"
start 2 1="$folder/broken"
[[ ${codes[*]} == "2 2" ]] || fail "without UCX: ${codes[*]}"
grep -q "UCX: .*libucp.so.0" "$folder/out.1" || fail "rank 1 does not name what is missing"
grep -q "rank 1 gave up: UNAVAILABLE: UCX" "$folder/out.0" || fail "rank 0 does not know why"

if command -v mpirun >/dev/null; then
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  # The session directory's path must be short enough for a Unix socket.
  TMPDIR=$folder timeout 120 mpirun -n 2 --oversubscribe -x MASTER_ADDR=127.0.0.1 \
    -x MASTER_PORT="$port" "$program" cpu >"$folder/out.0" 2>&1 || fail "mpirun"
  grep -q "rank 1 of 2: passed" "$folder/out.0" || fail "mpirun"
fi
