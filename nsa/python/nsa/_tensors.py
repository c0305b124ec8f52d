"""Views of numpy arrays and torch tensors, as the library's structs."""

import functools
from typing import Any

import numpy as np

from nsa import _library

# A numpy array or a torch tensor.
Tensor = Any

DTYPES = ("float32", "bfloat16", "float16")  # by nsa_dtype
_SHORT = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
# An address that is not null, of tensors without elements.
_NOWHERE = 256


def dtype_name(dtype) -> str:
    """Of a name ("bf16", ...) or a numpy or torch dtype: what numpy and torch call it."""
    name = getattr(dtype, "__name__", None) or str(dtype)
    name = name.rpartition(".")[2]
    name = _SHORT.get(name, name)
    if name not in DTYPES:
        raise ValueError(f"dtype = {dtype}: must be one of {DTYPES}")
    return name


def address(name: str, tensor: Tensor) -> int:
    """ValueError, naming `name`, where a torch tensor has elements but no memory: on the meta
    device, or of a class that stands for other tensors."""
    if isinstance(tensor, np.ndarray):
        return tensor.ctypes.data or _NOWHERE
    place = tensor.data_ptr()
    if not place and tensor.numel():
        raise ValueError(
            f"{name}: is a {type(tensor)} on {tensor.device}, must have memory of its own"
        )
    return place or _NOWHERE


def _signature(tensor: Tensor):
    """What of a tensor its view says, but for the address; hashable."""
    if isinstance(tensor, np.ndarray):
        return tensor.shape, tensor.strides, tensor.dtype, tensor.flags.writeable
    if hasattr(tensor, "data_ptr"):
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device()
    return None if tensor is None else object()  # of which view() says what is wrong


def memory_of(k: Tensor, v: Tensor):
    """Equal for the same elements at the same places; hashable."""
    return address("k", k), _signature(k), address("v", v), _signature(v)


def view(name: str, tensor: Tensor, device_index: int, is_written=False) -> _library.Tensor:
    """ValueError, naming `name`, when the library cannot be given it."""
    if isinstance(tensor, np.ndarray):
        if is_written and not tensor.flags.writeable:
            raise ValueError(f"{name}: is read-only, must be writeable")
        device, strides = -1, [stride / tensor.itemsize for stride in tensor.strides]
        if any(stride % 1 for stride in strides):
            raise ValueError(f"{name}: strides {tensor.strides} must be whole elements")
    elif hasattr(tensor, "data_ptr"):
        device = (
            tensor.device.index if tensor.is_cuda else -1 if tensor.device.type == "cpu" else -2
        )
        strides = tensor.stride()
    else:
        raise ValueError(f"{name}: is a {type(tensor)}, must be a numpy array or a torch tensor")
    if device != device_index:
        place = "the CPU" if device_index < 0 else f"cuda:{device_index}"
        raise ValueError(
            f"{name}: is on {getattr(tensor, 'device', 'the CPU')}, must be on {place}"
        )
    dtype = str(tensor.dtype).rpartition(".")[2]
    if dtype not in DTYPES:
        raise ValueError(f"{name}: has dtype {tensor.dtype}, must be one of {DTYPES}")
    if len(tensor.shape) > 4:
        raise ValueError(f"{name}: has {len(tensor.shape)} dimensions, must be 4 at most")
    return _library.Tensor(
        data=address(name, tensor),
        dtype=DTYPES.index(dtype),
        ndim=len(tensor.shape),
        shape=tuple(tensor.shape),
        strides=tuple(map(int, strides)),
    )


class Structs:
    """Structs of one type whose field `tensors` is filled with views. A struct is made once for
    each signature of tensors; later calls with the like only write addresses."""

    MAX_KEPT = 64

    def __init__(self, struct_type, names, device_index, is_written=False):
        self._type = struct_type
        self._is_written = is_written  # by the library
        self._names = names
        self._device_index = device_index
        self._kept = {}

    def fill(self, tensors, places=None, **fields):
        """A struct that is valid until the next call: in each view the tensor (None: unset) at that
        one of `places` (None: in their order), and its other fields, which are integers."""
        try:  # torch tensors all: this is the larger part of a call's time
            key = [
                None if t is None else (t.shape, t.stride(), t.dtype, t.get_device())
                for t in tensors
            ]
        except AttributeError:
            key = list(map(_signature, tensors))
        key = (*key, places, *fields.items())
        kept = self._kept.get(key)
        if kept is None:
            kept = self._make(tensors, places or range(len(tensors)), fields)
            if len(self._kept) >= self.MAX_KEPT:
                self._kept.clear()
            self._kept[key] = kept
        struct, views = kept
        for place, (name, of) in views:
            here = address(name, tensors[place])
            for slot in of:
                slot.data = here
        return struct

    def _make(self, tensors, places, fields):
        struct, views = self._type(**fields), {}
        for i, place in enumerate(places):
            if tensors[place] is not None:
                name = self._names[i]
                struct.tensors[i] = view(name, tensors[place], self._device_index, self._is_written)
                views.setdefault(place, (name, []))[1].append(struct.tensors[i])
        return struct, list(views.items())


def empty_like(tensor: Tensor, shape=None, dtype=None) -> Tensor:
    """A new dense tensor of the kind and device of `tensor`; `dtype` by name."""
    shape = tuple(tensor.shape) if shape is None else shape
    if isinstance(tensor, np.ndarray):
        return np.empty(shape, dtype or tensor.dtype)
    import torch

    return torch.empty(
        shape, dtype=getattr(torch, dtype) if dtype else tensor.dtype, device=tensor.device
    )


def current_stream(device_index):
    """A function that gives torch's current stream, as the library takes it."""
    if device_index < 0:
        return lambda: None
    import torch

    # torch.cuda.current_stream() makes an object, which takes longer than all checks of a call.
    return functools.partial(torch._C._cuda_getCurrentRawStream, device_index)
