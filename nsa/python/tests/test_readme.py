"""README's example, as it stands there."""

import pathlib
import re

import pytest

torch = pytest.importorskip("torch")

import ranks  # noqa: E402

README = pathlib.Path(__file__).resolve().parents[3] / "README.md"


def run_example(rank, size, device):
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    section = README.read_text().split("## Use it from PyTorch")[1]
    names = {}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], names)
    assert names["group"].size == size
    return [parameter.grad.float().norm().item() for parameter in names["layer"].parameters()]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_readme(device):
    size = 2
    if device == "cuda" and torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    first, second = ranks.run(run_example, size, device)
    assert first == second and any(norm > 0 for norm in first)
