#!/usr/bin/env bash
# Builds the demo and runs it on this machine: one rank on each GPU, up to four, where there are GPUs
# and the build can use them, else four ranks on CPUs. Arguments go to the demo.
set -euo pipefail
cd "$(dirname "$0")/.."

tools/setup.sh
cache=${XDG_CACHE_HOME:-$HOME/.cache}/nsa-bazel
bazel build --disk_cache="$cache" --noshow_progress //examples/02_demo:demo //tools/launch:list_gpus

ranks=4
if [[ ! " $* " =~ \ --?(device[=\ ]cpu|backend[=\ ]ucx)\  ]]; then
  gpus=$(bazel-bin/tools/launch/list_gpus | wc -l)
  ranks=$((gpus > 0 && gpus < 4 ? gpus : 4))
fi

# Root is refused by default. Four ranks may well share fewer cores, so no rank is bound to one.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
exec mpirun -n "$ranks" --oversubscribe --bind-to none bazel-bin/examples/02_demo/demo "$@"
