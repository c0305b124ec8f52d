"""plot.py draws the result files that are kept."""

import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")

FOLDER = pathlib.Path(__file__).resolve().parent
DRAWN = ("*-training-*.json", "*-decode-*.json")


@pytest.mark.parametrize(
    "file", [f for of in DRAWN for f in sorted(FOLDER.glob(f"results/{of}"))], ids=lambda f: f.stem
)
def test_draws(file, tmp_path):
    plot = [sys.executable, FOLDER / "plot.py", file, "--output", tmp_path]
    subprocess.run(plot, check=True, timeout=100, stdout=subprocess.DEVNULL)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    kept = {path.name for of in ("svg", "png") for path in file.parent.glob(f"{file.stem}-*.{of}")}
    assert kept and kept <= set(sizes)
    assert min(sizes.values()) > 5000
