#!/usr/bin/env bash
# compute-sanitizer over the GPU tests, for a host with a GPU and without Bazel:
#
#   tools/sanitizers/compute_sanitizer.sh BUNDLE [LOGS]
#
# BUNDLE is a folder with the tests' binaries and the libraries that they need; LOGS, by default a
# temporary folder, gets one file a run. JOBS runs go at a time, and each ends within LIMIT seconds;
# ONLY, a pattern of grep -E, chooses among them. A run is one tool over one test, of which a filter
# takes what touches every kernel and is small enough for the tool. The last line counts runs:
# "N clean, N failed, N skipped".
set -uo pipefail
bundle=$(realpath "${1:?usage: $0 BUNDLE [LOGS]}")
logs=$(realpath "${2:-$(mktemp -d)}")
jobs=${JOBS:-4} limit=${LIMIT:-600} only=${ONLY:-.}
export LD_LIBRARY_PATH=$bundle${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

# tool  test  gtest filter  [options of compute-sanitizer]
#
# AttendBackwardKernel is not shown to synccheck: its roles meet at one barrier from different places
# of the code, as PTX allows, and that synccheck calls divergent. Meeting at an mbarrier instead cost
# 300 bytes of spilled registers a thread.
runs=(
  "memcheck  stages_test  *StorageTypes*:*GroupSizes*:*BlockSizes*:*AnyLength*:*Compressors*"
  "memcheck  stages_test  *HeadDims*:*WindowSizes*:*NumbersOfBlocks*:*Extreme*:*WithoutSummaries*"
  "memcheck  decode_test  *StorageTypes*:*GroupSizes*:*AnyLength*:*CopiesPieces*"
  "memcheck  plan_fetch_test  -*ManyBlocksAndQueries*"
  "memcheck  cuda_kernels_test  *"
  "memcheck  score_select_test  *OtherHeadDims*:*NumbersOfBlocks*:*PlainKernel*"
  "memcheck  attend_backward_test  *AddsToWhat*:*KeysWithout*:*WindowsAndBlocks*"
  "memcheck  selected_backward_test  *GroupSizes*:*Bits*:*LongLists*"
  "memcheck  nccl_conformance_test  *Alone:NcclGraph.*"
  "memcheck  cuda_reference_test  *ShortDocuments*:*OneToken*:*GroupOf5*:*MlpOfF16*"
  "memcheck  cuda_sharding_invariance_test  *Repeated*/bf16"
  "synccheck  stages_test  *StorageTypes*:*GroupSizes*:*BlockSizes*:*Compressors*"
  "synccheck  decode_test  *StorageTypes*"
  "synccheck  plan_fetch_test  *PiecesAreTheCpus*"
  "synccheck  score_select_test  *OtherHeadDims*:*PlainKernel*"
  "synccheck  selected_backward_test  *GroupSizes*"
  "synccheck  nccl_conformance_test  *Alone"
  "racecheck  stages_test  *StorageTypes*"
  "racecheck  stages_test  *HeadDims*"
  # Two calls with a linear compressor and two with an mlp: more would take many minutes.
  "racecheck  stages_test  *Compressors/Auto  --kernel-name kernel_substring=CompressMatrix
    --launch-skip 14 --launch-count 4"
  "racecheck  plan_fetch_test  *PiecesAreTheCpus*"
  "racecheck  attend_backward_test  *AddsToWhat*"
  "racecheck  selected_backward_test  *GroupSizes*"
  "racecheck  cuda_kernels_test  *CopiesRows*"
  "racecheck  nccl_conformance_test  *Alone"
)

# Kernels that racecheck is not shown. A producer warp fills rings of shared memory in them, and
# consumer warps read these:
#   AttendSelectedKernel   slots, by cp.async.bulk; notes, by stores
#   AttendSummariesKernel  items of work (WorkRing), by stores
#   RankBlocksKernel       items of work; scores, which consumers store and selectors read
#   AttendBackwardKernel   statistics of rows, by stores
#   SelectedKeysKernel     rows and their statistics, by cp.async
#   SelectedQueriesKernel  as AttendSelectedKernel
# A slot is written after a wait for "empty" and read after a wait for "full". Two steps of that
# racecheck does not follow, and so takes every turn of a ring for a race: that a copy has written
# when the barrier has counted it; and that an arrival of lane 0 after __syncwarp speaks for all
# lanes of the warp. AttendSummariesKernel and RankBlocksKernel fill their other rings by bulk copies
# too, but wgmma reads those, and reads of wgmma racecheck does not see. That the barriers are right,
# synccheck and the tests for equal bits have to show.
unseen_by_racecheck=(AttendSelectedKernel AttendSummariesKernel RankBlocksKernel
  AttendBackwardKernel SelectedKeysKernel SelectedQueriesKernel)

# Runs number $1 and leaves "clean", "failed" or "skipped" and why in $logs/$1.verdict.
run() {
  local tool test filter more log=$logs/$1.log verdict status=0
  read -r -d "" tool test filter more <<<"${runs[$1]}"
  local options=(--tool "$tool" --port $((49152 + 20 * $1)) --error-exitcode 99)
  options+=(--show-backtrace device --print-limit 20)
  # shellcheck disable=SC2206 # they are words
  options+=($more)
  # Errors of the API are what some tests ask for.
  [[ $tool != memcheck ]] || options+=(--report-api-errors no)
  if [[ $tool == racecheck ]]; then
    for kernel in "${unseen_by_racecheck[@]}"; do
      options+=(--kernel-name-exclude "kernel_substring=$kernel")
    done
  fi
  if [[ ! -x $bundle/$test ]]; then
    verdict="skipped, there is no $bundle/$test"
  else
    timeout -k 10 "$limit" compute-sanitizer "${options[@]}" "$bundle/$test" \
      --gtest_filter="$filter" >"$log" 2>&1 || status=$?
    if grep -q "Running 0 tests" "$log"; then
      verdict="failed, the filter finds no test"
    elif [[ $status != 0 ]]; then
      verdict="failed, exit status $status, $(grep -h SUMMARY "$log" | tail -n 1)"
    elif ! grep -q "SUMMARY: 0 " "$log"; then
      verdict="failed, no summary"
    elif ! grep -q "\[       OK \]" "$log"; then
      verdict="skipped, the test ran nothing"
    else
      verdict=clean
    fi
  fi
  echo "$tool $test $filter: $verdict" | tee "$logs/$1.verdict"
}

mkdir -p "$logs"
rm -f "$logs"/*.verdict
for i in "${!runs[@]}"; do
  grep -qE -e "$only" <<<"${runs[$i]}" || continue
  while (($(jobs -rp | wc -l) >= jobs)); do wait -n; done
  run "$i" &
done
wait
count() { cat "$logs"/*.verdict | grep -c ": $1"; }
echo "logs in $logs"
echo "$(count clean) clean, $(count failed) failed, $(count skipped) skipped"
[[ $(count failed) == 0 ]]
