"""Differentiable attention for torch."""

import functools
from collections.abc import Mapping, Sequence

import torch
from torch.autograd import forward_ad

from nsa import _library
from nsa._library import FailedPreconditionError
from nsa.engine import Engine, engine_of_number, flatten

_TENSORS = "Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor? k_slc, Tensor? v_slc, " + (
    "Tensor? k_win, Tensor? v_win, Tensor gate, "
    + ", ".join(f"Tensor? {name.replace('.', '_')}=None" for name in _library.INPUTS[8:])
)
_ops = torch.library.Library("nsa", "DEF")
# "traced" is for graphs, which may learn only as they run which engine they use. In eager code it
# would cost several microseconds a call.
for _overload, _int in (("", "int"), (".traced", "SymInt")):
    _ops.define(
        f"forward{_overload}({_TENSORS}, *, {_int} engine, {_int} saved_bytes) "
        "-> (Tensor o, Tensor saved)"
    )
    _ops.define(
        f"backward{_overload}(Tensor d_o, Tensor saved, {_TENSORS}, *, {_int} engine, "
        "bool[] wanted, bool sum_over_ranks) -> Tensor[]"
    )


def _empty_o(tensors):
    q, v = tensors[0], tensors[2]
    return q.new_empty((*q.shape[:2], v.shape[-1]))


def _fake_forward(*tensors, engine, saved_bytes):
    """o, and room for what the forward leaves for its backward, none for a forward without."""
    return _empty_o(tensors), tensors[0].new_empty(saved_bytes, dtype=torch.uint8)


def _forward(*tensors, engine, saved_bytes):
    o, saved = outputs = _fake_forward(*tensors, engine=engine, saved_bytes=saved_bytes)
    engine = engine_of_number(engine)
    engine.run_forward(tensors, o, engine.saved_in(saved) if saved_bytes else None)
    return outputs


def _empty_gradients(tensors, wanted):
    """Dense; None where not wanted. The compressors' are in f32, whatever the parameters are."""
    return [
        torch.empty_like(
            tensor,
            dtype=torch.float32 if i > 7 else None,
            memory_format=torch.contiguous_format,
        )
        if is_wanted
        else None
        for i, (tensor, is_wanted) in enumerate(zip(tensors, wanted))
    ]


def _readable(d_o):
    """`d_o`, or a copy where the library does not read it in place, such as the gradient of a sum,
    or on a GPU that of a part of a concatenation, whose rows begin anywhere."""
    if d_o.stride(-1) != 1:
        return d_o.contiguous()
    begins = (d_o.storage_offset(), *d_o.stride()[:2])
    if d_o.is_cuda and any(begin * d_o.element_size() % 16 for begin in begins):
        return d_o.clone(memory_format=torch.contiguous_format)
    return d_o


def _gradients(d_o, saved, *tensors, engine, wanted, sum_over_ranks):
    engine = engine_of_number(engine)
    saved = engine.saved_in(saved, is_filled=True)
    gradients = _empty_gradients(tensors, wanted)
    engine.run_backward(tensors, _readable(d_o), saved, gradients, sum_over_ranks=sum_over_ranks)
    return gradients


def _backward(*tensors, **settings):
    return [gradient for gradient in _gradients(*tensors, **settings) if gradient is not None]


def _fake_backward(d_o, saved, *tensors, engine, wanted, sum_over_ranks):
    return [gradient for gradient in _empty_gradients(tensors, wanted) if gradient is not None]


for _overload in ("", ".traced"):
    for _device in ("CPU", "CUDA"):
        _ops.impl(f"forward{_overload}", _forward, _device)
        _ops.impl(f"backward{_overload}", _backward, _device)
    torch.library.register_fake(f"nsa::forward{_overload}", _fake_forward, lib=_ops)
    torch.library.register_fake(f"nsa::backward{_overload}", _fake_backward, lib=_ops)


def _overload_of(operation):
    return operation.traced if torch.compiler.is_compiling() else operation.default


_PLAIN = {type(None), torch.Tensor, torch.nn.Parameter}
_functorch = torch._C._functorch
_num_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_has_transforms = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def _is_plain(tensors):
    """Whether torch would do nothing with an operation but call its function: nothing traces, no
    mode or transform is active, and no tensor is of another class. To call the function itself then
    takes half of the time."""
    return (
        not torch.compiler.is_compiling()
        and _num_modes() == 0
        and not _has_transforms()
        and _PLAIN.issuperset(map(type, tensors))
    )


# The place of each of this rank's `count` tokens in its document, [T] int64. An operation, so that
# traced code can make it of the engine's number.
_ops.define("positions(SymInt engine, SymInt count, Device device) -> Tensor")


@functools.lru_cache(maxsize=16)
def _positions_of(plan, rank, device):
    return torch.tensor(plan.positions_in_document(rank), device=device)


def _positions(engine, count, device):
    engine = engine_of_number(engine)
    return _positions_of(engine.plan, engine.rank, engine.device).clone()


_ops.impl("positions", _positions, "CompositeExplicitAutograd")


@torch.library.register_fake("nsa::positions", lib=_ops)
def _fake_positions(engine, count, device):
    return torch.empty(count, dtype=torch.int64, device=device)


# An argument of nsa::forward, so that graphs that torch keeps from one process to the next are for
# engines that save as much. Given a text, which torch.compile makes a constant of.
@torch.compiler.assume_constant_result
def _saved_bytes(engine: str) -> int:
    count = engine_of_number(int(engine)).saved_bytes
    if count == 0:
        raise FailedPreconditionError("attention: its engine was made with backward=False")
    return count


# The same of an engine that is known only when the graph runs. `like`: any tensor, as torch 2.11's
# inductor needs one to know the device by.
_ops.define("saved_bytes(Tensor like, SymInt engine) -> SymInt")
_ops.impl("saved_bytes", lambda _, engine: _saved_bytes(str(engine)), "CompositeExplicitAutograd")


@torch.library.register_fake("nsa::saved_bytes", lib=_ops)
def _fake_saved_bytes(like, engine):
    return torch.library.get_ctx().new_dynamic_size()


def _run_backward(ctx, d_o):
    saved, *tensors = ctx.saved_tensors
    wanted = ctx.needs_input_grad[3:]
    arguments = (d_o, saved, *tensors)
    settings = dict(engine=ctx.engine, wanted=wanted, sum_over_ranks=ctx.sum_over_ranks)
    if _is_plain(arguments):
        return (None, None, None, *_gradients(*arguments, **settings))
    given = iter(_overload_of(torch.ops.nsa.backward)(*arguments, **settings))
    return (None, None, None, *(next(given) if is_wanted else None for is_wanted in wanted))


class _Attention(torch.autograd.Function):
    # Not registered with nsa::forward, which would take ten times as long (DESIGN.md).

    @staticmethod
    def forward(ctx, engine, saved_bytes, sum_over_ranks, *tensors):
        run = _forward if _is_plain(tensors) else _overload_of(torch.ops.nsa.forward)
        o, saved = run(*tensors, engine=engine, saved_bytes=saved_bytes)
        ctx.engine, ctx.sum_over_ranks = engine, sum_over_ranks
        # Its group may let it go before the backward.
        ctx.kept = None if torch.compiler.is_compiling() else engine_of_number(engine)
        ctx.save_for_backward(saved, *tensors)
        return o

    @staticmethod
    def backward(ctx, d_o):
        # The decorator takes long, and does nothing where nobody can ask for second derivatives.
        if torch.is_grad_enabled():
            return torch.autograd.function.once_differentiable(_run_backward)(ctx, d_o)
        return _run_backward(ctx, d_o)


def attention(
    engine: Engine,
    q: torch.Tensor,
    k: torch.Tensor | Sequence[torch.Tensor],
    v: torch.Tensor | Sequence[torch.Tensor],
    gate: torch.Tensor,
    *,
    compress_k: Mapping[str, torch.Tensor] | None = None,
    compress_v: Mapping[str, torch.Tensor] | None = None,
    sum_over_ranks: bool = False,
) -> torch.Tensor:
    """Native Sparse Attention of this rank's tokens over the whole sequence. Collective, and so is
    its backward. Differentiable in all tensors (block selection held fixed); torch.compile traces
    through it; any number of forwards may wait for their backwards.

    Args:
        engine: made with backward=True if anything requires a gradient.
        q: [T,Hq,Dk] in the engine's dtype, as k and v.
        k: [T,Hkv,Dk], or three of them, for the branches (cmp, slc, win).
        v: [T,Hkv,Dv], or three of them.
        gate: [T,Hq,3] f32 or the engine's dtype, after its sigmoid, order (cmp, slc, win).
        compress_k, compress_v: parameters of the compressor by name, as in Engine.forward.
        sum_over_ranks: the gradients of the compressors' parameters are of all ranks' tokens. Else
            they are of this rank's blocks alone, and whoever sums gradients over data-parallel
            ranks has to sum over these ranks too, as for any other parameter that is applied to a
            shard of the tokens.

    Returns:
        o [T,Hq,Dv].
    """
    try:
        tensors = flatten(q, k, v, gate, compress_k, compress_v)
    except Exception:
        engine.fail_forward()
        raise
    return attention_of_number(engine.number, tensors, sum_over_ranks)


def attention_of_number(engine: int, tensors, sum_over_ranks: bool) -> torch.Tensor:
    """attention() of what flatten() gives."""
    if torch.is_grad_enabled() and _require_grad(tensors):
        if _is_symbol(engine):
            saved_bytes = torch.ops.nsa.saved_bytes(tensors[0], engine)
        else:
            saved_bytes = _saved_bytes(f"{int(engine)}")
        return _Attention.apply(engine, saved_bytes, sum_over_ranks, *tensors)
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        # Which refuses tangents, that else would be lost.
        return _Attention.apply(engine, 0, sum_over_ranks, *tensors)
    if _is_plain(tensors):
        o = _empty_o(tensors)
        engine_of_number(engine).run_forward(tensors, o)
        return o
    return _overload_of(torch.ops.nsa.forward)(*tensors, engine=engine, saved_bytes=0)[0]


def _require_grad(tensors) -> bool:
    if any(t is not None and t.requires_grad for t in tensors):
        return True
    if torch.compiler.is_compiling() or not _has_transforms():
        return False
    # The tensors that vmap makes do not say so of those that they hold.
    held = [t for t in tensors if t is not None and _functorch.is_functorch_wrapped_tensor(t)]
    return bool(held) and _require_grad(list(map(_functorch.get_unwrapped, held)))


def _is_symbol(number) -> bool:
    """Whether it is traced, and differs from run to run of a graph."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(number)
