#!/usr/bin/env bash
# Formats every C, C++ and CUDA file that git does not ignore in place; with --check, only says which would change.
set -euo pipefail
cd "$(dirname "$0")/.."

mode=(-i)
[[ ${1:-} == --check ]] && mode=(--dry-run -Werror --ferror-limit=1)
git ls-files -z --cached --others --exclude-standard -- '*.c' '*.cc' '*.h' '*.cu' '*.cuh' |
  xargs -0 --no-run-if-empty -n 16 -P "$(nproc)" clang-format "${mode[@]}"
