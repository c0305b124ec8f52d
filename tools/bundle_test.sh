#!/usr/bin/env bash
# A bundle runs on its own, holds what it says, and is refused when it cannot be made.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failures=0

fail() {
  echo "FAILED: $*" >&2
  failures=$((failures + 1))
}

# expect_refusal PATTERN ARGS...: bundle.sh fails, says so, and leaves nothing behind.
expect_refusal() {
  local pattern=$1 before output
  shift
  before=$(ls "$folder")
  output=$(tools/bundle.sh "$@" 2>&1) && fail "bundle.sh $*: must fail"
  grep -qE -- "$pattern" <<<"$output" || fail "bundle.sh $*: no /$pattern/ in: $output"
  [[ $(ls "$folder") == "$before" ]] || fail "bundle.sh $*: left $(ls "$folder")"
}

program=//examples/01_one_process:one_process
bundle=$folder/bundle
mkdir "$bundle"
tools/bundle.sh "$bundle" "$program" || fail "bundle.sh"
[[ $(cd "$bundle" && echo *) == "MANIFEST libhwy.so.1 one_process" ]] || fail "$(ls "$bundle")"
(cd "$bundle" && sha256sum --quiet -c MANIFEST) || fail "MANIFEST: other files"
grep -qx "# one_process: $program" "$bundle/MANIFEST" || fail "$(cat "$bundle/MANIFEST")"
# Elsewhere, and with nothing in the environment that leads to libraries.
mv "$bundle" "$folder/moved"
[[ $(env -i "$folder/moved/one_process") == *"Output "* ]] || fail "one_process does not run"
libraries=$(env -i LD_TRACE_LOADED_OBJECTS=1 "$folder/moved/one_process")
[[ $libraries == *"=> $folder/moved/libhwy.so.1 "* ]] || fail "one_process takes $libraries"

# What libraries need of each other travels, too, and is found there.
tools/bundle.sh "$folder/library" //tests/c_api:ranks || fail "bundle.sh"
libraries=$(env -i LD_TRACE_LOADED_OBJECTS=1 "$folder/library/ranks")
[[ $libraries == *"=> $folder/library/libabsl_base.so."* ]] || fail "ranks takes $libraries"

expect_refusal 'usage' "$folder/new"
expect_refusal 'FOLDER = ".*/moved": must be new or empty' "$folder/moved" "$program"
expect_refusal 'TARGET = "//nsa:config": must be a program' "$folder/new" //nsa:config
expect_refusal 'TARGET = "//no:such": bazel does not know it' "$folder/new" //no:such
expect_refusal 'limit-mib = "x": must be' --limit-mib x "$folder/new" "$program"
expect_refusal 'one_process: is both' "$folder/new" "$program" "$program"
expect_refusal 'larger than 1 MiB:' --limit-mib 1 "$folder/new" "$program"
expect_refusal ' MiB  one_process' --limit-mib 1 "$folder/new" "$program"

exit "$((failures > 0))"
