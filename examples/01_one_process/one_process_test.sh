#!/usr/bin/env bash
# The program prints every line that its README promises.
set -uo pipefail
output=$("$1") || exit 1
status=0
while IFS= read -r line; do
  grep -qxF -- "$line" <<<"$output" || {
    echo "not printed: $line" >&2
    status=1
  }
done < <(grep -E '^(Output |Blocks | +kv head )' "$2")
[[ $status == 0 ]] || echo "$output" >&2
exit "$status"
