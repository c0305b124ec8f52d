#!/usr/bin/env bash
# The program's flags and exit codes; what it prints is tested in report_test.cc.
set -uo pipefail
nsa_plan=$1
failures=0

# expect CODE PATTERN ARGUMENT...: the exit code, and a pattern in what it prints.
expect() {
  local code=$1 pattern=$2 output
  shift 2
  output=$("$nsa_plan" "$@" 2>&1)
  local actual=$?
  if [[ $actual != "$code" ]] || ! grep -qE -- "$pattern" <<<"$output"; then
    echo "FAILED: nsa_plan $*: exit code $actual, expected $code and /$pattern/ in:" >&2
    echo "$output" >&2
    failures=$((failures + 1))
  fi
}

config=$TEST_TMPDIR/config.json
echo '{"num_q_heads": 8, "num_kv_heads": 2, "head_dim_qk": 192}' >"$config"
expect 0 'num_q_heads +8' --config "$config" --tokens 1000 --ranks 3
expect 0 '1500 tokens in 2 documents, 5 chunks on 2 ranks' \
  --cu_seqlens 0,1000,1500 --ranks 2 --sharding zigzag-per-document
expect 0 'load' --tokens 4096 --ranks 2 --dtype f32 --shared_kv --svg "$TEST_TMPDIR/drawings/new"
for drawing in sharding fetch_matrix selection_map; do
  [[ -s $TEST_TMPDIR/drawings/new/$drawing.svg ]] || {
    echo "FAILED: no drawing $drawing" >&2
    failures=$((failures + 1))
  }
done
expect 1 'Native Sparse Attention' --help
expect 1 'num_tokens = 0: must lie in'
expect 1 'num_ranks = 0: must lie in' --tokens 10 --ranks 0
expect 1 'sharding = "zigzog": must be contiguous' --tokens 10 --sharding zigzog
expect 1 'dtype = "fp8": must be bf16' --tokens 10 --dtype fp8
expect 1 'cu_seqlens: "x" must be a whole number' --cu_seqlens 0,x
expect 1 'cu_seqlens\[2\] = 9: must be num_tokens = 10' --tokens 10 --cu_seqlens 0,5,9
expect 1 'fetch_budget_mib = -1: must lie in' --tokens 10 --fetch_budget_mib -1
expect 1 'no_such_file.json' --config no_such_file.json --tokens 10
expect 1 'no_such_flag' --no_such_flag
expect 1 'takes flags only' --tokens 10 65536
"$nsa_plan" --tokens 10 >/dev/full 2>/dev/null && {
  echo "FAILED: succeeds although nothing could be printed" >&2
  failures=$((failures + 1))
}
exit "$((failures > 0))"
