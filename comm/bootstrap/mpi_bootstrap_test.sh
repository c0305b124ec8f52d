#!/bin/bash
# Starts three ranks of the given binary under mpirun.
set -euo pipefail

if ! command -v mpirun > /dev/null; then
  echo "no mpirun on this machine: skipped"
  exit 0
fi
# Containers run tests as root, which Open MPI refuses unless told twice. The session directory's
# path must be short enough for a Unix socket.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
TMPDIR="$(mktemp -d /tmp/mpi.XXXXXX)"
export TMPDIR
trap 'rm -rf "${TMPDIR}"' EXIT
# Open MPI leaks from plugins that it unloads, where no suppression can name them.
export ASAN_OPTIONS=detect_leaks=0
timeout 60 mpirun -n 3 --oversubscribe --mca btl self,tcp --mca btl_tcp_if_include lo "$1"
