#!/usr/bin/env bash
# Everything that must hold before a change lands, on one machine without a GPU. The last line is
# "N passed, N failed, N skipped": the test cases of every step, a step outside Bazel's tests being
# one case itself.
set -uo pipefail
cd "$(dirname "$0")/.."

# Bazel's results are kept between runs and shared by clones.
bazel_flags=(--disk_cache="${XDG_CACHE_HOME:-$HOME/.cache}/nsa-bazel" --noshow_progress --keep_going)

setup() { tools/setup.sh; }
check_layers() { tools/check_layers.py; }
check_format() { tools/format.sh --check; }
build_all() { bazel build "${bazel_flags[@]}" //...; }
test_all() { bazel_test //...; }
# The tests that are worth a second run: those of memory handling, and those of threads.
test_asan() { bazel_test --config=asan --build_tests_only --test_tag_filters=asan_ci //...; }
test_tsan() { bazel_test --config=tsan --build_tests_only --test_tag_filters=tsan_ci //...; }
# A user's workspace builds against this one, and its programs run.
external_workspace() {
  [[ -d examples/external_workspace ]] || return 0
  (
    cd examples/external_workspace || exit
    trap 'bazel shutdown' EXIT  # a second server would only hold memory
    bazel build "${bazel_flags[@]}" //... || exit
    for program in $(bazel query --noshow_progress 'kind(cc_binary, //...)'); do
      echo "external_workspace: $program"
      bazel run "${bazel_flags[@]}" "$program" </dev/null || exit
    done
  )
}

bundle() { tools/bundle_test.sh; }
# The Python package from its sources, with torch.
python_package() {
  local python
  python=$(tools/python_env.sh) && bazel build "${bazel_flags[@]}" //nsa:libnsa.so &&
    run_pytest "$python" nsa/python
}
# On what the step before has built.
pytorch_example() { run_pytest "$(tools/python_env.sh)" examples/04_pytorch_training; }
plots() { run_pytest "$(tools/python_env.sh)" benchmarks/test_plot.py; }
# As it is installed, without torch.
wheel() {
  tools/build_wheel.sh "$results/wheel" && python3 -m venv "$results/venv" &&
    "$results/venv/bin/pip" install -q pytest "$results"/wheel/*.whl &&
    NSA_TEST_INSTALLED=1 run_pytest "$results/venv/bin/python" nsa/python
}

# In this order; a new step is a function above and its name here.
steps=(
  setup
  check_layers
  check_format
  build_all
  test_all
  test_asan
  test_tsan
  external_workspace
  bundle
  python_package
  pytorch_example
  plots
  wheel
)

results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
passed=0 failed=0 skipped=0 failed_steps=()

# bazel test that leaves its events for counting. Its failing test cases are counted one by one, so
# exit code 3 (tests failed) is not the step's failure; 4 is "no tests to run".
bazel_test() {
  local events=$results/${FUNCNAME[1]}.json status=0 ok bad skip
  bazel test "${bazel_flags[@]}" --build_event_json_file="$events" "$@" || status=$?
  [[ -s $events ]] || return "$status"
  read -r ok bad skip < <(tools/count_tests.py "$events")
  passed=$((passed + ok)) failed=$((failed + bad)) skipped=$((skipped + skip))
  [[ $status == 0 || $status == 4 || ($status == 3 && $bad -gt 0) ]]
}

# run_pytest PYTHON FOLDER: counted likewise.
run_pytest() {
  local events=$results/${FUNCNAME[1]}.xml status=0 ok bad skip
  "$1" -m pytest -q -rs --junit-xml="$events" "$2" || status=$?
  [[ -s $events ]] || return "$status"
  read -r ok bad skip < <(tools/count_tests.py "$events")
  passed=$((passed + ok)) failed=$((failed + bad)) skipped=$((skipped + skip))
  [[ $status == 0 || ($status == 1 && $bad -gt 0) ]]
}

for name in "${steps[@]}"; do
  echo "=== $name"
  start=$SECONDS failed_before=$failed
  if "$name"; then
    # The steps of these two have counted their cases already.
    [[ $(declare -f "$name") =~ bazel_test|run_pytest ]] || passed=$((passed + 1))
  else
    failed=$((failed + 1))
  fi
  verdict=ok
  ((failed == failed_before)) || { verdict=FAILED && failed_steps+=("$name"); }
  echo "=== $name: $verdict, $((SECONDS - start)) s"
done

# The end of a long log says where to look.
((failed == 0)) || echo "failed steps: ${failed_steps[*]}"
echo "$passed passed, $failed failed, $skipped skipped"
((failed == 0))
