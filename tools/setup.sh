#!/usr/bin/env bash
# Installs what the build needs from Debian's packages; does nothing where all of it is there.
# The CUDA toolkit is not installed here: without one, the CPU part builds and the rest is skipped.
set -euo pipefail

packages=(
  # the build itself
  g++ git python3 bazel-bootstrap bazel-rules-java bazel-rules-proto bazel-skylib bazel-platforms
  # libraries
  libabsl-dev libprotobuf-dev protobuf-compiler zlib1g-dev libhwy-dev nlohmann-json3-dev libcpp-httplib-dev
  libgtest-dev libgmock-dev libbenchmark-dev
  # the Python package's tests
  python3-venv python3-dev
  # transports and starting ranks
  libucx-dev libopenmpi-dev openmpi-bin iproute2
  # fuzzing and formatting
  clang libclang-rt-dev clang-format
)

missing=()
for package in "${packages[@]}"; do
  state=$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null || true)
  [[ $state == ii* ]] || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
  exit 0
fi

echo "setup: installing ${missing[*]}"
sudo=()
((EUID == 0)) || sudo=(sudo)
"${sudo[@]}" apt-get update -qq
"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
  apt-get install -y -qq --no-install-recommends "${missing[@]}"
