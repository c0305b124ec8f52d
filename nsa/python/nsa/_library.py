"""libnsa.so through ctypes: its structs and functions, as nsa/c_api.h declares them."""

import ctypes
import numbers
import os
import pathlib
import weakref
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p


class NsaError(RuntimeError):
    """What the library reports, but for what Python has a name of its own for: wrong arguments are
    ValueError, lack of memory MemoryError, a wait that took too long TimeoutError, a rank that died
    or gave up a ConnectionError."""


class FailedPreconditionError(NsaError):
    """Not in this state, or ranks in different calls."""


class InternalError(NsaError):
    """The library's or CUDA's failure."""


class UnavailableError(NsaError, ConnectionError):
    """A rank died, or a library that is needed is not there."""


class AbortedError(NsaError, ConnectionError):
    """Some rank gave up: names it and its reason."""


class _InvalidArgument(NsaError, ValueError):
    pass


class _OutOfMemory(NsaError, MemoryError):
    pass


class _Timeout(NsaError, TimeoutError):
    pass


# By nsa_status.
_ERRORS = {
    3: _InvalidArgument,
    4: _Timeout,
    8: _OutOfMemory,
    9: FailedPreconditionError,
    10: AbortedError,
    11: _InvalidArgument,
    13: InternalError,
    14: UnavailableError,
}


class Tensor(ctypes.Structure):
    """nsa_tensor."""

    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int32),
        ("ndim", c_int32),
        ("shape", c_int64 * 4),
        ("strides", c_int64 * 4),
    ]


class Struct(ctypes.Structure):
    """A versioned struct: struct_size is filled in, the rest is zero unless given. ValueError for
    numbers that do not fit, of which ctypes would keep the low bits."""

    def __init__(self, **fields):
        super().__init__(struct_size=ctypes.sizeof(self), **fields)
        for name, value in fields.items():
            if isinstance(value, numbers.Integral) and (getattr(self, name) or 0) != value:
                bits = 8 * ctypes.sizeof(dict(self._fields_)[name])
                raise ValueError(f"{name} = {value}: must be a number of {bits} bits")


class GroupOptions(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("from_environment", c_int32),
        ("rank", c_int32),
        ("size", c_int32),
        ("device", c_int32),
        ("transport", c_int32),
        ("num_threads", c_int32),
        ("timeout_ms", c_int64),
        ("rendezvous", c_char_p),
        ("name", c_char_p),
        ("nccl_comm", c_void_p),
    ]


class Config(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("num_q_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim_qk", c_int32),
        ("head_dim_v", c_int32),
        ("compress_block_tokens", c_int32),
        ("compress_stride_tokens", c_int32),
        ("select_block_tokens", c_int32),
        ("num_selected_blocks", c_int32),
        ("num_initial_blocks", c_int32),
        ("num_local_blocks", c_int32),
        ("window_tokens", c_int32),
        ("softmax_scale", c_float),
        ("compressor", c_int32),
    ]


class PlanOptions(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("num_tokens", c_int64),
        ("num_ranks", c_int32),
        ("sharding", c_int32),
        ("cu_seqlens", c_void_p),
        ("num_cu_seqlens", c_int64),
        ("tokens_of_rank", c_void_p),
    ]


class EngineOptions(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("dtype", c_int32),
        ("has_backward", c_int32),
        ("fetch_budget_bytes", c_int64),
        ("max_hidden_width", c_int64),
        ("agree_on_change_only", c_int32),
        ("time_stages", c_int32),
        ("memory_of", c_void_p),
    ]


class SaveOptions(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("drop_summaries", c_int32),
        ("keep_blocks", c_int32),
        ("memory", c_void_p),
        ("is_filled", c_int32),
    ]


# The order of tensors in nsa_compressor_params, nsa_forward_inputs and nsa_gradients.
PARAMS = ("weight", "pe", "w", "w1", "b1", "w2", "b2")
KV = ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win")
INPUTS = (
    ("q", *KV, "gate")
    + tuple(f"compress_k.{name}" for name in PARAMS)
    + tuple(f"compress_v.{name}" for name in PARAMS)
)
OUTPUTS = ("o", "o_cmp", "o_slc", "o_win")
ROW_OUTPUTS = ("lse_cmp", "lse_slc", "lse_win", "block_indices")


class ForwardInputs(Struct):
    _fields_ = [("struct_size", c_size_t), ("tensors", Tensor * len(INPUTS))]


class ForwardOutputs(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("tensors", Tensor * len(OUTPUTS)),
        *((name, c_void_p) for name in ROW_OUTPUTS),
    ]


class OneTensor(ctypes.Structure):
    _fields_ = [("tensors", Tensor * 1)]


class Gradients(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("tensors", Tensor * len(INPUTS)),
        ("accumulate", c_int32),
        ("sum_over_ranks", c_int32),
    ]


class KVCacheOptions(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("dtype", c_int32),
        ("max_sequences", c_int32),
        ("num_pages", c_int64),
        ("home_shares", c_void_p),
        ("max_tokens", c_int64),
        ("summary_tokens", c_int64),
        ("max_step_rows", c_int32),
        ("separate_kv", c_int32),
        ("max_rollback_tokens", c_int64),
        ("tensors", Tensor * (2 * len(PARAMS))),  # compress_k, compress_v
    ]


class KVTokens(ctypes.Structure):
    _fields_ = [("tensors", Tensor * len(KV))]


class StepSequence(ctypes.Structure):
    _fields_ = [("sequence", c_int64), ("num_new", c_int32), ("reserved", c_int32)]


class StepInputs(Struct):
    _fields_ = [("struct_size", c_size_t), ("tensors", Tensor * 8)]  # INPUTS[:8]


class StepOutputs(Struct):
    _fields_ = [("struct_size", c_size_t), ("tensors", Tensor * 1), ("block_indices", c_void_p)]


class KVCacheStats(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("sequences", c_int64),
        ("pages", c_int64),
        ("pages_used", c_int64),
        ("summary_pages", c_int64),
        ("summary_pages_used", c_int64),
        ("steps", c_int64),
        ("tokens_appended", c_int64),
        ("bytes_fetched", c_int64),
    ]


_P, _HANDLE = c_void_p, POINTER(c_void_p)
_INT32, _INT64, _TEXT = POINTER(c_int32), POINTER(c_int64), POINTER(c_char_p)

# Those that return nsa_status. Structs are given by byref().
_FUNCTIONS = {
    "nsa_group_create": (_P, _HANDLE),
    "nsa_rendezvous_address": (c_char_p, _TEXT),
    "nsa_group_rank": (_P, _INT32, _INT32),
    "nsa_group_barrier": (_P,),
    "nsa_group_health": (_P,),
    "nsa_group_abort": (_P, c_char_p),
    "nsa_config_from_text": (c_char_p, _P),
    "nsa_config_validate": (_P,),
    "nsa_plan_create": (_P, _HANDLE),
    "nsa_plan_size": (_P, _INT64, _INT32, _INT32),
    "nsa_plan_tokens_of_rank": (_P, c_int32, _INT64),
    "nsa_plan_positions": (_P, c_int32, _P, _P, _P),
    "nsa_plan_text": (_P, _TEXT),
    "nsa_engine_create": (_P, _P, _P, _P, _HANDLE),
    "nsa_engine_saved_bytes": (_P, _P, _INT64),
    "nsa_saved_forward_create": (_P, _P, _HANDLE),
    "nsa_saved_forward_num_bytes": (_P, _INT64),
    "nsa_engine_forward": (_P, _P, _P, _P, _P),
    "nsa_engine_backward": (_P, _P, _P, _P, _P, _P),
    "nsa_engine_stats": (_P, _TEXT),
    "nsa_engine_gather_stats": (_P, _TEXT),
    "nsa_kv_cache_create": (_P, _P, _P, _HANDLE),
    "nsa_kv_cache_is_reachable": (_P, _INT32),
    "nsa_kv_cache_open": (_P, _INT64),
    "nsa_kv_cache_num_tokens": (_P, c_int64, _INT64),
    "nsa_kv_cache_append": (_P, c_int64, _P, _P),
    "nsa_kv_cache_append_forward": (_P, c_int32, c_int64, _P, _P, c_int32, _P),
    "nsa_kv_cache_truncate": (_P, c_int64, c_int64),
    "nsa_kv_cache_fork": (_P, c_int64, _INT64),
    "nsa_kv_cache_close": (_P, c_int64),
    "nsa_kv_cache_step": (_P, _P, c_int32, _P, _P, _P),
    "nsa_kv_cache_plan_step": (_P, _P, c_int32, _P),
    "nsa_kv_cache_run_step": (_P, c_int64, _P, _P, _P),
    "nsa_kv_cache_get_stats": (_P, _P),
}
_DESTROY = ("group", "plan", "engine", "saved_forward", "kv_cache")


def _load():
    path = os.environ.get("NSA_LIBRARY") or pathlib.Path(__file__).with_name("libnsa.so")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(
            f"nsa: cannot load {path} (NSA_LIBRARY names another): {error}"
        ) from error
    for name, arguments in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int32
    for name in _DESTROY:
        function = getattr(library, f"nsa_{name}_destroy")
        function.argtypes, function.restype = (c_void_p,), None
    for name in ("nsa_last_error", "nsa_version"):
        getattr(library, name).restype = c_char_p
    return library


lib = _load()


def check(status: int) -> None:
    """Raises what `status`, returned by this thread's last call, stands for."""
    if status:
        raise _ERRORS.get(status, NsaError)(lib.nsa_last_error().decode(errors="replace"))


def text(function, *arguments) -> str:
    """Of a function that gives a text."""
    result = c_char_p()
    check(function(*arguments, ctypes.byref(result)))
    return result.value.decode()


def create(kind: str, *arguments) -> c_void_p:
    """A handle of nsa_<kind>_create(), whose object goes with it."""
    handle = c_void_p()
    check(getattr(lib, f"nsa_{kind}_create")(*arguments, ctypes.byref(handle)))
    weakref.finalize(handle, _destroy, kind, handle.value, os.getpid())
    return handle


def _destroy(kind, address, process):
    # A forked process has none of the threads that its objects know, and others' connections.
    if os.getpid() == process:
        getattr(lib, f"nsa_{kind}_destroy")(address)


def version() -> str:
    """Of libnsa.so, such as "0.1.0"."""
    return lib.nsa_version().decode()
