"""What the tests of the adapters share."""

import dataclasses
import pathlib
import re

import torch

import nsa
from torch_testing import dtype_of, relative_error

TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}
# Relative L2 on GPUs: bf16 rounds each tensor on the way by up to 2**-9, in two layers some twenty
# times, and gradients again on the way back.
GPU_TOLERANCE = 2e-2
GPU_GRADIENT_TOLERANCE = 5e-2


def make_config(num_q_heads=4, **fields):
    fields = {"num_selected_blocks": 3, "num_local_blocks": 1, "window_tokens": 48} | fields
    return nsa.Config(
        num_q_heads=num_q_heads, num_kv_heads=2, head_dim_qk=64, head_dim_v=64, **fields
    )


def config_of(device, config):
    """On GPUs one that selects all blocks of 320 tokens: where other shapes of matrix products round
    differently other blocks would be selected."""
    blocks = config.num_selected_blocks if dtype_of(device) == torch.float32 else 5
    return dataclasses.replace(config, num_selected_blocks=blocks)


# Of up to 512 tokens each of these branches alone is dense causal attention.
DENSE = make_config(num_selected_blocks=8, window_tokens=512)
DENSE_BRANCHES = {"selected": 1, "window": 2}


@torch.no_grad()
def only(branch, model):
    """Closes the gates of all but one branch (0 cmp, 1 slc, 2 win) in a model."""
    for name, parameter in model.named_parameters():
        if name.endswith("gate_bias"):
            parameter.copy_(torch.tensor([100.0 if b == branch else -100.0 for b in range(3)]))


@torch.no_grad()
def perturb(model):
    """Gates and compressors that are no longer alike in all heads."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(model.named_parameters()):
        if "gate_" in name or "compress_" in name:
            noise = 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter += noise.to(parameter)


def is_ours(name):
    return "gate_" in name or "compress_" in name


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def rounds(tensor):
    """Whether models on its device compute in bf16."""
    return dtype_of(tensor.device) == torch.bfloat16


def assert_close(actual, expected):
    if rounds(actual):
        assert relative_error(actual, expected) < GPU_TOLERANCE
    else:
        torch.testing.assert_close(actual, expected, **TOLERANCE)


def assert_same(actual, expected):
    """Of dicts of tensors, in those of `expected`: in relation to each tensor's largest value, or
    to a hundredth of the largest of all where that is more, as some gradients are zero but for
    rounding. On GPUs norms stand for the largest values."""
    if rounds(next(iter(expected.values()))):
        size, tolerance = torch.Tensor.norm, GPU_GRADIENT_TOLERANCE
    else:
        size, tolerance = lambda tensor: tensor.abs().max(), 5e-4
    least = max(float(size(of.double())) for of in expected.values()) / 100
    for name, of in expected.items():
        scale = max(float(size(of.double())), least)
        difference = float(size(actual[name].double() - of.double())) / scale
        assert difference < tolerance, f"{name}: {difference}"


def run_readme(title, **names):
    """The first Python code under the README's heading `title`, run as written; its variables."""
    text = (pathlib.Path(__file__).parents[3] / "README.md").read_text()
    code = re.search(rf"^#+ {title}\n.*?```python\n(.*?)```", text, re.M | re.S).group(1)
    exec(compile(code, title, "exec"), names)
    return names
