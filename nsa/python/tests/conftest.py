"""Tests of the Python package. Those that need torch, or a GPU, skip where there is none."""

import os
import pathlib
import sys

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]

# The sources here, unless an installed package is tested.
if not os.environ.get("NSA_TEST_INSTALLED"):
    sys.path.insert(0, str(_PACKAGE))
    os.environ["PYTHONPATH"] = f"{_PACKAGE}:{os.environ.get('PYTHONPATH', '')}"
    built = _PACKAGE.parents[1] / "bazel-bin/nsa/libnsa.so"
    if built.exists():
        os.environ.setdefault("NSA_LIBRARY", str(built))
