#!/usr/bin/env bash
# Builds the demo and runs it on four ranks of this machine. Arguments go to the demo.
set -euo pipefail
cd "$(dirname "$0")/.."

tools/setup.sh
cache=${XDG_CACHE_HOME:-$HOME/.cache}/nsa-bazel
bazel build --disk_cache="$cache" --noshow_progress //examples/02_demo:demo

# Root is refused by default. Four ranks may well share fewer cores, so no rank is bound to one.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
exec mpirun -n 4 --oversubscribe --bind-to none bazel-bin/examples/02_demo/demo "$@"
