#!/usr/bin/env bash
# tools/python_env.sh: prints the path of a Python with pytest, matplotlib, a torch for CPUs and the
# stacks that nsa.adapters is for, which it makes when there is none yet. torch's wheel asks for two
# gigabytes of CUDA's libraries, of which a CPU uses the runtime: empty ones stand in for the others.
# Functions are looked up when called, which they are not; the variables that torch names are there.
set -euo pipefail
torch=2.15.0
folder=${XDG_CACHE_HOME:-$HOME/.cache}/nsa-python/torch-$torch-stacks-plots
python=$folder/bin/python
if [[ ! -e $folder/complete ]]; then
  {
    rm -rf "$folder"
    python3 -m venv "$folder"
    "$python" -m pip install -q pytest matplotlib numpy setuptools 'nvidia-cuda-runtime==13.2.*' \
      filelock typing-extensions sympy networkx jinja2 fsspec
    "$python" -m pip install -q --no-deps "torch==$torch"
    "$python" -m pip install -q transformers==5.23.0
    # Both ask for more than the adapters use.
    "$python" -m pip install -q --no-deps megatron-core==0.16.1 torchtitan==0.3.0 \
      spmd_types==0.2.3 tyro docstring_parser triton
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    libraries=("$site"/torch/lib/*.so)
    nm -D --undefined-only "${libraries[@]}" |
      sed -n 's/.* \(.*\)@NVSHMEM$/long \1;/p' | sort -u >"$folder/variables.c"
    echo 'NVSHMEM { *; };' >"$folder/version"
    for name in $(readelf -d "${libraries[@]}" |
      sed -n 's/.*(NEEDED).*\[\(lib\(cu\|nv\|nccl\).*\)\]/\1/p' | sort -u); do
      contents=(-x c /dev/null)
      case $name in
        libcudart.so.*) continue ;;
        libnvshmem*) contents=("$folder/variables.c" -Wl,--version-script="$folder/version") ;;
      esac
      gcc -shared -nostdlib -Wl,-soname,"$name" -o "$site/torch/lib/$name" "${contents[@]}"
    done
    echo 'import os, sys; sys.setdlopenflags(os.RTLD_LAZY); os.environ["CUDA_VISIBLE_DEVICES"] = ""' \
      >"$site/cpu_only.pth"
    "$python" -c 'import torch; assert not torch.cuda.is_available()'
    touch "$folder/complete"
  } >&2
fi
echo "$python"
