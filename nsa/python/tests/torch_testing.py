"""What the tests with torch share."""

import pytest
import torch
import torch.distributed as dist

import nsa

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3}  # relative L2

CONFIG = nsa.Config(
    num_q_heads=8,
    num_kv_heads=2,
    head_dim_qk=64,
    head_dim_v=64,
    num_selected_blocks=3,
    num_local_blocks=1,
    window_tokens=48,
)


def with_compressor(compressor, config=CONFIG):
    return nsa.Config(**{**vars(config), "compressor": compressor})


def dtype_of(device):
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def need(device, size):
    if device == "cuda" and torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")


def start(device, rank, size):
    """A process group of all ranks, and this rank's device."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
        dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    else:
        dist.init_process_group("gloo")
    return torch.device(device, rank) if device == "cuda" else torch.device("cpu")


def make_inputs(tokens, config=CONFIG, device="cpu", separate=False, seed=0):
    """q, k, v, gate as leaves of the autograd graph."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(heads, dim, dtype=dtype_of(device)):
        values = torch.randn(tokens, heads, dim, generator=generator)
        return values.to(device, dtype).requires_grad_()

    kv = [
        (
            leaf(config.num_kv_heads, config.head_dim_qk),
            leaf(config.num_kv_heads, config.head_dim_v),
        )
        for _ in range(3 if separate else 1)
    ]
    k, v = zip(*kv)
    q = leaf(config.num_q_heads, config.head_dim_qk)
    gate = leaf(config.num_q_heads, 3, torch.float32)
    return q, k if separate else k[0], v if separate else v[0], gate


def relative_error(actual, expected, least=0.0):
    """In L2, of the larger of `expected` and `least`."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / max(expected.norm(), least))
