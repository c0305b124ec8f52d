#!/usr/bin/env bash
# tools/bundle.sh [--limit-mib N] FOLDER TARGET...
#
# Packs the programs of Bazel targets for a host that has a GPU driver, MPI and NCCL but nothing to
# build with: stripped, beside the shared libraries that such a host lacks, in FOLDER, which is new
# or empty. They run from there by their names. MANIFEST says what came from where, and what the host
# must have; `sha256sum -c MANIFEST` checks the files. Data of targets does not travel. What is
# larger than N MiB, 40 by default, is refused.
set -euo pipefail

fail() {
  echo "bundle: $*" >&2
  exit 1
}

limit_mib=40
if [[ ${1-} == --limit-mib ]]; then
  limit_mib=${2-}
  [[ $limit_mib =~ ^[0-9]+$ ]] || fail "limit-mib = \"$limit_mib\": must be a number"
  shift 2
fi
(($# >= 2)) || fail "usage: tools/bundle.sh [--limit-mib N] FOLDER TARGET..."
folder=$(realpath -m "$1")
targets=("${@:2}")
[[ ! -e $folder || (-d $folder && -z $(ls -A "$folder")) ]] ||
  fail "FOLDER = \"$folder\": must be new or empty"
cd "$(dirname "$0")/.."

# The host's: the C and C++ runtimes, the driver, NCCL, MPI, and UCX, which comes with MPI and of
# which a process must have one only. What these need is theirs.
is_of_host() {
  [[ $1 =~ ^lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s|cuda|nccl|mpi|ucp|ucs|uct|ucm)\.so ]]
}

programs=()
for target in "${targets[@]}"; do
  found=$(bazel query --noshow_progress "kind('cc_(binary|test) rule', $target)") ||
    fail "TARGET = \"$target\": bazel does not know it"
  [[ -n $found ]] || fail "TARGET = \"$target\": must be a program, or several"
  mapfile -t -O ${#programs[@]} programs <<<"$found"
done
flags=(-c opt --noshow_progress --disk_cache="${XDG_CACHE_HOME:-$HOME/.cache}/nsa-bazel")
bazel build "${flags[@]}" "${programs[@]}"
bin=$(bazel info "${flags[@]}" bazel-bin)

# FOLDER appears whole or not at all.
mkdir -p "$(dirname "$folder")"
staged=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$staged"' EXIT
chmod 755 "$staged"
origins=() host=()

# add FILE NAME ORIGIN: FILE as NAME, and the libraries that it needs.
add() {
  local file=$1 name=$2 library path
  [[ ! -e $staged/$name ]] || fail "$name: is both ${3} and another file"
  strip --strip-unneeded -o "$staged/$name" "$file"
  origins+=("$name: $3")
  while read -r library; do
    [[ $library != ld-linux* ]] || continue
    path=$(ldd "$file" | awk -v library="$library" '$1 == library { print $3 }')
    [[ -e $path ]] || fail "$library, which $name needs: not found"
    if is_of_host "$library"; then
      host+=("$library: $(basename "$(realpath -m "$path")")")
    elif [[ ! -e $staged/$library ]]; then
      add "$path" "$library" "$path"
    fi
  done < <(readelf -d "$file" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')
}

for program in "${programs[@]}"; do
  path=${program#//}
  add "$bin/${path/://}" "${path#*:}" "$program"
done

# Nothing outside may stand in for a library of the bundle.
for program in "${programs[@]}"; do
  file=$staged/${program#*:}
  while read -r library _ path _; do
    [[ ! -e $staged/$library || $path == "$staged/$library" ]] ||
      fail "$(basename "$file"): takes $library from $path; link it with -Wl,-rpath,\$ORIGIN"
  done < <(env -u LD_LIBRARY_PATH ldd "$file")
done

manifest=$(
  echo "# commit $(git rev-parse HEAD)$(git diff --quiet HEAD || echo ", with changes")"
  printf '# %s\n' "${origins[@]}"
  echo "# the host must have (linked with):"
  printf '#   %s\n' "${host[@]}" | sort -u
  cd "$staged" && sha256sum -- *
)
echo "$manifest" >"$staged/MANIFEST"

sizes=$(du --apparent-size --block-size=1 "$staged"/* | awk '
  { sub(".*/", "", $2); printf "%8.2f MiB  %s\n", $1 / 2^20, $2; sum += $1 }
  END { printf "%8.2f MiB  in all\n", sum / 2^20 }')
bytes=$(cat "$staged"/* | wc -c)
((bytes <= limit_mib << 20)) || fail "larger than $limit_mib MiB:
$sizes"
[[ ! -d $folder ]] || rmdir "$folder"
mv "$staged" "$folder"
echo "bundle: $folder
$sizes"
