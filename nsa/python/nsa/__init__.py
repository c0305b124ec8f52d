"""Native Sparse Attention (arXiv:2502.11089) with context parallelism, on CPUs and NVIDIA GPUs.

    Group    which ranks take part, and on what device
    Config   heads, dimensions and block sizes of the attention
    Plan     which rank holds which tokens of a (packed) sequence
    Engine   forward and backward on numpy arrays and torch tensors
    KVCache  decoding

and, with torch: attention() (differentiable, traced by torch.compile), CoreAttention (a module that
is given q, k and v) and NSAAttention (a whole attention layer).

Shapes in these modules: S tokens of the whole sequence, P ranks, T tokens of this rank, Hq and Hkv
heads of q and of k and v, Dk and Dv their dimensions; l, d, l', n and w as in Config.
"""

from nsa._library import (
    AbortedError,
    FailedPreconditionError,
    InternalError,
    NsaError,
    UnavailableError,
    version,
)
from nsa.config import Config
from nsa.engine import Engine, Gradients, SavedForward
from nsa.group import Group
from nsa.kv_cache import KVCache
from nsa.plan import Plan

__version__ = version()

# What needs torch is imported when it is first asked for: numpy alone is enough for the rest.
_NEEDS_TORCH = {
    "attention": "nsa.ops",
    "CoreAttention": "nsa.module",
    "NSAAttention": "nsa.module",
}

__all__ = [
    "AbortedError",
    "Config",
    "CoreAttention",
    "Engine",
    "FailedPreconditionError",
    "Gradients",
    "Group",
    "InternalError",
    "KVCache",
    "NSAAttention",
    "NsaError",
    "Plan",
    "SavedForward",
    "UnavailableError",
    "attention",
    "version",
]


def __getattr__(name):
    if name in _NEEDS_TORCH:
        import importlib

        value = getattr(importlib.import_module(_NEEDS_TORCH[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'nsa' has no attribute {name!r}")
