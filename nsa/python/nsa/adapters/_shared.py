"""What the adapters share."""

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils.weak import WeakTensorKeyDictionary

from nsa.config import Config
from nsa.group import Group
from nsa.module import CoreAttention, batch_and_tokens, source_of_number
from nsa.plan import Plan


@functools.cache
def group_of(process_group) -> Group:
    """Of a torch ProcessGroup: one for all layers, so that they share engines. The first call
    makes it, which is collective."""
    return Group.from_process_group(process_group)


def check_heads(config: Config, num_q_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """ValueError unless config has what the stack's attention has."""
    for name, theirs in {
        "num_q_heads": num_q_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim_qk": head_dim,
        "head_dim_v": head_dim,
    }.items():
        if theirs != getattr(config, name):
            raise ValueError(f"nsa.Config.{name} = {getattr(config, name)}: the model has {theirs}")


def check_scale(config: Config, scale: float | None) -> None:
    """ValueError unless the stack's softmax scale (None: 1/sqrt(Dk)) is config's."""
    default = config.head_dim_qk**-0.5
    scale, ours = (default if of is None else of for of in (scale, config.softmax_scale))
    if abs(scale - ours) > 1e-6 * ours:
        raise ValueError(f"softmax scale = {scale}: nsa.Config.softmax_scale is {ours}")


def _once_per_tensor(function):
    """`function` of a tensor and hashable arguments, which is called again for the same tensor only
    when that has changed: reading a GPU's tensor waits for the GPU, and all layers are given the
    same one. Tensors of inference mode, which do not count their changes, are read each time."""
    kept = WeakTensorKeyDictionary()

    @functools.wraps(function)
    def wrapper(tensor, *arguments):
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError("documents: cannot be read where a CUDA graph is captured")
        if tensor.is_inference():
            return function(tensor, *arguments)
        key = (tensor._version, *arguments)
        last_key, value = kept.get(tensor, (None, None))
        if last_key != key:
            value = function(tensor, *arguments)
            kept[tensor] = key, value
        return value

    return wrapper


@_once_per_tensor
def _plan_of_ends(cu_seqlens, num_ranks):
    cu_seqlens = cu_seqlens.cpu()
    if num_ranks > 1 and (cu_seqlens.diff() % (2 * num_ranks)).any():
        raise ValueError(
            f"cu_seqlens: with {num_ranks} context-parallel ranks every document's (padded) length "
            f"must be a multiple of {2 * num_ranks}"
        )
    return Plan(num_ranks=num_ranks, sharding="zigzag_per_document", cu_seqlens=cu_seqlens)


def plan_of_ends(cu_seqlens_q, cu_seqlens_k=None, num_ranks: int = 1) -> Plan:
    """Of packed documents, each of which is dealt to all ranks in zig-zag."""
    plan = _plan_of_ends(cu_seqlens_q, num_ranks)
    if cu_seqlens_k is not None and _plan_of_ends(cu_seqlens_k, num_ranks) != plan:
        raise ValueError("cu_seqlens of queries and keys: must be equal")
    return plan


@_once_per_tensor
def plan_of_positions(positions: torch.Tensor, batch: int, process_group, sharding: str) -> Plan:
    """Of `batch` sequences by the positions [batch,T], or [1,T] if they are alike, of this rank's
    tokens. A document begins with each sequence and where a position is not one more than the one
    before. Collective over `process_group` (None: this rank alone), whose ranks were dealt each
    sequence by `sharding`, "zigzag" or "contiguous"; there documents count from 0."""
    positions = positions.expand(batch, -1)
    tokens = positions.shape[1]
    size = 1 if process_group is None else dist.get_world_size(process_group)
    if size > 1:
        whole = Plan(size * tokens, size, sharding=sharding)
        positions = whole.gather(positions.contiguous(), process_group, dim=1)
    positions = positions.cpu()
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    if size > 1 and positions[begins].any():
        raise ValueError(
            f"positions: the ranks' positions, put together as sharding = {sharding!r} deals them, "
            "are not those of documents that count from 0"
        )
    if size > 1 and batch > 1:
        if sharding != "zigzag" or begins[:, 1:].any():
            raise ValueError(
                f"batch of {batch}: must be 1 with context parallelism, unless each sequence is "
                "one document and dealt in zig-zag"
            )
        sharding = "zigzag_per_document"
    ends = begins.flatten().nonzero().flatten().tolist()
    return Plan(num_ranks=size, sharding=sharding, cu_seqlens=[*ends, begins.numel()])


class Documents(NamedTuple):
    """In place of a plan: tensors that say what the documents are. In traced code an operation reads
    them, so that torch.compile compiles nothing anew for other documents."""

    tensors: list[torch.Tensor]  # positions, or cu_seqlens of q and perhaps of k, as above
    group_name: str = ""  # of the process group of plan_of_positions()


class Core(CoreAttention):
    """A CoreAttention that may be given Documents as its plan."""

    positions_sharding = "zigzag"  # as plan_of_positions() is told

    def engine_number(self, q, plan=None) -> int:
        if not isinstance(plan, Documents):
            return super().engine_number(q, plan)
        compiles = torch.compiler.is_compiling()
        engine_of = torch.ops.nsa.engine_of_documents if compiles else _engine_of_documents
        return engine_of(
            q,
            plan.tensors,
            source=self.source.number,
            sharding=self.positions_sharding,
            group_name=plan.group_name,
        )


_ops = torch.library.Library("nsa", "FRAGMENT")
_ops.define(
    "engine_of_documents(Tensor q, Tensor[] documents, *, int source, str sharding, "
    "str group_name) -> SymInt"
)


@torch.compiler.disable
def _engine_of_documents(q, documents, *, source, sharding, group_name):
    source = source_of_number(source)
    batch, tokens = batch_and_tokens(q)
    if documents[0].dim() == 1:
        plan = plan_of_ends(*documents, num_ranks=source.group.size if source.group else 1)
    else:
        process_group = _resolve_process_group(group_name) if group_name else None
        plan = plan_of_positions(documents[0], batch, process_group, sharding)
        if process_group is not None:
            source = source.of_group(group_of(process_group))
    return source.engine(q.dtype, q.device, batch, tokens, plan).number


_ops.impl("engine_of_documents", _engine_of_documents, "CompositeExplicitAutograd")


@torch.library.register_fake("nsa::engine_of_documents", lib=_ops)
def _fake_engine_of_documents(q, documents, *, source, sharding, group_name):
    return torch.library.get_ctx().new_dynamic_size()
