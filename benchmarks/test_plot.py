"""plot.py draws the result files that are kept."""

import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")

FOLDER = pathlib.Path(__file__).resolve().parent
# Those that figures are kept of. Example 04 draws its own.
DRAWN = [f for f in FOLDER.glob("results/*.json") if list(f.parent.glob(f"{f.stem}-*.svg"))]


@pytest.mark.parametrize("file", sorted(DRAWN), ids=lambda f: f.stem)
def test_draws(file, tmp_path):
    plot = [sys.executable, FOLDER / "plot.py", file, "--output", tmp_path]
    subprocess.run(plot, check=True, timeout=100, stdout=subprocess.DEVNULL)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    kept = {path.name for of in ("svg", "png") for path in file.parent.glob(f"{file.stem}-*.{of}")}
    assert kept and kept <= set(sizes)
    assert min(sizes.values()) > 5000
